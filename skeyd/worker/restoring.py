"""A slice's old keys, set again: all of it at once, or in parts where the kernel refuses some frames.

One frame can keep all others of a slice from their keys, so what is refused is halved until each frame that can have
its key has it. A kernel that refuses every frame is asked twice a frame: so it is done step by step, and others are
served meanwhile.
"""

from __future__ import annotations

from typing import Final

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.storage_key import lost_runs
from skeyd.worker.keys import Keys

TRIES: Final = 256
"""How often the kernel is asked to set something in a step, at most."""


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

    def step(self) -> list[GfnRange]:
        """Go on: no more frames are tried than a slice has, and TRIES times at most.

        Return the frames, of those that are done with, that don't have their old keys; ascending, a list of few, since
        those side by side are one range.
        """
        dirty: list[GfnRange] = []
        tried = 0
        for _ in range(TRIES):
            if not self._left or tried >= self.frames.count:
                break
            frames, old = self._left.pop()
            tried += frames.count
            try:
                # Of these frames: another may have lost what the kernel needs to answer.
                if not self._keys.read(frames, memoryview(bytearray(frames.count))):
                    self._left = []  # then not one was set
                    return []
                self._keys.write_checked(frames, old, uses_keys=True)
                continue
            except SkeydError as error:
                if frames.count > 1 and error.reason is not Reason.VM_DEAD:
                    half = frames.count // 2
                    self._left.append((GfnRange(frames.start + half, frames.count - half), old[half:]))
                    self._left.append((GfnRange(frames.start, half), old[:half]))
                    continue
            for one in self._differing(frames, old):
                if dirty and dirty[-1].end == one.start:
                    dirty[-1] = GfnRange(dirty[-1].start, dirty[-1].count + one.count)
                else:
                    dirty.append(one)
        return dirty

    def _differing(self, frames: GfnRange, old: bytes) -> list[GfnRange]:
        found = bytearray(frames.count)
        try:
            if not self._keys.read(frames, memoryview(found)):
                return [frames]
        except SkeydError:
            return [frames]
        # Both ways: the kernel took nothing, so an R or C too many may be that of a new key.
        unequal = lost_runs(old, found) + lost_runs(found, old)
        return [GfnRange(frames.start + index, length) for index, length in unequal]
