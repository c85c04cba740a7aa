"""The stack of old keys: what goes in comes out, from memory or a file; what is damaged is never taken for keys."""

from __future__ import annotations

import errno
import os
import random
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.linux import open_unnamed
from skeyd.worker import journal
from skeyd.worker.journal import MEMORY_BYTES, Journal, JournalDamagedError
from tests.examples import examples

_EVEN = bytes(byte & 0xFE for byte in range(256))


def some_keys(count: int, seed: int = 0) -> bytes:
    """Return keys that can't be compressed by much."""
    return random.Random(seed).randbytes(count).translate(_EVEN)  # noqa: S311  no secret


class Disk:
    """Files without names in a directory, and how often one was asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.fds: list[int] = []

    def open(self) -> int:
        """As a worker does."""
        self.fds.append(open_unnamed(self._directory))
        return self.fds[-1]

    def close(self) -> None:
        """Leave the directory."""
        os.close(self._directory)


@pytest.fixture
def disk(tmp_path: Path, open_fds: None) -> Iterator[Disk]:
    made = Disk(tmp_path)
    yield made
    made.close()
    assert list(tmp_path.iterdir()) == []


def no_file() -> int:
    raise AssertionError("a file was asked for")


KEYS = {
    "one key": b"\x30" * 5000,
    "runs": b"\x10" * 300 + b"\x20" * 7 + b"\x06" * 3000,
    "random": some_keys(5000),
    "a single one": b"\x10",
    "two": b"\x10\x20",
}


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_what_was_pushed_last_comes_first_and_as_it_was(keys: bytes) -> None:
    ours = Journal(no_file)
    ours.push(GfnRange(7, 3), b"\x00\x06\xf8")
    ours.push(GfnRange(100, len(keys)), keys)
    assert ours.rest() == [GfnRange(7, 3), GfnRange(100, len(keys))]
    assert ours.pop() == (GfnRange(100, len(keys)), keys)
    assert ours.rest() == [GfnRange(7, 3)]
    assert ours.pop() == (GfnRange(7, 3), b"\x00\x06\xf8")
    assert ours.pop() is None
    assert ours.rest() == []


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 3)), max_size=30),
    st.integers(0, 400),
    st.sampled_from([1, 10, 50, 1 << 16]),
    st.sampled_from([1, 2, 4096]),
)
@settings(max_examples=examples(300), deadline=None)
def test_any_stack_comes_back_whether_in_memory_or_in_a_file(
    pushed: list[tuple[int, int, int]], memory_bytes: int, joined_keys: int, joined_ranges: int
) -> None:
    made: list[int] = []

    def open_file() -> int:
        made.append(os.memfd_create("journal"))
        return made[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal, "MEMORY_BYTES", memory_bytes)
        patched.setattr(journal, "JOINED_KEYS", joined_keys)
        patched.setattr(journal, "JOINED_RANGES", joined_ranges)
        ours = Journal(open_file)
        expected: list[tuple[int, int]] = []
        gfn = 0
        for gap, count, kind in pushed:
            frames = GfnRange(gfn + gap, count)
            keys = some_keys(count, kind) if kind else b"\x50" * count
            ours.push(frames, keys)
            expected += zip(range(frames.start, frames.end), keys, strict=True)
            gfn = frames.end
        assert sum(one.count for one in ours.rest()) == ours.frames() == len(expected)
        while (popped := ours.pop()) is not None:
            frames, keys = popped
            # The first slices of a call may have been larger than the kernel has time for.
            assert frames.count <= max(count for _, count, _ in pushed[-4:])
            assert expected[-frames.count :] == list(zip(range(frames.start, frames.end), keys, strict=True))
            del expected[-frames.count :]
            assert sum(one.count for one in ours.rest()) == ours.frames() == len(expected)
        assert expected == []
        ours.close()
    assert len(made) <= 1


def test_slices_that_overlap_come_back_last_first() -> None:
    ours = Journal(no_file)
    slices = [(GfnRange(0, 4), b"\x10\x20\x30\x40"), (GfnRange(2, 2), b"\x50\x60"), (GfnRange(2, 1), b"\x70")]
    for one in slices:
        ours.push(*one)
    assert [ours.pop() for _ in range(4)] == [*reversed(slices), None]


@pytest.mark.parametrize(
    ("old", "worth_it"),
    [
        (some_keys(journal.JOINED_KEYS), False),
        (bytes(range(16, 256, 16)) * 4370, False),  # no two alike side by side, and half of them all the same
        ((b"\x10" * 8 + b"\x30" * 8) * 4096, True),
    ],
)
def test_time_is_spent_on_keys_in_runs_only(
    old: bytes, worth_it: bool, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    deflated, looked_at = journal._deflated, list[int]()

    def look(data: bytes) -> bytes:
        looked_at.append(len(data))
        return deflated(data)

    monkeypatch.setattr(journal, "_deflated", look)
    stack = Journal(disk.open)
    frames = GfnRange(0, len(old))
    stack.push(frames, old)
    assert (len(old) in looked_at) == worth_it
    assert min(looked_at) < len(old) // 8
    assert stack.pop() == (frames, old)
    stack.close()


@pytest.mark.parametrize("size", [1, 7, 256])
@pytest.mark.parametrize("kind", ["random", "one key"])
def test_small_slices_cost_no_more_than_large_ones(size: int, kind: str) -> None:
    ours = Journal(no_file)
    frames = 3 << 16
    keys = some_keys(frames) if kind == "random" else b"\x30" * frames
    before = memory_of(ours)
    for at in range(0, frames, size):
        ours.push(GfnRange(at, min(size, frames - at)), keys[at : at + size])
        # What waits to be joined is bounded.
        assert len(ours._keys) <= journal.JOINED_KEYS
    cost = memory_of(ours) - before
    assert cost < (1.01 * frames if kind == "random" else 1.01 * journal.JOINED_KEYS)
    at = frames
    while (popped := ours.pop()) is not None:
        at -= popped[0].count
        assert popped == (GfnRange(at, popped[0].count), keys[at : at + popped[0].count])
    assert at == 0


def test_ranges_that_wait_to_be_joined_are_bounded() -> None:
    ours = Journal(no_file)
    count = 4 * journal.JOINED_RANGES
    for gfn in range(0, 2 * count, 2):
        ours.push(GfnRange(gfn, 1), bytes([gfn % 256]))
        assert len(ours._ranges) <= 2 * journal.JOINED_RANGES
    assert memory_of(ours) < 24 * count
    for gfn in reversed(range(0, 2 * count, 2)):
        assert ours.pop() == (GfnRange(gfn, 1), bytes([gfn % 256]))


def memory_of(ours: Journal) -> int:
    """Bytes that a journal holds in memory."""
    held = (ours._memory, ours._keys)
    return sum(map(len, held)) + sum(one.itemsize * len(one) for one in (ours._ranges, ours._records, ours._recorded))


def test_what_memory_does_not_hold_goes_into_one_file_without_a_name(disk: Disk) -> None:
    ours = Journal(disk.open)
    size, pushed = 1 << 18, []
    for number in range(8):
        keys = some_keys(size, number)
        pushed.append((GfnRange(number * size, size), keys))
        ours.push(*pushed[-1])
    assert len(disk.fds) == 1
    assert os.fstat(disk.fds[0]).st_size > 3 * size
    assert len(ours._memory) <= MEMORY_BYTES
    assert ours.rest() == [GfnRange(0, 8 * size)]
    while pushed:
        assert ours.pop() == pushed.pop()
    ours.close()
    ours.close()


def test_keys_in_runs_never_reach_a_file() -> None:
    ours = Journal(no_file)
    for number in range(256):  # a guest of 1 TiB that has one key throughout in each slice
        ours.push(GfnRange(number << 20, 1 << 20), bytes([number & 0xFE]) * (1 << 20))
    assert ours.pop() == (GfnRange(255 << 20, 1 << 20), b"\xfe" * (1 << 20))


@pytest.mark.parametrize(("keys", "most"), [(some_keys(1 << 18), 1 << 18), (b"\x10\x20" * 64 + b"\x30" * 4000, 600)])
def test_keys_are_compressed_where_that_is_worth_it(keys: bytes, most: int) -> None:
    ours = Journal(no_file)
    ours.push(GfnRange(0, len(keys)), keys)
    ours.push(GfnRange(1 << 20, 1 << 16), bytes(1 << 16))
    assert len(ours._memory) <= most + 1
    assert ours.pop() == (GfnRange(1 << 20, 1 << 16), bytes(1 << 16))
    assert ours.pop() == (GfnRange(0, len(keys)), keys)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errno.ENOSPC, Reason.HOST_EXHAUSTED),
        (errno.EDQUOT, Reason.HOST_EXHAUSTED),
        (errno.ENOMEM, Reason.OUT_OF_MEMORY),
        (errno.EIO, Reason.WORKER_FAILED),
        (errno.EOPNOTSUPP, Reason.WORKER_FAILED),
    ],
)
def test_a_file_that_cant_be_had_refuses_the_slice_and_loses_none_before(error: int, reason: Reason) -> None:
    def refused() -> int:
        raise OSError(error, os.strerror(error))

    ours = Journal(refused)
    keys = some_keys(MEMORY_BYTES // 2)
    ours.push(GfnRange(0, len(keys)), keys)
    with pytest.raises(SkeydError) as caught:
        ours.push(GfnRange(len(keys), 1 << 20), some_keys(1 << 20))
    assert caught.value.reason is reason
    assert ours.pop() == (GfnRange(0, len(keys)), keys)
    assert ours.pop() is None


def test_a_disk_that_is_full_in_the_middle_of_a_slice_loses_none_before(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Journal(disk.open)
    slices = [(GfnRange(number << 20, 1 << 20), some_keys(1 << 20, number)) for number in range(3)]
    ours.push(*slices[0])
    ours.push(*slices[1])
    whole = os.pwrite

    room = [300_000]

    def half(fd: int, data: memoryview, at: int) -> int:
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(fd, data[: room.pop()], at)

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(SkeydError) as caught:
        ours.push(*slices[2])
    assert caught.value.reason is Reason.HOST_EXHAUSTED
    monkeypatch.setattr(os, "pwrite", whole)
    # Where there is room again, the next slice is written over what was left of that one.
    ours.push(GfnRange(9 << 20, 3), b"\x10\x20\x30")
    assert ours.pop() == (GfnRange(9 << 20, 3), b"\x10\x20\x30")
    assert ours.pop() == slices[1]
    assert ours.pop() == slices[0]
    ours.close()


def _cut(fd: int) -> None:
    os.ftruncate(fd, os.fstat(fd).st_size - 1)


def _flip(at: int) -> Callable[[int], None]:
    def flip(fd: int) -> None:
        (byte,) = os.pread(fd, 1, os.fstat(fd).st_size + at)
        os.pwrite(fd, bytes([byte ^ 0x10]), os.fstat(fd).st_size + at)

    return flip


MIB = 1 << 20


@pytest.mark.parametrize(
    ("harm", "lost"),
    [
        (_cut, {2}),
        (lambda fd: os.ftruncate(fd, 0), {0, 1, 2}),
        (lambda fd: os.ftruncate(fd, MIB), {1, 2}),
        (_flip(-1), {2}),
        (_flip(-MIB), {2}),
        (_flip(-MIB - 1), {1}),
        (_flip(-3 * MIB), {0}),
    ],
)
def test_a_damaged_file_gives_no_keys_and_says_which_are_lost(
    disk: Disk, harm: Callable[[int], None], lost: set[int]
) -> None:
    ours = Journal(disk.open)
    below = (GfnRange(9 * MIB, 5), b"\x10\x20\x30\x40\x50")
    ours.push(*below)
    slices = [(GfnRange(number * MIB, MIB), some_keys(MIB, number)) for number in range(3)]
    for one in slices:
        ours.push(*one)
    (fd,) = disk.fds
    assert os.fstat(fd).st_size == 3 * MIB
    harm(fd)
    for number in (2, 1, 0):
        if number in lost:
            with pytest.raises(JournalDamagedError) as damaged:
                ours.pop()
            assert damaged.value.frames == [slices[number][0]]
            assert str(slices[number][0]) in str(damaged.value)
        else:
            assert ours.pop() == slices[number]
        assert ours.rest() == [below[0], *([GfnRange(0, number * MIB)] if number else [])]
    assert ours.pop() == below
    assert ours.pop() is None
    ours.close()


def test_a_file_that_cant_be_read_loses_one_record_at_a_time(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Journal(disk.open)
    slices = [(GfnRange(number * MIB, MIB), some_keys(MIB, number)) for number in range(3)]
    for one in slices:
        ours.push(*one)

    def broken(*_: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", broken)
        with pytest.raises(JournalDamagedError) as damaged:
            ours.pop()
        assert damaged.value.frames == [slices[2][0]]
    assert ours.pop() == slices[1]
    ours.close()


class Memory:
    """Runs out once: at the nth time that a journal grows, with the half of it done."""

    def __init__(self, times: int) -> None:
        self.times = times

    def take(self) -> None:
        self.times -= 1
        if not self.times:
            raise MemoryError


def short_of(memory: Memory) -> dict[str, Any]:
    class Bytes(bytearray):
        def __init__(self, *given: Any) -> None:
            memory.take()
            super().__init__(*given)

        def __iadd__(self, more: Any) -> Any:  # type: ignore[misc]  # as bytearray's own
            super().__iadd__(bytes(more)[: len(more) // 2])
            memory.take()
            return super().__iadd__(bytes(more)[len(more) // 2 :])

    class Numbers(array):  # type: ignore[type-arg]
        def extend(self, more: Any) -> None:
            super().extend(tuple(more)[:1])
            memory.take()
            super().extend(tuple(more)[1:])

    return {"bytearray": Bytes, "array": Numbers}


@pytest.mark.parametrize("joined_keys", [1, 10, 1000])
@pytest.mark.parametrize("memory_bytes", [0, 1000], ids=["file", "memory"])
def test_wherever_memory_is_short_no_key_is_lost_or_another_frames(
    monkeypatch: pytest.MonkeyPatch, joined_keys: int, memory_bytes: int
) -> None:
    slices = [(GfnRange(start, 4), some_keys(4, start)) for start in (0, 4, 100, 104, 200, 300)]
    monkeypatch.setattr(journal, "JOINED_KEYS", joined_keys)
    monkeypatch.setattr(journal, "MEMORY_BYTES", memory_bytes)
    reached = 0
    for times in range(1, 1000):
        memory = Memory(0)
        for name, short in short_of(memory).items():
            monkeypatch.setattr(journal, name, short, raising=False)
        ours = Journal(lambda: os.memfd_create("journal"))
        memory.times = times
        found: list[tuple[int, int]] = []
        failed = 0
        for frames, keys in slices:
            before = ours.rest()
            try:
                ours.push(frames, keys)
            except MemoryError:
                failed += 1
                assert ours.rest() == before
                ours.push(frames, keys)
        while ours.frames():
            left = ours.frames()
            try:
                popped = ours.pop()
            except MemoryError:
                failed += 1
                assert ours.frames() == left
                continue
            assert popped is not None
            found = [*zip(range(popped[0].start, popped[0].end), popped[1], strict=True), *found]
        assert found == [
            pair for frames, keys in slices for pair in zip(range(frames.start, frames.end), keys, strict=True)
        ]
        memory.times = 0
        ours.close()
        if not failed:
            break
        reached += 1
    assert reached > len(slices)


@pytest.mark.parametrize("packed", [b"", b"no zlib", zlib.compress(b"\x10" * 99), zlib.compress(b"\x10" * 101)[:-9]])
def test_a_record_whose_keys_are_not_as_many_as_its_frames_gives_none(
    monkeypatch: pytest.MonkeyPatch, packed: bytes
) -> None:
    ours = Journal(no_file)
    monkeypatch.setattr(journal, "JOINED_KEYS", 1)
    ours.push(GfnRange(0, 3), b"\x10\x20\x30")
    with monkeypatch.context() as patched:
        patched.setattr(journal, "_pack", lambda _: packed)
        ours.push(GfnRange(3, 50), bytes(50))
        ours.push(GfnRange(53, 50), bytes(50))
    for start in (53, 3):
        with pytest.raises(JournalDamagedError) as damaged:
            ours.pop()
        assert damaged.value.frames == [GfnRange(start, 50)]
    assert ours.pop() == (GfnRange(0, 3), b"\x10\x20\x30")
