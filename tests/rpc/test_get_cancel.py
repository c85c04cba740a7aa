"""A GetSkeys call that ends early takes the worker's part of the work with it, and nobody else's."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.rpc.calls import Cancelled
from skeyd.rpc.get_skeys import get_skeys
from skeyd.rpc.slots import CallSlots
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.vms.hang_up import HangUp
from skeyd.vms.session import Session
from tests.rpc.stubs import ranges
from tests.vms.fake_worker import Caller, FakeWorker, Script, hello
from tests.worker.processes import SECONDS

REQUEST = pb.GetSkeysRequest(vm="vms/web", ranges=ranges((0, 1 << 20)), max_chunk_keys=1 << 18)


class _OneVm:
    """A registry of the one VM whose worker listens in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextmanager
    def session(self, _: str, hang_up: HangUp) -> Iterator[Session]:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with Session.connect(fd, hang_up) as session:
                try:
                    yield session
                finally:
                    hang_up.let_go()
        finally:
            os.close(fd)


class _Call:
    """A call that can be ended from outside."""

    def __init__(self, directory: Path) -> None:
        self.slots = CallSlots(1, "streams", Reason.TOO_MANY_STREAMS)
        self._end: Callable[[], None] | None = None
        registry: Any = _OneVm(directory)
        self.parts = get_skeys(registry, self.slots, REQUEST, self)

    def is_active(self) -> bool:
        return True

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self._end = callback
        return True

    def end(self) -> None:
        assert self._end is not None
        self._end()


def _script(asked: threading.Event, seen: list[str], then: Callable[[Caller], None] = lambda _: None) -> Script:
    def script(caller: Caller) -> None:
        caller.say(hello())
        caller.answer("status", {"ok": {"uses_keys": True}})
        os.close(caller.attach())
        seen.append(caller.take()["op"])
        asked.set()
        then(caller)
        # Whatever it still says until it hangs up.
        while data := caller.connection.recv(1 << 16):
            seen.append(data.decode())

    return script


def test_who_waits_for_an_ioctl_is_woken_and_asks_for_no_other(runtime_dir: Path) -> None:
    asked, seen = threading.Event(), list[str]()
    with FakeWorker(runtime_dir, _script(asked, seen)), ThreadPoolExecutor(1) as pool:
        call = _Call(runtime_dir)
        reading = pool.submit(list, call.parts)
        assert asked.wait(SECONDS)
        call.end()
        assert isinstance(reading.exception(SECONDS), Cancelled)
        with call.slots.taken():
            pass  # its slot is free again
    assert seen == ["get"]


def test_a_worker_that_is_lost_while_the_call_goes_on_is_an_error(runtime_dir: Path) -> None:
    asked, seen = threading.Event(), list[str]()

    def hang_up(caller: Caller) -> None:
        raise BrokenPipeError

    with FakeWorker(runtime_dir, _script(asked, seen, hang_up)):
        call = _Call(runtime_dir)
        with pytest.raises(SkeydError, match="was lost"):
            list(call.parts)
        call.end()  # as gRPC does when it is over, which then changes nothing


class _Ended(_Call):
    """A call that has ended before it begins."""

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return False


def test_a_call_that_has_ended_before_it_begins_asks_nothing_of_the_worker(runtime_dir: Path) -> None:
    # Nobody listens: whoever connected would be told so.
    call = _Ended(runtime_dir)
    with pytest.raises(Cancelled):
        list(call.parts)
    with call.slots.taken():
        pass  # its slot is free again


def test_who_waits_for_a_hello_is_woken(runtime_dir: Path) -> None:
    connected = threading.Event()

    def script(caller: Caller) -> None:
        connected.set()
        caller.wait_for_end()

    with FakeWorker(runtime_dir, script), ThreadPoolExecutor(1) as pool:
        call = _Call(runtime_dir)
        reading = pool.submit(list, call.parts)
        assert connected.wait(SECONDS)
        call.end()
        # Nobody but the real registry makes a SkeydError of what the connection says.
        assert isinstance(reading.exception(SECONDS), ConnectionResetError)
        with call.slots.taken():
            pass
