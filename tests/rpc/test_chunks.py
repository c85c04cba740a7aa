"""A chunk from the worker's memory to the wire."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skeyd.encoding.codec import RAW, RUNS, ZSTD, decode
from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.rpc.chunks import write_down
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.vms.read_ahead import ChunkRead
from tests.examples import examples
from tests.rpc.stubs import some_keys

_runs = st.lists(st.tuples(st.sampled_from(range(0, 256, 2)), st.integers(1, 400)), min_size=1, max_size=12).map(
    lambda pairs: b"".join(bytes([key]) * count for key, count in pairs)
)
_keys = st.one_of(_runs, st.integers(1, 4000).map(some_keys))


class Held(ChunkRead):
    """A chunk in pieces that notes whether it was released."""

    def __init__(self, start: int, keys: bytes, cut: int = 0) -> None:
        view = memoryview(bytearray(keys))
        self.released = 0
        super().__init__(GfnRange(start, len(keys)), (view[:cut], view[cut:]) if cut else (view,), self._count)

    def _count(self) -> None:
        self.released += 1


@settings(deadline=None)
@given(_keys, st.integers(0, 4000), st.integers(0, 2**64 - 2**16), st.sets(st.sampled_from([RAW, RUNS, ZSTD])))
@example(b"\x10" * 5000, 0, 0, {RUNS})
@example(b"\x10" * 5000, 2500, 0, {RUNS})
@example(b"\x10" * 5000, 5000, 0, set())
@example(b"\x10" * 2500 + b"\x20" * 2500, 2500, 0, {RUNS})
def test_a_chunk_is_its_keys_in_one_of_the_encodings_and_is_released(
    keys: bytes, cut: int, start: int, encodings: set[int]
) -> None:
    held = Held(start, keys, min(cut, len(keys)))
    message, crc32 = write_down(held, encodings)
    chunk = pb.GetSkeysResponse.FromString(message).chunk
    assert crc32 == chunk.crc32 == zlib.crc32(keys)
    assert (chunk.start_gfn, chunk.count) == (start, len(keys))
    assert chunk.encoding == RAW or chunk.encoding in encodings
    assert decode(chunk.encoding, chunk.data, chunk.count) == keys
    assert held.released == 1
    assert held.views == ()


_HALF_NOISE = b"\x10" * 6000 + some_keys(4000)
"""Whether it is worth an encoding depends on where one looks."""


@settings(max_examples=examples(200), deadline=None)
@given(
    st.lists(_keys, min_size=1, max_size=4).map(b"".join),
    st.integers(0, 16_000),
    st.sets(st.sampled_from([RAW, RUNS, ZSTD])),
    _keys,
)
@example(_HALF_NOISE, 2500, {ZSTD}, b"\x10")
@example(_HALF_NOISE, 6000, {ZSTD}, b"\x10")
@example(_HALF_NOISE[::-1], 5000, {ZSTD}, b"\x10")
@example(b"\x10" * 39_000 + some_keys(1000), 38_000, {RUNS}, b"\x10")
@example(b"\x10" * 20_000 + b"\x20\x30" * 1000, 20_000, {RUNS}, b"\x10")
@example(b"\x10" * 5000, 2500, {RUNS, ZSTD}, b"\x10")
def test_a_chunk_is_the_same_bytes_wherever_the_ring_ends_and_whatever_was_before(
    keys: bytes, cut: int, encodings: set[int], before: bytes
) -> None:
    whole = write_down(Held(0x40, keys), encodings)
    write_down(Held(0, before), encodings)
    assert write_down(Held(0x40, keys, min(cut, len(keys))), encodings) == whole


@pytest.mark.parametrize(
    ("keys", "encoding"),
    [
        pytest.param(b"\x10" * 5000, RUNS, id="runs"),
        pytest.param((b"\x10" * 90 + b"\x20" * 90) * 90, ZSTD, id="zstd"),
    ],
)
def test_what_is_like_a_guests_keys_is_encoded(keys: bytes, encoding: int) -> None:
    message, _ = write_down(Held(0, keys), {RUNS, ZSTD})
    assert pb.GetSkeysResponse.FromString(message).chunk.encoding == encoding
    assert len(message) < len(keys) / 10


@pytest.mark.parametrize(
    ("keys", "cut", "named"),
    [
        (b"\x11", 0, "0x40"),
        (b"\xff" * 10, 0, "0x40"),
        (b"\x10\x10\x11\x10", 0, "0x42"),
        (b"\x10\x10\x10\x11", 2, "0x43"),
        (b"\x10\x11\x10\x20", 1, "0x41"),
    ],
)
def test_keys_that_no_kernel_has_are_not_written_down(keys: bytes, cut: int, named: str) -> None:
    with pytest.raises(SkeydError, match=f"gfn {named}$") as refused:
        write_down(Held(0x40, keys, cut), {RUNS})
    assert refused.value.reason is Reason.WORKER_FAILED


def test_a_guest_that_stops_using_keys_is_an_error() -> None:
    with pytest.raises(SkeydError, match="0x40-0x43") as refused:
        write_down(ChunkRead(GfnRange(0x40, 4), None), {RUNS})
    assert refused.value.reason is Reason.WORKER_FAILED
