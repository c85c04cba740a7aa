"""Keys in a file. docs/snapshot-format.md describes the format for those who read it with other programs.

A file is whole or it is recognised as not whole: every record has a checksum and the last one counts the keys. It is
written under a temporary name and renamed when it is on disk.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

from skeyd.client.reading import Keys, KeyStream
from skeyd.errors import SkeydError
from skeyd.gfn import GfnRange, Ranges
from skeyd.storage_key import first_reserved

MAGIC: Final = b"\x89SKEYS\n\x1a"
"""Not ASCII first, a line feed and an end-of-file mark after: mangling by a text mode shows."""

FORMAT: Final = 1

_HEAD: Final = struct.Struct(">cI")
_CRC: Final = struct.Struct(">I")
_START: Final = struct.Struct(">Q")
_END: Final = struct.Struct(">QI")
_HEADER, _KEYS, _LAST = b"H", b"K", b"E"
_RECORD_KEYS: Final = 1_048_576
"""Most keys in a record: a chunk of the API, which is what `load` makes of it."""

_PAYLOAD_MAX: Final = 8 * 1024 * 1024
"""Bytes: 1 Mi keys and room; a header of 16,384 ranges fits too."""


class SnapshotError(Exception):
    """A file is no snapshot, or not a whole one. The message says what is wrong and where."""


def write_snapshot(path: Path, stream: KeyStream, progress: Callable[[int], None] | None = None) -> int:
    """Write what a stream brings into a file, replacing what was there; returns the number of keys.

    `progress` is told how many frames are done, keys and gaps together.

    OSError where the name is that of a device or another thing that is no file; a symbolic link is followed.
    The file appears under its name when it is whole and on disk; if anything raises, nothing is left.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            keys = _write(file, stream, progress)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return keys


def _write(file: BinaryIO, stream: KeyStream, progress: Callable[[int], None] | None) -> int:
    header = stream.header
    about = {
        "format": FORMAT,
        "vm": header.vm,
        "uid": header.uid,
        "incarnation": header.incarnation,
        "kernel": header.kernel,
        "frame_size": header.frame_size,
        "uses_storage_keys": header.uses_storage_keys,
        "memory_slots": [[slot.slot, slot.start_gfn, slot.count] for slot in header.memory_slots],
        "ranges": [[one.start, one.count] for one in stream.ranges],
    }
    file.write(MAGIC)
    _record(file, _HEADER, json.dumps(about).encode())
    frames, keys, crc32 = 0, 0, 0
    for part in stream:
        frames += part.frames.count
        if isinstance(part, Keys):
            keys += part.frames.count
            crc32 = zlib.crc32(part.keys, crc32)
            _record(file, _KEYS, _START.pack(part.frames.start) + part.keys)
        if progress is not None:
            progress(frames)
    _record(file, _LAST, _END.pack(keys, crc32))
    return keys


def _record(file: BinaryIO, kind: bytes, payload: bytes) -> None:
    head = _HEAD.pack(kind, len(payload))
    file.write(head)
    file.write(payload)
    file.write(_CRC.pack(zlib.crc32(payload, zlib.crc32(head))))


class Snapshot:
    """A snapshot file, open for reading. SnapshotError from the constructor where it does not begin as one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        try:
            if self._file.read(len(MAGIC)) != MAGIC:
                raise self._damaged("is no snapshot of storage keys", 0)
            kind, payload = self._next()
            if kind != _HEADER:
                raise self._damaged("does not begin with a header", len(MAGIC))
            self.header = self._header(payload)
            """What the file says of the VM it was taken from."""
            self._begin = self._file.tell()
        except BaseException:
            self._file.close()
            raise

    @property
    def uses_storage_keys(self) -> bool:
        """Whether the guest used storage keys; if not there are none in the file."""
        return bool(self.header["uses_storage_keys"])

    def ranges(self) -> Ranges:
        """Return the frames that were asked for when it was taken; holes in them have no keys. SnapshotError."""
        try:
            found = Ranges(GfnRange(_whole(start), _whole(count)) for start, count in self.header["ranges"])
        except (KeyError, TypeError, ValueError, SkeydError) as error:
            raise self._damaged(f"has a header with impossible ranges ({error})", len(MAGIC)) from error
        if not found:
            raise self._damaged("has a header without ranges", len(MAGIC))
        return found

    def verify(self) -> Ranges:
        """Read it all and check it all; returns the frames that it has keys of. SnapshotError."""
        found: list[GfnRange] = []
        for part in self.keys():
            if found and found[-1].end == part.frames.start:
                found[-1] = GfnRange(found[-1].start, found[-1].count + part.frames.count)
            else:
                found.append(part.frames)
        return Ranges(found)

    def keys(self) -> Iterator[Keys]:
        """Read the keys from the beginning. SnapshotError at the first record that is not whole."""
        self._file.seek(self._begin)
        keys, crc32, end = 0, 0, 0
        while True:
            at = self._file.tell()
            kind, payload = self._next()
            if kind == _KEYS:
                part = self._keys(payload, at)
                if part.frames.start < end:
                    raise self._damaged(f"has the keys of {part.frames} out of order", at)
                end = part.frames.end
                keys += part.frames.count
                crc32 = zlib.crc32(part.keys, crc32)
                yield part
                continue
            if kind != _LAST or len(payload) != _END.size or _END.unpack(payload) != (keys, crc32):
                raise self._damaged("has an end that doesn't match its keys", at)
            if self._file.read(1):
                raise self._damaged("goes on after its end", at)
            return

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _next(self) -> tuple[bytes, bytes]:
        at = self._file.tell()
        head = self._file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            raise self._damaged("is cut off", at)
        kind, size = _HEAD.unpack(head)
        if kind not in (_HEADER, _KEYS, _LAST) or size > _PAYLOAD_MAX:
            raise self._damaged("is damaged", at)
        payload, crc = self._file.read(size), self._file.read(_CRC.size)
        if len(payload) < size or len(crc) < _CRC.size:
            raise self._damaged("is cut off", at)
        if _CRC.unpack(crc)[0] != zlib.crc32(payload, zlib.crc32(head)):
            raise self._damaged("is damaged", at)
        return kind, payload

    def _keys(self, payload: bytes, at: int) -> Keys:
        if not 1 <= len(payload) - _START.size <= _RECORD_KEYS:
            raise self._damaged(f"has a record of {len(payload) - _START.size} keys", at)
        keys = payload[_START.size :]
        try:
            frames = GfnRange(_START.unpack_from(payload)[0], len(keys))
        except SkeydError as error:
            raise self._damaged(f"has an impossible range ({error.message})", at) from error
        if first_reserved(keys) is not None:
            raise self._damaged("has a key with the reserved bit 0x01", at)
        return Keys(frames, keys)

    def _header(self, payload: bytes) -> dict[str, Any]:
        try:
            header = json.loads(payload)
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict) or not isinstance(header.get("uses_storage_keys"), bool):
            raise self._damaged("has a header that can't be read", len(MAGIC))
        if header.get("format") != FORMAT:
            raise self._damaged(f"has format {header.get('format')!r}, and this program reads {FORMAT}", len(MAGIC))
        return header

    def _damaged(self, what: str, at: int) -> SnapshotError:
        return SnapshotError(f"{self._path} {what} (at byte {at})")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _whole(number: object) -> int:
    if type(number) is not int:
        raise TypeError(f"{number!r} is no whole number")
    return number
