"""Page tables made before a SET: of which segments, by touching which frame, and how often."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from skeyd.gfn import GfnRange
from skeyd.kvm.memory import GuestMemory
from skeyd.storage_key import FRAME_SIZE, SEGMENT_FRAMES
from skeyd.worker.page_tables import PageTables

SEGMENT = SEGMENT_FRAMES


class Memory(GuestMemory):
    """Memory that is nowhere, and writes down which frames are touched. `readable` is how many bytes it has."""

    def __init__(self, segments: int, readable: int | None = None) -> None:
        self.size = segments * SEGMENT * FRAME_SIZE
        self.readable = self.size if readable is None else readable
        self.touched: list[int] = []

    def touch(self, offsets: Sequence[int]) -> int:
        assert all(0 <= offset < self.size and not offset % FRAME_SIZE for offset in offsets)
        done = next((number for number, offset in enumerate(offsets) if offset >= self.readable), len(offsets))
        self.touched += [offset // FRAME_SIZE for offset in offsets[:done]]
        return done


def made(start: int, keys: bytes, segments: int = 4) -> list[int]:
    """Return the frames that are touched for a SET on untouched memory that begins with frame 0."""
    memory = Memory(segments)
    PageTables([(GfnRange(0, segments * SEGMENT), memory)]).make(start, keys)
    return memory.touched


def test_each_segment_is_touched_once() -> None:
    assert made(0, b"\x10" * 4 * SEGMENT) == [0, SEGMENT, 2 * SEGMENT, 3 * SEGMENT]


@pytest.mark.parametrize(
    ("start", "count", "touched"),
    [
        (0, SEGMENT - 1, []),
        (1, SEGMENT - 1, []),
        (1, SEGMENT, []),
        (0, SEGMENT, [0]),
        (0, 2 * SEGMENT - 1, [0]),
        (1, 2 * SEGMENT - 1, [SEGMENT]),
        (1, 2 * SEGMENT, [SEGMENT]),
        (SEGMENT - 1, 2 * SEGMENT + 2, [SEGMENT, 2 * SEGMENT]),
        (4 * SEGMENT - 1, 1, []),
    ],
)
def test_a_segment_of_which_not_all_keys_are_set_is_left_alone(start: int, count: int, touched: list[int]) -> None:
    assert made(start, b"\x10" * count) == touched


@pytest.mark.parametrize("first", [0, 1, 77, SEGMENT - 1])
@pytest.mark.parametrize("start", [0, SEGMENT - 1])
def test_it_is_the_frame_of_the_first_key_that_is_not_zero(first: int, start: int) -> None:
    before = -start % SEGMENT
    keys = bytes(before) + (bytes(first) + b"\x02" * (SEGMENT - first)) * 2
    assert made(start, keys) == [start + before + first, start + before + SEGMENT + first]


def test_a_segment_whose_keys_are_all_zero_is_left_alone() -> None:
    assert made(0, bytes(4 * SEGMENT)) == []
    assert made(0, bytes(SEGMENT) + b"\x10" * SEGMENT + bytes(SEGMENT - 1) + b"\x08" + bytes(SEGMENT)) == [
        SEGMENT,
        3 * SEGMENT - 1,
    ]


def test_a_segment_is_not_touched_again() -> None:
    memory = Memory(4)
    tables = PageTables([(GfnRange(0, 4 * SEGMENT), memory)])
    tables.make(SEGMENT, b"\x10" * SEGMENT)
    tables.make(3 * SEGMENT, bytes(SEGMENT))
    tables.make(0, b"\x10" * 4 * SEGMENT)
    tables.make(0, b"\x10" * 4 * SEGMENT)
    assert memory.touched == [SEGMENT, 0, 2 * SEGMENT, 3 * SEGMENT]


def test_each_slot_has_its_own_memory() -> None:
    low, high, last = Memory(2), Memory(2), Memory(1)
    tables = PageTables(
        [
            (GfnRange(SEGMENT, 2 * SEGMENT), low),
            (GfnRange(3 * SEGMENT, 2 * SEGMENT), high),
            (GfnRange(1 << 30, SEGMENT), last),
        ]
    )
    tables.make(2 * SEGMENT - 5, b"\x10" * (2 * SEGMENT + 10))
    assert (low.touched, high.touched, last.touched) == ([SEGMENT], [0], [])
    tables.make(1 << 30, b"\x10" * SEGMENT)
    assert (low.touched, high.touched, last.touched) == ([SEGMENT], [0], [0])


def test_a_segment_that_could_not_be_touched_is_tried_again() -> None:
    memory = Memory(4, readable=2 * SEGMENT * FRAME_SIZE)
    tables = PageTables([(GfnRange(0, 4 * SEGMENT), memory)])
    tables.make(0, b"\x10" * 4 * SEGMENT)
    assert memory.touched == [0, SEGMENT]
    memory.readable = memory.size
    tables.make(0, b"\x10" * 4 * SEGMENT)
    assert memory.touched == [0, SEGMENT, 2 * SEGMENT, 3 * SEGMENT]
