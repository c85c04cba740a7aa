"""A limit on how long a call may keep its thread waiting for its client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

_FOREVER: Final = float("inf")


class Patience:
    """Calls a function for each wait that goes on for too long. One thread serves all waits, and starts with the first.

    Synchronization: any thread.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waits: dict[object, tuple[float, Callable[[], object]]] = {}
        self._looks_at = _FOREVER
        self._thread: threading.Thread | None = None

    @contextmanager
    def limit(self, seconds: float, give_up: Callable[[], object]) -> Iterator[None]:
        """Call `give_up`, from another thread and once, if the body takes longer."""
        wait, deadline = object(), time.monotonic() + seconds
        with self._changed:
            self._waits[wait] = deadline, give_up
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="patience", daemon=True)
                self._thread.start()
            elif deadline < self._looks_at:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._waits.pop(wait, None)

    def _watch(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                late = [wait for wait, (deadline, _) in self._waits.items() if deadline <= now]
                given_up = [self._waits.pop(wait)[1] for wait in late]
                if not given_up:
                    self._looks_at = min((deadline for deadline, _ in self._waits.values()), default=_FOREVER)
                    self._changed.wait(None if self._looks_at == _FOREVER else self._looks_at - now)
            for give_up in given_up:
                give_up()
