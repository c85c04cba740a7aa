"""The size of slices: as large as the kernel's lock may be held, never larger than an ioctl may be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skeyd.vms.pacing import FIRST_KEYS, GROWTH, Pace
from skeyd.worker.protocol import SLICE_KEYS

LIMIT = 0.010


def _run(pace: Pace, nanoseconds_a_key: float, slices: int) -> list[int]:
    sizes = []
    for _ in range(slices):
        sizes.append(pace.keys)
        pace.took(pace.keys, round(pace.keys * nanoseconds_a_key))
    return sizes


def test_slices_grow_by_steps_to_the_largest_where_the_kernel_is_quick() -> None:
    assert _run(Pace(LIMIT), 1, 4) == [FIRST_KEYS, 4 * FIRST_KEYS, SLICE_KEYS, SLICE_KEYS]


def test_slices_shrink_at_once_where_the_kernel_becomes_slow_and_grow_again() -> None:
    pace = Pace(LIMIT)
    _run(pace, 1, 4)
    assert _run(pace, 1000, 3) == [SLICE_KEYS, 9_984, 9_984]
    assert _run(pace, 1, 4) == [9_984, 39_936, 159_744, SLICE_KEYS]


def test_a_slice_is_never_smaller_than_a_segment() -> None:
    assert _run(Pace(LIMIT), 1e9, 3) == [FIRST_KEYS, 256, 256]


@pytest.mark.parametrize("limit", [0.001, 0.010, 0.5])
def test_slices_take_as_long_as_they_may_and_no_longer(limit: float) -> None:
    pace = Pace(limit)
    _run(pace, 3000, 12)
    took = pace.keys * 3000 / 1e9
    assert limit - 256 * 3000 / 1e9 <= took <= limit


def test_a_small_slice_says_nothing_of_large_ones_unless_it_is_late() -> None:
    pace = Pace(LIMIT)
    _run(pace, 1, 4)
    pace.took(1, 50_000)
    assert pace.keys == SLICE_KEYS
    pace.took(1000, 20_000_000)
    assert pace.keys == 256


def test_slices_that_were_asked_for_before_the_last_change_make_nothing_grow() -> None:
    pace = Pace(LIMIT)
    _run(pace, 1, 4)
    pace.took(SLICE_KEYS, 100_000_000)
    small = pace.keys
    pace.took(SLICE_KEYS, 11_000_000)
    assert pace.keys == small


def test_it_has_no_measure_until_something_was_measured() -> None:
    pace = Pace(LIMIT)
    assert not pace.measured
    pace.took(1, 1)
    assert pace.measured


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, SLICE_KEYS), st.integers(0, 1 << 62)), max_size=30), st.floats(1e-9, 1.0))
def test_whatever_a_worker_says_a_slice_is_whole_segments_and_grows_by_steps(
    told: list[tuple[int, int]], limit: float
) -> None:
    pace = Pace(limit)
    for keys, nanoseconds in told:
        before = pace.keys
        pace.took(keys, nanoseconds)
        assert 256 <= pace.keys <= min(SLICE_KEYS, GROWTH * before)
        assert pace.keys % 256 == 0
