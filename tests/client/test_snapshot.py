"""Snapshot files: whole, or recognised as not whole."""

from __future__ import annotations

import json
import os
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skeyd.client import Keys, Snapshot, SnapshotError, StreamError, write_snapshot
from skeyd.client.reading import KeyStream
from skeyd.client.snapshot import MAGIC
from skeyd.gfn import GfnRange
from skeyd.v1 import storage_key_service_pb2 as pb
from tests.client.lying_daemon import chunk, gap, header, trailer
from tests.examples import examples
from tests.rpc.stubs import some_keys

ONE, TWO = some_keys(4, 1), some_keys(2, 2)
PARTS = [header((0, 4), (8, 4)), chunk(0, ONE), chunk(8, TWO), gap(10, 2), trailer(ONE + TWO, 2)]


def stream(parts: Iterable[pb.GetSkeysResponse] = PARTS) -> KeyStream:
    return KeyStream(iter(parts))


def read(path: Path) -> list[Keys]:
    """Read a file twice, as `load` does: to verify it, and then for its keys."""
    with Snapshot(path) as snapshot:
        snapshot.verify()
        return list(snapshot.keys())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Write a small whole file."""
    path = tmp_path / "a.skeys"
    assert write_snapshot(path, stream()) == 6
    return path


def test_what_was_written_is_what_is_read(path: Path) -> None:
    with Snapshot(path) as snapshot:
        assert snapshot.uses_storage_keys
        assert list(snapshot.verify()) == [GfnRange(0, 4), GfnRange(8, 2)]
        for _ in range(2):  # as often as one likes
            assert list(snapshot.keys()) == [Keys(GfnRange(0, 4), ONE), Keys(GfnRange(8, 2), TWO)]
        assert snapshot.header["vm"] == "vms/a"
        assert snapshot.header["ranges"] == [[0, 4], [8, 4]]
        assert snapshot.header["frame_size"] == 4096


def test_keys_that_touch_are_one_range(tmp_path: Path) -> None:
    parts = [header((5, 4)), chunk(5, ONE[:1]), chunk(6, ONE[1:]), trailer(ONE)]
    write_snapshot(tmp_path / "a", stream(parts))
    with Snapshot(tmp_path / "a") as snapshot:
        assert list(snapshot.verify()) == [GfnRange(5, 4)]


def test_a_guest_without_keys_makes_a_file_without_keys(tmp_path: Path) -> None:
    assert write_snapshot(tmp_path / "a", stream([header((0, 4), uses_keys=False), trailer(b"")])) == 0
    with Snapshot(tmp_path / "a") as snapshot:
        assert not snapshot.uses_storage_keys
        assert len(snapshot.verify()) == 0


@settings(max_examples=examples(50), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_stream_can_be_written_and_read(tmp_path: Path, data: st.DataObject) -> None:
    parts, keys, at = [], b"", data.draw(st.integers(0, 2**63))
    begin, gaps = at, 0
    for size in data.draw(st.lists(st.integers(1, 600), min_size=1, max_size=8)):
        if data.draw(st.booleans()):
            parts.append(gap(at, size))
            gaps += size
        else:
            part = some_keys(size, data.draw(st.integers(0, 99)))
            parts.append(chunk(at, part))
            keys += part
        at += size
    told: list[int] = []
    saved = write_snapshot(
        tmp_path / "a", stream([header((begin, at - begin)), *parts, trailer(keys, gaps)]), told.append
    )
    assert saved == len(keys)
    assert told[-1] == at - begin
    found = read(tmp_path / "a")
    assert [(one.frames.start, one.keys) for one in found] == [
        (one.chunk.start_gfn, one.chunk.data) for one in parts if one.WhichOneof("part") == "chunk"
    ]


def test_a_file_cut_at_any_byte_is_recognised(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(SnapshotError) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "byte" in str(caught.value)


@pytest.mark.parametrize("change", [0xFF, 0x01, 0x80], ids=hex)
def test_a_file_with_any_byte_changed_is_recognised(path: Path, change: int) -> None:
    whole = path.read_bytes()
    for index in range(len(whole)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ change]) + whole[index + 1 :])
        with pytest.raises(SnapshotError):
            read(path)


@settings(max_examples=examples(200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(begin=st.integers(0, 400), length=st.integers(0, 60), other=st.binary(max_size=60))
def test_a_file_with_any_stretch_replaced_is_recognised(path: Path, begin: int, length: int, other: bytes) -> None:
    whole = file_of(HEADER, *RECORDS)
    changed = whole[:begin] + other + whole[begin + length :]
    path.write_bytes(changed)
    if changed == whole:
        assert len(read(path)) == 2
        return
    with pytest.raises(SnapshotError):
        read(path)


@pytest.mark.parametrize("more", [b"\0", b"K", b"\n"])
def test_what_follows_the_end_is_recognised(path: Path, more: bytes) -> None:
    path.write_bytes(path.read_bytes() + more)
    with pytest.raises(SnapshotError, match="goes on after its end"):
        read(path)


# Files that are made by somebody who knows how: every checksum is right, and something else is wrong.


def record(kind: bytes, payload: bytes) -> bytes:
    head = kind + struct.pack(">I", len(payload))
    return head + payload + struct.pack(">I", zlib.crc32(head + payload))


def keys_record(start: int, keys: bytes) -> bytes:
    return record(b"K", struct.pack(">Q", start) + keys)


def end_record(keys: bytes, count: int | None = None) -> bytes:
    return record(b"E", struct.pack(">QI", len(keys) if count is None else count, zlib.crc32(keys)))


def header_record(**other: Any) -> bytes:
    return record(b"H", json.dumps({"format": 1, "uses_storage_keys": True, **other}).encode())


def file_of(*records: bytes) -> bytes:
    return MAGIC + b"".join(records)


HEADER = header_record()
RECORDS = (keys_record(0, ONE), keys_record(8, TWO), end_record(ONE + TWO))
MADE_BY_HAND = {
    "empty": b"",
    "magic-only": MAGIC,
    "another-magic": b"PNG" + file_of(HEADER, *RECORDS)[3:],
    "magic-in-text-mode": file_of(HEADER, *RECORDS).replace(b"\n", b"\r\n"),
    "no-header": file_of(*RECORDS),
    "header-only": file_of(HEADER),
    "header-is-no-json": file_of(record(b"H", b"{"), *RECORDS),
    "header-is-no-utf-8": file_of(record(b"H", b'"\xff"'), *RECORDS),
    "header-is-no-object": file_of(record(b"H", b"[]"), *RECORDS),
    "header-is-nested-deeply": file_of(record(b"H", b"[" * 200_000), *RECORDS),
    "header-has-a-long-number": file_of(record(b"H", b"9" * 100_000), *RECORDS),
    "header-of-another-format": file_of(header_record(format=2), *RECORDS),
    "header-of-no-format": file_of(record(b"H", b'{"uses_storage_keys": true}'), *RECORDS),
    "header-does-not-say-whether": file_of(record(b"H", b'{"format": 1}'), *RECORDS),
    "header-says-whether-with-a-number": file_of(header_record(uses_storage_keys=1), *RECORDS),
    "header-twice": file_of(HEADER, HEADER, *RECORDS),
    "header-in-the-middle": file_of(HEADER, RECORDS[0], HEADER, *RECORDS[1:]),
    "record-left-out": file_of(HEADER, RECORDS[0], RECORDS[2]),
    "record-twice": file_of(HEADER, RECORDS[0], *RECORDS),
    "record-without-keys": file_of(HEADER, keys_record(0, b""), *RECORDS),
    "record-without-a-start": file_of(HEADER, record(b"K", b"\0" * 7), *RECORDS),
    "records-the-wrong-way-round": file_of(HEADER, RECORDS[1], RECORDS[0], end_record(TWO + ONE)),
    "records-that-overlap": file_of(HEADER, keys_record(0, ONE), keys_record(3, TWO), RECORDS[2]),
    "equal-records-the-wrong-way-round": file_of(
        HEADER, keys_record(8, TWO), keys_record(0, TWO), end_record(TWO + TWO)
    ),
    "range-beyond-2^64": file_of(HEADER, keys_record(2**64 - 3, ONE), end_record(ONE)),
    "reserved-bit": file_of(HEADER, keys_record(0, b"\x10\x11"), end_record(b"\x10\x11")),
    "more-keys-than-a-chunk-can-have": file_of(
        HEADER, keys_record(0, bytes((1 << 20) + 1)), end_record(bytes((1 << 20) + 1))
    ),
    "a-kind-that-there-is-not": file_of(HEADER, record(b"X", b""), *RECORDS),
    "record-that-claims-4-gib": file_of(HEADER, b"K\xff\xff\xff\xff"),
    "end-counts-wrong": file_of(HEADER, *RECORDS[:2], end_record(ONE + TWO, 5)),
    "end-of-other-keys": file_of(HEADER, *RECORDS[:2], end_record(TWO + ONE)),
    "end-too-short": file_of(HEADER, *RECORDS[:2], record(b"E", b"\0" * 11)),
    "end-too-long": file_of(HEADER, *RECORDS[:2], record(b"E", struct.pack(">QI", 6, zlib.crc32(ONE + TWO)) + b"\0")),
    "no-end": file_of(HEADER, *RECORDS[:2]),
    "end-twice": file_of(HEADER, *RECORDS, RECORDS[2]),
}


def test_a_file_made_by_hand_as_the_format_says_is_read(path: Path) -> None:
    """The maker above all: what is wrong below is wrong by one thing each."""
    path.write_bytes(file_of(HEADER, *RECORDS))
    assert read(path) == [Keys(GfnRange(0, 4), ONE), Keys(GfnRange(8, 2), TWO)]


@pytest.mark.usefixtures("open_fds")
@pytest.mark.parametrize("content", MADE_BY_HAND.values(), ids=MADE_BY_HAND)
def test_what_is_no_snapshot_is_a_snapshot_error_and_no_other(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(SnapshotError) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", [name for name in MADE_BY_HAND if "way-round" in name or "overlap" in name])
def test_keys_that_do_not_ascend_are_recognised_when_they_are_reached(path: Path, name: str) -> None:
    path.write_bytes(MADE_BY_HAND[name])
    with Snapshot(path) as snapshot, pytest.raises(SnapshotError, match="out of order"):
        list(snapshot.keys())


def test_what_was_asked_for_is_known(path: Path) -> None:
    with Snapshot(path) as snapshot:
        assert list(snapshot.ranges()) == [GfnRange(0, 4), GfnRange(8, 4)]


@pytest.mark.parametrize(
    "ranges",
    [
        *(None, [], {}, 5, "ab", ["ab"], [[0]], [[0, 1, 2]], [[0, 0]], [[-1, 2]], [[0, 4], [3, 1]], [[2**64 - 1, 2]]),
        *([[0, 1.5]], [[True, 1]], [["0", "1"]], [None], [[None, None]]),
    ],
    ids=repr,
)
def test_ranges_that_are_none_are_recognised(path: Path, ranges: object) -> None:
    path.write_bytes(file_of(header_record(ranges=ranges), *RECORDS))
    with Snapshot(path) as snapshot, pytest.raises(SnapshotError, match=r"header with.* ranges"):
        snapshot.ranges()


def test_a_header_that_does_not_say_what_was_asked_for_is_recognised(path: Path) -> None:
    path.write_bytes(file_of(HEADER, *RECORDS))
    with Snapshot(path) as snapshot, pytest.raises(SnapshotError, match="impossible ranges"):
        snapshot.ranges()


def test_the_largest_record_there_can_be_is_read(path: Path) -> None:
    keys = some_keys(1 << 20)
    path.write_bytes(file_of(HEADER, keys_record(0, keys), end_record(keys)))
    assert read(path) == [Keys(GfnRange(0, 1 << 20), keys)]


def test_a_file_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Snapshot(tmp_path / "nothing")


# Writing that fails


class FullDiskError(OSError):
    pass


def cut_stream() -> Iterator[pb.GetSkeysResponse]:
    yield from PARTS[:2]


def failing_stream() -> Iterator[pb.GetSkeysResponse]:
    yield from PARTS[:2]
    raise FullDiskError


def interrupted_stream() -> Iterator[pb.GetSkeysResponse]:
    yield from PARTS[:2]
    raise KeyboardInterrupt


@pytest.mark.usefixtures("open_fds")
@pytest.mark.parametrize("old", [None, b"what was there before"], ids=["no-file-before", "a-file-before"])
@pytest.mark.parametrize(
    ("parts", "error"),
    [(cut_stream, StreamError), (failing_stream, FullDiskError), (interrupted_stream, KeyboardInterrupt)],
)
def test_writing_that_fails_leaves_nothing_and_keeps_what_was_there(
    tmp_path: Path, parts: Any, error: type[BaseException], old: bytes | None
) -> None:
    path = tmp_path / "a.skeys"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(error):
        write_snapshot(path, stream(parts()))
    assert list(tmp_path.iterdir()) == ([path] if old is not None else [])
    assert old is None or path.read_bytes() == old


def test_a_directory_in_the_files_place_is_left_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.skeys"
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        write_snapshot(path, stream())
    assert list(tmp_path.iterdir()) == [path]


def test_writing_into_a_directory_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_snapshot(tmp_path / "nothing" / "a", stream())


@pytest.mark.usefixtures("open_fds")
def test_a_file_is_replaced_whole_and_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "a.skeys"
    path.write_bytes(b"old")
    held = path.open("rb")
    before = os.umask(0)
    try:
        write_snapshot(path, stream())
    finally:
        os.umask(before)
    with held:
        assert held.read() == b"old", "who has the old file open goes on reading it"
    assert len(read(path)) == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
