"""How many keys one ioctl may be asked for, so that it holds the kernel's lock for no longer than it may."""

from __future__ import annotations

from typing import Final

from skeyd.storage_key import SEGMENT_FRAMES
from skeyd.worker.protocol import SLICE_KEYS

FIRST_KEYS: Final = 16_384
"""The first slice, of which nobody knows how long it takes."""

GROWTH: Final = 4
"""How many times larger than the one before a slice is at most."""


class Pace:
    """The size of the next slice, by how long those before it took.

    Synchronization: one thread.
    """

    def __init__(self, limit_seconds: float) -> None:
        self._limit = limit_seconds * 1e9
        self.keys = FIRST_KEYS
        """Most keys for the next slice: a multiple of a segment's, up to SLICE_KEYS."""
        self.measured = False
        """Whether it goes by anything."""

    def took(self, keys: int, nanoseconds: int) -> None:
        """Take note of how long a slice of so many keys took."""
        self.measured = True
        late = nanoseconds > self._limit
        if not late and 2 * keys < self.keys:
            return  # what a call costs by itself would be taken for the cost of its few keys
        fitting = int(keys * self._limit / max(1, nanoseconds))
        if late:
            # Slices that were asked for before the last change tell nothing new.
            fitting = min(fitting, self.keys)
        most = min(fitting, GROWTH * self.keys, SLICE_KEYS)
        self.keys = max(SEGMENT_FRAMES, most // SEGMENT_FRAMES * SEGMENT_FRAMES)
