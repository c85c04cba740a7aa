"""From chunks to a guest's keys: what is wrong is refused before it is written; errors say what became of the rest."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, Ranges
from skeyd.vms.pacing import FIRST_KEYS, GROWTH
from skeyd.vms.registry import Registry
from skeyd.vms.runtime import RuntimeDirectory
from skeyd.vms.session import Session
from skeyd.vms.starter import ChildStarter
from skeyd.vms.writing import KeysDigest, KeyWriting, Progress, WriteOptions
from skeyd.worker.outcomes import Begun, LastWrite
from skeyd.worker.protocol import SLICE_KEYS
from tests.examples import examples
from tests.processes import children, end
from tests.vms.fake_session import FakeSession
from tests.worker.specs import simulated

MEMORY = (0x100, 0x100)


def _new(session: Session, *ranges: tuple[int, int], allow_enable: bool = True, **options: Any) -> KeyWriting:
    return KeyWriting(
        session, Ranges(GfnRange(*one) for one in ranges), WriteOptions(allow_enable=allow_enable, **options)
    )


def _writing(session: Session, *ranges: tuple[int, int], allow_enable: bool = True, **options: Any) -> KeyWriting:
    begun = _new(session, *ranges, allow_enable=allow_enable, **options)
    assert begun.begin()
    return begun


def _chunk(writing_: KeyWriting, start: int, keys: bytes) -> Progress:
    return writing_.chunk(GfnRange(start, len(keys)), keys, zlib.crc32(keys))


def _refusal(writing_: KeyWriting, frames: GfnRange, keys: bytes, crc32: int | None = None) -> SkeydError:
    before = writing_.progress
    error = _told(writing_, lambda: writing_.chunk(frames, keys, zlib.crc32(keys) if crc32 is None else crc32))
    assert writing_.progress == before
    return error


def _told(writing_: KeyWriting, step: Callable[[], object]) -> SkeydError:
    with pytest.raises(SkeydError) as refused, writing_.told():
        step()
    return refused.value


def _kept(keys: bytes, **changes: Any) -> LastWrite:
    """Make what a worker says of a call that had set these keys."""
    return replace(LastWrite("kept", "", len(keys), zlib.crc32(keys), False, 0), **changes)


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
    ours = _new(session, *ranges)
    refused = _told(ours, ours.begin)
    assert refused.reason is Reason.GFN_NOT_MAPPED
    assert refused.metadata == {"gfn": missing, "outcome": "UNCHANGED"}
    assert session.written == []
    assert session.calls == []


def test_keys_are_not_enabled_unless_that_is_allowed() -> None:
    session = FakeSession(MEMORY, uses_keys=False)
    ours = _new(session, (0x100, 4), allow_enable=False)
    refused = _told(ours, ours.begin)
    assert refused.reason is Reason.SKEYS_NOT_ENABLED
    assert "vms/web" in refused.message
    assert refused.metadata == {"outcome": "UNCHANGED"}
    assert session.written == []
    assert session.calls == []


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
    assert ours.progress == Progress(0x100, 0, 0, enabled=False, crc32=0)
    # Each knows the CRC-32 of all keys before it.
    first, second, third = (zlib.crc32(b"\x10\x20\x30\x40\x50\x60"[:end]) for end in (2, 4, 6))
    assert _chunk(ours, 0x100, b"\x10\x20") == Progress(0x102, 2, 1, enabled=True, crc32=first)
    # The end of one range is the beginning of the next.
    assert _chunk(ours, 0x102, b"\x30\x40") == Progress(0x110, 4, 2, enabled=True, crc32=second)
    assert _chunk(ours, 0x110, b"\x50\x60") == Progress(0x112, 6, 3, enabled=True, crc32=third)
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
    done = _chunk(_writing(session, (3, len(keys))), 3, keys)
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
    _chunk(ours, 0, bytes(size))
    sizes = [frames.count for frames, _, _ in session.written]
    assert sum(sizes) == size
    assert max(sizes[1:]) == most
    assert sizes[0] == FIRST_KEYS


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
    ours = _writing(session, *((one.start, one.count) for one in ranges))
    with mock.patch.object(ours._pace, "took"):
        ours._pace.keys = slice_keys
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
    assert refusal.metadata == {"gfn": gfn, "outcome": "ROLLED_BACK"}
    assert [one for one, _, _ in session.written] == [GfnRange(0x100, 4)]
    assert session.calls == ["begin", "abandon"]


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
    assert refusal.metadata == {"gfn": "0x104", "outcome": "ROLLED_BACK"}
    assert len(session.written) == 1


def test_a_chunk_may_not_reach_into_the_next_range_even_where_they_touch() -> None:
    session = FakeSession(MEMORY)
    ours = _writing(session, (0x100, 4), (0x104, 4))
    assert _refusal(ours, GfnRange(0x100, 8), bytes(8)).reason is Reason.CHUNK_OUT_OF_ORDER
    assert session.written == []


def test_a_first_chunk_that_is_refused_leaves_everything_unchanged() -> None:
    session = FakeSession(MEMORY)
    ours = _writing(session, (0x100, 4))
    assert _refusal(ours, GfnRange(0x101, 1), b"\x20").metadata == {"gfn": "0x101", "outcome": "UNCHANGED"}
    assert session.calls == ["begin", "abandon"]


# --- the worker's refusals -----------------------------------------------------------------------------------------


UNCERTAIN = {"gfn": "0x1", "uncertain": "0x4000-0x13fff"}
SLICE = bytes(FIRST_KEYS)


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (_kept(SLICE, outcome="rolled_back"), {"gfn": "0x1", "outcome": "ROLLED_BACK"}),
        (
            _kept(SLICE, outcome="dirty", dirty=(GfnRange(0x40001, 2), GfnRange(0x40010, 1))),
            {"gfn": "0x1", "outcome": "DIRTY", "dirty": "0x40001-0x40002,0x40010-0x40010"},
        ),
        (
            _kept(SLICE, dirty=(GfnRange(0x4001, 2), GfnRange(0x4010, 1))),
            {
                "gfn": "0x1",
                "uncertain": "0x4001-0x4002,0x4010-0x4010",
                "outcome": "KEPT",
                "next_gfn": hex(FIRST_KEYS),
                "keys_set": str(FIRST_KEYS),
                "crc32": f"{zlib.crc32(SLICE):#010x}",
            },
        ),
    ],
    ids=["rolled back", "dirty", "kept"],
)
def test_a_slice_that_the_worker_refused_ends_the_call_and_says_what_became_of_it(
    outcome: LastWrite, told: dict[str, str]
) -> None:
    session = FakeSession((0, 4 * SLICE_KEYS))
    session.refusals = {1: SkeydError(Reason.KEYS_NOT_STORED, "lost", dict(UNCERTAIN))}
    session.outcomes = [outcome]
    ours = _writing(session, (0, 3 * SLICE_KEYS), keep=outcome.outcome == "kept")
    keys = bytes(3 * SLICE_KEYS)
    refused = _told(ours, lambda: _chunk(ours, 0, keys))
    assert refused.reason is Reason.KEYS_NOT_STORED
    # What is uncertain is so no more where the old keys are back; what isn't back is said.
    assert refused.metadata == told
    assert ours.progress == Progress(FIRST_KEYS, FIRST_KEYS, 0, enabled=False, crc32=zlib.crc32(SLICE))
    assert len(session.written) == 2
    assert session.calls == ["begin", "abandon"]


def test_the_old_keys_are_waited_for_until_the_last_of_them_is_back() -> None:
    session = FakeSession(MEMORY)
    rolling = _kept(b"\x20" * 4, outcome="rolling_back")
    session.outcomes = [rolling, rolling, replace(rolling, outcome="rolled_back")]
    ours = _writing(session, (0x100, 8))
    _chunk(ours, 0x100, b"\x20" * 2)
    _chunk(ours, 0x102, b"\x20" * 2)
    assert _told(ours, ours.cut).metadata == {"outcome": "ROLLED_BACK"}
    assert session.calls == ["begin", "abandon", "abandon", "abandon"]


def test_a_worker_that_says_for_ever_that_it_rolls_back_is_not_waited_for() -> None:
    session = FakeSession(MEMORY)
    session.outcomes = [_kept(b"\x20" * 4, outcome="rolling_back")] * 3
    ours = _writing(session, (0x100, 8))
    _chunk(ours, 0x100, b"\x20" * 4)
    assert _told(ours, ours.cut).metadata == {"outcome": "UNKNOWN"}
    assert session.calls == ["begin", "abandon", "abandon"]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "lie",
    [
        None,
        _kept(b"\x20" * 4, outcome="applied"),
        _kept(b"\x20" * 3),
        _kept(b"\x20" * 4, crc32=1),
        _kept(b"\x20" * 5, outcome="rolled_back"),
    ],
    ids=["nothing", "applied", "fewer", "others", "more"],
)
def test_a_worker_that_says_what_cant_be_is_not_believed(lie: LastWrite | None, keep: bool) -> None:
    session = FakeSession(MEMORY)
    session.outcomes = [lie]
    ours = _writing(session, (0x100, 8), keep=keep)
    _chunk(ours, 0x100, b"\x20" * 4)
    assert _told(ours, ours.cut).metadata == {"outcome": "UNKNOWN"}


@pytest.mark.parametrize(("keep", "other"), [(False, "kept"), (True, "rolled_back"), (True, "dirty")])
def test_what_is_kept_is_what_was_to_be_kept(keep: bool, other: str) -> None:
    session = FakeSession(MEMORY)
    session.outcomes = [_kept(b"\x20" * 4, outcome=other, dirty=(GfnRange(0x100, 1),) if other == "dirty" else ())]
    ours = _writing(session, (0x100, 8), keep=keep)
    _chunk(ours, 0x100, b"\x20" * 4)
    assert _told(ours, ours.cut).metadata == {"outcome": "UNKNOWN"}


@pytest.mark.parametrize("after", [0, 2])
def test_of_a_worker_that_is_lost_nobody_knows_what_it_does(after: int) -> None:
    session = FakeSession(MEMORY, uses_keys=False)
    rolling = _kept(b"\x20" * 4, outcome="rolling_back")
    session.outcomes = [*[rolling] * after, SkeydError(Reason.WORKER_LOST, "gone")]
    session.refusals = {1: SkeydError(Reason.WORKER_LOST, "first", {"uncertain": "0x104-0x107"})}
    ours = _writing(session, (0x100, 8))
    _chunk(ours, 0x100, b"\x20" * 4)
    told = _told(ours, lambda: _chunk(ours, 0x104, b"\x20" * 4))
    assert told.message == "first"
    assert told.metadata == {"outcome": "UNKNOWN", "uncertain": "0x104-0x107", "enabled": "true"}


def test_a_worker_that_is_lost_before_it_was_asked_to_set_anything_has_changed_nothing() -> None:
    class Lost(FakeSession):
        def begin(self, request_id: str, fingerprint: str, *, keep: bool, resume: bool) -> Begun:
            raise SkeydError(Reason.WORKER_LOST, "gone")

    ours = _new(Lost(MEMORY), (0x100, 8))
    assert _told(ours, ours.begin).metadata == {"outcome": "UNCHANGED"}


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("outcome", ["rolled_back", "kept"])
def test_the_error_says_whether_the_guest_uses_keys_since(enabled: bool, outcome: str) -> None:
    # By the worker's word: a write that failed may have enabled them too.
    session = FakeSession(MEMORY)
    session.outcomes = [_kept(b"\x20" * 4, outcome=outcome, enabled=enabled)]
    ours = _writing(session, (0x100, 8), keep=outcome == "kept")
    _chunk(ours, 0x100, b"\x20" * 4)
    assert _told(ours, ours.cut).metadata.get("enabled") == ("true" if enabled else None)


def test_more_dirty_ranges_than_a_status_has_room_for_are_cut_with_a_mark() -> None:
    session = FakeSession(MEMORY)
    dirty = tuple(GfnRange(gfn, 1) for gfn in range(0x100, 0x200, 2))
    session.outcomes = [_kept(b"\x20" * 4, outcome="dirty", dirty=dirty)]
    ours = _writing(session, (0x100, 8))
    _chunk(ours, 0x100, b"\x20" * 4)
    listed = _told(ours, ours.cut).metadata["dirty"]
    *whole, mark = listed.split(",")
    assert mark == "…"
    assert whole == [str(one) for one in dirty[: len(whole)]]
    # status.py cuts at 256 bytes, in the middle of a range if it has to.
    assert 200 < len(listed.encode()) <= 256


# --- the end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunks", "next_gfn", "keys_set"),
    [([], "0x100", 0), ([(0x100, 2)], "0x102", 2), ([(0x100, 4)], "0x110", 4), ([(0x100, 4), (0x110, 1)], "0x111", 5)],
)
@pytest.mark.parametrize("how", [KeyWriting.commit, KeyWriting.cut])
@pytest.mark.parametrize("keep", [False, True])
def test_a_stream_that_ends_before_its_ranges_are_covered_is_incomplete_and_says_what_is_missing(
    chunks: list[tuple[int, int]], next_gfn: str, keys_set: int, how: Callable[[KeyWriting], object], keep: bool
) -> None:
    session = FakeSession(MEMORY)
    ours = _writing(session, (0x100, 4), (0x110, 2), keep=keep)
    for start, count in chunks:
        _chunk(ours, start, bytes(count))
    if keep and chunks:
        session.outcomes = [_kept(bytes(keys_set))]
    refused = _told(ours, lambda: how(ours))
    assert refused.reason is Reason.STREAM_INCOMPLETE
    assert f"{6 - keys_set} are missing from gfn {next_gfn} on" in refused.message
    if not chunks:
        assert refused.metadata == {"outcome": "UNCHANGED"}
    elif keep:
        crc32 = f"{zlib.crc32(bytes(keys_set)):#010x}"
        assert refused.metadata == {
            "outcome": "KEPT",
            "next_gfn": next_gfn,
            "keys_set": str(keys_set),
            "crc32": crc32,
        }
    else:
        assert refused.metadata == {"outcome": "ROLLED_BACK"}
    assert session.calls == ["begin", "abandon"]


def test_a_stream_that_was_covered_and_ends_without_commit_is_incomplete_all_the_same() -> None:
    ours = _writing(FakeSession(MEMORY), (0x100, 4))
    _chunk(ours, 0x100, bytes(4))
    refused = _told(ours, ours.cut)
    assert refused.reason is Reason.STREAM_INCOMPLETE
    assert refused.metadata == {"outcome": "ROLLED_BACK"}


def test_an_error_of_another_kind_ends_the_call_too() -> None:
    session = FakeSession(MEMORY)
    ours = _writing(session, (0x100, 4))
    _chunk(ours, 0x100, bytes(2))
    with pytest.raises(SkeydError) as refused, ours.told():
        raise SkeydError(Reason.REQUEST_INVALID, "no")
    assert refused.value.metadata == {"outcome": "ROLLED_BACK"}
    assert session.calls == ["begin", "abandon"]


def test_what_is_no_refusal_is_left_to_the_end_of_the_session() -> None:
    session = FakeSession(MEMORY)
    ours = _writing(session, (0x100, 4))
    with pytest.raises(ZeroDivisionError), ours.told():
        raise ZeroDivisionError
    assert session.calls == ["begin"]


@pytest.mark.parametrize("lie", [{"keys_set": 3}, {"keys_set": 5}, {"crc32": 1}])
def test_a_worker_that_has_applied_something_else_is_not_believed(lie: dict[str, int]) -> None:
    class Lying(FakeSession):
        def commit(self, keys_set: int, crc32: int) -> Begun:
            return replace(super().commit(keys_set, crc32), **lie)  # type: ignore[arg-type]

    session = Lying(MEMORY)
    ours = _writing(session, (0x100, 4))
    _chunk(ours, 0x100, b"\x10" * 4)
    refused = _told(ours, ours.commit)
    assert refused.reason is Reason.WORKER_FAILED
    assert f"it applied {lie.get('keys_set', 4)} keys" in refused.message
    # Not UNCHANGED: something was set and committed, and nobody knows what.
    assert refused.metadata == {"outcome": "UNKNOWN"}
    assert session.calls == ["begin", "commit"]


# --- validate_only -------------------------------------------------------------------------------------------------


def test_what_is_only_validated_is_checked_as_ever_and_the_worker_is_told_nothing() -> None:
    session = FakeSession(MEMORY)
    ours = _writing(session, (0x100, 4), (0x110, 2), validate_only=True)
    assert _chunk(ours, 0x100, bytes(4)) == Progress(0x110, 4, 0, enabled=False, crc32=zlib.crc32(bytes(4)))
    assert _chunk(ours, 0x110, bytes(2)).keys_set == 6
    assert ours.commit() == Progress(0x112, 6, 0, enabled=False, crc32=zlib.crc32(bytes(6)))
    assert (session.written, session.calls) == ([], [])


def test_what_is_only_validated_is_refused_as_ever() -> None:
    session = FakeSession(MEMORY, uses_keys=False)
    ours = _new(session, (0x100, 4), allow_enable=False, validate_only=True)
    assert _told(ours, ours.begin).reason is Reason.SKEYS_NOT_ENABLED
    ours = _new(session, (0x100, 0x101), validate_only=True)
    assert _told(ours, ours.begin).reason is Reason.GFN_NOT_MAPPED
    ours = _writing(session, (0x100, 4), validate_only=True)
    _chunk(ours, 0x100, bytes(2))
    refused = _refusal(ours, GfnRange(0x102, 2), b"\x10\x01")
    assert refused.reason is Reason.KEY_RESERVED_BIT
    assert refused.metadata == {"gfn": "0x103", "outcome": "UNCHANGED"}
    refused = _told(ours, ours.commit)
    assert refused.reason is Reason.STREAM_INCOMPLETE
    assert refused.metadata == {"outcome": "UNCHANGED"}
    assert (session.written, session.calls) == ([], [])


def test_the_request_id_of_another_request_is_refused_where_it_is_only_validated_too() -> None:
    session = FakeSession(MEMORY)
    options: dict[str, Any] = {"validate_only": True, "request_id": "mine", "fingerprint": "7" * 64}
    ours = _writing(session, (0x100, 4), **options)
    assert session.calls == ["require_unused mine " + "7" * 64]
    _chunk(ours, 0x100, bytes(4))
    assert ours.commit().keys_set == 4
    session.reused = SkeydError(Reason.REQUEST_ID_REUSED, "no")
    ours = _new(session, (0x100, 4), **options)
    refused = _told(ours, ours.begin)
    assert (refused.reason, refused.metadata) == (Reason.REQUEST_ID_REUSED, {"outcome": "UNCHANGED"})


# --- who waits no more ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["expected", "resulting"])
@pytest.mark.parametrize("after", [0, 1])
def test_keys_that_nobody_waits_for_any_more_are_not_digested_to_the_end(which: str, after: int) -> None:
    class Gone(Exception):  # noqa: N818  (says what happened)
        pass

    session = FakeSession((0, 4 * SLICE_KEYS))
    ranges = Ranges(GfnRange(start, 16) for start in range(0, 512, 128))
    looks: list[int] = []

    def still_wanted() -> None:
        looks.append(len(session.read))
        if len(looks) > after:
            raise Gone

    options = {which: KeysDigest(bytes(32), False)}
    ours = KeyWriting(session, ranges, WriteOptions(**options), still_wanted)  # type: ignore[arg-type]

    def use() -> None:
        ours.begin()
        for one in ranges:
            _chunk(ours, one.start, bytes(one.count))
        ours.commit()

    with pytest.raises(Gone):
        use()
    assert len(looks) == after + 1
    assert len(session.read) <= after + 1, "nothing more is read"
    assert "commit" not in session.calls


# --- requests that were sent before --------------------------------------------------------------------------------


def test_what_was_applied_before_is_not_set_again() -> None:
    session = FakeSession(MEMORY)
    session.begun = Begun("applied", 6, 2, 0x1234, True)
    ours = _new(session, (0x100, 4), (0x110, 2), request_id="mine")
    assert not ours.begin()
    assert ours.progress == Progress(0x112, 6, 2, enabled=True, crc32=0x1234)
    assert session.written == []


def test_what_was_applied_before_must_have_been_whole() -> None:
    session = FakeSession(MEMORY)
    session.begun = Begun("applied", 5, 2, 0x1234, True)
    ours = _new(session, (0x100, 4), (0x110, 2), request_id="mine")
    assert _told(ours, ours.begin).reason is Reason.WORKER_FAILED


@pytest.mark.parametrize(("before", "next_gfn"), [(0, 0x100), (3, 0x103), (4, 0x110), (5, 0x111), (6, 0x112)])
def test_a_call_that_was_cut_goes_on_behind_what_it_has_set(before: int, next_gfn: int) -> None:
    session = FakeSession(MEMORY)
    keys = b"\x10\x20\x30\x40\x50\x60"
    session.begun = Begun("resumed", before, 1, zlib.crc32(keys[:before]), False)
    ours = _writing(session, (0x100, 4), (0x110, 2), keep=True, request_id="mine", resume=True)
    assert ours.progress == Progress(next_gfn, before, 1, enabled=False, crc32=zlib.crc32(keys[:before]))
    if before < 4:
        _chunk(ours, next_gfn, keys[before:4])
    if before < 6:
        _chunk(ours, ours.progress.next_gfn, keys[max(before, 4) :])
    assert ours.commit() == Progress(0x112, 6, 1, enabled=False, crc32=zlib.crc32(keys))


def test_a_worker_that_has_set_more_than_there_is_to_set_is_not_believed() -> None:
    session = FakeSession(MEMORY)
    session.begun = Begun("resumed", 7, 0, 0, False)
    ours = _new(session, (0x100, 4), (0x110, 2), keep=True, request_id="mine", resume=True)
    assert _told(ours, ours.begin).reason is Reason.WORKER_FAILED


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
                ours = _writing(session, (0, 512), (2048, 512))
                for start in (0, 2048):
                    _chunk(ours, start, keys)
                assert ours.commit() == Progress(2560, 1024, 4, enabled=True, crc32=zlib.crc32(keys * 2))
                assert [part for _, part in session.read_slices([GfnRange(0, 512), GfnRange(2048, 512)])] == [keys] * 2
        finally:
            for worker in children() - before:
                end(worker)
            starter.reap()
