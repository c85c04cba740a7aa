"""From ranges of a guest to chunks and gaps: what GetSkeys streams."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, MemoryMap, Ranges
from skeyd.storage_key import first_reserved
from skeyd.vms.session import Session
from skeyd.worker.protocol import SLICE_KEYS


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


def read(session: Session, ranges: Ranges, chunk_keys: int) -> Iterator[KeysRead | GapRead]:
    """Read checked ranges of a guest that uses storage keys, in chunks of at most `chunk_keys` frames.

    A chunk that is larger than a slice takes several ioctls; one slice is always read ahead.
    """
    memory_map = session.memory_map
    slices = session.read_slices(
        piece
        for part, mapped in _layout(memory_map, ranges, chunk_keys)
        if mapped
        for piece in pieces(part, SLICE_KEYS)
    )
    for part, mapped in _layout(memory_map, ranges, chunk_keys):
        if not mapped:
            yield GapRead(part)
            continue
        keys = b""
        while len(keys) < part.count:
            frames, found = next(slices)
            if found is None:
                raise SkeydError(
                    Reason.WORKER_FAILED,
                    f"the guest used storage keys, and at {frames} it is said to use none",
                )
            bad = first_reserved(found)
            if bad is not None:
                gfn = frames.start + bad
                raise SkeydError(Reason.WORKER_FAILED, f"the worker tells of an impossible key at gfn {gfn:#x}")
            keys = found if not keys else keys + found
        yield KeysRead(part, keys, zlib.crc32(keys))


def pieces(frames: GfnRange, most: int) -> Iterator[GfnRange]:
    """Cut frames into pieces of at most `most`."""
    for start in range(frames.start, frames.end, most):
        yield GfnRange(start, min(most, frames.end - start))


def _layout(memory_map: MemoryMap, ranges: Iterable[GfnRange], chunk_keys: int) -> Iterator[tuple[GfnRange, bool]]:
    for wanted in ranges:
        for part, mapped in memory_map.mapped.split(wanted):
            if mapped:
                for piece in pieces(part, chunk_keys):
                    yield piece, True
            else:
                yield part, False
