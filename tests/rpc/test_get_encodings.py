"""Encodings and the time of a slice, as GetSkeys is asked for them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import grpc
import pytest

from skeyd.encoding import codec
from skeyd.v1 import storage_key_service_pb2 as pb
from tests.daemon import DaemonProcess
from tests.rpc.stubs import SECONDS, Stubs, new_id, refused, some_keys

RAW, RUNS, ZSTD = pb.ENCODING_RAW, pb.ENCODING_RUNS, pb.ENCODING_ZSTD
CHUNK = 16_384
LINUX_LIKE = b"".join(bytes([key]) * count for key, count in [(6, 190), (0, 30), (0x16, 61), (4, 119)] * 41)[:CHUNK]
KEYS = {"one key": b"\x10" * CHUNK, "like Linux": LINUX_LIKE, "random": some_keys(CHUNK, 9)}


@pytest.fixture(scope="module")
def vm(stubs: Stubs) -> Iterator[str]:
    """Make a VM with a chunk of each kind of keys."""
    name = stubs.create(new_id(), (0, 3 * CHUNK // 256)).name
    stubs.set(name, [(0, b"".join(KEYS.values()))])
    yield name
    stubs.delete(name)


def _read(
    stubs: Stubs, vm: str, encodings: list[int]
) -> tuple[pb.GetSkeysResponse.Header, list[pb.Chunk], pb.GetSkeysResponse.Trailer]:
    request = pb.GetSkeysRequest(vm=vm, max_chunk_keys=CHUNK)
    request.encodings.extend(encodings)  # type: ignore[arg-type]  # numbers that there are not, too
    first, *chunks, last = stubs.keys.GetSkeys(request, timeout=SECONDS)
    return first.header, [one.chunk for one in chunks], last.trailer


@pytest.mark.parametrize(
    ("offered", "told", "chosen"),
    [
        ([], [RAW], [RAW, RAW, RAW]),
        ([RAW], [RAW], [RAW, RAW, RAW]),
        ([RUNS], [RAW, RUNS], [RUNS, RUNS, RAW]),
        pytest.param([ZSTD], [RAW, ZSTD], [ZSTD, ZSTD, RAW], id="zstd"),
        pytest.param([ZSTD, RUNS, RAW, RUNS], [RAW, RUNS, ZSTD], [RUNS, ZSTD, RAW], id="zstd and others"),
        ([77, RUNS, 2**31 - 1, -5], [RAW, RUNS], [RUNS, RUNS, RAW]),
        ([77], [RAW], [RAW, RAW, RAW]),
    ],
)
def test_chunks_have_encodings_that_were_offered_and_the_header_tells_of(
    stubs: Stubs, vm: str, offered: list[int], told: list[int], chosen: list[int]
) -> None:
    header, chunks, trailer = _read(stubs, vm, offered)
    assert list(header.encodings) == told
    assert [chunk.encoding for chunk in chunks] == chosen
    for chunk, keys in zip(chunks, KEYS.values(), strict=True):
        assert codec.decode(chunk.encoding, chunk.data, chunk.count) == keys
        assert (chunk.count, chunk.crc32) == (CHUNK, zlib.crc32(keys))
        if chunk.encoding != RAW:
            assert len(chunk.data) <= CHUNK / 10
    assert trailer.crc32 == zlib.crc32(b"".join(KEYS.values()))


def test_an_encoding_that_is_none_is_refused(stubs: Stubs, vm: str) -> None:
    found = refused(lambda: _read(stubs, vm, [RUNS, 0]))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
    assert "ENCODING_UNSPECIFIED" in found.message


@pytest.mark.parametrize(
    "encodings", [(), (codec.RAW,), (codec.RUNS,), codec.KNOWN, pytest.param((codec.ZSTD,), id="zstd")]
)
def test_the_client_reads_the_same_keys_in_any_encoding(
    shared_daemon: DaemonProcess, vm: str, encodings: tuple[int, ...]
) -> None:
    with shared_daemon.connect() as client, client.get_skeys(vm, max_chunk_keys=CHUNK, encodings=encodings) as stream:
        assert list(stream.header.encodings) == sorted({codec.RAW, *encodings})
        assert b"".join(part.keys for part in stream) == b"".join(KEYS.values())  # type: ignore[union-attr]


def test_the_client_offers_all_that_it_knows(shared_daemon: DaemonProcess, vm: str) -> None:
    with shared_daemon.connect() as client, client.get_skeys(vm) as stream:
        assert tuple(stream.header.encodings) == codec.KNOWN


# --- the time of a slice -------------------------------------------------------------------------------------------


def _limit(stubs: Stubs, vm: str, seconds: int | None, nanos: int = 0) -> tuple[int, int]:
    request = pb.GetSkeysRequest(vm=vm)
    if seconds is not None:
        request.max_slice_time.seconds, request.max_slice_time.nanos = seconds, nanos
    limit = next(iter(stubs.keys.GetSkeys(request, timeout=SECONDS))).header.max_slice_time
    return limit.seconds, limit.nanos


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ((None,), (0, 10_000_000)),
        ((0, 1), (0, 1)),
        ((0, 250_000), (0, 250_000)),
        ((0, 999_999_999), (0, 999_999_999)),
        ((1, 0), (1, 0)),
        ((1, 1), (1, 0)),
        ((2**63 - 1, 999_999_999), (1, 0)),
    ],
)
def test_the_header_tells_of_the_limit_that_holds(
    stubs: Stubs, vm: str, asked: tuple[int, ...], told: tuple[int, int]
) -> None:
    assert _limit(stubs, vm, *asked) == told


@pytest.mark.parametrize(
    ("seconds", "nanos"), [(0, 0), (-1, 0), (0, -1), (-(2**63), 0), (0, 1_000_000_000), (1, 2**31 - 1), (1, -1)]
)
def test_a_limit_that_is_no_time_over_zero_is_refused_and_named(
    stubs: Stubs, vm: str, seconds: int, nanos: int
) -> None:
    found = refused(lambda: _limit(stubs, vm, seconds, nanos))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
    assert f"{seconds} s and {nanos} ns" in found.message


def test_the_client_asks_for_the_limit_that_it_is_given(shared_daemon: DaemonProcess, vm: str) -> None:
    with shared_daemon.connect() as client, client.get_skeys(vm, slice_seconds=0.002) as stream:
        assert stream.header.max_slice_time.nanos == 2_000_000
        assert b"".join(part.keys for part in stream) == b"".join(KEYS.values())  # type: ignore[union-attr]
