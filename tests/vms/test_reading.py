"""From ranges to chunks and gaps: every frame once, none invented, in bounded pieces."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, Ranges
from skeyd.vms import reading
from skeyd.vms.reading import GapRead, KeysRead, check_ranges, pieces, read
from skeyd.worker.protocol import SLICE_KEYS
from tests.examples import examples
from tests.vms.fake_session import FakeSession, key_of

LIMIT = 1 << 64


def _read(session: FakeSession, ranges: list[tuple[int, int]], chunk_keys: int = 1 << 20) -> list[KeysRead | GapRead]:
    return list(read(session, Ranges(GfnRange(*one) for one in ranges), chunk_keys))


def _keys(start: int, count: int) -> KeysRead:
    keys = bytes(key_of(gfn) for gfn in range(start, start + count))
    return KeysRead(GfnRange(start, count), keys, zlib.crc32(keys))


def _gap(start: int, count: int) -> GapRead:
    return GapRead(GfnRange(start, count))


# --- which ranges --------------------------------------------------------------------------------------------------


def test_no_ranges_mean_everything_from_the_first_slot_to_the_last() -> None:
    session = FakeSession((0x300, 0x10), (0x100, 0x10))
    assert list(check_ranges(session.memory_map, Ranges([]))) == [GfnRange(0x100, 0x210)]


def test_ranges_whose_ends_have_memory_are_taken_as_they_are() -> None:
    session = FakeSession((0x100, 0x10), (0x300, 0x10))
    ranges = Ranges([GfnRange(0x100, 1), GfnRange(0x10F, 0x1F2), GfnRange(0x305, 0xB)])
    assert check_ranges(session.memory_map, ranges) is ranges


@pytest.mark.parametrize(
    ("start", "count", "named"),
    [(0xFF, 2, "0xff"), (0x10F, 2, "0x110"), (0x200, 1, "0x200"), (0x30F, 2, "0x310"), (LIMIT - 1, 1, hex(LIMIT - 1))],
)
def test_a_range_that_begins_or_ends_without_memory_is_refused_by_that_frame(
    start: int, count: int, named: str
) -> None:
    session = FakeSession((0x100, 0x10), (0x300, 0x10))
    with pytest.raises(SkeydError) as refused:
        check_ranges(session.memory_map, Ranges([GfnRange(0x100, 1)] * (start > 0x100) + [GfnRange(start, count)]))
    assert refused.value.reason is Reason.GFN_NOT_MAPPED
    assert refused.value.metadata == {"gfn": named}


# --- chunks and gaps -----------------------------------------------------------------------------------------------


def test_a_range_is_cut_at_chunks_and_at_the_edges_of_memory() -> None:
    session = FakeSession((0x0, 0x20), (0x30, 0x20))
    assert _read(session, [(0x8, 0x40)], chunk_keys=0x10) == [
        _keys(0x8, 0x10),
        _keys(0x18, 0x8),
        _gap(0x20, 0x10),
        _keys(0x30, 0x10),
        _keys(0x40, 0x8),
    ]


def test_slots_that_touch_are_read_as_one() -> None:
    assert _read(FakeSession((0, 0x10), (0x10, 0x10)), [(8, 0x10)]) == [_keys(8, 0x10)]


def test_a_gap_is_told_whole_however_large_it_is() -> None:
    session = FakeSession((0, 1), ((1 << 52) - 1, 1))
    assert _read(session, [(0, 1 << 52)], chunk_keys=1) == [
        _keys(0, 1),
        _gap(1, (1 << 52) - 2),
        _keys((1 << 52) - 1, 1),
    ]


def test_a_chunk_larger_than_a_slice_is_read_in_slices_and_arrives_whole() -> None:
    session = FakeSession((0, 4 * SLICE_KEYS))
    (part,) = _read(session, [(5, 2 * SLICE_KEYS + 7)], chunk_keys=1 << 20)
    assert part == _keys(5, 2 * SLICE_KEYS + 7)
    assert session.read == [
        GfnRange(5, SLICE_KEYS),
        GfnRange(5 + SLICE_KEYS, SLICE_KEYS),
        GfnRange(5 + 2 * SLICE_KEYS, 7),
    ]


def test_slices_do_not_cross_the_edges_of_chunks() -> None:
    session = FakeSession((0, 4 * SLICE_KEYS))
    _read(session, [(0, 2 * SLICE_KEYS)], chunk_keys=SLICE_KEYS + 1)
    assert [one.count for one in session.read] == [SLICE_KEYS, 1, SLICE_KEYS - 1]


def test_nothing_is_read_before_it_is_asked_for() -> None:
    session = FakeSession((0, 0x100))
    parts: Iterator[KeysRead | GapRead] = read(session, Ranges([GfnRange(0, 0x100)]), 0x10)
    assert session.read == []
    next(parts)
    assert len(session.read) == 1


def test_a_guest_that_stops_using_keys_in_the_middle_is_an_error_and_no_chunk_of_zeros() -> None:
    session = FakeSession((0, 0x100))
    session.keyless_from = 0x20
    parts = read(session, Ranges([GfnRange(0, 0x40)]), 0x10)
    assert [next(parts), next(parts)] == [_keys(0, 0x10), _keys(0x10, 0x10)]
    with pytest.raises(SkeydError) as refused:
        next(parts)
    assert refused.value.reason is Reason.WORKER_FAILED
    assert "0x20-0x2f" in refused.value.message


@pytest.mark.parametrize("bad", [0x01, 0xFF])
def test_a_key_that_no_kernel_has_is_not_passed_on(bad: int) -> None:
    session = FakeSession((0, 0x100))
    session.impossible = {0x23: bad}
    parts = read(session, Ranges([GfnRange(0, 0x40)]), 0x10)
    assert [next(parts), next(parts)] == [_keys(0, 0x10), _keys(0x10, 0x10)]
    with pytest.raises(SkeydError) as refused:
        next(parts)
    assert refused.value.reason is Reason.WORKER_FAILED
    assert "0x23" in refused.value.message


@st.composite
def _guests(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    # (slots, ranges whose ends are mapped), at the bottom or at the top of the address space.
    slots: list[tuple[int, int]] = []
    at = 0
    for gap, count in draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=5)):
        slots.append((at + gap, count))
        at += gap + count
    base = draw(st.sampled_from([0, LIMIT - at]))
    slots = [(base + start, count) for start, count in slots]
    mapped = [gfn for start, count in slots for gfn in range(start, start + count)]
    ends = sorted(draw(st.lists(st.integers(0, len(mapped) - 1), max_size=6, unique=True)))
    pairs = zip(ends[::2], ends[1::2], strict=False)
    return slots, [(mapped[first], mapped[last] - mapped[first] + 1) for first, last in pairs]


@given(_guests(), st.integers(1, 12), st.integers(1, 5))
@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_frame_of_every_range_arrives_once_in_order_with_its_key_or_in_a_gap(
    guest: tuple[list[tuple[int, int]], list[tuple[int, int]]], chunk_keys: int, slice_keys: int
) -> None:
    slots, asked = guest
    session = FakeSession(*slots)
    ranges = check_ranges(session.memory_map, Ranges(GfnRange(*one) for one in asked))
    with mock.patch.object(reading, "SLICE_KEYS", slice_keys):
        parts = list(read(session, ranges, chunk_keys))

    mapped = {gfn for start, count in slots for gfn in range(start, start + count)}
    wanted = [gfn for one in ranges for gfn in range(one.start, one.end)]
    found: list[tuple[int, int | None]] = []
    for part in parts:
        frames = range(part.frames.start, part.frames.end)
        if isinstance(part, GapRead):
            found += [(gfn, None) for gfn in frames]
        else:
            assert part.frames.count == len(part.keys) <= chunk_keys
            assert part.crc32 == zlib.crc32(part.keys)
            found += zip(frames, part.keys, strict=True)
    assert found == [(gfn, key_of(gfn) if gfn in mapped else None) for gfn in wanted]
    # What was asked of the worker is what has memory, in slices.
    assert [gfn for one in session.read for gfn in range(one.start, one.end)] == [g for g in wanted if g in mapped]
    assert all(one.count <= slice_keys for one in session.read)


@given(st.integers(0, LIMIT - 1), st.integers(1, 200), st.integers(1, 50))
@settings(max_examples=examples(80), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_pieces_are_as_large_as_they_may_be_and_lie_end_to_end(start: int, count: int, most: int) -> None:
    frames = GfnRange(start, min(count, LIMIT - start))
    cut = list(pieces(frames, most))
    assert [one.start for one in cut] == list(range(frames.start, frames.end, most))
    assert sum(one.count for one in cut) == frames.count
    assert all(one.count == most for one in cut[:-1])
    assert 1 <= cut[-1].count <= most
