"""Patience: whoever waits for too long is given up, and sooner where that is urgent; nobody else is."""

from __future__ import annotations

import threading
from typing import Final

from skeyd.rpc.patience import Patience
from tests.rpc.stubs import SECONDS

LONG: Final = 3600.0
SHORT: Final = 0.01


def test_a_wait_that_takes_too_long_is_given_up_once() -> None:
    patience, given_up = Patience(), threading.Semaphore(0)
    with patience.limit(LONG, lambda: None), patience.limit(SHORT, given_up.release):
        assert given_up.acquire(timeout=SECONDS)
        with patience.limit(SHORT, given_up.release):
            assert given_up.acquire(timeout=SECONDS)
        assert not given_up.acquire(blocking=False)


def test_what_is_urgent_is_given_up_sooner_and_what_is_not_is_asked_again() -> None:
    patience, given_up = Patience(), threading.Event()
    answers = [True, False, False]
    asked = threading.Semaphore(0)

    def is_urgent() -> bool:
        asked.release()
        return answers.pop()

    with patience.limit(LONG, given_up.set, SHORT, is_urgent):
        assert given_up.wait(SECONDS)
    assert [asked.acquire(blocking=False) for _ in range(4)] == [True, True, True, False]


def test_nobody_is_given_up_whose_body_has_ended() -> None:
    patience, ended, others = Patience(), threading.Event(), threading.Event()
    with patience.limit(LONG, ended.set, SHORT, lambda: True):
        pass
    for _ in range(3):
        others.clear()
        with patience.limit(SHORT, others.set):
            assert others.wait(SECONDS)
    assert not ended.is_set()


def test_a_wait_that_ends_while_it_is_asked_about_is_not_given_up() -> None:
    patience, given_up, others = Patience(), threading.Event(), threading.Event()
    asked, ended = threading.Event(), threading.Event()

    def is_urgent() -> bool:
        asked.set()
        assert ended.wait(SECONDS)
        return True

    with patience.limit(LONG, given_up.set, SHORT, is_urgent):
        assert asked.wait(SECONDS)
    ended.set()
    with patience.limit(SHORT, others.set):
        assert others.wait(SECONDS)
    assert not given_up.is_set()
