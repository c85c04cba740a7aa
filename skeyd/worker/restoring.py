"""A slice's old keys, set again: all of it at once, or in parts where the kernel refuses some frames.

One frame can keep all others of a slice from their keys, so what is refused is halved until each frame that can have
its key has it. A kernel that refuses every frame is asked twice a frame: so it is done step by step, and others are
served meanwhile. What is refused for a reason that is no frame's stays to be tried again: the old keys are here, and
nowhere else.
"""

from __future__ import annotations

import time
from typing import Final

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.storage_key import differing_runs
from skeyd.worker.keys import Keys

TRIES: Final = 256
"""How often the kernel is asked to set something in a step, at most."""
STEP_SECONDS: Final = 0.05
"""For so long a step goes on to ask: who else asks the worker waits for it."""

_OF_A_FRAME: Final = frozenset((Reason.GFN_NOT_MAPPED, Reason.KERNEL_REFUSED, Reason.KEYS_NOT_STORED))
_OF_THE_SIZE: Final = frozenset((Reason.OUT_OF_MEMORY,))
"""A smaller part may do; where it is one frame already, later may."""


class Restoring:
    """The old keys of some frames, on their way back. Synchronization: none; one thread owns it and the Keys."""

    def __init__(self, keys: Keys, frames: GfnRange, old: bytes) -> None:
        self.frames = frames
        self._keys = keys
        self._left = [(frames, old)]

    @property
    def is_done(self) -> bool:
        """Whether `step` has nothing more to do."""
        return not self._left

    def left(self) -> int:
        """Return how many frames it isn't done with."""
        return sum(frames.count for frames, _ in self._left)

    def step(self, dirty: list[GfnRange]) -> None:
        """Go on: no more frames are tried than a slice has, TRIES times at most, and for STEP_SECONDS.

        Adds to `dirty` the frames, of those that are done with, that don't have their old keys; ascending, few, since
        those side by side are one range. What it raises is no frame's fault (SkeydErrors of the VM's process, OSError,
        MemoryError), and all that isn't done with is there to be tried again.
        """
        tried = 0
        end = time.monotonic() + STEP_SECONDS
        for _ in range(TRIES):
            if not self._left or tried >= self.frames.count or (tried and time.monotonic() >= end):
                break
            frames, old = self._left[-1]
            tried += frames.count
            try:
                # Of these frames: another may have lost what the kernel needs to answer.
                if not self._keys.read(frames, memoryview(bytearray(frames.count))):
                    self._left = []  # then not one was set
                    return
                self._keys.write_checked(frames, old, uses_keys=True, exact=True)
            except SkeydError as error:
                if error.reason is Reason.VM_DEAD or (error.reason in _OF_A_FRAME and frames.count == 1):
                    self._give_up(dirty)
                elif frames.count > 1 and error.reason in _OF_A_FRAME | _OF_THE_SIZE:
                    half = frames.count // 2
                    halves = [(GfnRange(frames.start + half, frames.count - half), old[half:])]
                    halves.append((GfnRange(frames.start, half), old[:half]))
                    self._left[-1:] = halves
                else:
                    raise
            else:
                self._left.pop()

    def give_up(self, dirty: list[GfnRange]) -> None:
        """Leave all that isn't done with as it is, and add to `dirty` what of it doesn't have its old keys."""
        while self._left:
            self._give_up(dirty)

    def _give_up(self, dirty: list[GfnRange]) -> None:
        frames, old = self._left[-1]
        for one in self._differing(frames, old):
            if dirty and dirty[-1].end == one.start:
                dirty[-1] = GfnRange(dirty[-1].start, dirty[-1].count + one.count)
            else:
                dirty.append(one)
        self._left.pop()

    def _differing(self, frames: GfnRange, old: bytes) -> list[GfnRange]:
        try:
            found = bytearray(frames.count)
            if not self._keys.read(frames, memoryview(found)):
                return [frames]
        except Exception:
            # A mistake of skeyd's too: what is given up is done with, or it would be given up again for ever.
            return [frames]
        # The kernel took nothing, so an R or C too many may be that of a new key.
        return [GfnRange(frames.start + index, length) for index, length in differing_runs(old, found, 0xFF)]
