"""All keys of a VM that is read by having them printed, by a Service whose printings end when a test says so."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, Ranges
from skeyd.worker import capture_requests, captures, service
from skeyd.worker.own_capture import FrozenKeys
from tests.worker.backends import Recording
from tests.worker.processes import SECONDS, Front
from tests.worker.serving import attached, met, serving
from tests.worker.test_freezing import BEGIN, Keyed, freeze, get, put

SNAPSHOT: Final = {"op": "snapshot"}
FRAMES: Final = 1024


class Printing:
    """Prints what the VM's keys are when it goes on."""

    def __init__(self, printer: Printer, seconds: float) -> None:
        self._printer = printer
        self._until = time.monotonic() + seconds
        self._kept = FrozenKeys(Ranges([GfnRange(0, FRAMES)]))
        self._told, self._telling = os.pipe()
        self._is_open = True
        os.set_blocking(self._told, False)
        self.cancelled = False

    @property
    def keys(self) -> FrozenKeys:
        return self._kept

    def fileno(self) -> int:
        return self._told

    def seconds_left(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def step(self) -> int | None:
        if not self.seconds_left():
            self.close()
            raise SkeydError(Reason.QMP_BUSY, "it took too long")
        try:
            os.read(self._told, 1)
        except BlockingIOError:
            return None
        self.close()
        with memoryview(self._kept.memory) as view:
            self._printer.backend.vm.get_skeys(0, view)
        return 0

    def go_on(self) -> None:
        os.write(self._telling, b"x")

    def cancel(self) -> None:
        self.cancelled = True

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            os.close(self._told)
            os.close(self._telling)


class Printer:
    """Counts what it prints."""

    def __init__(self, backend: Recording) -> None:
        self.backend = backend
        self.seconds: list[float] = []
        self.begun: list[Printing] = []
        self._more = threading.Condition()

    def __call__(self, seconds: float) -> Printing:
        with self._more:
            self.seconds.append(seconds)
            self.begun.append(Printing(self, seconds))
            self._more.notify_all()
            return self.begun[-1]

    def printing(self, number: int) -> Printing:
        """Wait until the one of that number has begun."""
        with self._more:
            assert self._more.wait_for(lambda: len(self.begun) > number, SECONDS)
            return self.begun[number]

    def close(self) -> None:
        for one in self.begun:
            one.close()


@contextmanager
def printing(directory: Path, backend: Recording | None = None) -> Iterator[Printer]:
    printer = Printer(backend or Keyed())
    try:
        with serving(directory, printer.backend, print_keys=printer):
            yield printer
    finally:
        printer.close()


def snapshot(front: Front, printer: Printer, number: int) -> None:
    """Have all keys printed, and wait for it."""
    front.say(**SNAPSHOT)
    printer.printing(number).go_on()
    assert front.take() == {"ok": {"uses_keys": True, "ns": 0}}


def test_what_is_read_is_of_the_one_printing_that_was_asked_for(runtime_dir: Path) -> None:
    with (
        printing(runtime_dir) as printer,
        attached(runtime_dir) as (one, mine),
        attached(runtime_dir) as (two, other),
    ):
        snapshot(one, printer, 0)
        printer.backend.vm.set_skeys(0, memoryview(bytearray(b"\x70" * FRAMES)))
        snapshot(two, printer, 1)
        for front, buffers, expected in ((one, mine, bytes((4, 6, 8))), (two, other, b"\x70" * 3)):
            assert front.ok(**get(2, 3)) == {"uses_keys": True, "ns": 0}
            assert buffers[1 << 20 :][:3] == expected
        # Another of the same connection takes the place of the first.
        snapshot(one, printer, 2)
        one.ok(**get(2, 3))
        assert mine[1 << 20 :][:3] == b"\x70" * 3
        # Of the VM itself one key is asked for, which says whether there are any.
        assert {(call, frames.count) for call, frames in printer.backend.calls} == {("get", 1)}


def test_while_it_prints_others_are_answered_and_who_needs_the_vm_waits(runtime_dir: Path) -> None:
    with printing(runtime_dir) as printer, ExitStack() as fronts:
        owner, reader, looker, next_one = (fronts.enter_context(attached(runtime_dir))[0] for _ in range(4))
        owner.say(**SNAPSHOT)
        first = printer.printing(0)
        reader.say(**get(0, 4))
        next_one.say(**SNAPSHOT)
        # Who wants a key now is told at once that there is none to be had.
        assert (reader.take() or {})["error"]["reason"] == "QMP_BUSY"
        assert looker.ok(op="status") == {"uses_keys": True}
        assert not select.select([next_one.socket], [], [], 0)[0]
        assert len(printer.begun) == 1
        first.go_on()
        assert owner.take() == {"ok": {"uses_keys": True, "ns": 0}}
        printer.printing(1).go_on()
        assert next_one.take() == {"ok": {"uses_keys": True, "ns": 0}}


def test_what_it_waited_for_is_taken_off_its_time(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_requests, "PRINTING_SECONDS", 2.0)
    with printing(runtime_dir) as printer, attached(runtime_dir) as (one, _), attached(runtime_dir) as (two, _):
        one.say(**SNAPSHOT)
        printer.printing(0)
        two.say(**SNAPSHOT)
        for front in (one, two):
            # Nothing is said by the VMM, and so it is the time that has the worker look.
            assert (front.take() or {})["error"]["reason"] == "QMP_BUSY"
        # For the second nothing was left, or next to nothing.
        assert all(seconds < printer.seconds[0] / 2 for seconds in printer.seconds[1:])


def test_so_many_are_kept_and_no_more(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captures, "MAX_PRINTINGS", 2)
    with printing(runtime_dir) as printer, ExitStack() as fronts:
        one, two, three = (fronts.enter_context(attached(runtime_dir))[0] for _ in range(3))
        snapshot(one, printer, 0)
        snapshot(two, printer, 1)
        three.say(**SNAPSHOT)
        assert (three.take() or {})["error"]["reason"] == "TOO_MANY_CALLS_ON_VM"
        # One that has it may have another in its place.
        snapshot(two, printer, 2)
        one.close()
        with met(runtime_dir) as other:
            other.ok(op="status")
        snapshot(three, printer, 3)


def test_who_hangs_up_has_it_go_on_and_others_served(runtime_dir: Path) -> None:
    with printing(runtime_dir) as printer, attached(runtime_dir) as (waiting, _):
        with met(runtime_dir) as owner:
            owner.say(**SNAPSHOT)
            first = printer.printing(0)
        waiting.say(**SNAPSHOT)
        with met(runtime_dir) as other:
            while not first.cancelled:
                other.ok(op="status")
            assert len(printer.begun) == 1
        first.go_on()
        printer.printing(1).go_on()
        assert waiting.take() == {"ok": {"uses_keys": True, "ns": 0}}


def test_nothing_is_printed_for_who_has_hung_up_while_it_waited(runtime_dir: Path) -> None:
    with printing(runtime_dir) as printer, attached(runtime_dir) as (owner, _), attached(runtime_dir) as (other, _):
        owner.say(**SNAPSHOT)
        first = printer.printing(0)
        with met(runtime_dir) as gone:
            gone.say(**SNAPSHOT)
            other.ok(op="status")  # so it has been read
        first.go_on()
        assert owner.take() == {"ok": {"uses_keys": True, "ns": 0}}
        assert other.ok(op="status") == {"uses_keys": True}
        assert len(printer.begun) == 1


def test_who_has_hung_up_while_it_waited_takes_nobodys_place(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_CONNECTIONS", 3)
    with printing(runtime_dir) as printer, attached(runtime_dir) as (owner, _), attached(runtime_dir) as (other, _):
        owner.say(**SNAPSHOT)
        first = printer.printing(0)
        for _ in range(5):
            with met(runtime_dir) as gone:
                gone.say(**SNAPSHOT)
                other.ok(op="status")
        first.go_on()


def test_a_worker_that_ends_closes_it(runtime_dir: Path) -> None:
    printer = Printer(Keyed())
    with serving(runtime_dir, printer.backend, print_keys=printer), met(runtime_dir) as owner:
        owner.say(**SNAPSHOT)
        first = printer.printing(0)
    assert not first._is_open


def test_a_guest_without_keys_is_not_printed(runtime_dir: Path) -> None:
    with printing(runtime_dir, Recording((0, 4))) as printer, attached(runtime_dir) as (front, _):
        assert front.ok(**SNAPSHOT) == {"uses_keys": False, "ns": 0}
        assert printer.begun == []


@pytest.mark.parametrize(
    "request_", [BEGIN, put(0, 4), {"op": "keyop", "operation": "sske", "gfn": 0, "key": 0}], ids=lambda one: one["op"]
)
def test_nothing_can_be_set(runtime_dir: Path, request_: dict[str, Any]) -> None:
    with printing(runtime_dir), attached(runtime_dir) as (front, _):
        front.say(**request_)
        assert (front.take() or {})["error"]["reason"] == "BACKEND_READ_ONLY"


def test_it_can_not_be_frozen(runtime_dir: Path) -> None:
    with printing(runtime_dir), attached(runtime_dir) as (front, buffers):
        freeze(front, buffers, (0, 4))
        assert front.is_hung_up_on()


def test_nobody_prints_a_vm_that_is_read_slice_by_slice(runtime_dir: Path) -> None:
    with serving(runtime_dir, Keyed()), attached(runtime_dir) as (front, _):
        front.say(**SNAPSHOT)
        assert front.is_hung_up_on()


def test_whoever_waits_for_it_says_nothing(runtime_dir: Path) -> None:
    with printing(runtime_dir) as printer, attached(runtime_dir) as (owner, _), met(runtime_dir) as other:
        owner.say(**SNAPSHOT)
        first = printer.printing(0)
        owner.say(op="status")
        assert owner.is_hung_up_on()
        assert other.ok(op="status") == {"uses_keys": True}
        first.go_on()
