"""From chunks to a guest's keys: what is wrong is refused before anything is written, and every error says how far."""

from __future__ import annotations

import zlib
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, Ranges
from skeyd.vms import writing
from skeyd.vms.registry import Registry
from skeyd.vms.runtime import RuntimeDirectory
from skeyd.vms.starter import ChildStarter
from skeyd.vms.writing import KeyWriting, Progress
from skeyd.worker.protocol import SLICE_KEYS
from tests.examples import examples
from tests.processes import children, end
from tests.vms.fake_session import FakeSession
from tests.worker.specs import simulated

MEMORY = (0x100, 0x100)


def _writing(session: FakeSession, *ranges: tuple[int, int], allow_enable: bool = True) -> KeyWriting:
    return KeyWriting(session, Ranges(GfnRange(*one) for one in ranges), allow_enable)


def _chunk(writing_: KeyWriting, start: int, keys: bytes) -> Progress:
    return writing_.chunk(GfnRange(start, len(keys)), keys, zlib.crc32(keys))


def _refusal(writing_: KeyWriting, frames: GfnRange, keys: bytes, crc32: int | None = None) -> SkeydError:
    before = writing_.progress
    with pytest.raises(SkeydError) as refused:
        writing_.chunk(frames, keys, zlib.crc32(keys) if crc32 is None else crc32)
    assert writing_.progress == before
    return refused.value


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
    with pytest.raises(SkeydError) as refused:
        _writing(session, *ranges)
    assert refused.value.reason is Reason.GFN_NOT_MAPPED
    assert refused.value.metadata == {"gfn": missing}
    assert session.written == []


def test_keys_are_not_enabled_unless_that_is_allowed() -> None:
    session = FakeSession(MEMORY, uses_keys=False)
    with pytest.raises(SkeydError) as refused:
        _writing(session, (0x100, 4), allow_enable=False)
    assert refused.value.reason is Reason.SKEYS_NOT_ENABLED
    assert "vms/web" in refused.value.message
    assert session.written == []


@pytest.mark.parametrize("allow_enable", [False, True])
def test_what_is_allowed_is_what_the_worker_is_told(allow_enable: bool) -> None:
    session = FakeSession(MEMORY)
    _chunk(_writing(session, (0x100, 4), allow_enable=allow_enable), 0x100, b"\x10" * 4)
    assert session.written == [(GfnRange(0x100, 4), b"\x10" * 4, allow_enable)]


# --- a good stream -------------------------------------------------------------------------------------------------


def test_progress_says_where_the_next_chunk_begins_and_what_was_done() -> None:
    session = FakeSession(MEMORY, uses_keys=False)
    session.repaired = 1
    ours = _writing(session, (0x100, 4), (0x110, 2))
    assert ours.progress == Progress(0x100, 0, 0, enabled=False)
    assert _chunk(ours, 0x100, b"\x10\x20") == Progress(0x102, 2, 1, enabled=True)
    # The end of one range is the beginning of the next.
    assert _chunk(ours, 0x102, b"\x30\x40") == Progress(0x110, 4, 2, enabled=True)
    assert _chunk(ours, 0x110, b"\x50\x60") == Progress(0x112, 6, 3, enabled=True)
    assert ours.commit() == Progress(0x112, 6, 3, enabled=True)
    assert [(frames, keys) for frames, keys, _ in session.written] == [
        (GfnRange(0x100, 2), b"\x10\x20"),
        (GfnRange(0x102, 2), b"\x30\x40"),
        (GfnRange(0x110, 2), b"\x50\x60"),
    ]


def test_a_chunk_larger_than_a_slice_is_written_in_slices() -> None:
    session = FakeSession((0, 4 * SLICE_KEYS))
    session.repaired = 2
    keys = bytes(range(0, 256, 2)) * (SLICE_KEYS // 128) + b"\x10\x20\x30"
    done = _chunk(_writing(session, (3, len(keys))), 3, keys)
    assert [(frames, len(part)) for frames, part, _ in session.written] == [
        (GfnRange(3, SLICE_KEYS), SLICE_KEYS),
        (GfnRange(3 + SLICE_KEYS, 3), 3),
    ]
    assert b"".join(part for _, part, _ in session.written) == keys
    assert done == Progress(3 + len(keys), len(keys), 4, enabled=False)


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
    ours = KeyWriting(session, Ranges(ranges), allow_enable=True)
    with mock.patch.object(writing, "SLICE_KEYS", slice_keys):
        number = 0
        for one in ranges:
            gfn = one.start
            while gfn < one.end:
                count = min(sizes[number % len(sizes)], one.end - gfn)
                number += 1
                assert ours.progress.next_gfn == gfn
                _chunk(ours, gfn, bytes(gfn * 2 % 256 for gfn in range(gfn, gfn + count)))
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
    ours = _writing(session, (0x100, 0x10), (0x120, 4))
    _chunk(ours, 0x100, b"\x20" * 4)
    refusal = _refusal(ours, GfnRange(*frames), keys, crc32)
    assert refusal.reason is reason
    assert refusal.metadata == {"gfn": gfn, "next_gfn": "0x104", "keys_set": "4"}
    assert [one for one, _, _ in session.written] == [GfnRange(0x100, 4)]


def test_a_bad_key_in_the_last_slice_of_a_chunk_keeps_the_first_from_being_written() -> None:
    session = FakeSession((0, 4 * SLICE_KEYS))
    ours = _writing(session, (0, 2 * SLICE_KEYS))
    keys = bytes(2 * SLICE_KEYS - 1) + b"\x01"
    assert _refusal(ours, GfnRange(0, len(keys)), keys).reason is Reason.KEY_RESERVED_BIT
    assert session.written == []


def test_a_chunk_after_the_last_range_is_refused() -> None:
    session = FakeSession(MEMORY)
    ours = _writing(session, (0x100, 4))
    _chunk(ours, 0x100, b"\x20" * 4)
    refusal = _refusal(ours, GfnRange(0x104, 1), b"\x20")
    assert refusal.reason is Reason.CHUNK_OUT_OF_ORDER
    assert refusal.metadata == {"gfn": "0x104", "next_gfn": "0x104", "keys_set": "4"}
    assert len(session.written) == 1


def test_a_chunk_may_not_reach_into_the_next_range_even_where_they_touch() -> None:
    session = FakeSession(MEMORY)
    ours = _writing(session, (0x100, 4), (0x104, 4))
    assert _refusal(ours, GfnRange(0x100, 8), bytes(8)).reason is Reason.CHUNK_OUT_OF_ORDER
    assert session.written == []


def test_after_a_refusal_the_right_chunk_is_still_the_right_one() -> None:
    session = FakeSession(MEMORY)
    ours = _writing(session, (0x100, 4))
    _refusal(ours, GfnRange(0x101, 1), b"\x20")
    assert _chunk(ours, 0x100, b"\x20" * 4).keys_set == 4


# --- the worker's refusals -----------------------------------------------------------------------------------------


def test_a_slice_that_the_worker_refused_says_how_far_it_had_come_and_what_is_uncertain() -> None:
    session = FakeSession((0, 4 * SLICE_KEYS))
    session.refusals = {1: SkeydError(Reason.KEYS_NOT_STORED, "lost", {"gfn": "0x1", "uncertain": "0x40000-0x7ffff"})}
    ours = _writing(session, (0, 3 * SLICE_KEYS))
    keys = bytes(3 * SLICE_KEYS)
    with pytest.raises(SkeydError) as refused:
        _chunk(ours, 0, keys)
    assert refused.value.reason is Reason.KEYS_NOT_STORED
    assert refused.value.metadata == {
        "gfn": "0x1",
        "uncertain": "0x40000-0x7ffff",
        "next_gfn": hex(SLICE_KEYS),
        "keys_set": str(SLICE_KEYS),
    }
    assert ours.progress == Progress(SLICE_KEYS, SLICE_KEYS, 0, enabled=False)
    assert len(session.written) == 2


@pytest.mark.parametrize("uses_keys", [False, True])
def test_every_error_after_keys_were_enabled_says_that_they_were(uses_keys: bool) -> None:
    ours = _writing(FakeSession(MEMORY, uses_keys=uses_keys), (0x100, 8))
    assert "enabled" not in _refusal(ours, GfnRange(0x101, 1), b"\x20").metadata
    _chunk(ours, 0x100, bytes(2))
    _chunk(ours, 0x102, bytes(2))
    with pytest.raises(SkeydError) as cut:
        ours.cut()
    for error in (_refusal(ours, GfnRange(0x101, 1), b"\x20"), cut.value):
        assert error.metadata.get("enabled") == (None if uses_keys else "true")


# --- the end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunks", "next_gfn", "keys_set"),
    [([], "0x100", 0), ([(0x100, 2)], "0x102", 2), ([(0x100, 4)], "0x110", 4), ([(0x100, 4), (0x110, 1)], "0x111", 5)],
)
@pytest.mark.parametrize("how", [KeyWriting.commit, KeyWriting.cut])
def test_a_stream_that_ends_before_its_ranges_are_covered_is_incomplete_and_says_what_is_missing(
    chunks: list[tuple[int, int]], next_gfn: str, keys_set: int, how: object
) -> None:
    ours = _writing(FakeSession(MEMORY), (0x100, 4), (0x110, 2))
    for start, count in chunks:
        _chunk(ours, start, bytes(count))
    with pytest.raises(SkeydError) as refused:
        how(ours)  # type: ignore[operator]
    assert refused.value.reason is Reason.STREAM_INCOMPLETE
    assert refused.value.metadata == {"next_gfn": next_gfn, "keys_set": str(keys_set)}
    assert f"{6 - keys_set} are missing" in refused.value.message


def test_a_stream_that_was_covered_and_ends_without_commit_is_incomplete_all_the_same() -> None:
    ours = _writing(FakeSession(MEMORY), (0x100, 4))
    _chunk(ours, 0x100, bytes(4))
    with pytest.raises(SkeydError) as refused:
        ours.cut()
    assert refused.value.reason is Reason.STREAM_INCOMPLETE
    assert refused.value.metadata == {"next_gfn": "0x104", "keys_set": "4"}


def test_an_error_of_another_kind_says_how_far_it_had_come_too() -> None:
    ours = _writing(FakeSession(MEMORY), (0x100, 4))
    _chunk(ours, 0x100, bytes(2))
    with pytest.raises(SkeydError) as refused, ours.telling():
        raise SkeydError(Reason.REQUEST_INVALID, "no")
    assert refused.value.metadata == {"next_gfn": "0x102", "keys_set": "2"}
    with pytest.raises(ZeroDivisionError), ours.telling():
        raise ZeroDivisionError


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
                ours = KeyWriting(session, Ranges([GfnRange(0, 512), GfnRange(2048, 512)]), allow_enable=True)
                for start in (0, 2048):
                    _chunk(ours, start, keys)
                assert ours.commit() == Progress(2560, 1024, 4, enabled=True)
                assert [part for _, part in session.read_slices([GfnRange(0, 512), GfnRange(2048, 512)])] == [keys] * 2
        finally:
            for worker in children() - before:
                end(worker)
            starter.reap()
