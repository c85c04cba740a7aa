"""Chunks on the wire, by hand: the two messages that carry keys, GetSkeysResponse and SetSkeysRequest with a chunk.

Their bytes are what the generated classes write, and a test says so. What is written here copies the keys once and what
is read here doesn't copy them, where the generated classes do so two or three times. Both messages have the chunk in
field 2 of the same oneof, so that they are the same bytes.

Standard library only; the front and the client both use it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

CHUNK_FIELDS_MAX: Final = 64
"""Most fields of a chunk that the generated classes are given in a large message. It has five; a later version's may
have more."""

CHUNK_FIELD: Final = 2
"""Of GetSkeysResponse and of SetSkeysRequest."""

FIELDS: Final = {"start_gfn": 1, "count": 2, "encoding": 3, "data": 4, "crc32": 5}
"""Of Chunk. Those of wire type VARINT, VARINT, VARINT, LEN and I32."""

_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5
_FIXED_BYTES: Final = {_I64: 8, _I32: 4}
_CHUNK: Final = CHUNK_FIELD << 3 | _LEN
_START: Final = FIELDS["start_gfn"] << 3 | _VARINT
_COUNT: Final = FIELDS["count"] << 3 | _VARINT
_ENCODING: Final = FIELDS["encoding"] << 3 | _VARINT
_DATA: Final = FIELDS["data"] << 3 | _LEN
_CRC32: Final = FIELDS["crc32"] << 3 | _I32

_FIXED32: Final = struct.Struct("<I")


@dataclass(frozen=True, slots=True, eq=False)
class ChunkMessage:
    """A message that holds a chunk, and the chunk: the attributes are those of both generated classes."""

    start_gfn: int
    count: int
    encoding: int
    data: memoryview
    """The message's own bytes."""
    crc32: int

    @property
    def chunk(self) -> ChunkMessage:
        """The chunk."""
        return self

    def WhichOneof(self, _: str) -> str:  # noqa: N802  as the generated classes have it
        """Which part it is: "chunk"."""
        return "chunk"


def chunk_message(start_gfn: int, count: int, encoding: int, data: Sequence[bytes | memoryview], crc32: int) -> bytes:
    """Write down a GetSkeysResponse, or a SetSkeysRequest, with a chunk, whose data are pieces end to end.

    No number is below 0.
    """
    length = sum(map(len, data))
    head = bytearray()
    for tag, number in ((_START, start_gfn), (_COUNT, count), (_ENCODING, encoding), (_DATA, length)):
        # Proto3 leaves out what is zero or empty.
        if number:
            head.append(tag)
            _append_varint(head, number)
    tail = bytes([_CRC32]) + _FIXED32.pack(crc32) if crc32 else b""
    begin = bytearray([_CHUNK])
    _append_varint(begin, len(head) + length + len(tail))
    return b"".join((begin, head, *data, tail))


def read_chunk_message(message: bytes) -> ChunkMessage | None:
    """Take apart a message that holds a chunk and nothing else, each field at most once and in order.

    None for all others, good or bad: the generated classes take those.
    """
    try:
        return _read(message)
    except IndexError:
        return None  # it ends too early


def is_one_chunk(message: bytes) -> bool:
    """Whether a message is one chunk from end to end, of CHUNK_FIELDS_MAX fields at most.

    Only so it takes no more memory than its bytes when it is parsed, whichever implementation of protobuf does that.
    """
    try:
        size, at = _tagged(message, 0, _CHUNK)
        return bool(at) and at + size == len(message) and _has_few_fields(message, at)
    except IndexError:
        return False


def _read(message: bytes) -> ChunkMessage | None:
    size, at = _tagged(message, 0, _CHUNK)
    if not at or at + size != len(message):
        return None
    start_gfn, at = _tagged(message, at, _START)
    count, at = _tagged(message, at, _COUNT)
    encoding, at = _tagged(message, at, _ENCODING)
    length, at = _tagged(message, at, _DATA)
    end = at + length
    if end > len(message) or start_gfn >> 64 or count >> 32 or encoding >> 31:
        return None
    crc32 = 0
    if end != len(message):
        if message[end] != _CRC32 or end + 1 + _FIXED32.size != len(message):
            return None
        (crc32,) = _FIXED32.unpack_from(message, end + 1)
    return ChunkMessage(start_gfn, count, encoding, memoryview(message)[at:end], crc32)


def _has_few_fields(message: bytes, at: int) -> bool:
    for _ in range(CHUNK_FIELDS_MAX):
        tag, at = _varint(message, at)
        wire_type = tag & 7
        if wire_type == _VARINT:
            _, at = _varint(message, at)
        elif wire_type == _LEN:
            length, at = _varint(message, at)
            at += length
        elif wire_type in _FIXED_BYTES:
            at += _FIXED_BYTES[wire_type]
        else:
            return False  # a group, which has fields of its own, or nothing that there is
        if at >= len(message):
            return at == len(message)
    return False


def _tagged(message: bytes, at: int, tag: int) -> tuple[int, int]:
    # A field's number and where it ends; (0, at) where another field is there, or none.
    if at == len(message) or message[at] != tag:
        return 0, at
    return _varint(message, at + 1)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    for index in range(at, at + 10):
        byte = message[index]
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, index + 1
        shift += 7
    raise IndexError("a varint has 10 bytes at most")


def _append_varint(to: bytearray, number: int) -> None:
    while number > 0x7F:
        to.append(number & 0x7F | 0x80)
        number >>= 7
    to.append(number)
