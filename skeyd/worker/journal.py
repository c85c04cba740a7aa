"""The old keys of a SetSkeys until its Commit, so that it can be undone: a stack of slices, compressed.

The first MEMORY_BYTES stay in memory. What comes after lies in a file without a name in the VM's directory: a worker's
memory doesn't grow with its guest, and the file is gone with the process however it ends. At worst, with keys that
can't be compressed, it takes one byte for each frame that is being set.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from skeyd.errors import Reason, SkeydError, exhausted
from skeyd.gfn import GfnRange
from skeyd.storage_key import GFN_LIMIT, only_key

MEMORY_BYTES: Final = 1 << 20
"""Bytes of compressed keys that stay in memory."""

SLICE_MAX: Final = 1 << 20
"""Most keys in a slice."""

_SAMPLE: Final = 4096
"""Keys by which it is told whether a slice is worth compressing."""

_TAIL = struct.Struct("=QIII")
"""What follows a slice's packed keys, so that the stack is read from its end: first gfn, keys, packed bytes, CRC-32."""


class JournalDamagedError(Exception):
    """The file doesn't hold what was written to it. What lies below in the stack can't be found any more."""


class Journal:
    """A stack of (frames, keys). Synchronization: none; one thread owns it.

    `open_file` makes the file, once memory is full.
    """

    def __init__(self, open_file: Callable[[], int]) -> None:
        self._open_file = open_file
        self._memory = bytearray()
        self._fd = -1
        self._size = 0
        """Of the file."""
        self._covered: list[GfnRange] = []
        """All frames in it, slices that touch joined: what is lost should the file be."""

    def push(self, frames: GfnRange, keys: bytes | bytearray | memoryview) -> None:
        """Put a slice on top.

        SkeydError HOST_EXHAUSTED or WORKER_FAILED where the file doesn't take it; the stack is then as it was.
        """
        packed = _pack(keys)
        record = packed + _TAIL.pack(frames.start, frames.count, len(packed), zlib.crc32(packed))
        if self._fd < 0 and len(self._memory) + len(record) <= MEMORY_BYTES:
            self._memory += record
        else:
            self._write(record)
        if self._covered and self._covered[-1].end == frames.start:
            last = self._covered[-1]
            self._covered[-1] = GfnRange(last.start, last.count + frames.count)
        else:
            self._covered.append(frames)

    def pop(self) -> tuple[GfnRange, bytes] | None:
        """Take the slice on top, or None. JournalDamagedError where it can't be read; `rest` has what it held."""
        if self._size:
            record_end, read = self._size, self._read
        elif self._memory:
            record_end, read = len(self._memory), self._recall
        else:
            return None
        tail = read(record_end - _TAIL.size, _TAIL.size)
        start, count, length, crc32 = _TAIL.unpack(tail)
        at = record_end - _TAIL.size - length
        if at < 0 or not 1 <= count <= SLICE_MAX:
            raise JournalDamagedError
        packed = read(at, length)
        if zlib.crc32(packed) != crc32:
            raise JournalDamagedError
        if start + count > GFN_LIMIT:
            raise JournalDamagedError
        frames, keys = GfnRange(start, count), _unpack(packed, count)
        self._forget(frames)
        if self._size:
            self._size = at
        else:
            del self._memory[at:]
        return frames, keys

    def rest(self) -> list[GfnRange]:
        """Return the frames of all slices that are still in it, ascending where they were pushed so."""
        return list(self._covered)

    def close(self) -> None:
        """Forget everything. Closing twice is fine."""
        self._memory = bytearray()
        self._covered = []
        self._size = 0
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _forget(self, frames: GfnRange) -> None:
        last = self._covered.pop()
        if last.end != frames.end or last.count < frames.count:
            self._covered.append(last)
            raise JournalDamagedError
        if last.count > frames.count:
            self._covered.append(GfnRange(last.start, last.count - frames.count))

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

    def _read(self, at: int, length: int) -> bytes:
        data = b""
        with suppress(OSError):
            data = os.pread(self._fd, length, at) if at >= 0 else b""
        if len(data) != length:
            raise JournalDamagedError
        return data

    def _recall(self, at: int, length: int) -> bytes:
        return bytes(self._memory[at : at + length])


def _pack(keys: bytes | bytearray | memoryview) -> bytes:
    data = bytes(keys)
    if only_key(data) is not None:
        return data[:1]
    if len(data) > 2 * _SAMPLE:
        # Keys that look random are kept as they are: an eighth less of them would take more time than all the rest.
        middle = len(data) // 2
        if len(_deflated(data[middle : middle + _SAMPLE])) > _SAMPLE * 3 // 4:
            return data
    packed = _deflated(data)
    return packed if len(packed) < len(data) else data


def _deflated(data: bytes) -> bytes:
    # Keys come in runs mostly. Z_RLE finds those as fast as the default strategy, and is through with random keys in a
    # quarter of its time (1.7 against 6.2 ms for 256 Ki keys).
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return packer.compress(data) + packer.flush()


def _unpack(packed: bytes, count: int) -> bytes:
    if len(packed) == count:
        return packed
    if len(packed) == 1:
        return packed * count
    try:
        unpacker = zlib.decompressobj()
        keys = unpacker.decompress(packed, count)
    except zlib.error:
        raise JournalDamagedError from None
    if len(keys) != count:
        raise JournalDamagedError
    return keys
