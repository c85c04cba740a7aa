"""Which encoding is chosen, and what comes of chunks in each."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skeyd.encoding import codec, runs, zstd
from skeyd.encoding.codec import KNOWN, RAW, RUNS, ZSTD, decode
from skeyd.errors import Reason, SkeydError
from skeyd.storage_key import only_key
from skeyd.v1 import storage_key_service_pb2 as pb
from tests.rpc.stubs import some_keys

LINUX_LIKE = b"".join(bytes([key]) * count for key, count in [(6, 190), (0, 30), (0x16, 61), (4, 119)] * 1000)
ALL = (RAW, RUNS, ZSTD)


def encode(keys: bytes, offered: Collection[int]) -> tuple[int, bytes]:
    return codec.encode(keys, offered, only_key(keys))


def test_the_numbers_are_those_of_the_contract() -> None:
    assert (RAW, RUNS, ZSTD) == (pb.ENCODING_RAW, pb.ENCODING_RUNS, pb.ENCODING_ZSTD)
    assert {RAW, RUNS} <= set(KNOWN) <= set(pb.Encoding.values()) - {pb.ENCODING_UNSPECIFIED}


def test_zstd_is_known_where_its_package_is() -> None:
    assert set(KNOWN) == set(ALL), "zstandard is there for the tests"


def check_choice(keys: bytes, offered: tuple[int, ...], chosen: int) -> None:
    encoding, data = encode(keys, offered)
    assert encoding == chosen
    assert decode(encoding, data, len(keys)) == keys


@pytest.mark.parametrize(
    ("keys", "offered", "chosen"),
    [
        (LINUX_LIKE, (), RAW),
        (LINUX_LIKE, (RAW,), RAW),
        (LINUX_LIKE, (RUNS,), RUNS),
        (b"\x10" * 262_144, (), RAW),
        (b"\x10" * 262_144, (RUNS,), RUNS),
        (b"\x10" * 262_144, ALL, RUNS),
        (some_keys(262_144), ALL, RAW),
        (b"\x10\x20" * 131_072, (RUNS,), RAW),
        (b"\x10", ALL, RAW),
        (b"\x10" * 3, ALL, RAW),
        (b"\x10" * 4, ALL, RUNS),
    ],
)
def test_the_encoding_is_one_that_was_offered_and_fits_the_keys(
    keys: bytes, offered: tuple[int, ...], chosen: int
) -> None:
    check_choice(keys, offered, chosen)


@pytest.mark.parametrize(
    ("keys", "offered"),
    [
        (LINUX_LIKE, (ZSTD,)),
        (LINUX_LIKE, ALL),
        (b"\x10" * 262_144, (ZSTD,)),
        (b"\x10\x20" * 131_072, ALL),
    ],
)
def test_zstd_is_chosen_where_it_was_offered_and_fits_the_keys(keys: bytes, offered: tuple[int, ...]) -> None:
    check_choice(keys, offered, ZSTD)


def test_linux_like_keys_take_a_tenth_of_the_bytes_as_runs() -> None:
    assert len(encode(LINUX_LIKE, (RUNS,))[1]) <= len(LINUX_LIKE) / 10


def test_zstd_takes_a_tenth_of_the_bytes_for_linux_like_keys() -> None:
    assert len(encode(LINUX_LIKE, (ZSTD,))[1]) <= len(LINUX_LIKE) / 10


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=3000), st.sets(st.sampled_from([0, 1, 2, 3, 77])))
@example(bytes(128) + some_keys(8 * 128) + bytes(100), {2})
def test_any_keys_come_back_and_never_take_more_bytes_than_raw(keys: bytes, offered: set[int]) -> None:
    encoding, data = encode(keys, offered)
    assert encoding == RAW or encoding in offered
    assert (len(data) < len(keys)) if encoding != RAW else (data is keys)
    assert decode(encoding, data, len(keys)) == keys
    assert encode(keys, offered) == (encoding, data)


@pytest.fixture
def misleading() -> bytes:
    """Make keys of which one is looked at, and what lies between is noise."""
    keys = bytearray(some_keys(1 << 20))
    for at in range(0, 1 << 20, 1 << 16):
        keys[at : at + 1024] = bytes(1024)
    return bytes(keys)


def test_a_sample_that_misleads_costs_no_bytes(misleading: bytes) -> None:
    assert runs.guess((misleading,)) < 0.1
    assert encode(misleading, (RUNS,)) == (RAW, misleading)


def test_zstd_costs_no_bytes_where_a_sample_misleads(misleading: bytes) -> None:
    assert zstd.guess((misleading,)) < 0.1
    assert encode(misleading, (ZSTD,)) == (RAW, misleading)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [0, 4, 77, 2**31 - 1, -1])
def test_an_encoding_that_there_is_not_is_refused_and_the_known_ones_are_named(encoding: int) -> None:
    with pytest.raises(SkeydError) as refused:
        decode(encoding, b"\x10", 1)
    assert refused.value.reason is Reason.ENCODING_UNSUPPORTED
    assert str(encoding) in refused.value.message
    assert "ENCODING_RUNS" in refused.value.message


def test_without_its_package_zstd_is_neither_written_nor_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "KNOWN", (RAW, RUNS))
    monkeypatch.setattr(zstd, "AVAILABLE", False)
    assert encode(LINUX_LIKE, ALL)[0] == RUNS
    with pytest.raises(SkeydError, match="ENCODING_ZSTD") as refused:
        decode(ZSTD, b"\x10", 10)
    assert refused.value.reason is Reason.ENCODING_UNSUPPORTED


@pytest.mark.parametrize(("data", "count"), [(b"", 1), (b"\x10", 2), (b"\x10\x10", 1)])
def test_raw_keys_of_another_number_are_refused(data: bytes, count: int) -> None:
    with pytest.raises(SkeydError) as refused:
        decode(RAW, data, count)
    assert refused.value.reason is Reason.CHUNK_SIZE_MISMATCH


# One Zstandard frame: of no dictionary and one segment, 100 keys, and of these one block of one key.
ZSTD_FRAME = bytes.fromhex("28b52ffd 20 64 230300 10")


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b"", 1),
        (b"\0\0\x10", 1),  # right, and longer than the key itself
        (b"\x02\0\x10", 3),  # as long
        (b"\x03\0\x10", 5),
        (ZSTD_FRAME, 100),
    ],
)
def test_data_that_is_no_runs_is_refused_and_the_encoding_named(data: bytes, count: int) -> None:
    check_refusal(RUNS, data, count)


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (ZSTD_FRAME, 9),
        (ZSTD_FRAME, 10),
        (ZSTD_FRAME, 101),
        (b"\x10" * 9, 100),
        (b"\x03\0\x10", 4),
    ],
)
def test_zstd_data_that_is_not_the_keys_is_refused_and_the_encoding_named(data: bytes, count: int) -> None:
    assert decode(ZSTD, ZSTD_FRAME, 100) == b"\x10" * 100
    check_refusal(ZSTD, data, count)


def check_refusal(encoding: int, data: bytes, count: int) -> None:
    with pytest.raises(SkeydError) as refused:
        decode(encoding, data, count)
    assert refused.value.reason is Reason.CHUNK_ENCODING_INVALID
    assert pb.Encoding.Name(encoding) in refused.value.message  # type: ignore[arg-type]  # any number does
