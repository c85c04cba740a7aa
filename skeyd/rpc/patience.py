"""A limit on how long a call may keep its thread waiting for its client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

_FOREVER: Final = float("inf")
_LATE: Final = 0.1
"""Seconds that a look may be late."""


@dataclass
class _Wait:
    deadline: float
    every: float
    give_up: Callable[[], object]
    is_urgent: Callable[[], bool]
    look: float


class Patience:
    """Calls a function for each wait that goes on for too long. One thread serves all waits, and starts with the first.

    Synchronization: any thread.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waits: dict[object, _Wait] = {}
        self._looks_at = _FOREVER
        self._thread: threading.Thread | None = None

    @contextmanager
    def limit(
        self,
        seconds: float,
        give_up: Callable[[], object],
        sooner: float = _FOREVER,
        is_urgent: Callable[[], bool] = bool,
    ) -> Iterator[None]:
        """Call `give_up`, from another thread and once, if the body takes longer.

        After `sooner` seconds already if `is_urgent` says so, then or later, from that thread, too.
        """
        key, now = object(), time.monotonic()
        every = min(sooner, seconds)
        wait = _Wait(now + seconds, every, give_up, is_urgent, now + every)
        with self._changed:
            self._waits[key] = wait
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="patience", daemon=True)
                self._thread.start()
            elif wait.look < self._looks_at:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._waits.pop(key, None)

    def _watch(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                due = [(key, wait) for key, wait in self._waits.items() if wait.look <= now]
                # Whoever looks late had no CPU, and so had those who are waited for: they get their time anew.
                late_looks = {key for key, wait in due if now - wait.look > _LATE and now < wait.deadline}
                if not due:
                    self._looks_at = min((wait.look for wait in self._waits.values()), default=_FOREVER)
                    self._changed.wait(None if self._looks_at == _FOREVER else self._looks_at - now)
                    continue
            # Without the lock: what is asked has locks of its own.
            late = [key for key, wait in due if wait.deadline <= now or (key not in late_looks and wait.is_urgent())]
            with self._changed:
                given_up = [wait for key in late if (wait := self._waits.pop(key, None))]
                for _, wait in due:
                    wait.look = min(now + wait.every, wait.deadline)
            for wait in given_up:
                wait.give_up()
