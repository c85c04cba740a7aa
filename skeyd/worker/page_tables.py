"""Page tables made before a SET, so that Linux 4.19 to 6.19 lose no keys there (docs/kernel.md, "The lost keys").

Only time is won by it: a lost key costs a SET of its own and a second read-back. What is proven is proven in
skeyd/worker/keys.py, whatever this does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from skeyd.gfn import GfnRange
from skeyd.kvm.memory import GuestMemory
from skeyd.storage_key import FRAME_SIZE, SEGMENT_FRAMES

_NOT_ZERO = re.compile(rb"[^\0]")


@dataclass(frozen=True, slots=True)
class _Slot:
    frames: GfnRange
    memory: GuestMemory
    known: bytearray
    """A byte a segment: 1 where there is a page table for certain. Zeroed memory that nobody wrote to costs nothing."""


class PageTables:
    """The page tables of a VM's memory, as far as this process has made them. They stay as long as the memory does.

    Synchronization: none; one thread owns it.
    """

    def __init__(self, slots: Iterable[tuple[GfnRange, GuestMemory]]) -> None:
        self._slots = [_Slot(frames, memory, bytearray(-(-frames.count // SEGMENT_FRAMES))) for frames, memory in slots]

    def make(self, start_gfn: int, keys: bytes | bytearray) -> None:
        """Touch, in each segment whose keys are all to be set, the frame of the first key that is not 0.

        It is the very frame that the kernel would bring in to lose its key, so no more memory is used than without.
        Segments with zero keys only are left alone, as the kernel leaves them. So are those of which not all keys are
        set: enabling keys gives R and C to every frame of a page table that is there, and only a SET takes them away.
        """
        end = start_gfn + len(keys)
        for slot in self._slots:
            first = -(-max(start_gfn - slot.frames.start, 0) // SEGMENT_FRAMES)
            last = min(end - slot.frames.start, slot.frames.count) // SEGMENT_FRAMES
            # Byte `index` of the keys is the frame `index - shift` of the slot.
            shift = slot.frames.start - start_gfn
            for begin, stop in _unknown(slot.known, first, last):
                wanted = _to_touch(keys, begin * SEGMENT_FRAMES + shift, stop * SEGMENT_FRAMES + shift)
                touched = slot.memory.touch([(index - shift) * FRAME_SIZE for index in wanted])
                for index in wanted[:touched]:
                    slot.known[(index - shift) // SEGMENT_FRAMES] = 1


def _unknown(known: bytearray, first: int, last: int) -> Iterable[tuple[int, int]]:
    while first < last and (begin := known.find(0, first, last)) >= 0:
        stop = known.find(1, begin, last)
        first = last if stop < 0 else stop
        yield begin, first


def _to_touch(keys: bytes | bytearray, begin: int, end: int) -> range | list[int]:
    if keys.find(0, begin, end) < 0:
        return range(begin, end, SEGMENT_FRAMES)
    firsts = (_NOT_ZERO.search(keys, at, at + SEGMENT_FRAMES) for at in range(begin, end, SEGMENT_FRAMES))
    return [first.start() for first in firsts if first]
