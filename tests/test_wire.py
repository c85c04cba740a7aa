"""Chunks put together and taken apart by hand are what the generated classes make of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skeyd import wire
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.wire import CHUNK_FIELDS_MAX, ChunkMessage, chunk_message, is_one_chunk, read_chunk_message
from tests.examples import examples

MESSAGES: list[Any] = [pb.GetSkeysResponse, pb.SetSkeysRequest]

_start = st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1))
_count = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))
_encoding = st.one_of(st.integers(0, 4), st.integers(0, 2**31 - 1))
_data = st.one_of(st.binary(max_size=40), st.integers(0, 20_000).map(bytes))
_crc32 = st.integers(0, 2**32 - 1)
_fields = st.tuples(_start, _count, _encoding, _data, _crc32)

Fields = tuple[int, int, int, bytes, int]


def _generated(message: Any, fields: Fields) -> bytes:
    start_gfn, count, encoding, data, crc32 = fields
    chunk: Any = pb.Chunk(start_gfn=start_gfn, count=count, data=data, crc32=crc32)
    chunk.encoding = encoding
    written: bytes = message(chunk=chunk).SerializeToString()
    return written


def _of(chunk: ChunkMessage | pb.Chunk) -> Fields:
    return chunk.start_gfn, chunk.count, chunk.encoding, bytes(chunk.data), chunk.crc32


def test_the_numbers_of_the_fields_are_those_of_the_contract() -> None:
    assert {field.name: field.number for field in pb.Chunk.DESCRIPTOR.fields} == wire.FIELDS
    kinds = [field.type for field in sorted(pb.Chunk.DESCRIPTOR.fields, key=lambda field: field.number)]
    field = type(pb.Chunk.DESCRIPTOR.fields[0])
    assert kinds == [field.TYPE_UINT64, field.TYPE_UINT32, field.TYPE_ENUM, field.TYPE_BYTES, field.TYPE_FIXED32]
    for message in MESSAGES:
        assert message.DESCRIPTOR.fields_by_name["chunk"].number == wire.CHUNK_FIELD
        assert message.DESCRIPTOR.fields_by_name["chunk"].containing_oneof.name == "part"


@pytest.mark.parametrize("message", MESSAGES)
@settings(deadline=None)
@given(_fields)
@example((0, 0, 0, b"", 0))
@example((2**64 - 1, 2**32 - 1, 2**31 - 1, b"\0" * 128, 2**32 - 1))
@example((0x100, 1 << 20, 1, bytes(1 << 20), 1))
def test_what_is_written_is_what_the_generated_class_writes(message: Any, fields: Fields) -> None:
    start_gfn, count, encoding, data, crc32 = fields
    half = len(data) // 2
    cuts: list[list[bytes | memoryview]] = [
        [data],
        [memoryview(data)],
        [data[:half], memoryview(data)[half:]],
        [b"", data],
    ]
    for pieces in cuts:
        assert chunk_message(start_gfn, count, encoding, pieces, crc32) == _generated(message, fields)


@pytest.mark.parametrize("message", MESSAGES)
@settings(deadline=None)
@given(_fields)
@example((0, 0, 0, b"", 0))
def test_what_a_generated_class_writes_is_read_without_it(message: Any, fields: Fields) -> None:
    found = read_chunk_message(_generated(message, fields))
    assert found is not None
    assert found.WhichOneof("part") == "chunk"
    assert _of(found.chunk) == fields


def test_the_data_is_not_copied() -> None:
    message = chunk_message(1, 4, 1, [b"\x10\x20\x30\x40"], 5)
    found = read_chunk_message(message)
    assert found is not None
    assert found.data.obj is message


@pytest.mark.parametrize(
    "other",
    [
        pb.SetSkeysRequest(),
        pb.SetSkeysRequest(commit=pb.SetSkeysRequest.Commit()),
        pb.SetSkeysRequest(header=pb.SetSkeysRequest.Header(vm="vms/a")),
        pb.GetSkeysResponse(trailer=pb.GetSkeysResponse.Trailer(keys=1)),
        pb.GetSkeysResponse(gap=pb.GetSkeysResponse.Gap(start_gfn=1, count=2)),
    ],
)
def test_a_message_without_a_chunk_is_left_to_the_generated_class(other: Any) -> None:
    assert read_chunk_message(other.SerializeToString()) is None


_GOOD = chunk_message(0x1234, 4, 1, [b"\x10\x20\x30\x40"], 0xDEADBEEF)


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(_GOOD + _GOOD, id="twice"),
        pytest.param(_GOOD + b"\x1a\x00", id="a commit too"),
        pytest.param(b"\x0a\x00" + _GOOD, id="a header too"),
        pytest.param(_GOOD[:1] + b"\xff" * 20, id="a varint without an end"),
        pytest.param(b"\x12\x03\x28\x01\x08", id="an unknown field"),
        pytest.param(b"\x12\x04\x10\x01\x08\x01", id="out of order"),
        pytest.param(b"\x12\x04\x08\x01\x08\x02", id="a field twice"),
        pytest.param(b"\x12\x0b\x18" + b"\xff" * 9 + b"\x01", id="an encoding below 0"),
        pytest.param(b"\x12\x06\x10" + b"\xff" * 4 + b"\x7f", id="a count of over 32 bits"),
        pytest.param(b"\x12\x03\x08\x80\x00" + b"", id="a longer varint than it must be"),
    ],
)
def test_what_is_unusual_is_left_to_the_generated_class_or_read_as_it_reads_it(message: bytes) -> None:
    _compare(pb.SetSkeysRequest, message)
    _compare(pb.GetSkeysResponse, message)


def _compare(generated: Any, message: bytes) -> None:
    found = read_chunk_message(message)
    if found is None:
        return
    expected = generated.FromString(message)
    assert expected.WhichOneof("part") == "chunk"
    assert _of(found) == _of(expected.chunk)
    assert not expected.chunk.DESCRIPTOR.fields_by_name.keys() - wire.FIELDS.keys()


@pytest.mark.parametrize("generated", MESSAGES)
@settings(max_examples=examples(400), deadline=None)
@given(_fields, st.data())
def test_a_message_that_was_changed_is_never_read_as_another_than_the_generated_class_reads(
    generated: Any, fields: Fields, data: st.DataObject
) -> None:
    message = bytearray(_generated(generated, fields))
    near_the_head = st.integers(0, min(len(message), 30))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(near_the_head)
        match data.draw(st.sampled_from(["replace", "insert", "remove", "cut", "append"])):
            case "replace":
                message[at : at + 1] = data.draw(st.binary(min_size=1, max_size=2))
            case "insert":
                message[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case "remove":
                del message[at : at + data.draw(st.integers(1, 4))]
            case "cut":
                del message[-data.draw(st.integers(1, 8)) :]
            case "append":
                message += data.draw(st.binary(min_size=1, max_size=8))
    _compare(generated, bytes(message))


@settings(max_examples=examples(400), deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_are_read_as_the_generated_class_reads_them(message: bytes) -> None:
    for tried in (message, b"\x12" + bytes([len(message)]) + message):
        _compare(pb.SetSkeysRequest, tried)


def test_every_cut_of_a_message_is_no_chunk() -> None:
    for end in range(len(_GOOD)):
        assert read_chunk_message(_GOOD[:end]) is None


def _chunk_of(fields: bytes) -> bytes:
    length = len(fields)
    assert length < 1 << 21
    return b"\x12" + bytes([length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14]) + fields


_DATA = b"\x22\x80\x80\x04" + bytes(1 << 16)


@pytest.mark.parametrize(
    "fields",
    [
        _DATA,
        b"\x2d\x07\0\0\0" + _DATA + b"\x10\x01\x08\x01",  # in another order
        _DATA + b"\x31" + bytes(8) + b"\x38\xff\x01",  # and fields of another version's
        b"\x78\x01" * (CHUNK_FIELDS_MAX - 1) + _DATA,
    ],
)
def test_a_chunk_of_few_fields_is_one_however_it_is_written(fields: bytes) -> None:
    message = _chunk_of(fields)
    assert is_one_chunk(message)
    assert bytes(pb.SetSkeysRequest.FromString(message).chunk.data) == bytes(1 << 16)
    assert not is_one_chunk(message + message)


@pytest.mark.parametrize(
    "fields",
    [
        b"\x78\x01" * CHUNK_FIELDS_MAX + _DATA,
        b"\x78\x01" * 500_000,  # numbers that no chunk has
        b"\x08\x01" * 500_000,  # one of its own, over and over
        b"\x7a\x00" * 500_000,  # strings that no chunk has
        b"\x22\x00" * 500_000,  # its data, over and over
        b"\x7b\x7c" * 500_000,  # groups
        b"\x7b" * 500_000 + b"\x7c" * 500_000,  # a group in a group in a group
        b"\x7b" + b"\x78\x01" * 500_000 + b"\x7c",  # many numbers in one group
        b"\x08" + b"\xff" * 1_000_000,  # no field at all
        _DATA + b"\x22\x7f",  # data that end after the message does
        _DATA + b"\x2d\0\0",  # a cut checksum
    ],
)
def test_what_takes_many_times_its_bytes_when_it_is_parsed_is_no_chunk(fields: bytes) -> None:
    # 4 MiB of the second take 482 MiB in protobuf 4.21's Python, and 72 s of an emulated CPU (seen on forky).
    message = _chunk_of(fields)
    assert not is_one_chunk(message)
    assert read_chunk_message(message) is None
