"""Ranges of guest frames against the simplest model there is: one frame at a time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, MemoryMap, MemorySlot, Ranges
from tests.examples import examples

LIMIT = 1 << 64


@st.composite
def _ascending(draw: st.DrawFn, least: int = 0) -> list[GfnRange]:
    # Small, so that a model can look at every frame; at the bottom or at the top of the address space. Gaps of 0 make
    # ranges that touch.
    steps = draw(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 8)), min_size=least, max_size=6))
    width = sum(gap + count for gap, count in steps)
    at = draw(st.sampled_from([0, LIMIT - width]))
    ranges = []
    for gap, count in steps:
        ranges.append(GfnRange(at + gap, count))
        at += gap + count
    return ranges


@st.composite
def _ranges_and_wanted(draw: st.DrawFn, least: int = 0) -> tuple[list[GfnRange], GfnRange]:
    ranges = draw(_ascending(least))
    first = ranges[0].start if ranges else 0
    start = min(max(0, first + draw(st.integers(-10, 90))), LIMIT - 1)
    return ranges, GfnRange(start, min(draw(st.integers(1, 90)), LIMIT - start))


def _holder(ranges: list[GfnRange], gfn: int) -> GfnRange | None:
    return next((one for one in ranges if gfn in range(one.start, one.end)), None)


# --- one range -----------------------------------------------------------------------------------------------------


def test_a_range_knows_its_end() -> None:
    one = GfnRange(0x100, 0x80)
    assert one.end == 0x180
    assert str(one) == "0x100-0x17f"


@pytest.mark.parametrize("start", [0, 1, LIMIT - 1])
def test_a_range_of_no_frames_is_refused(start: int) -> None:
    with pytest.raises(SkeydError) as refused:
        GfnRange(start, 0)
    assert refused.value.reason is Reason.RANGE_EMPTY


@pytest.mark.parametrize(("start", "count"), [(0, LIMIT), (LIMIT - 1, 1), (LIMIT - 7, 7), (1, LIMIT - 1)])
def test_a_range_may_end_exactly_at_two_to_the_64(start: int, count: int) -> None:
    assert GfnRange(start, count).end == LIMIT


@pytest.mark.parametrize(
    ("start", "count"), [(0, LIMIT + 1), (LIMIT - 1, 2), (LIMIT, 1), (1, LIMIT), (LIMIT - 1, LIMIT)]
)
def test_a_range_that_ends_beyond_two_to_the_64_is_refused(start: int, count: int) -> None:
    with pytest.raises(SkeydError) as refused:
        GfnRange(start, count)
    assert refused.value.reason is Reason.RANGE_OVERFLOW
    assert refused.value.metadata == {"gfn": hex(start)}


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, -1), (-1, 0), (5, -5)])
def test_negative_numbers_make_no_range(start: int, count: int) -> None:
    with pytest.raises(SkeydError) as refused:
        GfnRange(start, count)
    assert refused.value.reason is Reason.REQUEST_INVALID


# --- several -------------------------------------------------------------------------------------------------------


@given(_ascending())
@settings(max_examples=examples(80), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_ascending_ranges_are_a_sequence_of_just_those(ranges: list[GfnRange]) -> None:
    several = Ranges(iter(ranges))

    assert list(several) == ranges
    assert len(several) == len(ranges)
    assert several[:2] == tuple(ranges[:2])
    assert several.frames() == sum(one.count for one in ranges)


@pytest.mark.parametrize(
    ("ranges", "named"),
    [
        ([(0, 10), (9, 1)], "0x9"),  # overlaps by one
        ([(0, 10), (0, 10)], "0x0"),  # twice the same
        ([(10, 10), (0, 5)], "0x0"),  # descending, apart
        ([(10, 10), (0, 10)], "0x0"),  # descending, touching
        ([(0, 10), (2, 2)], "0x2"),  # one inside the other
        ([(0, 1), (4, 1), (8, 8), (15, 1)], "0xf"),  # only the last
    ],
)
def test_ranges_that_overlap_or_descend_are_refused_by_the_first_that_does(
    ranges: list[tuple[int, int]], named: str
) -> None:
    with pytest.raises(SkeydError) as refused:
        Ranges(GfnRange(*one) for one in ranges)
    assert refused.value.reason is Reason.RANGES_NOT_ASCENDING
    assert refused.value.metadata == {"gfn": named}


def test_ranges_may_touch_and_stay_apart() -> None:
    ranges = [GfnRange(0, 10), GfnRange(10, 10)]
    assert list(Ranges(ranges)) == ranges


@given(_ranges_and_wanted())
@settings(max_examples=examples(80), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_range_that_holds_a_frame_is_found_and_no_other(given_: tuple[list[GfnRange], GfnRange]) -> None:
    ranges, wanted = given_
    several = Ranges(ranges)
    edges = {edge for one in ranges for edge in (one.start - 1, one.start, one.end - 1, one.end)}
    for gfn in edges | {wanted.start, wanted.end - 1}:
        assert several.at(gfn) == _holder(ranges, gfn)


@given(_ranges_and_wanted())
@settings(max_examples=examples(120), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_split_is_what_looking_at_every_frame_finds(given_: tuple[list[GfnRange], GfnRange]) -> None:
    ranges, wanted = given_

    expected = []
    frames = range(wanted.start, wanted.end)
    for holder, group in itertools.groupby(frames, lambda gfn: _holder(ranges, gfn)):
        part = list(group)
        expected.append((GfnRange(part[0], len(part)), holder is not None))
    assert list(Ranges(ranges).split(wanted)) == expected


@given(_ascending(), _ascending())
@settings(max_examples=examples(120), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_two_share_are_the_frames_that_both_have(ranges: list[GfnRange], wanted: list[GfnRange]) -> None:
    shared = Ranges(Ranges(ranges).shared(wanted))  # ascending and apart

    frames = [gfn for one in shared for gfn in range(one.start, one.end)]
    assert frames == [gfn for one in wanted for gfn in range(one.start, one.end) if _holder(ranges, gfn)]
    assert all(_holder(wanted, one.start) == _holder(wanted, one.end - 1) for one in shared)


def test_splitting_everything_there_is_takes_no_longer_than_its_edges() -> None:
    parts = list(Ranges([GfnRange(1, 1), GfnRange(LIMIT - 1, 1)]).split(GfnRange(0, LIMIT)))
    assert parts == [
        (GfnRange(0, 1), False),
        (GfnRange(1, 1), True),
        (GfnRange(2, LIMIT - 3), False),
        (GfnRange(LIMIT - 1, 1), True),
    ]


# --- memory --------------------------------------------------------------------------------------------------------


def _map(*frames: tuple[int, int]) -> MemoryMap:
    return MemoryMap(MemorySlot(slot, GfnRange(*one), "anonymous") for slot, one in enumerate(frames))


def test_slots_are_ascending_however_they_were_given_and_keep_their_numbers() -> None:
    memory = _map((0x300, 0x100), (0x0, 0x100))

    assert [(one.slot, one.frames.start) for one in memory.slots] == [(1, 0x0), (0, 0x300)]


def test_slots_that_touch_are_one_range_of_memory_and_still_two_slots() -> None:
    memory = _map((0x0, 0x100), (0x100, 0x100), (0x300, 0x100), (0x400, 0x100), (0x500, 0x100), (0x700, 1))

    assert list(memory.mapped) == [GfnRange(0, 0x200), GfnRange(0x300, 0x300), GfnRange(0x700, 1)]
    assert len(memory.slots) == 6
    memory.require_mapped(GfnRange(0x0, 0x200))
    memory.require_mapped(GfnRange(0x3FF, 0x102))


def test_slots_that_overlap_make_no_memory_map() -> None:
    with pytest.raises(SkeydError) as refused:
        _map((0x0, 0x100), (0xFF, 0x100))
    assert refused.value.reason is Reason.RANGES_NOT_ASCENDING


@given(_ranges_and_wanted(least=1))
@settings(max_examples=examples(120), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_first_frame_without_memory_is_the_one_that_is_named(given_: tuple[list[GfnRange], GfnRange]) -> None:
    slots, wanted = given_
    memory = _map(*((one.start, one.count) for one in slots))

    missing = next((gfn for gfn in range(wanted.start, wanted.end) if _holder(slots, gfn) is None), None)
    if missing is None:
        memory.require_mapped(wanted)
        return
    with pytest.raises(SkeydError) as refused:
        memory.require_mapped(wanted)
    assert refused.value.reason is Reason.GFN_NOT_MAPPED
    assert refused.value.metadata == {"gfn": hex(missing)}
    assert f"gfn {missing:#x} of range {wanted}" in refused.value.message


@given(_ranges_and_wanted(least=1))
@settings(max_examples=examples(120), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_range_with_mapped_ends_may_have_holes_and_one_without_is_refused(
    given_: tuple[list[GfnRange], GfnRange],
) -> None:
    slots, wanted = given_
    memory = _map(*((one.start, one.count) for one in slots))

    missing = [gfn for gfn in (wanted.start, wanted.end - 1) if _holder(slots, gfn) is None]
    if not missing:
        memory.require_ends_mapped(wanted)
        return
    with pytest.raises(SkeydError) as refused:
        memory.require_ends_mapped(wanted)
    assert refused.value.reason is Reason.GFN_NOT_MAPPED
    assert refused.value.metadata == {"gfn": hex(missing[0])}


@given(_ascending(least=1))
@settings(max_examples=examples(80), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_span_reaches_from_the_first_frame_to_the_last(slots: list[GfnRange]) -> None:
    span = _map(*((one.start, one.count) for one in slots)).span()

    assert (span.start, span.end) == (slots[0].start, slots[-1].end)


def test_a_refusal_says_where_there_is_memory_and_stays_short() -> None:
    memory = _map(*((index * 0x200, 0x100) for index in range(9)))

    with pytest.raises(SkeydError) as refused:
        memory.require_mapped(GfnRange(0x100, 1))
    assert "0x0-0xff" in refused.value.message
    assert "0xe00-0xeff, …" in refused.value.message
    assert "0x1000" not in refused.value.message
