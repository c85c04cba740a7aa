"""How many frames have which key, and how the keys lie. Everybody may import this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from skeyd.gfn import GfnRange
from skeyd.turns import give_way

_PIECE: Final = 1 << 15
"""Keys that are counted in one go, in less than a millisecond whatever they are: numbers of this many bytes stay in a
CPU's cache."""

_BITS: Final = (0x80, 0x40, 0x20, 0x10, 0x08, 0x04, 0x02)
_SEGMENTS: Final = 8
_NONZERO: Final = b"\0" + b"\1" * 255


@dataclass(frozen=True, slots=True)
class Run:
    """Frames that follow one another and have one key."""

    frames: GfnRange
    key: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What there is."""

    counts: dict[int, int]
    """Frames by key, ascending; keys that no frame has are left out."""
    runs: int
    """Runs of one key."""
    longest_run: Run | None
    """The longest, the first of several; None where there are no keys."""

    @property
    def keys(self) -> int:
        """Keys that were counted."""
        return sum(self.counts.values())


class Summarizer:
    """Takes valid keys in ascending order of frames, cut in any way, and counts them. Synchronization: one thread."""

    def __init__(self) -> None:
        self._counts = [0] * 256
        self._runs = 0
        self._longest_start = self._longest_count = self._longest_key = 0
        # The run that the next key may go on with.
        self._start = self._count = self._key = 0

    def add(self, frames: GfnRange, keys: bytes | bytearray | memoryview) -> None:
        """Add the keys of frames, one byte a frame; they are not kept. ValueError where they don't ascend or fit."""
        if len(keys) != frames.count:
            raise ValueError(f"{len(keys)} keys are not those of {frames.count} frames")
        end = self._start + self._count
        if frames.start < end:
            raise ValueError(f"frames {frames} do not lie after those before them")
        if frames.start > end:
            self.end_run()
        for index in range(0, frames.count, _PIECE):
            self._add(frames.start + index, bytes(keys[index : index + _PIECE]))
            give_way()

    def end_run(self) -> None:
        """End a run here, whatever the next key is: at the edge of a range. A gap ends one by itself."""
        if self._count:
            self._runs += 1
            self._measure(self._start, self._count, self._key)
            self._start, self._count = self._start + self._count, 0

    def summary(self) -> Summary:
        """Return what there is. It ends a run."""
        self.end_run()
        longest = None
        if self._longest_count:
            longest = Run(GfnRange(self._longest_start, self._longest_count), self._longest_key)
        counts = {key: count for key, count in enumerate(self._counts) if count}
        return Summary(counts, self._runs, longest)

    def _add(self, gfn: int, keys: bytes) -> None:
        first, last, size = keys[0], keys[-1], len(keys)
        if self._count and first != self._key:
            self.end_run()
        if not self._count:
            self._start, self._key = gfn, first
        if keys == keys[:1] * size:  # as most of a guest is
            self._counts[first] += size
            self._count += size
            return
        number = int.from_bytes(keys, "little")
        self._count_keys(number, size)
        # A mark on each frame whose successor has another key. The last frame has none.
        marks = (number ^ number >> 8).to_bytes(size, "little")[:-1].translate(_NONZERO)
        end, begin = marks.find(1) + 1, marks.rfind(1) + 1
        self._count += end
        self.end_run()
        self._runs += marks.count(1) - 1
        # Only runs that are longer than the longest so far are looked for: those with as many frames without a mark.
        while (at := marks.find(bytes(self._longest_count), end, begin - 1)) >= 0:
            end = marks.find(1, at) + 1
            self._measure(gfn + at, end - at, keys[at])
        self._start, self._count, self._key = gfn + begin, size - begin, last

    def _measure(self, start: int, count: int, key: int) -> None:
        if count > self._longest_count:
            self._longest_start, self._longest_count, self._longest_key = start, count, key

    def _count_keys(self, number: int, size: int) -> None:
        # Keys as one long number, so that they are counted by a few operations in C, whatever they are. A plane has one
        # bit of each key: eight keys to a byte, each from another eighth of the keys.
        width = -(-size // _SEGMENTS)
        every = int.from_bytes(b"\1" * width, "little")
        low = (1 << 8 * width) - 1
        eighths = [number >> 8 * width * segment & low for segment in range(_SEGMENTS)]
        there = 0
        for segment in range(_SEGMENTS):
            there |= (every & (1 << 8 * max(0, min(width, size - width * segment))) - 1) << segment
        left = [(there, 0, 0)]
        planes: list[int] = []
        for bit in _BITS:
            plane, shift = 0, bit.bit_length() - 1
            for segment, eighth in enumerate(eighths):
                plane |= (eighth >> shift & every) << segment
            planes.append(plane)
        while left:
            some, depth, key = left.pop()
            if depth == len(_BITS):
                self._counts[key] += some.bit_count()
                continue
            having = some & planes[depth]
            if having:
                left.append((having, depth + 1, key | _BITS[depth]))
            if having != some:
                left.append((some ^ having, depth + 1, key))
