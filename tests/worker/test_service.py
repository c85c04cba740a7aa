"""One VM's service in this process, where its backend can be anything: a kernel that refuses, one that is broken."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from skeyd.gfn import GfnRange
from skeyd.kvm.errors import KvmError
from skeyd.kvm.vm import Vm
from skeyd.linux import peer_of
from skeyd.worker import service
from skeyd.worker.protocol import BUFFER_BYTES
from tests.worker.backends import Recording, Refusing
from tests.worker.processes import SECONDS, Front, hung_up
from tests.worker.serving import attached, met, serving


class Unimplemented(Recording):
    """The real ioctl on a descriptor of another kind: the real kernel's real ENOTTY."""

    def __init__(self) -> None:
        super().__init__()
        reader, writer = os.pipe()
        os.close(writer)
        self.ioctls = Vm(reader)
        self.may_answer = threading.Event()
        self.may_answer.set()

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        assert self.may_answer.wait(SECONDS)
        return self.ioctls.get_skeys(start_gfn, buffer)

    def close(self) -> None:
        self.ioctls.close()


def test_a_refusal_of_the_kernel_is_an_answer_and_the_connection_goes_on(runtime_dir: Path) -> None:
    backend = Refusing({("get", 0): KvmError("KVM_S390_GET_SKEYS", errno.EIO)})
    with serving(runtime_dir, backend), met(runtime_dir) as front:
        assert front.refused(op="status") == "VM_DEAD"
        assert front.ok(op="status") == {"uses_keys": False}


def test_a_mistake_in_one_answer_ends_neither_the_vm_nor_the_connection(
    runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = Refusing({("get", 0): ZeroDivisionError("a bug")})
    with serving(runtime_dir, backend), met(runtime_dir) as front:
        answer = front.ask(op="status")["error"]
        assert answer["reason"] == "WORKER_FAILED"
        assert "ZeroDivisionError" in answer["message"]
        assert front.ok(op="status") == {"uses_keys": False}
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err


def test_a_mistake_in_the_middle_of_a_write_says_nothing_of_success(
    runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = Refusing({("set", 0): ZeroDivisionError("a bug")})
    with serving(runtime_dir, backend), attached(runtime_dir) as (front, _):
        assert front.refused(op="set", buffer=0, offset=0, start=0, count=1, allow_enable=True) == "WORKER_FAILED"
    assert "a bug" in capsys.readouterr().err


@pytest.mark.parametrize("op", ["get", "set", "status"])
def test_a_front_that_is_gone_when_it_is_told_of_an_error_does_not_end_the_vm(runtime_dir: Path, op: str) -> None:
    backend = Unimplemented()
    with serving(runtime_dir, backend):
        backend.may_answer.clear()
        with attached(runtime_dir) as (front, _):
            front.say(op=op, buffer=0, offset=0, start=0, count=1, allow_enable=True)
        backend.may_answer.set()
        with met(runtime_dir) as front:
            assert front.refused(op="status") == "CAP_S390_SKEYS_MISSING"


def test_a_refused_read_leaves_the_buffers_usable(runtime_dir: Path) -> None:
    with serving(runtime_dir, Unimplemented()), attached(runtime_dir) as (front, buffers):
        for _ in range(3):
            assert front.refused(op="get", buffer=1, offset=0, start=0, count=1) == "CAP_S390_SKEYS_MISSING"
        assert buffers[:] == bytes(BUFFER_BYTES)


def test_what_the_front_writes_while_a_write_runs_does_not_get_to_the_kernel(runtime_dir: Path) -> None:
    # Checked and set must be the same bytes: the buffer changes after the check here, in the middle of the write.
    class Racing(Recording):
        front_buffers: mmap.mmap

        def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
            self.front_buffers[:4] = b"\x01\x01\x01\x01"
            return super().get_skeys(start_gfn, buffer)

    backend = Racing()
    with serving(runtime_dir, backend), attached(runtime_dir) as (front, buffers):
        backend.front_buffers = buffers
        buffers[:4] = b"\x10\x20\x30\x40"
        done = front.ok(op="set", buffer=0, offset=0, start=8, count=4, allow_enable=True)
        assert (done["repaired"], done["enabled"]) == (0, True)
    assert backend.sets() == [GfnRange(8, 4)]


@pytest.mark.parametrize(("uid", "is_served"), [(0, True), (None, True), (54321, False)])
def test_only_root_and_its_own_user_are_answered(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, uid: int | None, is_served: bool
) -> None:
    own = 12345
    monkeypatch.setattr(os, "geteuid", lambda: own)
    monkeypatch.setattr(service, "peer_of", lambda one: replace(peer_of(one), uid=own if uid is None else uid))
    with serving(runtime_dir, Recording()), Front(runtime_dir) as front:
        hello = front.take()
        assert (hello is not None) == is_served
        if is_served:
            assert front.ok(op="status")["uses_keys"] is False


def test_the_service_ends_with_every_connection_closed(runtime_dir: Path) -> None:
    with serving(runtime_dir, Recording()):
        fronts = [Front(runtime_dir) for _ in range(3)]
        for front in fronts:
            front.hello()
    for front in fronts:
        assert hung_up(front.socket)
        front.close()


def test_a_front_that_hangs_up_has_no_more_ioctls_made_for_it_whatever_it_asked_for_before(runtime_dir: Path) -> None:
    class Slow(Recording):
        def __init__(self) -> None:
            super().__init__()
            self.begun, self.may_go_on = threading.Event(), threading.Event()

        def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
            found = super().get_skeys(start_gfn, buffer)
            self.begun.set()
            assert self.may_go_on.wait(SECONDS)
            return found

    backend = Slow()
    with serving(runtime_dir, backend):
        with attached(runtime_dir) as (front, _):
            for number in range(8):
                front.say(op="get", buffer=0, offset=0, start=number, count=1)
            assert backend.begun.wait(SECONDS)
        backend.may_go_on.set()
        with met(runtime_dir) as other:
            assert other.ok(op="status") == {"uses_keys": False}
    assert [frames for _, frames in backend.calls] == [GfnRange(0, 1), GfnRange(0, 1)], "the second is the other's"


def test_the_time_of_a_read_is_that_of_the_kernel(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1_000, 1_750])
    with serving(runtime_dir, Recording()), attached(runtime_dir) as (front, _):
        monkeypatch.setattr("skeyd.worker.keys.time.monotonic_ns", lambda: next(clock))
        assert front.ok(op="get", buffer=0, offset=0, start=0, count=1) == {"uses_keys": False, "ns": 750}


def test_the_time_of_a_write_is_that_of_the_kernels_longest_call_for_it(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The look whether there are keys, the SET, its read-back; then a read, which starts anew.
    clock = iter([0, 10, 100, 400, 500, 700, 1_000, 1_001])
    with serving(runtime_dir, Recording()), attached(runtime_dir) as (front, _):
        monkeypatch.setattr("skeyd.worker.keys.time.monotonic_ns", lambda: next(clock))
        done = front.ok(op="set", buffer=0, offset=0, start=0, count=1, allow_enable=True)
        assert done == {"repaired": 0, "enabled": True, "ns": 300}
        assert front.ok(op="get", buffer=0, offset=0, start=0, count=1)["ns"] == 1
