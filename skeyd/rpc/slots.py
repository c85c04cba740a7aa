"""A bound on how many calls of a kind run at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from skeyd.errors import Reason, SkeydError


class CallSlots:
    """So many calls and no more: one more is refused at once, it doesn't wait. Synchronization: any thread."""

    def __init__(self, most: int, what: str) -> None:
        self._free = threading.Semaphore(most)
        self._refusal = f"{most} {what} run, as many as are allowed; try again later"

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Hold a slot. SkeydError TOO_MANY_STREAMS where none is free."""
        if not self._free.acquire(blocking=False):
            raise SkeydError(Reason.TOO_MANY_STREAMS, self._refusal)
        try:
            yield
        finally:
            self._free.release()
