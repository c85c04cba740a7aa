"""Chunks from a worker's memory: right, in order, never overwritten while somebody holds them, and in bounded room."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.limits import DEFAULT_CHUNK_KEYS
from skeyd.vms.pacing import FIRST_KEYS, Pace
from skeyd.vms.read_ahead import SLICES_AHEAD, ChunkRead, ReadAhead
from skeyd.worker.packets import Fields
from skeyd.worker.protocol import BUFFER_BYTES, BUFFER_KEYS, SLICE_KEYS
from tests.examples import examples

_PATTERN = bytes(gfn * 6 % 256 & 0xFE for gfn in range(256)) * ((BUFFER_KEYS >> 8) + 2)


def _keys(frames: GfnRange) -> bytes:
    at = frames.start % 256
    return _PATTERN[at : at + frames.count]


class Worker:
    """Fills memory when it is asked for its answer; what was held then must not be what it fills."""

    def __init__(self, nanoseconds_a_key: float = 1, chunk_keys: int = BUFFER_KEYS) -> None:
        self.memory = mmap.mmap(-1, BUFFER_BYTES)
        self.chunk_keys = chunk_keys
        self.nanoseconds_a_key = nanoseconds_a_key
        self.requests: list[dict[str, Any]] = []
        self.waiting: deque[dict[str, Any]] = deque()
        self.most_waiting = 0
        self.keyless_from: int | None = None
        self.keyless_at: int | None = None
        """The first gfn of one slice that alone is said to be of a guest that uses no keys."""

    def send(self, request: dict[str, Any]) -> None:
        assert request["op"] == "get"
        assert 0 <= request["offset"] < request["offset"] + request["count"] <= BUFFER_KEYS
        assert 1 <= request["count"] <= SLICE_KEYS
        self.requests.append(request)
        self.waiting.append(request)
        self.most_waiting = max(self.most_waiting, len(self.waiting))

    def take(self) -> Fields:
        request = self.waiting.popleft()
        self.fill(request)
        start = request["start"]
        keyless = start == self.keyless_at or (self.keyless_from is not None and start >= self.keyless_from)
        ns = round(request["count"] * self.nanoseconds_a_key)
        return Fields({"uses_keys": not keyless, "ns": ns}, "answer")

    def fill(self, request: dict[str, Any]) -> None:
        """Write the keys that were asked for."""
        at = request["buffer"] * BUFFER_KEYS + request["offset"]
        assert at + request["count"] <= self.chunk_keys + SLICE_KEYS
        self.memory[at : at + request["count"]] = _keys(GfnRange(request["start"], request["count"]))

    def fill_all(self) -> None:
        """Write all that was asked for, as a quick worker does while its front is busy."""
        for request in self.waiting:
            self.fill(request)

    def read(self, chunks: list[GfnRange], pace: Pace | None = None) -> Iterator[ChunkRead]:
        """Read chunks."""
        return iter(ReadAhead(self.memory, self.send, self.take, chunks, self.chunk_keys, pace or Pace(0.010)))


@settings(max_examples=examples(60), deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1 << 40), st.one_of(st.integers(1, 600), st.integers(1, BUFFER_KEYS))), max_size=12
    ),
    st.floats(0, 1e6),
    st.lists(st.booleans(), max_size=12),
    st.one_of(st.just(BUFFER_KEYS), st.just(SLICE_KEYS), st.integers(1, BUFFER_KEYS)),
)
def test_every_chunk_has_its_keys_however_far_the_worker_is_ahead(
    wanted: list[tuple[int, int]], nanoseconds_a_key: float, releases: list[bool], chunk_keys: int
) -> None:
    worker = Worker(nanoseconds_a_key, chunk_keys)
    chunks = [GfnRange(start, min(count, chunk_keys)) for start, count in wanted]
    found = []
    for number, chunk in enumerate(worker.read(chunks)):
        assert chunk.views is not None
        worker.fill_all()
        found.append((chunk.frames, b"".join(chunk.views)))
        if releases[number : number + 1] == [True]:
            chunk.release()
    assert found == [(one, _keys(one)) for one in chunks]
    assert worker.most_waiting <= SLICES_AHEAD
    assert sum(request["count"] for request in worker.requests) == sum(one.count for one in chunks)
    worker.memory.close()


def test_slices_fill_a_chunk_one_after_the_other_as_long_as_the_pace_says() -> None:
    # Of 100 ns a key and 1 ms at most: 10,000 keys, in whole segments 9,984; the first slice has no measure.
    worker = Worker(100)
    for chunk in worker.read([GfnRange(0x100, 40_000), GfnRange(0x20000, 11_000)], Pace(0.001)):
        chunk.release()
    assert [(one["offset"], one["start"], one["count"]) for one in worker.requests] == [
        (0, 0x100, FIRST_KEYS),
        (16_384, 0x100 + 16_384, 9_984),
        (26_368, 0x100 + 26_368, 9_984),
        (36_352, 0x100 + 36_352, 3_648),
        (40_000, 0x20000, 9_984),
        (49_984, 0x20000 + 9_984, 1_016),
    ]


def test_slices_shrink_and_grow_with_how_long_they_take_in_the_middle_of_a_stream() -> None:
    worker = Worker()
    sizes = []
    for number, _ in enumerate(worker.read([GfnRange(n << 20, BUFFER_KEYS) for n in range(6)])):
        worker.nanoseconds_a_key = 1000 if number in (1, 2) else 1
        sizes.append(worker.requests[-1]["count"])
    assert max(sizes) == SLICE_KEYS
    assert min(sizes) <= 10_000
    assert sizes[-1] > 100_000


@pytest.mark.parametrize("chunk_keys", [BUFFER_KEYS, SLICE_KEYS, 100_000])
def test_the_next_chunk_is_asked_for_while_one_that_was_released_is_being_sent(chunk_keys: int) -> None:
    worker = Worker(chunk_keys=chunk_keys)
    chunks = worker.read([GfnRange(n << 20, chunk_keys) for n in range(20)])
    next(chunks).release()
    next(chunks).release()
    chunk = next(chunks)
    # While it is held there is room for one slice beside it; then for all of the next, and a slice more.
    assert sum(one["count"] for one in worker.waiting) == SLICE_KEYS
    chunk.release()
    assert sum(one["count"] for one in worker.waiting) == chunk_keys + SLICE_KEYS
    chunks.close()  # type: ignore[attr-defined]


def test_a_stream_of_chunks_as_large_as_most_has_two_slices_in_the_front() -> None:
    worker = Worker(chunk_keys=DEFAULT_CHUNK_KEYS)
    for chunk in worker.read([GfnRange(n << 20, DEFAULT_CHUNK_KEYS) for n in range(20)]):
        held = sum(map(len, chunk.views or ()))
        assert held + sum(one["count"] for one in worker.waiting) <= 2 * SLICE_KEYS
        chunk.release()
        assert sum(one["count"] for one in worker.waiting) <= 2 * SLICE_KEYS
    assert not any(worker.memory[2 * SLICE_KEYS :]), "memory beyond two slices is never used"


def test_no_more_slices_are_under_way_than_the_socket_holds_answers_to() -> None:
    worker = Worker(1e9)
    chunks = worker.read([GfnRange(0, BUFFER_KEYS)])
    next(chunks)
    assert worker.most_waiting == SLICES_AHEAD
    assert worker.requests[1]["count"] == 256


def test_of_many_small_chunks_no_more_are_under_way_than_slices() -> None:
    worker = Worker()
    list(islice(worker.read([GfnRange(n, 1) for n in range(1000)]), 10))
    assert worker.most_waiting == SLICES_AHEAD
    assert len(worker.requests) <= 10 + SLICES_AHEAD


def test_nothing_is_asked_for_before_the_first_chunk_is() -> None:
    worker = Worker()
    worker.read([GfnRange(0, 1)])
    assert worker.requests == []


def test_a_guest_that_uses_no_keys_has_no_views() -> None:
    worker = Worker()
    worker.keyless_from = SLICE_KEYS
    found = [chunk.copy() for chunk in worker.read([GfnRange(0, 4), GfnRange(SLICE_KEYS - 1, 1 << 19)])]
    assert found == [_keys(GfnRange(0, 4)), None]


@pytest.mark.parametrize("slice_start", [0, FIRST_KEYS, 5 * FIRST_KEYS], ids=["first", "second", "third"])
def test_a_chunk_of_which_one_slice_is_keyless_has_no_views(slice_start: int) -> None:
    # What a broken worker calls keyless it has not written: there are the keys of whatever was there before.
    worker = Worker()
    worker.keyless_at = slice_start
    found = [chunk.copy() for chunk in worker.read([GfnRange(0, SLICE_KEYS), GfnRange(1 << 20, 4)])]
    assert [one["start"] for one in worker.requests[:3]] == [0, FIRST_KEYS, 5 * FIRST_KEYS]
    assert found == [None, _keys(GfnRange(1 << 20, 4))]


def test_a_chunk_that_is_left_unreleased_keeps_no_memory() -> None:
    worker = Worker()
    for chunk in worker.read([GfnRange(0, 4), GfnRange(4, 4)]):
        held = chunk
    assert held.views == ()
    worker.memory.close()  # BufferError where a view is left


def test_a_reader_that_stops_in_the_middle_keeps_no_memory_and_asks_for_nothing() -> None:
    worker = Worker()
    chunks = worker.read([GfnRange(n << 20, BUFFER_KEYS) for n in range(4)])
    next(chunks)
    asked = len(worker.requests)
    chunks.close()  # type: ignore[attr-defined]
    assert len(worker.requests) == asked
    worker.memory.close()


def test_a_worker_that_is_lost_when_memory_is_given_back_is_an_error_and_no_memory_is_kept() -> None:
    worker = Worker()
    gone = False

    def send(request: dict[str, Any]) -> None:
        if gone:
            raise SkeydError(Reason.WORKER_LOST, "gone")
        worker.send(request)

    wanted = [GfnRange(n << 20, BUFFER_KEYS) for n in range(4)]
    chunk = next(iter(ReadAhead(worker.memory, send, worker.take, wanted, BUFFER_KEYS, Pace(0.010))))
    gone = True
    with pytest.raises(SkeydError, match="gone"):
        chunk.release()
    worker.memory.close()
