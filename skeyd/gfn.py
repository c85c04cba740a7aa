"""Ranges of guest frames and the memory slots they lie in. Everybody may import this."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from skeyd.errors import Reason, SkeydError
from skeyd.storage_key import GFN_LIMIT


@dataclass(frozen=True, slots=True, order=True)
class GfnRange:
    """`count` frames, at least one, from `start` on. SkeydError RANGE_EMPTY or RANGE_OVERFLOW for what is none."""

    start: int
    count: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.count < 0:
            raise SkeydError(Reason.REQUEST_INVALID, f"a range has no negative numbers: {self.start}, {self.count}")
        if not self.count:
            raise SkeydError(Reason.RANGE_EMPTY, f"the range at gfn {self.start:#x} has a count of 0")
        if self.start + self.count > GFN_LIMIT:
            raise SkeydError(
                Reason.RANGE_OVERFLOW,
                f"{self.count} frames from gfn {self.start:#x} on end beyond 2^64",
                {"gfn": hex(self.start)},
            )

    @property
    def end(self) -> int:
        """The frame after the last."""
        return self.start + self.count

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.end - 1:#x}"


class Ranges(Sequence[GfnRange]):
    """Ranges that are ascending and apart. SkeydError RANGES_NOT_ASCENDING for others."""

    def __init__(self, ranges: Iterable[GfnRange]) -> None:
        self._ranges = tuple(ranges)
        for one, other in zip(self._ranges, self._ranges[1:], strict=False):
            if other.start < one.end:
                raise SkeydError(
                    Reason.RANGES_NOT_ASCENDING,
                    f"range {other} does not lie after range {one}",
                    {"gfn": hex(other.start)},
                )
        self._starts = [one.start for one in self._ranges]

    @overload
    def __getitem__(self, index: int) -> GfnRange: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[GfnRange, ...]: ...

    def __getitem__(self, index: int | slice) -> GfnRange | tuple[GfnRange, ...]:
        return self._ranges[index]

    def __len__(self) -> int:
        return len(self._ranges)

    def frames(self) -> int:
        """Frames in all of them."""
        return sum(one.count for one in self._ranges)

    def at(self, gfn: int) -> GfnRange | None:
        """Return the range that holds a frame."""
        index = bisect_right(self._starts, gfn) - 1
        if index >= 0 and gfn < self._ranges[index].end:
            return self._ranges[index]
        return None

    def split(self, wanted: GfnRange) -> Iterator[tuple[GfnRange, bool]]:
        """Cut `wanted` where it crosses an edge: (part, whether a range holds it), ascending, without a break."""
        gfn = wanted.start
        index = max(0, bisect_right(self._starts, gfn) - 1)
        while gfn < wanted.end:
            while index < len(self._ranges) and self._ranges[index].end <= gfn:
                index += 1
            if index == len(self._ranges):
                end, inside = wanted.end, False
            elif self._ranges[index].start > gfn:
                end, inside = min(wanted.end, self._ranges[index].start), False
            else:
                end, inside = min(wanted.end, self._ranges[index].end), True
            yield GfnRange(gfn, end - gfn), inside
            gfn = end

    def shared(self, wanted: Iterable[GfnRange]) -> Iterator[GfnRange]:
        """Cut each of `wanted` down to its frames that a range holds; ascending and apart as those are."""
        for one in wanted:
            for part, inside in self.split(one):
                if inside:
                    yield part


@dataclass(frozen=True, slots=True)
class MemorySlot:
    """A memory slot as the kernel knows it."""

    slot: int
    frames: GfnRange
    backing: str
    """ "anonymous", "memfd" or "file"; "none" for a simulated VM."""


class MemoryMap:
    """Where a guest has memory: its slots, ascending."""

    def __init__(self, slots: Iterable[MemorySlot]) -> None:
        self.slots = tuple(sorted(slots, key=lambda slot: slot.frames.start))
        self.mapped = Ranges(_joined(slot.frames for slot in self.slots))
        """The frames in any slot; slots that touch are one range."""

    def require_mapped(self, wanted: GfnRange) -> None:
        """GFN_NOT_MAPPED where a frame of the range is in no slot; it names the first such frame."""
        for part, inside in self.mapped.split(wanted):
            if not inside:
                self._refuse(wanted, part.start)

    def require_ends_mapped(self, wanted: GfnRange) -> None:
        """GFN_NOT_MAPPED where the first or the last frame of the range is in no slot."""
        for gfn in (wanted.start, wanted.end - 1):
            if self.mapped.at(gfn) is None:
                self._refuse(wanted, gfn)

    def span(self) -> GfnRange:
        """Everything from the first slot to the last."""
        first = self.mapped[0].start
        return GfnRange(first, self.mapped[-1].end - first)

    def _refuse(self, wanted: GfnRange, gfn: int) -> None:
        slots = ", ".join(str(one) for one in self.mapped[:8]) + (", …" if len(self.mapped) > 8 else "")
        raise SkeydError(
            Reason.GFN_NOT_MAPPED,
            f"gfn {gfn:#x} of range {wanted} is in no memory slot (there is memory at {slots})",
            {"gfn": hex(gfn)},
        )


def _joined(ranges: Iterable[GfnRange]) -> Iterator[GfnRange]:
    last: GfnRange | None = None
    for one in ranges:
        if last is not None and last.end == one.start:
            last = GfnRange(last.start, last.count + one.count)
            continue
        if last is not None:
            yield last
        last = one
    if last is not None:
        yield last
