"""Keys of one moment: where they are kept until they are sent, and how those are read that only skeyd changes."""

from __future__ import annotations

import mmap
import time
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, Ranges
from skeyd.kvm.errors import KvmError
from skeyd.kvm.slices import FIRST_KEYS, next_keys
from skeyd.worker import refusals
from skeyd.worker.packets import ProtocolError
from skeyd.worker.protocol import SLICE_KEYS


class FrozenKeys:
    """Room for the keys of ranges, in memory that forked processes share. OSError where there is none."""

    def __init__(self, frames: Ranges) -> None:
        self.frames = frames
        self.memory = mmap.mmap(-1, frames.frames())
        self._starts = [one.start for one in frames]
        self._places = [0, *accumulate(one.count for one in frames)]

    @property
    def room(self) -> int:
        """Bytes of memory that they take."""
        return len(self.memory)

    def read(self, wanted: GfnRange, into: memoryview) -> None:
        """Fill `into` with the keys of frames that lie in one of the ranges. ProtocolError."""
        index = bisect_right(self._starts, wanted.start) - 1
        if index < 0 or wanted.end > self.frames[index].end:
            raise ProtocolError(f"the keys of {wanted} were not asked for when the VM was frozen")
        at = self._places[index] + wanted.start - self._starts[index]
        with memoryview(self.memory) as whole:
            into[:] = whole[at : at + wanted.count]

    def close(self) -> None:
        """Give the memory back."""
        self.memory.close()


class _Readable(Protocol):
    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """As the ioctl."""


class OwnCapture:
    """A Capture of a VM whose keys nobody but this process changes: it is enough that nobody is let.

    Nothing is held: no thread runs a guest here, and requests that set keys are refused meanwhile. Each step is one
    ioctl, so that others who read wait for no more than that.
    """

    def __init__(
        self, vm: _Readable, frames: Sequence[GfnRange], into: memoryview, seconds: float, slice_seconds: float
    ) -> None:
        self._vm = vm
        self._todo = list(reversed(frames))
        self._into = into
        self._seconds = seconds
        self._end = time.monotonic() + seconds
        self._slice_seconds = slice_seconds
        self._done = 0
        self._keys = FIRST_KEYS

    def fileno(self) -> int | None:
        """Return nothing: each step reads."""
        return None

    def seconds_left(self) -> None:
        """Return nothing, likewise."""

    def step(self) -> int | None:
        """Read a slice."""
        began = time.monotonic()
        if began >= self._end:
            raise expired(self._seconds, "not all keys were read by then")
        frames = self._todo.pop()
        count = min(self._keys, frames.count, SLICE_KEYS)
        part = GfnRange(frames.start, count)
        with self._into[self._done : self._done + count] as view:
            try:
                if not self._vm.get_skeys(part.start, view):
                    raise keyless(part)
            except KvmError as error:
                raise refusals.of_key_call(error, part) from error
        self._keys = next_keys(count, time.monotonic() - began, self._slice_seconds)
        self._done += count
        if count < frames.count:
            self._todo.append(GfnRange(part.end, frames.count - count))
        return None if self._todo else 0

    def cancel(self) -> None:
        """Read no more."""
        self._todo.clear()

    def close(self) -> None:
        """Do nothing: it reads in `step` only."""


def expired(seconds: float, what: str) -> SkeydError:
    """Say that a budget has passed."""
    budget = f"{seconds:g}"
    return SkeydError(
        Reason.FREEZE_EXPIRED,
        f"the freeze_budget of {budget} s has passed: {what}; nothing is held any more",
        {"freeze_budget": f"{budget}s"},
    )


def keyless(frames: GfnRange) -> SkeydError:
    """Say what no kernel says."""
    return SkeydError(Reason.KERNEL_REFUSED, f"the guest used storage keys, and at {frames} it is said to use none")
