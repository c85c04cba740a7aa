"""Threads for calls of one kind, and a bound on how many of that kind there are: no kind keeps another waiting.

A call counts from when its first bytes come, before it has sent its request; a slot (skeyd.rpc.slots) is taken later,
when it is known which VM it is about. grpcio's own bound is one for calls of all kinds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from skeyd.errors import Reason, SkeydError


class _Refusal(threading.local):
    # The thread's, and no context variable: grpcio runs a call in a context of its own.
    error: SkeydError | None = None


class _Running(threading.local):
    lane: Lane | None = None


_refusal = _Refusal()
_running = _Running()


class Lane(ThreadPoolExecutor):
    """Runs so many calls and lets so many wait. One more runs at once in a thread of `refusals`, to be refused there.

    For grpcio, which submits to it whatever comes; a ThreadPoolExecutor because it takes no other.
    Synchronization: any thread.
    """

    def __init__(self, name: str, threads: int, waiting: int, reason: Reason, refusals: ThreadPoolExecutor) -> None:
        super().__init__(threads, name)
        self._name = name
        self._running_at_once = threads
        self._free = self._most = threads + waiting
        self._reason = reason
        self._refusals = refusals
        self._counting = threading.Lock()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run it when there is a thread, or so that `require_admitted` raises, which it asks first."""
        with self._counting:
            admitted = self._free > 0
            self._free -= admitted
        if not admitted:
            what = f"{self._most} calls of this kind ({self._name}) run or wait, as many as are allowed"
            error = SkeydError(self._reason, f"{what}; try again later")
            return self._refusals.submit(_refused, error, fn, *args, **kwargs)
        try:
            return super().submit(self._counted, fn, *args, **kwargs)
        except BaseException:
            self._leave()
            raise

    def is_crowded(self) -> bool:
        """Tell whether calls wait for a thread."""
        return self._most - self._free > self._running_at_once

    def _counted(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        _running.lane = self
        try:
            return fn(*args, **kwargs)
        finally:
            _running.lane = None
            self._leave()

    def _leave(self) -> None:
        with self._counting:
            self._free += 1


def require_admitted() -> None:
    """SkeydError where the running call is one too many, with the lane's reason."""
    if _refusal.error is not None:
        raise _refusal.error


def crowding() -> Callable[[], bool]:
    """Return what tells, in any thread and at any time, whether other calls wait for the running call's thread."""
    return _running.lane.is_crowded if _running.lane is not None else bool


def _refused(error: SkeydError, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    _refusal.error = error
    try:
        return fn(*args, **kwargs)
    finally:
        _refusal.error = None
