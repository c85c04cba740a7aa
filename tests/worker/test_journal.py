"""The stack of old keys: what goes in comes out, from memory or a file; what is damaged is never taken for keys."""

from __future__ import annotations

import errno
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

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


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 3)), max_size=30), st.integers(0, 400))
@settings(max_examples=examples(200), deadline=None)
def test_any_stack_comes_back_whether_in_memory_or_in_a_file(
    pushed: list[tuple[int, int, int]], memory_bytes: int
) -> None:
    made: list[int] = []

    def open_file() -> int:
        made.append(os.memfd_create("journal"))
        return made[-1]

    before, journal.MEMORY_BYTES = journal.MEMORY_BYTES, memory_bytes  # type: ignore[misc]  # to meet both
    try:
        ours = Journal(open_file)
        expected, gfn = [], 0
        for gap, count, kind in pushed:
            frames = GfnRange(gfn + gap, count)
            keys = some_keys(count, kind) if kind else b"\x50" * count
            ours.push(frames, keys)
            expected.append((frames, keys))
            gfn = frames.end
        assert sum(one.count for one in ours.rest()) == sum(frames.count for frames, _ in expected)
        while expected:
            assert ours.pop() == expected.pop()
            assert sum(one.count for one in ours.rest()) == sum(frames.count for frames, _ in expected)
        assert ours.pop() is None
        ours.close()
    finally:
        journal.MEMORY_BYTES = before  # type: ignore[misc]
    assert len(made) <= 1


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
    assert len(ours._memory) <= most + 20
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


def _tail(**changes: int) -> Callable[[int], None]:
    # A tail that fits its packed keys and lies.
    def lie(fd: int) -> None:
        size = os.fstat(fd).st_size
        form = struct.Struct("=QIII")
        fields = dict(zip(("start", "count", "length", "crc32"), form.unpack(os.pread(fd, 20, size - 20)), strict=True))
        os.pwrite(fd, form.pack(*{**fields, **changes}.values()), size - 20)

    return lie


@pytest.mark.parametrize(
    "harm",
    [
        _cut,
        lambda fd: os.ftruncate(fd, 0),
        _flip(-1),
        _flip(-21),
        _flip(-500_000),
        _tail(count=0),
        _tail(count=1),
        _tail(count=(1 << 20) + 1),
        _tail(start=5),
        _tail(start=(1 << 64) - 1),
        _tail(length=0),
        _tail(length=(1 << 32) - 1),
    ],
)
def test_a_damaged_file_gives_no_keys_and_says_which_are_lost(disk: Disk, harm: Callable[[int], None]) -> None:
    ours = Journal(disk.open)
    keys = some_keys(1 << 20)
    ours.push(GfnRange(0, 1 << 20), keys)
    ours.push(GfnRange(1 << 20, 1 << 20), keys)
    assert len(disk.fds) == 1
    harm(disk.fds[0])
    with pytest.raises(JournalDamagedError):
        ours.pop()
    assert GfnRange(0, 2 << 20) in ours.rest()
    ours.close()
