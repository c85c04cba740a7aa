"""LineWriter: the order of lines and the count of those that are lost, over pipes, files and disks that are full."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from skeyd.line_writer import LineWriter
from tests.rpc.stubs import SECONDS

PIPE = 65_536
"""Bytes that fit into a pipe, as Linux makes it."""
LINE = 64
MOST = 1024
"""Bytes that may wait: 16 lines."""


def a_line(number: int) -> bytes:
    return f"{number}".encode().ljust(LINE - 1) + b"\n"


def loss_of(lines: int) -> bytes:
    return f"lost {lines}\n".encode()


@contextmanager
def a_writer(fd: int) -> Iterator[LineWriter]:
    """Write to a descriptor, which is closed afterwards as soon as nobody uses it any more."""
    writer = LineWriter(fd, MOST, loss_of)
    try:
        yield writer
    finally:
        ended = writer.close(SECONDS)
        os.close(fd)
    assert ended


@pytest.fixture
def pipe(open_fds: None) -> Iterator[tuple[int, LineWriter]]:
    """Make a pipe and its writer; its reader is closed before the writer is, which so can't hang in a write."""
    reader, fd = os.pipe()
    with a_writer(fd) as writer:
        try:
            yield reader, writer
        finally:
            os.close(reader)


def fill(writer: LineWriter, lines: int) -> None:
    """Put lines of which those that wait are at most as many as may wait, so that none is lost."""
    for number in range(lines):
        writer.put(a_line(number))
        if not number % 8:
            assert writer.flush(SECONDS)


def fill_pipe(writer: LineWriter) -> int:
    """Fill the pipe, which holds whole lines, so that the next line hangs in its write. How many lines that took."""
    fill(writer, PIPE // LINE)
    assert writer.flush(SECONDS)
    writer.put(a_line(PIPE // LINE))
    deadline = time.monotonic() + SECONDS
    while not writer.flush(0) and writer._bytes:  # until the thread has taken it
        assert time.monotonic() < deadline
    return PIPE // LINE + 1


def lines_of(reader: int, until: bytes) -> list[bytes]:
    """Read lines until one that is given."""
    read = b""
    while not read.endswith(until):
        part = os.read(reader, PIPE)
        assert part, read
        read += part
    return read.splitlines(keepends=True)


def test_lines_keep_their_order_and_none_is_lost_where_they_are_read(pipe: tuple[int, LineWriter]) -> None:
    reader, writer = pipe
    read: list[bytes] = []
    reading = threading.Thread(target=lambda: read.extend(lines_of(reader, a_line(4_999))))
    reading.start()
    fill(writer, 5_000)
    reading.join(SECONDS)
    assert read == [a_line(number) for number in range(5_000)]


def test_what_is_lost_is_told_at_its_place_in_one_line(pipe: tuple[int, LineWriter]) -> None:
    reader, writer = pipe
    first = fill_pipe(writer)
    room = MOST // LINE
    for number in range(first, first + room + 100):
        writer.put(a_line(number))
    assert not writer.flush(0)
    read = lines_of(reader, loss_of(100))
    assert read == [*(a_line(number) for number in range(first + room)), loss_of(100)]
    # And from then on all is as before: the next gap has a number of its own.
    writer.put(a_line(7))
    assert lines_of(reader, a_line(7)) == [a_line(7)]
    first = fill_pipe(writer)
    for number in range(first, first + room + 3):
        writer.put(a_line(number))
    assert lines_of(reader, loss_of(3))[-2:] == [a_line(first + room - 1), loss_of(3)]


def test_after_a_line_that_is_lost_a_shorter_one_does_not_overtake_it(pipe: tuple[int, LineWriter]) -> None:
    reader, writer = pipe
    fill_pipe(writer)
    writer.put(b"x" * (MOST - 4) + b"\n")
    writer.put(b"lost\n")
    writer.put(b"a\n")
    assert lines_of(reader, loss_of(2))[-2:] == [b"x" * (MOST - 4) + b"\n", loss_of(2)]


def test_many_threads_put_lines_and_each_is_written_or_counted(pipe: tuple[int, LineWriter]) -> None:
    reader, writer = pipe
    fill_pipe(writer)

    def put(thread: int) -> None:
        for number in range(500):
            writer.put(f"{thread} {number}\n".encode())

    threads = [threading.Thread(target=put, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    writer.lose()
    lost = writer._lost
    read = lines_of(reader, loss_of(lost))[PIPE // LINE + 1 : -1]
    assert len(read) + lost == 8 * 500 + 1
    for which in range(8):
        numbers = [int(line.split()[1]) for line in read if line.startswith(b"%d " % which)]
        assert numbers == list(range(len(numbers)))


def test_neither_a_flush_nor_a_close_waits_longer_than_it_may(pipe: tuple[int, LineWriter]) -> None:
    _, writer = pipe
    fill_pipe(writer)
    began = time.monotonic()
    assert not writer.flush(0.2)
    assert not writer.close(0.2)
    assert 0.4 <= time.monotonic() - began < SECONDS / 2


def test_a_line_that_cannot_be_made_is_told_too(pipe: tuple[int, LineWriter]) -> None:
    reader, writer = pipe
    writer.lose()
    assert lines_of(reader, loss_of(1)) == [loss_of(1)]


def test_a_pipe_that_does_not_block_is_waited_for(pipe: tuple[int, LineWriter]) -> None:
    reader, writer = pipe
    os.set_blocking(writer._fd, False)
    first = fill_pipe(writer)
    writer.put(b"last\n")
    assert lines_of(reader, b"last\n") == [*(a_line(number) for number in range(first)), b"last\n"]


def test_a_disk_that_is_full_is_tried_again_and_loses_nothing(tmp_path: Path) -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    with a_writer(fd) as writer:
        for number in range(5):
            writer.put(a_line(number))
        assert not writer.flush(0.5)
        # The disk has room again.
        room = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(room, fd)
        os.close(room)
        assert writer.flush(SECONDS)
    assert (tmp_path / "log").read_bytes() == b"".join(map(a_line, range(5)))


def test_a_reader_that_is_gone_ends_nothing(pipe: tuple[int, LineWriter]) -> None:
    reader, writer = pipe
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, reader)  # and so the pipe has no reader any more
    os.close(nothing)
    for number in range(1_000):
        writer.put(a_line(number))
    assert not writer.flush(0.5)
