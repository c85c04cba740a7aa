"""One capture at a time, and what it read, which is its owner's until that hangs up.

What is captured is frozen keys, of one moment, or all keys as a VMM has printed them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from skeyd.errors import Reason, SkeydError, exhausted
from skeyd.gfn import Ranges
from skeyd.worker.backend import Backend, Capture, KeptKeys, Printing
from skeyd.worker.own_capture import FrozenKeys
from skeyd.worker.packets import ProtocolError
from skeyd.worker.protocol import FROZEN_KEYS
from skeyd.worker.worker_log import log_traceback

MAX_PRINTINGS: Final = 4
"""Owners that have one kept at once; each costs a byte a key of the guest at worst."""

_Owner = TypeVar("_Owner")


@dataclass(slots=True)
class _Running(Generic[_Owner]):
    # A capture; `owner` is None where nobody waits for it any more.
    owner: _Owner | None
    capture: Capture
    keys: KeptKeys
    into: memoryview | None = None
    """Where the capture writes them, if it doesn't make them itself."""


class Captures(Generic[_Owner]):
    """The captures of one VM, by their owners, which are connections.

    All frozen keys that are kept for them together are bounded by FROZEN_KEYS. Synchronization: none; one thread owns
    it.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._running: _Running[_Owner] | None = None
        self._kept: dict[_Owner, KeptKeys] = {}

    def is_running(self) -> bool:
        """Whether `step` has something to do, now or when the descriptor is readable."""
        return self._running is not None

    def fileno(self) -> int | None:
        """Return the descriptor of the capture that runs, while which nobody else may ask the VM; None: anybody may."""
        return None if self._running is None else self._running.capture.fileno()

    def seconds_left(self) -> float | None:
        """Return after how long `step` is to be called though the descriptor isn't readable; None: never."""
        return None if self._running is None else self._running.capture.seconds_left()

    def require_none(self) -> None:
        """VM_BUSY while a capture runs: nobody may set a key, or begin another."""
        if self._running is not None:
            raise SkeydError(Reason.VM_BUSY, "all keys of this VM are being read for another call")

    def runs_for(self, owner: _Owner) -> bool:
        """Whether the capture that runs is this owner's, who waits for its end and may say nothing."""
        return self._running is not None and self._running.owner is owner

    def keys_of(self, owner: _Owner) -> KeptKeys | None:
        """Return what was captured for an owner."""
        return self._kept.get(owner)

    def begin(self, owner: _Owner, frames: Ranges, seconds: float, slice_seconds: float) -> None:
        """Begin to capture the keys of frames in memory slots; `step` tells of the end.

        SkeydError VM_BUSY; REQUEST_INVALID: they are too many. OUT_OF_MEMORY, HOST_EXHAUSTED. ProtocolError the
        second time.
        """
        self.require_none()
        if owner in self._kept:
            raise ProtocolError("frozen twice")
        count = frames.frames()
        if count > FROZEN_KEYS:
            raise SkeydError(
                Reason.REQUEST_INVALID,
                f"{count} keys are more than those of a moment may be, {FROZEN_KEYS}; ask for ranges in several calls",
            )
        if sum(keys.room for keys in self._kept.values()) + count > FROZEN_KEYS:
            raise SkeydError(
                Reason.VM_BUSY, "what was read of this VM at other moments takes its room until it has been sent"
            )
        try:
            keys = FrozenKeys(frames)
            into = memoryview(keys.memory)
            try:
                capture = self._backend.capture(tuple(frames), into, seconds, slice_seconds)
            except BaseException:
                into.release()
                keys.close()
                raise
        except OSError as error:
            raise exhausted(error) or SkeydError(Reason.HOST_EXHAUSTED, f"{error.strerror}") from error
        self._running = _Running(owner, capture, keys, into)

    def begin_printing(self, owner: _Owner, print_keys: Callable[[], Printing]) -> None:
        """Begin to capture all keys; what the owner had is forgotten. TOO_MANY_CALLS_ON_VM, VM_BUSY; QMP's."""
        self.require_none()
        self.abandon(owner)
        if len(self._kept) >= MAX_PRINTINGS:
            raise SkeydError(
                Reason.TOO_MANY_CALLS_ON_VM,
                f"{MAX_PRINTINGS} streams read this VM already, each a printing of its own",
            )
        try:
            printing = print_keys()
        except OSError as error:
            raise exhausted(error) or SkeydError(Reason.HOST_EXHAUSTED, f"{error.strerror}") from error
        self._running = _Running(owner, printing, printing.keys)

    def step(self) -> tuple[_Owner, int | SkeydError] | None:
        """Go on with the capture. At its end the owner, and for how many nanoseconds its VMM stood still or the error.

        None: it isn't at its end, or nobody waits for that.
        """
        running = self._running
        if running is None:
            return None
        told: int | SkeydError
        try:
            held = running.capture.step()
            if held is None:
                return None
            told = held
        except SkeydError as error:
            told = error
        except Exception as error:
            log_traceback()
            told = SkeydError(Reason.WORKER_FAILED, f"the worker failed: {type(error).__name__}")
        self._end(running, keep=isinstance(told, int))
        return None if running.owner is None else (running.owner, told)

    def abandon(self, owner: _Owner) -> None:
        """End an owner's capture, and forget what was read for it."""
        keys = self._kept.pop(owner, None)
        if keys is not None:
            keys.close()
        running = self._running
        if running is not None and running.owner is owner:
            running.owner = None
            running.capture.cancel()
            if running.capture.fileno() is None:
                self._end(running, keep=False)

    def close(self) -> None:
        """End what runs, and wait for its end. Who owns it is told nothing."""
        running = self._running
        if running is not None:
            running.capture.close()
            self._end(running, keep=False)

    def _end(self, running: _Running[_Owner], keep: bool) -> None:
        self._running = None
        if running.into is not None:
            running.into.release()
        if keep and running.owner is not None:
            self._kept[running.owner] = running.keys
        else:
            running.keys.close()
