"""From chunks to a guest's keys: what is wrong is refused before it is written."""

from __future__ import annotations

import zlib
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, Ranges
from skeyd.vms.pacing import FIRST_KEYS, GROWTH
from skeyd.vms.registry import Registry
from skeyd.vms.runtime import RuntimeDirectory
from skeyd.vms.starter import ChildStarter
from skeyd.vms.writing import KeysDigest, KeyWriting, Progress, WriteOptions
from skeyd.worker.protocol import SLICE_KEYS
from tests.examples import examples
from tests.processes import children, end
from tests.vms.fake_session import FakeSession
from tests.vms.fake_worker import FakeWorker, Slow
from tests.vms.sessions import opened
from tests.vms.writings import MEMORY, begin, error_of, new, refusal_of, write_chunk
from tests.worker.specs import simulated

# --- before the first chunk ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranges", "missing"),
    [
        ([(0xFF, 2)], "0xff"),
        ([(0x1FF, 2)], "0x200"),
        ([(0x100, 4), (0x300, 1)], "0x300"),
        ([(0x100, 0x401)], "0x200"),  # both ends have memory, the middle has none
    ],
)
def test_every_frame_of_every_range_must_have_memory(ranges: list[tuple[int, int]], missing: str) -> None:
    session = FakeSession(MEMORY, (0x500, 0x10))
    ours = new(session, *ranges)
    refused = error_of(ours, ours.begin)
    assert refused.reason is Reason.GFN_NOT_MAPPED
    assert refused.metadata == {"gfn": missing, "outcome": "UNCHANGED"}
    assert session.written == []
    assert session.calls == []


def test_keys_are_not_enabled_unless_that_is_allowed() -> None:
    session = FakeSession(MEMORY, uses_keys=False)
    ours = new(session, (0x100, 4), allow_enable=False)
    refused = error_of(ours, ours.begin)
    assert refused.reason is Reason.SKEYS_NOT_ENABLED
    assert "vms/web" in refused.message
    assert refused.metadata == {"outcome": "UNCHANGED"}
    assert session.written == []
    assert session.calls == []


@pytest.mark.parametrize("allow_enable", [False, True])
def test_what_is_allowed_is_what_the_worker_is_told(allow_enable: bool) -> None:
    session = FakeSession(MEMORY)
    write_chunk(begin(session, (0x100, 4), allow_enable=allow_enable), 0x100, b"\x10" * 4)
    assert session.written == [(GfnRange(0x100, 4), b"\x10" * 4, allow_enable)]


# --- a good stream -------------------------------------------------------------------------------------------------


def test_progress_says_where_the_next_chunk_begins_and_what_was_done() -> None:
    session = FakeSession(MEMORY, uses_keys=False)
    session.repaired = 1
    ours = begin(session, (0x100, 4), (0x110, 2))
    assert ours.progress == Progress(0x100, 0, 0, enabled=False, crc32=0)
    # Each knows the CRC-32 of all keys before it.
    first, second, third = (zlib.crc32(b"\x10\x20\x30\x40\x50\x60"[:end]) for end in (2, 4, 6))
    assert write_chunk(ours, 0x100, b"\x10\x20") == Progress(0x102, 2, 1, enabled=True, crc32=first)
    # The end of one range is the beginning of the next.
    assert write_chunk(ours, 0x102, b"\x30\x40") == Progress(0x110, 4, 2, enabled=True, crc32=second)
    assert write_chunk(ours, 0x110, b"\x50\x60") == Progress(0x112, 6, 3, enabled=True, crc32=third)
    assert ours.commit() == Progress(0x112, 6, 3, enabled=True, crc32=third)
    assert session.calls == ["begin", "commit"]
    assert session.committed == (6, third)
    assert [(frames, keys) for frames, keys, _ in session.written] == [
        (GfnRange(0x100, 2), b"\x10\x20"),
        (GfnRange(0x102, 2), b"\x30\x40"),
        (GfnRange(0x110, 2), b"\x50\x60"),
    ]


def test_a_chunk_larger_than_a_slice_is_written_in_slices() -> None:
    session = FakeSession((0, 4 * SLICE_KEYS))
    session.repaired = 2
    keys = bytes(range(0, 256, 2)) * (SLICE_KEYS // 128) + b"\x10\x20\x30"
    done = write_chunk(begin(session, (3, len(keys))), 3, keys)
    # The first of which nobody knows how long it takes; then as fast as it may grow.
    sizes = [FIRST_KEYS, GROWTH * FIRST_KEYS, SLICE_KEYS - 5 * FIRST_KEYS + 3]
    assert [len(part) for _, part, _ in session.written] == sizes
    assert [frames.count for frames, _, _ in session.written] == sizes
    assert b"".join(part for _, part, _ in session.written) == keys
    assert done == Progress(3 + len(keys), len(keys), 6, enabled=False, crc32=zlib.crc32(keys))


@pytest.mark.parametrize(("limit", "most"), [(1.0, SLICE_KEYS), (0.010, 66_560), (0.001, 6_656), (1e-9, 256)])
def test_slices_are_as_long_as_the_kernel_may_be_kept(limit: float, most: int) -> None:
    session = FakeSession((0, 8 * SLICE_KEYS))
    session.nanoseconds = lambda count: count * 150  # a key
    size = 4 * SLICE_KEYS
    options = WriteOptions(allow_enable=True, slice_seconds=limit)
    ours = KeyWriting(session, Ranges([GfnRange(0, size)]), options)
    ours.begin()
    write_chunk(ours, 0, bytes(size))
    sizes = [frames.count for frames, _, _ in session.written]
    assert sum(sizes) == size
    assert max(sizes[1:]) == most
    assert sizes[0] == FIRST_KEYS


@pytest.mark.parametrize(("limit", "most"), [(1.0, SLICE_KEYS), (0.010, 66_560), (0.001, 6_656)])
def test_the_slices_of_a_digest_are_as_long_as_the_kernel_may_be_kept(
    runtime_dir: Path, limit: float, most: int
) -> None:
    worker = Slow(150)
    expected = KeysDigest(b"\x10" * 32, with_referenced_changed=False)
    with FakeWorker(runtime_dir, worker), opened(runtime_dir) as session, pytest.raises(SkeydError) as refused:
        begin(session, (0, 4 * SLICE_KEYS), validate_only=True, expected=expected, slice_seconds=limit)
    assert refused.value.reason is Reason.EXPECTED_DIGEST_MISMATCH
    assert sum(worker.asked) == 4 * SLICE_KEYS
    assert worker.asked[0] == FIRST_KEYS
    assert max(worker.asked[1:]) == most


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20)), min_size=1, max_size=4),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 5),
)
@settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_key_of_every_range_is_written_once_in_order(
    steps: list[tuple[int, int]], sizes: list[int], slice_keys: int
) -> None:
    ranges, at = [], 0
    for gap, count in steps:
        ranges.append(GfnRange(at + gap, count))
        at += gap + count
    session = FakeSession((0, at))
    ours = begin(session, *((one.start, one.count) for one in ranges))
    with mock.patch.object(ours._pace, "took"):
        ours._pace.keys = slice_keys
        number = 0
        for one in ranges:
            gfn = one.start
            while gfn < one.end:
                count = min(sizes[number % len(sizes)], one.end - gfn)
                number += 1
                assert ours.progress.next_gfn == gfn
                write_chunk(ours, gfn, bytes(gfn * 2 % 256 for gfn in range(gfn, gfn + count)))
                gfn += count
    assert ours.commit().keys_set == sum(one.count for one in ranges)
    wanted = [(gfn, gfn * 2 % 256) for one in ranges for gfn in range(one.start, one.end)]
    assert [
        pair for frames, keys, _ in session.written for pair in zip(range(frames.start, frames.end), keys, strict=True)
    ] == wanted
    assert all(frames.count <= slice_keys for frames, _, _ in session.written)


# --- chunks that are refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "keys", "crc32", "reason", "gfn"),
    [
        pytest.param((0x104, 4), b"\x10" * 3, None, Reason.CHUNK_SIZE_MISMATCH, "0x104", id="too few keys"),
        pytest.param((0x104, 4), b"\x10" * 5, None, Reason.CHUNK_SIZE_MISMATCH, "0x104", id="too many keys"),
        pytest.param((0x104, 4), b"", None, Reason.CHUNK_SIZE_MISMATCH, "0x104", id="no keys"),
        pytest.param((0x104, 4), b"\x10" * 4, 0, Reason.CHUNK_CHECKSUM_MISMATCH, "0x104", id="no checksum"),
        pytest.param(
            (0x104, 4),
            b"\x10" * 4,
            zlib.crc32(b"\x10\x10\x10\x12"),
            Reason.CHUNK_CHECKSUM_MISMATCH,
            "0x104",
            id="a bit",
        ),
        pytest.param((0x105, 4), b"\x10" * 4, None, Reason.CHUNK_OUT_OF_ORDER, "0x105", id="a key left out"),
        pytest.param((0x103, 4), b"\x10" * 4, None, Reason.CHUNK_OUT_OF_ORDER, "0x103", id="a key twice"),
        pytest.param((0x100, 4), b"\x10" * 4, None, Reason.CHUNK_OUT_OF_ORDER, "0x100", id="a chunk twice"),
        pytest.param((0x120, 4), b"\x10" * 4, None, Reason.CHUNK_OUT_OF_ORDER, "0x120", id="a range left out"),
        pytest.param((0x104, 13), b"\x10" * 13, None, Reason.CHUNK_OUT_OF_ORDER, "0x110", id="beyond its range"),
        pytest.param((0x104, 4), b"\x10\x10\x11\x01", None, Reason.KEY_RESERVED_BIT, "0x106", id="a bad key"),
        pytest.param((0x104, 1), b"\x01", None, Reason.KEY_RESERVED_BIT, "0x104", id="only a bad key"),
    ],
)
def test_a_chunk_that_is_wrong_is_refused_before_any_of_it_is_written(
    frames: tuple[int, int], keys: bytes, crc32: int | None, reason: Reason, gfn: str
) -> None:
    session = FakeSession(MEMORY)
    ours = begin(session, (0x100, 0x10), (0x120, 4))
    write_chunk(ours, 0x100, b"\x20" * 4)
    refusal = refusal_of(ours, GfnRange(*frames), keys, crc32)
    assert refusal.reason is reason
    assert refusal.metadata == {"gfn": gfn, "outcome": "ROLLED_BACK"}
    assert [one for one, _, _ in session.written] == [GfnRange(0x100, 4)]
    assert session.calls == ["begin", "abandon"]


def test_a_bad_key_in_the_last_slice_of_a_chunk_keeps_the_first_from_being_written() -> None:
    session = FakeSession((0, 4 * SLICE_KEYS))
    ours = begin(session, (0, 2 * SLICE_KEYS))
    keys = bytes(2 * SLICE_KEYS - 1) + b"\x01"
    assert refusal_of(ours, GfnRange(0, len(keys)), keys).reason is Reason.KEY_RESERVED_BIT
    assert session.written == []


def test_a_chunk_after_the_last_range_is_refused() -> None:
    session = FakeSession(MEMORY)
    ours = begin(session, (0x100, 4))
    write_chunk(ours, 0x100, b"\x20" * 4)
    refusal = refusal_of(ours, GfnRange(0x104, 1), b"\x20")
    assert refusal.reason is Reason.CHUNK_OUT_OF_ORDER
    assert refusal.metadata == {"gfn": "0x104", "outcome": "ROLLED_BACK"}
    assert len(session.written) == 1


def test_a_chunk_may_not_reach_into_the_next_range_even_where_they_touch() -> None:
    session = FakeSession(MEMORY)
    ours = begin(session, (0x100, 4), (0x104, 4))
    assert refusal_of(ours, GfnRange(0x100, 8), bytes(8)).reason is Reason.CHUNK_OUT_OF_ORDER
    assert session.written == []


def test_a_first_chunk_that_is_refused_leaves_everything_unchanged() -> None:
    session = FakeSession(MEMORY)
    ours = begin(session, (0x100, 4))
    assert refusal_of(ours, GfnRange(0x101, 1), b"\x20").metadata == {"gfn": "0x101", "outcome": "UNCHANGED"}
    assert session.calls == ["begin", "abandon"]


# --- a real worker -------------------------------------------------------------------------------------------------


def test_keys_that_the_kernel_loses_are_repaired_on_their_way_into_a_real_worker(runtime_dir: Path) -> None:
    before = children()
    starter = ChildStarter()
    with RuntimeDirectory.open(runtime_dir) as runtime:
        registry = Registry(runtime, starter)
        try:
            registry.create(simulated((0, 2), (8, 2), kernel="4.19"))
            keys = b"\x38" * 512
            with registry.writing("web") as session:
                ours = begin(session, (0, 512), (2048, 512))
                for start in (0, 2048):
                    write_chunk(ours, start, keys)
                assert ours.commit() == Progress(2560, 1024, 4, enabled=True, crc32=zlib.crc32(keys * 2))
                assert [part for _, part in session.read_slices([GfnRange(0, 512), GfnRange(2048, 512)])] == [keys] * 2
        finally:
            for worker in children() - before:
                end(worker)
            starter.reap()
