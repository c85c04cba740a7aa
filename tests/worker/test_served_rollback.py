"""A service that rolls back while something is in the way: what it says, whom it serves meanwhile, and its end."""

from __future__ import annotations

import errno
import selectors
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.kvm.errors import KvmError
from skeyd.worker import transactions
from tests.worker.backends import Recording
from tests.worker.processes import SECONDS, Front, hung_up
from tests.worker.serving import attached, met, serving

BEGIN: dict[str, Any] = {"op": "begin", "request_id": "", "fingerprint": "0" * 64, "keep": False, "resume": False}


class Traced(Recording):
    """Of a process that a debugger has, for as long as it has it."""

    def __init__(self) -> None:
        super().__init__((0, 4), kernel="7.2")
        self.is_traced = threading.Event()
        self.refused = threading.Semaphore(0)
        self.bad: set[int] = set()
        """Frames that the kernel sets no key of."""

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """Read keys, unless it is traced; one at a time anybody may."""
        if self.is_traced.is_set() and buffer.nbytes > 1:
            self.refused.release()
            raise SkeydError(Reason.VMM_TRACED, "a debugger")
        return super().get_skeys(start_gfn, buffer)

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
        """Set keys but bad ones."""
        if self.bad & set(range(start_gfn, start_gfn + buffer.nbytes)):
            raise KvmError("KVM_S390_SET_SKEYS", errno.EFAULT)
        super().set_skeys(start_gfn, buffer)


def test_while_a_debugger_has_the_process_others_are_served_and_when_it_goes_all_is_rolled_back(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "RETRY_SECONDS", 0.05)
    backend = Traced()
    with serving(runtime_dir, backend), met(runtime_dir) as other, attached(runtime_dir) as (front, buffers):
        front.ok(**BEGIN)
        buffers[:8] = b"\xf8" * 8
        front.ok(op="set", buffer=0, offset=0, start=0, count=8, allow_enable=True)
        backend.is_traced.set()
        for _ in range(3):
            last = front.ok(op="abandon")["last_write"]
            assert (last["outcome"], last["left"]) == ("rolling_back", 8)
            begin = time.monotonic()
            assert other.ok(op="status")["last_write"]["left"] == 8
            assert time.monotonic() - begin < SECONDS / 2
            assert backend.refused.acquire(timeout=SECONDS), "it is tried again, whether anybody asks or not"
        backend.is_traced.clear()
        end = time.monotonic() + SECONDS
        while (last := other.ok(op="status")["last_write"])["outcome"] == "rolling_back":
            assert time.monotonic() < end
        assert (last["outcome"], last["left"]) == ("rolled_back", 0)
        front.ok(op="get", buffer=0, offset=0, start=0, count=8)
        assert buffers[:8] == bytes(8)


@pytest.mark.parametrize("bad", [{3}, set()], ids=["dirty", "well"])
def test_what_is_not_well_of_a_vm_that_goes_on_is_in_the_log_of_its_worker(
    runtime_dir: Path, capfd: pytest.CaptureFixture[str], bad: set[int]
) -> None:
    backend = Traced()
    with serving(runtime_dir, backend, release=lambda: None) as stop, attached(runtime_dir) as (front, buffers):
        front.ok(**BEGIN)
        buffers[:8] = b"\xf8" * 8
        front.ok(op="set", buffer=0, offset=0, start=0, count=8, allow_enable=True)
        backend.bad = bad
        stop()
        assert hung_up(front.socket)
    said = capfd.readouterr().err
    assert ("dirty" in said and "frames that have other keys than before: 0x3" in said) == bool(bad)


class Full(selectors.DefaultSelector):
    """Takes so many connections and no more (fs.epoll.max_user_watches)."""

    room = 2

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Watch a descriptor; a listener's data is None and a signal's a function."""
        if type(data).__name__ == "FrontConnection":
            if not Full.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            Full.room -= 1
        return super().register(fileobj, events, data)


def test_a_connection_that_there_is_no_room_to_watch_is_closed_and_the_vm_lives(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skeyd.worker.service.selectors.DefaultSelector", Full)
    monkeypatch.setattr(Full, "room", 1)
    with serving(runtime_dir, Recording((0, 4))), met(runtime_dir) as front:
        for _ in range(3):
            with Front(runtime_dir) as refused:
                assert hung_up(refused.socket)
        assert front.ok(op="status")["uses_keys"] is False
