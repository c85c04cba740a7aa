"""All keys while a VMM prints them: a VMM that prints slowly, stops, ends, refuses or lies, and nothing that waits."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.injection import proc
from skeyd.qmp.errors import BrokenError, BusyError, QmpError, RefusedError
from skeyd.qmp.monitor import Monitor
from skeyd.worker import dump_capture
from skeyd.worker.dump import DumpParser
from skeyd.worker.dump_capture import DumpCapture, DumpPipe
from tests.qmp.monitors import SECONDS, Conversation, FakeMonitor
from tests.qmp.printer import Printer, put
from tests.worker.test_dump import dump, memory

FRAMES: Final = 5000
KEYS: Final = bytes(gfn * 2 % 256 for gfn in range(FRAMES))


class Reader:
    """What a worker does of a VM over QMP, but for its checks."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.pipe: DumpPipe | None = None
        self.dropped = 0
        self.parser = DumpParser(memory((0, FRAMES)))

    def begin(self, seconds: float = SECONDS) -> DumpCapture:
        return DumpCapture(partial(Monitor, self.path, SECONDS), self.pipe_in, self.drop, self.parser, seconds)

    def pipe_in(self, monitor: Monitor) -> DumpPipe:
        self.pipe = self.pipe or DumpPipe(monitor)
        return self.pipe

    def drop(self) -> None:
        self.dropped += self.pipe is not None
        self.close()

    def close(self) -> None:
        if self.pipe is not None:
            self.pipe.close()
            self.pipe = None


@contextmanager
def printed(directory: Path) -> Iterator[tuple[Printer, Reader]]:
    vmm = Printer(KEYS)
    with FakeMonitor(directory / "qmp", vmm.converse) as fake:
        reader = Reader(fake.path)
        try:
            yield vmm, reader
        finally:
            vmm.goes_on.set()
            reader.close()
    vmm.let_go()


def end_of(capture: DumpCapture) -> int:
    """Step whenever there is something to do, until it has ended."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        select.select([capture], [], [], capture.seconds_left())
        done = capture.step()
        if done is not None:
            return done
    pytest.fail("it doesn't end")


def test_all_keys_are_there_at_its_end_and_the_vmm_has_nothing_left(runtime_dir: Path) -> None:
    with printed(runtime_dir) as (vmm, reader):
        capture = reader.begin()
        assert end_of(capture) == 0
        into = bytearray(FRAMES)
        capture.keys.read(GfnRange(0, FRAMES), memoryview(into))
        assert bytes(into) == KEYS
        assert vmm.commands == [
            *("qmp_capabilities", "query-fdsets", "add-fd", "dump-skeys", "query-status", "remove-fd")
        ]
        assert (vmm.given, reader.pipe) == (-1, None)


def test_a_pipe_that_a_paused_guests_vmm_has_is_used_again(runtime_dir: Path) -> None:
    with printed(runtime_dir) as (vmm, reader):
        vmm.answers["query-status"] = {"running": False}
        for _ in range(3):
            reader.parser = DumpParser(memory((0, FRAMES)))
            assert end_of(reader.begin()) == 0
        assert (vmm.commands.count("add-fd"), vmm.commands.count("remove-fd"), reader.dropped) == (1, 0, 0)


def test_what_the_dead_and_this_process_could_not_take_back_is_forgotten_and_nobody_elses(runtime_dir: Path) -> None:
    here = Path("/proc/self/ns/pid").stat().st_ino
    parent = os.getppid()
    names = {
        10: f"skeyd-{here}-{os.getpid()}-1-{16 * 'a'}",
        11: f"skeyd-{here}-{parent}-{proc.start_time(parent)}-{16 * 'a'}",
        12: f"skeyd-{here}-{parent}-{proc.start_time(parent) + 1}-{16 * 'a'}",
        13: f"skeyd-{here}-4194305-1-{16 * 'a'}",
        14: f"skeyd-{here + 1}-4194305-1-{16 * 'a'}",
        15: "a disk",
        16: "x" * 2000,
    }
    with printed(runtime_dir) as (vmm, reader):
        vmm.held = {**names}
        assert end_of(reader.begin()) == 0
        assert set(vmm.held) == {11, 14, 15, 16}


def test_no_step_waits_for_a_vmm_that_prints_slowly(runtime_dir: Path) -> None:
    with printed(runtime_dir) as (vmm, reader):
        vmm.prints = vmm.half_by_half
        capture = reader.begin()
        seen = 0
        while seen < 3:
            # Nothing is readable once the first half was read; a step finds that out, and no more.
            if not select.select([capture], [], [], 0)[0] and not vmm.goes_on.is_set() and capture.seconds_left():
                seen += 1
            began = time.monotonic()
            assert capture.step() is None
            assert time.monotonic() - began < SECONDS / 2
        vmm.goes_on.set()
        assert end_of(capture) == 0


def test_a_vmm_that_stops_in_the_middle_is_given_up_when_the_time_has_passed(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dump_capture, "END_SECONDS", 0.2)
    with printed(runtime_dir) as (vmm, reader):
        vmm.prints = vmm.half_by_half
        capture = reader.begin(seconds=0.3)
        assert capture.seconds_left() <= 0.3
        with pytest.raises(BusyError, match="no answer to dump-skeys"):
            end_of(capture)
        assert reader.dropped == 1
        # It goes on to the end without a reader.
        vmm.goes_on.set()


def test_a_vmm_that_is_late_is_told_to_forget_what_it_was_given(runtime_dir: Path) -> None:
    with printed(runtime_dir) as (vmm, reader):
        vmm.prints = vmm.half_by_half
        capture = reader.begin(seconds=0.2)
        while not reader.dropped:
            select.select([capture], [], [], capture.seconds_left())
            assert capture.step() is None
        vmm.goes_on.set()
        with pytest.raises(BusyError, match="no answer to dump-skeys"):
            end_of(capture)
        assert vmm.commands[-1] == "remove-fd"
        assert vmm.given == -1


def test_a_vmm_that_hangs_up_in_the_middle_has_printed_nothing(runtime_dir: Path) -> None:
    def hang_up(one: Conversation) -> None:
        one.greet()
        one.answer([], "query-fdsets")
        _, (fd,), *_ = socket.recv_fds(one.connection, 1 << 16, 1)
        try:
            one.say({"return": {"fdset-id": 0, "fd": fd}, "id": 3})
            one.connection.recv(1 << 16)
            put(fd, dump(0, KEYS))
        finally:
            os.close(fd)

    with FakeMonitor(runtime_dir / "qmp", hang_up) as fake:
        reader = Reader(fake.path)
        with pytest.raises(BrokenError, match="hung up"):
            end_of(reader.begin())
        assert reader.dropped == 1


def test_a_refusal_is_told_and_the_pipe_used_again(runtime_dir: Path) -> None:
    def refuse(write: int) -> dict[str, Any]:
        put(write, dump(0, KEYS)[:1000])
        return {"error": {"class": "GenericError", "desc": "Get keys error 14"}}

    with printed(runtime_dir) as (vmm, reader):
        vmm.prints = refuse
        vmm.answers["query-status"] = {"running": False}
        with pytest.raises(RefusedError, match="Get keys error 14"):
            end_of(reader.begin())
        # While its guest is paused it is told to forget nothing: it would do so later, at any time.
        assert (reader.dropped, vmm.commands[-1]) == (0, "query-status")
        assert reader.pipe is not None
        assert reader.pipe.read() is None  # nothing is left in it


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "it is empty"),
        (b"hello\n", "is no dump of keys"),
        (dump(0, KEYS)[:-1], "in the middle of a line"),
        (b"x" * 4096, "a line has more than"),
    ],
)
def test_what_is_no_dump_is_refused_and_the_vmm_let_go(runtime_dir: Path, text: bytes, said: str) -> None:
    def lie(write: int) -> dict[str, Any]:
        put(write, text)
        return {"return": {}}

    with printed(runtime_dir) as (vmm, reader):
        vmm.prints = lie
        with pytest.raises(SkeydError, match=said) as caught:
            end_of(reader.begin())
        assert caught.value.reason is Reason.QMP_FAILED
        assert reader.dropped == 1
        assert vmm.given == -1


def test_a_dump_without_an_end_is_read_no_longer_than_it_may_take(runtime_dir: Path) -> None:
    def flood(write: int) -> dict[str, Any]:
        # Of a guest of which skeyd knows a part.
        page = FRAMES
        with suppress(BrokenPipeError):
            while True:
                data = dump(page, b"\x10" * 1000)
                page += 1000
                while data:
                    data = data[os.write(write, data) :]
        return {"return": {}}

    with printed(runtime_dir) as (vmm, reader):
        vmm.prints = flood
        capture = reader.begin(seconds=0.5)
        with pytest.raises(QmpError, match=r"no answer to dump-skeys|for longer than it may"):
            end_of(capture)
        assert capture.keys.room == 0


class Endless(DumpPipe):
    """Has always more to read, as of a VMM that answers and prints on, faster than anybody reads."""

    page = 0

    def read(self) -> bytes:
        start, self.page = self.page, self.page + 100
        return dump(start, b"\x10" * 100)


def test_a_vmm_that_prints_on_after_its_answer_is_read_no_longer_than_it_may_take(runtime_dir: Path) -> None:
    with printed(runtime_dir) as (vmm, reader):
        vmm.prints = lambda _: {"return": {}}

        def pipe_in(monitor: Monitor) -> DumpPipe:
            reader.pipe = Endless(monitor)
            return reader.pipe

        capture = DumpCapture(partial(Monitor, reader.path, SECONDS), pipe_in, reader.drop, reader.parser, 0.5)
        with pytest.raises(BusyError, match="for longer than it may"):
            end_of(capture)
        assert reader.dropped == 1


def test_one_that_nobody_waits_for_goes_on_to_the_end(runtime_dir: Path) -> None:
    with printed(runtime_dir) as (vmm, reader):
        vmm.prints = vmm.half_by_half
        capture = reader.begin()
        capture.cancel()
        vmm.goes_on.set()
        assert end_of(capture) == 0
        assert (vmm.commands[-1], vmm.given, reader.pipe) == ("remove-fd", -1, None)


def test_one_that_is_closed_in_the_middle_hangs_up(runtime_dir: Path) -> None:
    with printed(runtime_dir) as (vmm, reader):
        vmm.prints = vmm.half_by_half
        capture = reader.begin()
        assert capture.step() is None
        capture.close()
        capture.close()
        assert reader.dropped == 1
        vmm.goes_on.set()


def test_where_it_cant_begin_nothing_is_left(runtime_dir: Path) -> None:
    def refuse(one: Conversation) -> None:
        one.greet()
        one.answer([], "query-fdsets")
        heard = one.hear()
        one.say(
            {"error": {"class": "GenericError", "desc": "File descriptor named was not supplied"}, "id": heard["id"]}
        )
        one.wait_for_end()

    with FakeMonitor(runtime_dir / "qmp", refuse) as fake:
        reader = Reader(fake.path)
        with pytest.raises(RefusedError, match="add-fd"):
            reader.begin()
        assert (reader.pipe, reader.dropped) == (None, 0)
    with pytest.raises(QmpError):
        Reader(str(runtime_dir / "nobody")).begin()
