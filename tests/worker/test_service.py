"""One VM's service in this process, where its backend can be anything: a kernel that refuses, one that is broken."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from skeyd.gfn import GfnRange
from skeyd.kvm.errors import KvmError
from skeyd.kvm.vm import Vm
from skeyd.worker.backend import Backend
from skeyd.worker.protocol import BUFFER_BYTES, SOCKET, Hello
from skeyd.worker.service import Service
from tests.worker.backends import Recording, Refusing
from tests.worker.processes import SECONDS, Front, hung_up
from tests.worker.specs import UID


@contextmanager
def _serving(directory: Path, backend: Backend) -> Iterator[None]:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wake, sender = socket.socketpair()
    with listener, wake, sender:
        listener.bind(str(directory / SOCKET))
        listener.listen()
        hello = Hello("web", UID, "0" * 32, "owned", "6.1", "0", os.getpid(), 0, backend.memory_map.slots)
        thread = threading.Thread(target=Service(listener, hello, backend).run, args=(wake,))
        thread.start()
        try:
            yield
        finally:
            sender.send(b"x")
            thread.join(SECONDS)
            assert not thread.is_alive()
    backend.close()


@contextmanager
def _met(directory: Path) -> Iterator[Front]:
    with Front(directory) as front:
        front.hello()
        yield front


@contextmanager
def _attached(directory: Path) -> Iterator[tuple[Front, mmap.mmap]]:
    with _met(directory) as front:
        fd = front.attach()
        try:
            buffers = mmap.mmap(fd, BUFFER_BYTES)
        finally:
            os.close(fd)
        with buffers:
            yield front, buffers


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
    with _serving(runtime_dir, backend), _met(runtime_dir) as front:
        assert front.refused(op="status") == "VM_DEAD"
        assert front.ok(op="status") == {"uses_keys": False}


def test_a_mistake_in_one_answer_ends_neither_the_vm_nor_the_connection(
    runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = Refusing({("get", 0): ZeroDivisionError("a bug")})
    with _serving(runtime_dir, backend), _met(runtime_dir) as front:
        answer = front.ask(op="status")["error"]
        assert answer["reason"] == "WORKER_FAILED"
        assert "ZeroDivisionError" in answer["message"]
        assert front.ok(op="status") == {"uses_keys": False}
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err


def test_a_mistake_in_the_middle_of_a_write_says_nothing_of_success(
    runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = Refusing({("set", 0): ZeroDivisionError("a bug")})
    with _serving(runtime_dir, backend), _attached(runtime_dir) as (front, _):
        assert front.refused(op="set", buffer=0, start=0, count=1, allow_enable=True) == "WORKER_FAILED"
    assert "a bug" in capsys.readouterr().err


@pytest.mark.parametrize("op", ["get", "set", "status"])
def test_a_front_that_is_gone_when_it_is_told_of_an_error_does_not_end_the_vm(runtime_dir: Path, op: str) -> None:
    backend = Unimplemented()
    with _serving(runtime_dir, backend):
        backend.may_answer.clear()
        with _attached(runtime_dir) as (front, _):
            front.say(op=op, buffer=0, start=0, count=1, allow_enable=True)
        backend.may_answer.set()
        with _met(runtime_dir) as front:
            assert front.refused(op="status") == "CAP_S390_SKEYS_MISSING"


def test_a_refused_read_leaves_the_buffers_usable(runtime_dir: Path) -> None:
    with _serving(runtime_dir, Unimplemented()), _attached(runtime_dir) as (front, buffers):
        for _ in range(3):
            assert front.refused(op="get", buffer=1, start=0, count=1) == "CAP_S390_SKEYS_MISSING"
        assert buffers[:] == bytes(BUFFER_BYTES)


def test_what_the_front_writes_while_a_write_runs_does_not_get_to_the_kernel(runtime_dir: Path) -> None:
    # Checked and set must be the same bytes: the buffer changes after the check here, in the middle of the write.
    class Racing(Recording):
        front_buffers: mmap.mmap

        def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
            self.front_buffers[:4] = b"\x01\x01\x01\x01"
            return super().get_skeys(start_gfn, buffer)

    backend = Racing()
    with _serving(runtime_dir, backend), _attached(runtime_dir) as (front, buffers):
        backend.front_buffers = buffers
        buffers[:4] = b"\x10\x20\x30\x40"
        assert front.ok(op="set", buffer=0, start=8, count=4, allow_enable=True) == {"repaired": 0, "enabled": True}
    assert backend.sets() == [GfnRange(8, 4)]


def test_the_service_ends_with_every_connection_closed(runtime_dir: Path) -> None:
    with _serving(runtime_dir, Recording()):
        fronts = [Front(runtime_dir) for _ in range(3)]
        for front in fronts:
            front.hello()
    for front in fronts:
        assert hung_up(front.socket)
        front.close()
