"""Lane: so many calls run, so many wait, and one more is refused at once; all come back."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from skeyd import limits
from skeyd.errors import Reason, SkeydError
from skeyd.rpc.lanes import Lane, crowding, require_admitted
from tests.rpc.stubs import SECONDS

THREADS, WAITING = 2, 3


@pytest.fixture
def lane() -> Iterator[Lane]:
    """Make one, and let its threads end."""
    with ThreadPoolExecutor(1) as refusals, Lane("kind", THREADS, WAITING, Reason.TOO_MANY_STREAMS, refusals) as lane:
        yield lane


def test_one_more_than_run_and_wait_is_refused_while_they_do(lane: Lane) -> None:
    go_on = threading.Event()

    def call() -> str:
        require_admitted()
        assert go_on.wait(SECONDS)
        return "done"

    try:
        for _ in range(2):
            go_on.clear()
            admitted = [lane.submit(call) for _ in range(THREADS + WAITING)]
            for _ in range(3):
                with pytest.raises(SkeydError, match=f"{THREADS + WAITING} calls of this kind") as refused:
                    lane.submit(call).result(SECONDS)
                assert refused.value.reason is Reason.TOO_MANY_STREAMS
            go_on.set()
            assert [one.result(SECONDS) for one in admitted] == ["done"] * (THREADS + WAITING)
    finally:
        go_on.set()


def test_what_fails_and_what_never_ran_gives_its_place_back(lane: Lane) -> None:
    def fail() -> None:
        require_admitted()
        raise KeyError

    for _ in range(3 * (THREADS + WAITING)):
        with pytest.raises(KeyError):
            lane.submit(fail).result(SECONDS)
    lane.shutdown()
    for _ in range(THREADS + WAITING + 1):
        with pytest.raises(RuntimeError, match="shutdown"):
            lane.submit(fail)


def test_a_refusal_is_of_that_call_only(lane: Lane) -> None:
    go_on = threading.Event()
    admitted = [lane.submit(go_on.wait, SECONDS) for _ in range(THREADS + WAITING)]
    with pytest.raises(SkeydError):
        lane.submit(require_admitted).result(SECONDS)
    with pytest.raises(SkeydError):  # as grpcio does
        lane.submit(contextvars.Context().run, require_admitted).result(SECONDS)
    go_on.set()
    assert all(one.result(SECONDS) for one in admitted)
    lane.submit(require_admitted).result(SECONDS)
    require_admitted()


def test_a_call_can_tell_whether_others_wait_for_its_thread(lane: Lane) -> None:
    go_on, tell = threading.Event(), lane.submit(crowding).result(SECONDS)
    assert not crowding()()  # no lane's
    try:
        running = [lane.submit(go_on.wait, SECONDS) for _ in range(THREADS)]
        assert not tell()
        running.append(lane.submit(go_on.wait, SECONDS))
        assert tell()
    finally:
        go_on.set()
    assert all(one.result(SECONDS) for one in running)
    assert not tell()


def test_all_kinds_together_never_reach_grpcios_own_bound() -> None:
    threads = (
        limits.MAX_KEY_STREAMS + limits.SPARE_THREADS,
        limits.CALL_THREADS,
        limits.CHECK_THREADS,
        limits.MAX_WATCHES + limits.SPARE_THREADS,
    )
    assert sum(threads) + len(threads) * limits.MAX_WAITING < limits.MAX_CALLS // 2
