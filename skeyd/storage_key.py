"""What a storage key is, by the z/Architecture Principles of Operation; everybody may import this.

A key is one byte a 4 KiB frame. The numbers here are the only place they are written down.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

FRAME_SIZE = 4096
"""Bytes in a guest frame."""

SEGMENT_FRAMES = 256
"""Frames in a segment, 1 MiB: what one page table maps."""

GFN_LIMIT = 1 << 64
"""First number that is no gfn: the kernel's field is a u64."""

ACC_MASK = 0xF0
ACC_SHIFT = 4
FETCH_PROTECTION = 0x08
REFERENCED = 0x04
CHANGED = 0x02
RESERVED = 0x01

STABLE_MASK = ACC_MASK | FETCH_PROTECTION
"""The bits that only a SET changes, and a guest that runs and sets keys itself. A guest, and up to Linux 6.19 the host,
set R and C by touching the frame."""

_RUN = re.compile(rb"(.)\1*", re.DOTALL)
_MARKS = b"\0" + b"\1" * 255
_BLOCK = 65_536
_VALID_KEYS = bytes(key for key in range(256) if not key & RESERVED)


@dataclass(frozen=True, slots=True)
class StorageKey:
    """One key, taken apart."""

    access_control: int
    """ACC, 0 to 15."""
    fetch_protection: bool
    referenced: bool
    changed: bool

    def __post_init__(self) -> None:
        if not 0 <= self.access_control <= 15:
            raise ValueError(f"access-control bits are 0 to 15, not {self.access_control}")

    @classmethod
    def from_byte(cls, key: int) -> StorageKey:
        """Take a key byte apart. ValueError for what is no key: over 0xFF, or with the reserved bit."""
        if not 0 <= key <= 0xFF:
            raise ValueError(f"a storage key is one byte, not {key:#x}")
        if key & RESERVED:
            raise ValueError(f"key {key:#04x} has the reserved bit 0x01")
        return cls(key >> ACC_SHIFT, bool(key & FETCH_PROTECTION), bool(key & REFERENCED), bool(key & CHANGED))

    def to_byte(self) -> int:
        """Put the key together."""
        return (
            self.access_control << ACC_SHIFT
            | FETCH_PROTECTION * self.fetch_protection
            | REFERENCED * self.referenced
            | CHANGED * self.changed
        )


def first_reserved(keys: bytes | bytearray | memoryview) -> int | None:
    """Index of the first byte with the reserved bit, or None. Fast on the good case: one pass in C."""
    if isinstance(keys, memoryview):
        # In blocks, so that what translate needs copies of stays in the processor's cache.
        for at in range(0, len(keys), _BLOCK):
            bad = first_reserved(bytes(keys[at : at + _BLOCK]))
            if bad is not None:
                return at + bad
        return None
    if not keys.translate(None, _VALID_KEYS):
        return None
    return next(index for index, key in enumerate(keys) if key & RESERVED)


def look_through(keys: bytes | memoryview, crc32: int = 0) -> tuple[int | None, int]:
    """Return what first_reserved says of keys, and their CRC-32, which goes on from that of those before them.

    A thread that does nothing but search keeps the interpreter's lock, and in a daemon with sixteen streams a health
    check waits for all of them at each of its steps. The checksum is computed without the lock, block by block.
    """
    found = None
    with memoryview(keys) as view:
        for at in range(0, len(view), _BLOCK):
            block = bytes(view[at : at + _BLOCK])
            crc32 = zlib.crc32(block, crc32)
            if found is None and (bad := first_reserved(block)) is not None:
                found = at + bad
    return found, crc32


def only_key(keys: bytes | memoryview) -> int | None:
    """Return the key that all of at least one frame have, or None where they differ; mostly without a look at all."""
    count, first = len(keys), bytes(keys[:1])
    if keys[-1] != first[0] or keys[count // 2] != first[0]:
        return None
    # In blocks that stay in the processor's cache, each compared where it lies: no view's keys are copied.
    block = first * min(count, _BLOCK)
    with memoryview(keys) as view:
        same = all(block.startswith(view[at : at + _BLOCK]) for at in range(0, count, _BLOCK))
    return first[0] if same else None


def differing_runs(one: bytes | bytearray, other: bytes | bytearray, mask: int = STABLE_MASK) -> list[tuple[int, int]]:
    """Where two equally long key arrays differ in a bit of the mask: (index, length) of each run, ascending."""
    if one == other:
        return []
    left, right = _as_numbers(one, other)
    return _nonzero_runs((left ^ right) & _every(mask, len(one)), len(one))


def lost_runs(wanted: bytes | bytearray, found: bytes | bytearray) -> list[tuple[int, int]]:
    """Where a read-back shows that a SET did not take: (index, length) of each run, ascending.

    ACC or F differ, or R or C is missing. R or C *more* than was set is no loss: touching the frame adds them.
    """
    if wanted == found:
        return []
    left, right = _as_numbers(wanted, found)
    missing = left & ~right | (left ^ right) & _every(STABLE_MASK, len(wanted))
    return _nonzero_runs(missing, len(wanted))


def runs_of_equal(keys: bytes | bytearray) -> list[tuple[int, int, int]]:
    """Split keys into runs of one value: (index, length, key) of each, ascending."""
    return [(run.start(), run.end() - run.start(), run[0][0]) for run in _RUN.finditer(keys)]


# Keys as one long number, so that a comparison of a quarter of a million of them is a few operations in C.


def _as_numbers(one: bytes | bytearray, other: bytes | bytearray) -> tuple[int, int]:
    if len(one) != len(other):
        raise ValueError(f"{len(one)} keys can't be compared with {len(other)}")
    return int.from_bytes(one, "little"), int.from_bytes(other, "little")


def _every(mask: int, count: int) -> int:
    return int.from_bytes(bytes([mask]) * count, "little")


def _nonzero_runs(number: int, count: int) -> list[tuple[int, int]]:
    if not number:
        return []
    # One value for all that isn't zero: then both ends of a run are found at memchr's speed.
    marks = number.to_bytes(count, "little").translate(_MARKS)
    runs, end = [], 0
    while (start := marks.find(1, end)) >= 0:
        end = marks.find(0, start)
        if end < 0:
            end = count
        runs.append((start, end - start))
    return runs
