"""From ranges to chunks and gaps: every frame once, none invented, in bounded pieces."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, Ranges
from skeyd.vms.pacing import Pace
from skeyd.vms.read_ahead import ChunkRead
from skeyd.vms.reading import GapRead, KeysRead, before, check_ranges, pieces, read, read_chunks
from tests.examples import examples
from tests.vms.fake_session import FakeSession, key_of

LIMIT = 1 << 64


def _read(session: FakeSession, ranges: list[tuple[int, int]], chunk_keys: int = 1 << 20) -> list[KeysRead | GapRead]:
    return list(read(session, Ranges(GfnRange(*one) for one in ranges), chunk_keys))


def _keys(start: int, count: int) -> KeysRead:
    keys = bytes(key_of(gfn) for gfn in range(start, start + count))
    return KeysRead(GfnRange(start, count), keys, zlib.crc32(keys))


def _copied(parts: Iterator[ChunkRead | GapRead]) -> list[KeysRead | GapRead]:
    found: list[KeysRead | GapRead] = []
    for part in parts:
        if isinstance(part, ChunkRead):
            frames, keys = part.frames, part.copy()
            assert keys is not None
            found.append(KeysRead(frames, keys, zlib.crc32(keys)))
        else:
            found.append(part)
    return found


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


@given(_guests(), st.integers(1, 12))
@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_frame_of_every_range_arrives_once_in_order_with_its_key_or_in_a_gap(
    guest: tuple[list[tuple[int, int]], list[tuple[int, int]]], chunk_keys: int
) -> None:
    slots, asked = guest
    session = FakeSession(*slots)
    ranges = check_ranges(session.memory_map, Ranges(GfnRange(*one) for one in asked))
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
    # What was asked of the worker is what has memory, in chunks.
    assert [gfn for one in session.read for gfn in range(one.start, one.end)] == [g for g in wanted if g in mapped]
    assert all(one.count <= chunk_keys for one in session.read)


@given(st.integers(0, LIMIT - 1), st.integers(1, 200), st.integers(1, 50))
@settings(max_examples=examples(80), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_pieces_are_as_large_as_they_may_be_and_lie_end_to_end(start: int, count: int, most: int) -> None:
    frames = GfnRange(start, min(count, LIMIT - start))
    cut = list(pieces(frames, most))
    assert [one.start for one in cut] == list(range(frames.start, frames.end, most))
    assert sum(one.count for one in cut) == frames.count
    assert all(one.count == most for one in cut[:-1])
    assert 1 <= cut[-1].count <= most


# --- going on in the middle ----------------------------------------------------------------------------------------


@given(_guests(), st.integers(1, 12), st.data())
@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_from_any_frame_on_comes_what_came_after_it_before(
    guest: tuple[list[tuple[int, int]], list[tuple[int, int]]], chunk_keys: int, data: st.DataObject
) -> None:
    slots, asked = guest
    session = FakeSession(*slots)
    ranges = check_ranges(session.memory_map, Ranges(GfnRange(*one) for one in asked))
    whole = list(read(session, ranges, chunk_keys))
    frames = [gfn for one in ranges for gfn in range(one.start, one.end)]
    gfn = data.draw(st.sampled_from([*frames, *(one.end for one in ranges)]))

    rest = _copied(read_chunks(session, ranges, chunk_keys, Pace(1), start_at=gfn))

    cut = [part for part in whole if part.frames.start < gfn < part.frames.end]
    assert rest[len(cut) :] == [part for part in whole if part.frames.start >= gfn]
    for part, left in zip(cut, rest, strict=False):
        assert left.frames == GfnRange(gfn, part.frames.end - gfn)
        assert isinstance(left, KeysRead) == isinstance(part, KeysRead)
    mapped = {one for start, count in slots for one in range(start, start + count)}
    came_before = [one for one in frames if one < gfn]
    keys = sum(one in mapped for one in came_before)
    assert before(session.memory_map, ranges, gfn) == (keys, len(came_before) - keys)


def test_to_go_on_late_in_a_large_guest_takes_no_longer_than_early() -> None:
    # 2^31 chunks lie before it, and nobody looks at one of them.
    session = FakeSession((0, 1 << 31))
    ranges = Ranges([GfnRange(0, 1 << 31)])
    first = next(read_chunks(session, ranges, 1, Pace(1), start_at=(1 << 31) - 3))
    assert _copied(iter([first])) == [_keys((1 << 31) - 3, 1)]
    assert before(session.memory_map, ranges, (1 << 31) - 3) == ((1 << 31) - 3, 0)


@pytest.mark.parametrize("gfn", [0, 0xFF, 0x105, 0x10F, 0x116, LIMIT - 1])
def test_a_frame_in_no_range_and_the_end_of_none_is_nothing_to_go_on_with(gfn: int) -> None:
    session = FakeSession((0x100, 0x20))
    with pytest.raises(SkeydError, match=hex(gfn)) as refused:
        before(session.memory_map, Ranges([GfnRange(0x100, 4), GfnRange(0x110, 5)]), gfn)
    assert refused.value.reason is Reason.REQUEST_INVALID
