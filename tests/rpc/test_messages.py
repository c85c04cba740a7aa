"""Messages that carry keys are taken apart without a copy, and are what the generated class makes of them."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import grpc
import pytest

from skeyd import limits
from skeyd.errors import Reason, SkeydError
from skeyd.rpc.messages import PARSERS, bounded, set_skeys_request
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.wire import ChunkMessage
from tests.rpc.stubs import SECONDS, Stubs, chunk, commit, header, new_id, ranges, refused


def test_a_chunk_is_taken_apart_and_its_keys_are_the_messages_own_bytes() -> None:
    message = chunk(0x100, b"\x10\x20").SerializeToString()
    found = set_skeys_request(message)
    assert isinstance(found, ChunkMessage)
    assert found.WhichOneof("part") == "chunk"
    assert (found.chunk.start_gfn, found.chunk.count, bytes(found.chunk.data)) == (0x100, 2, b"\x10\x20")
    assert found.chunk.data.obj is message


@pytest.mark.parametrize("request_", [header("vms/a", (0, 4)), commit(), pb.SetSkeysRequest()])
def test_all_else_is_a_message_of_the_generated_class(request_: pb.SetSkeysRequest) -> None:
    assert set_skeys_request(request_.SerializeToString()) == request_


def test_a_chunk_that_is_written_in_another_way_is_the_same_chunk() -> None:
    twice = chunk(1, b"\x10").SerializeToString() + chunk(2, b"\x20\x30").SerializeToString()
    assert set_skeys_request(twice) == pb.SetSkeysRequest.FromString(twice)


def test_what_is_no_message_is_an_error() -> None:
    with pytest.raises(Exception, match=r"[Pp]ars|[Dd]ecod|[Tt]runcated"):
        set_skeys_request(b"\xff\xff\xff")


# --- what is too large to be parsed --------------------------------------------------------------------------------

_LARGEST = [(at << 45, (1 << 45) - 1) for at in range(limits.MAX_RANGES)]
"""As many ranges as may be, with numbers as long as they can be."""


def test_every_method_with_ranges_has_a_parser_and_its_largest_request_fits() -> None:
    service = pb.DESCRIPTOR.services_by_name["StorageKeyService"]
    with_ranges = {one.name for one in service.methods if "ranges" in one.input_type.fields_by_name}
    assert set(PARSERS) == {*with_ranges, "SetSkeys"}
    name = "vms/" + "a" * 63
    ranges = [pb.SetSkeysRequest(header=header("", one).header).header.ranges[0] for one in _LARGEST]
    resume = pb.GetSkeysRequest.Resume(gfn=2**64 - 1, incarnation="0" * 32, crc32=1)
    for message in (
        pb.GetSkeysRequest(vm=name, ranges=ranges, encodings=[1, 2, 3], resume=resume),  # type: ignore[list-item]
        pb.DigestSkeysRequest(vm=name, ranges=ranges),
        pb.SummarizeSkeysRequest(vm=name, ranges=ranges),
    ):
        method = type(message).__name__.removesuffix("Request")
        assert PARSERS[method](message.SerializeToString()) == message
    whole = header(name, *_LARGEST, request_id="r" * 128)
    assert set_skeys_request(whole.SerializeToString()) == whole


def _hostile(method: str, size: int) -> bytes:
    """Write ranges of two bytes each, which take the most memory when they are parsed."""
    ranges = b"\x12\x00" * (size // 2)
    if method != "SetSkeys":
        return ranges
    head = b"\x0a" + bytes([len(ranges) & 0x7F | 0x80, len(ranges) >> 7 & 0x7F | 0x80, len(ranges) >> 14])
    assert len(ranges) < 1 << 21
    return head + ranges


@pytest.mark.parametrize("method", sorted(PARSERS))
def test_a_message_of_too_many_ranges_is_refused_before_memory_is_spent(method: str) -> None:
    message = _hostile(method, 1 << 20)
    tracemalloc.start()
    before = _resident()
    try:
        with pytest.raises(SkeydError, match=str(len(message))) as refused:
            PARSERS[method](message)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.value.reason is Reason.REQUEST_INVALID
    assert str(limits.MAX_RANGES_BYTES) in refused.value.message
    assert peak < 400_000, "of Python's: pytest and re take some; a message of half a million parts takes tens of MiB"
    assert _resident() - before < 4 << 20, "of protobuf's, which is in C: it would be some 20 MiB"


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("size", [limits.MAX_RANGES_BYTES, limits.MAX_RANGES_BYTES + 2])
def test_the_limit_is_a_limit_and_no_less(size: int) -> None:
    message = _hostile("GetSkeys", size)
    if size <= limits.MAX_RANGES_BYTES:
        assert len(PARSERS["GetSkeys"](message).ranges) == size // 2
    else:
        with pytest.raises(SkeydError):
            PARSERS["GetSkeys"](message)


def test_a_large_chunk_is_a_chunk_however_it_is_written() -> None:
    keys = bytes(1 << 20)
    backwards = b"".join(
        pb.Chunk(**{field: value}).SerializeToString()  # type: ignore[arg-type]
        for field, value in (("crc32", 7), ("data", keys), ("count", 1 << 20))
    )
    whole = b"\x12\x8d\x80\x40" + backwards
    found = set_skeys_request(whole)
    assert (found.chunk.count, found.chunk.data, found.chunk.crc32) == (1 << 20, keys, 7)
    with pytest.raises(SkeydError):
        set_skeys_request(whole + b"\x12\x00")


@pytest.mark.parametrize(
    "message",
    [
        b"\x12",
        b"\x12" + b"\xff" * 600_000,
        b"\xff" * 600_000,
        b"\x12\x00" * 300_000,
        b"\x12\xc0\xcf\x24" + b"\x78\x01" * 300_000,
    ],
)
def test_what_only_begins_like_a_chunk_has_the_limit_of_all_others(message: bytes) -> None:
    with pytest.raises(Exception) as refused:  # noqa: PT011  protobuf's own for the short one
        set_skeys_request(message)
    assert isinstance(refused.value, SkeydError) == (len(message) > limits.MAX_RANGES_BYTES)


def test_a_message_of_any_other_kind_has_a_lower_limit() -> None:
    assert bounded(bytes)(bytes(limits.MAX_REQUEST_BYTES)) == bytes(limits.MAX_REQUEST_BYTES)
    with pytest.raises(SkeydError, match=str(limits.MAX_REQUEST_BYTES)) as refused:
        bounded(bytes)(bytes(limits.MAX_REQUEST_BYTES + 1))
    assert refused.value.reason is Reason.REQUEST_INVALID


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("StorageKeyService/GetSkeys", b"\x12\x00" * 1_000_000),
        ("StorageKeyService/SetSkeys", _hostile("SetSkeys", 1_500_000)),
        ("StorageKeyService/GetSkey", b"\x0a\xff\xff\x3f" + b"a" * 0xFFFFF),
        ("VmService/CreateVm", b"\x0a\xff\xff\x3f" + b"a" * 0xFFFFF),
        ("VmService/CreateVm", b"\x1a\x00" * 1_000_000),
        ("HostService/GetHost", bytes(100_000)),
        ("NoService/NoMethod", bytes(1 << 20)),
    ],
)
def test_the_daemon_refuses_what_is_too_large_and_says_how_large_it_was(
    stubs: Stubs, method: str, message: bytes
) -> None:
    call: Any = stubs.channel.stream_stream(f"/skeyd.v1.{method}")
    if method == "NoService/NoMethod":
        with pytest.raises(grpc.RpcError) as error:
            list(call(iter([message]), timeout=SECONDS))
        assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED
        return
    found = refused(lambda: list(call(iter([message]), timeout=SECONDS)))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
    assert f"a message of {len(message)} bytes" in found.message
    assert "has use for" in found.message


@pytest.mark.timeout(600)
def test_the_most_ranges_of_all_are_read(stubs: Stubs) -> None:
    # On an emulated host so many ioctls and chunks take over a minute.
    vm = stubs.create(new_id(), (0, 256)).name
    wanted = [(4 * at, 3) for at in range(limits.MAX_RANGES)]
    stubs.set(vm, [(0, bytes(65_536))])
    *_, trailer = stubs.keys.GetSkeys(pb.GetSkeysRequest(vm=vm, ranges=ranges(*wanted)), timeout=300)
    assert trailer.trailer.keys == 3 * limits.MAX_RANGES
    stubs.delete(vm)
