"""The old keys of a SetSkeys until its Commit, so that it can be undone: a stack of slices, compressed.

Slices that are small are joined into one record. The first MEMORY_BYTES of records stay in memory. What comes after
lies in a file without a name in the VM's directory: the memory of the worker's own doesn't grow with its guest (where
that directory is in a tmpfs the file is the host's memory all the same), and the file is gone with the process however
it ends. At worst, with keys that can't be compressed, it takes one byte for each frame that is being set. Where each
record lies, which frames it has and its checksum stay in memory, so that a record that is damaged keeps no other from
being found.
"""

from __future__ import annotations

import os
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from skeyd.errors import Reason, SkeydError, exhausted
from skeyd.gfn import GfnRange
from skeyd.storage_key import only_key

MEMORY_BYTES: Final = 1 << 20
"""Bytes of compressed keys that stay in memory."""

JOINED_KEYS: Final = 1 << 16
"""Keys that make a record; slices that are smaller wait in memory, as they are, until there are so many."""

JOINED_RANGES: Final = 4096
"""Ranges of frames that make a record, however few keys they have."""

_RECENT: Final = 4
"""Slices that were put on last: as large as the largest of them is what is taken off, at most."""

_SAMPLE: Final = 4096
"""Keys by which it is told whether a record is worth compressing."""


class JournalDamagedError(Exception):
    """A record doesn't hold what was written to it. It is off the stack; what lies below it is as it was."""

    def __init__(self, frames: list[GfnRange]) -> None:
        super().__init__(f"the old keys of {', '.join(map(str, frames))} are damaged")
        self.frames = frames
        """Of that record."""


class Journal:
    """A stack of (frames, keys). Synchronization: none; one thread owns it.

    Slices that follow one another are taken off as slices of the largest that was put on lately, at most: the first
    ones may have been too large for the kernel (skeyd.vms.pacing). `open_file` makes the file, once memory is full.
    """

    def __init__(self, open_file: Callable[[], int]) -> None:
        self._open_file = open_file
        self._memory = bytearray()
        self._fd = -1
        self._size = 0
        """Of the file."""
        self._recent = deque([1], _RECENT)
        """Keys in the slices that were put on last."""
        self._keys = bytearray()
        """Of the slices on top, which are in no record."""
        self._ranges = array("Q")
        """Of those: first frame and frames, in pairs."""
        self._records = array("Q")
        """Of each record: whether it is in the file, where it begins, its bytes, their CRC-32, and its ranges."""
        self._recorded = array("Q")
        """The ranges of all records, as those of the slices on top."""

    def push(self, frames: GfnRange, keys: bytes | bytearray | memoryview) -> None:
        """Put a slice on top.

        SkeydError HOST_EXHAUSTED or WORKER_FAILED where the file doesn't take what is to be written before that, or
        MemoryError; the stack is then as it was.
        """
        full = len(self._keys) + len(keys) > JOINED_KEYS or len(self._ranges) >= 2 * JOINED_RANGES
        if self._ranges and full:
            nothing = bytearray(), array("Q")
            self._record(self._keys, self._ranges)
            self._keys, self._ranges = nothing
        if len(keys) >= JOINED_KEYS:
            self._record(keys, array("Q", (frames.start, frames.count)))
        else:
            with _as_before(self._keys, self._ranges):
                follows = len(self._ranges) > 0 and self._ranges[-2] + self._ranges[-1] == frames.start
                if not follows:
                    self._ranges.extend((frames.start, frames.count))
                self._keys += keys
                if follows:
                    self._ranges[-1] += frames.count
        self._recent.append(frames.count)

    def pop(self) -> tuple[GfnRange, bytes] | None:
        """Take the slice on top, or None.

        JournalDamagedError where its record can't be read, which is off then. MemoryError: it is as it was.
        """
        if not self._ranges:
            if not self._records:
                return None
            self._take_record()
        start, frames = self._ranges[-2:]
        count = min(frames, max(self._recent))
        keys = bytes(self._keys[-count:])
        taken = GfnRange(start + frames - count, count)
        del self._keys[-count:]
        if count == frames:
            del self._ranges[-2:]
        else:
            self._ranges[-1] = frames - count
        return taken, keys

    def frames(self) -> int:
        """Return how many frames its slices have."""
        return sum(self._recorded[1::2]) + sum(self._ranges[1::2])

    def rest(self) -> list[GfnRange]:
        """Return the frames of all slices that are still in it, those that touch joined where they were pushed so."""
        return _joined([*_frames(self._recorded), *_frames(self._ranges)])

    def close(self) -> None:
        """Forget everything. Closing twice is fine."""
        self._memory = bytearray()
        self._keys = bytearray()
        self._ranges, self._records, self._recorded = array("Q"), array("Q"), array("Q")
        self._size = 0
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # The number is free however this ends (close(2)), and what can't be written is wanted no more.
            with suppress(OSError):
                os.close(fd)

    def _record(self, keys: bytes | bytearray | memoryview, ranges: array[int]) -> None:
        packed = _pack(keys)
        in_file = self._fd >= 0 or len(self._memory) + len(packed) > MEMORY_BYTES
        at = self._size if in_file else len(self._memory)
        with _as_before(self._memory, self._records, self._recorded):
            self._records.extend((in_file, at, len(packed), zlib.crc32(packed), len(ranges) // 2))
            self._recorded.extend(ranges)
            if in_file:
                self._write(packed)
            else:
                self._memory += packed

    def _take_record(self) -> None:
        # Its slices become those on top. Where memory is too short for them they are still in the record.
        in_file, at, length, crc32, count = self._records[-5:]
        ranges = self._recorded[-2 * count :]
        packed = self._read(at, length) if in_file else bytes(self._memory[at : at + length])
        keys = None
        if packed is not None and len(packed) == length and zlib.crc32(packed) == crc32:
            unpacked = _unpack(packed, sum(ranges[1::2]))
            keys = bytearray(unpacked) if unpacked is not None else None
        damaged = JournalDamagedError(_joined(_frames(ranges))) if keys is None else None
        del self._records[-5:]
        del self._recorded[-2 * count :]
        if in_file:
            self._size = at
        else:
            del self._memory[at:]
        if keys is None:
            assert damaged is not None  # noqa: S101  made above
            raise damaged
        self._keys, self._ranges = keys, ranges

    def _write(self, record: bytes) -> None:
        try:
            if self._fd < 0:
                self._fd = self._open_file()
            view = memoryview(record)
            at = self._size
            while view:
                written = os.pwrite(self._fd, view, at)
                at += written
                view = view[written:]
        except OSError as error:
            # What was written of it is beyond the end that is remembered, and is written over.
            failed = SkeydError(Reason.WORKER_FAILED, f"the old keys can't be kept: {error.strerror}")
            raise exhausted(error) or failed from error
        self._size = at

    def _read(self, at: int, length: int) -> bytes | None:
        try:
            return os.pread(self._fd, length, at)
        except OSError:
            return None


@contextmanager
def _as_before(*grown: bytearray | array[int]) -> Iterator[None]:
    # Have all of them as long as they were where something is raised: one that is longer than another would give frames
    # the keys of others.
    lengths = [len(one) for one in grown]
    try:
        yield
    except BaseException:
        for one, length in zip(grown, lengths, strict=True):
            del one[length:]
        raise


def _frames(ranges: array[int]) -> list[GfnRange]:
    return [GfnRange(start, count) for start, count in zip(ranges[::2], ranges[1::2], strict=True)]


def _joined(ranges: list[GfnRange]) -> list[GfnRange]:
    joined: list[GfnRange] = []
    for one in ranges:
        if joined and joined[-1].end == one.start:
            last = joined[-1]
            joined[-1] = GfnRange(last.start, last.count + one.count)
        else:
            joined.append(one)
    return joined


def _pack(keys: bytes | bytearray | memoryview) -> bytes:
    data = bytes(keys)
    if only_key(data) is not None:
        return data[:1]
    if len(data) > 2 * _SAMPLE:
        # Keys in no runs are kept as they are: to make half of them takes more time than all else that a SetSkeys does.
        # Guests' shrink to an eighth at most (benchmarks/mixes.py).
        middle = len(data) // 2
        if len(_deflated(data[middle : middle + _SAMPLE])) > _SAMPLE // 4:
            return data
    packed = _deflated(data)
    return packed if len(packed) < len(data) else data


def _deflated(data: bytes) -> bytes:
    # Keys come in runs mostly. Z_RLE finds those as fast as the default strategy, and is through with random keys in a
    # quarter of its time (1.7 against 6.2 ms for 256 Ki keys).
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return packer.compress(data) + packer.flush()


def _unpack(packed: bytes, count: int) -> bytes | None:
    if len(packed) == count:
        return packed
    if len(packed) == 1:
        return packed * count
    try:
        unpacker = zlib.decompressobj()
        keys = unpacker.decompress(packed, count + 1)
    except zlib.error:
        return None
    return keys if len(keys) == count and unpacker.eof else None
