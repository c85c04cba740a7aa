"""From ranges of a guest to chunks and gaps: what GetSkeys streams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, MemoryMap, Ranges
from skeyd.limits import DEFAULT_SLICE_SECONDS
from skeyd.storage_key import look_through
from skeyd.vms.pacing import Pace
from skeyd.vms.read_ahead import ChunkRead
from skeyd.vms.session import Session


@dataclass(frozen=True, slots=True)
class KeysRead:
    """Keys of frames that follow one another."""

    frames: GfnRange
    keys: bytes
    crc32: int


@dataclass(frozen=True, slots=True)
class GapRead:
    """Frames that are in no memory slot."""

    frames: GfnRange


def check_ranges(memory_map: MemoryMap, ranges: Ranges) -> Ranges:
    """Return the ranges to read; everything from the first slot to the last where none are given. GFN_NOT_MAPPED."""
    if not ranges:
        return Ranges([memory_map.span()])
    for wanted in ranges:
        memory_map.require_ends_mapped(wanted)
    return ranges


def read(session: Session, ranges: Ranges, chunk_keys: int, pace: Pace | None = None) -> Iterator[KeysRead | GapRead]:
    """As read_chunks, with chunks that are checked, and copied out of the worker's memory."""
    for part in read_chunks(session, ranges, chunk_keys, pace or Pace(DEFAULT_SLICE_SECONDS)):
        if isinstance(part, GapRead):
            yield part
            continue
        keys = part.copy()
        # The copy: what the worker can still change isn't worth a look.
        _, crc32 = require_keys(ChunkRead(part.frames, None if keys is None else (memoryview(keys),)))
        assert keys is not None  # noqa: S101  by require_keys
        yield KeysRead(part.frames, keys, crc32)
        del keys


def read_chunks(
    session: Session, ranges: Ranges, chunk_keys: int, pace: Pace, start_at: int | None = None
) -> Iterator[ChunkRead | GapRead]:
    """Read checked ranges of a guest that uses storage keys, in chunks of at most `chunk_keys` frames.

    Where a chunk begins depends on the memory slots, the ranges and `chunk_keys` alone: those of a part of memory lie
    end to end from its first frame on. `start_at`, a frame in a range or the end of one, leaves out all before it.
    Of the keys nothing is checked: `require_keys` does that.
    """
    memory_map = session.memory_map
    session.take_snapshot()
    chunks = session.read_chunks(
        (part for part, mapped in _layout(memory_map, ranges, chunk_keys, start_at) if mapped), chunk_keys, pace
    )
    for part, mapped in _layout(memory_map, ranges, chunk_keys, start_at):
        yield next(chunks) if mapped else GapRead(part)


def require_keys(chunk: ChunkRead) -> tuple[tuple[memoryview, ...], int]:
    """Return a chunk's views and the CRC-32 of what they hold, if they are keys. WORKER_FAILED."""
    if chunk.views is None:
        raise SkeydError(
            Reason.WORKER_FAILED, f"the guest used storage keys, and at {chunk.frames} it is said to use none"
        )
    gfn, crc32 = chunk.frames.start, 0
    for view in chunk.views:
        bad, crc32 = look_through(view, crc32)
        if bad is not None:
            raise SkeydError(Reason.WORKER_FAILED, f"the worker tells of an impossible key at gfn {gfn + bad:#x}")
        gfn += len(view)
    return chunk.views, crc32


def before(memory_map: MemoryMap, ranges: Ranges, gfn: int) -> tuple[int, int]:
    """Return what of checked ranges lies before a frame: (frames with keys, frames in gaps).

    REQUEST_INVALID where the frame is in no range and the end of none.
    """
    if ranges.at(gfn) is None and ranges.at(gfn - 1) is None:
        raise SkeydError(
            Reason.REQUEST_INVALID,
            f"there is nothing to resume at gfn {gfn:#x}: it is in no range and the end of none",
            {"gfn": hex(gfn)},
        )
    keys, gap_frames = 0, 0
    for wanted in ranges:
        if wanted.start >= gfn:
            break
        for part, mapped in memory_map.mapped.split(GfnRange(wanted.start, min(wanted.end, gfn) - wanted.start)):
            if mapped:
                keys += part.count
            else:
                gap_frames += part.count
    return keys, gap_frames


def pieces(frames: GfnRange, most: int) -> Iterator[GfnRange]:
    """Cut frames into pieces of at most `most`."""
    for start in range(frames.start, frames.end, most):
        yield GfnRange(start, min(most, frames.end - start))


def _layout(
    memory_map: MemoryMap, ranges: Iterable[GfnRange], chunk_keys: int, start_at: int | None
) -> Iterator[tuple[GfnRange, bool]]:
    start_at = start_at or 0
    for wanted in ranges:
        if wanted.end <= start_at:
            continue
        for part, mapped in memory_map.mapped.split(wanted):
            if part.end <= start_at:
                continue
            rest = part
            if part.start < start_at:
                rest = GfnRange(start_at, part.end - start_at)
                if mapped and (start_at - part.start) % chunk_keys:
                    # What is left of the chunk that it lies in.
                    left = chunk_keys - (start_at - part.start) % chunk_keys
                    if left >= rest.count:
                        yield rest, True
                        continue
                    yield GfnRange(start_at, left), True
                    rest = GfnRange(start_at + left, rest.count - left)
            if mapped:
                for piece in pieces(rest, chunk_keys):
                    yield piece, True
            else:
                yield rest, False
