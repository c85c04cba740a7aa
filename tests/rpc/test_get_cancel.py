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

from skeyd.errors import SkeydError
from skeyd.rpc.calls import Cancelled
from skeyd.rpc.get_skeys import get_skeys
from skeyd.rpc.slots import CallSlots
from skeyd.v1 import storage_key_service_pb2 as pb
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
    def session(self, _: str) -> Iterator[Session]:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with Session.connect(fd) as session:
                yield session
        finally:
            os.close(fd)


class _Call:
    """A call that can be ended from outside."""

    def __init__(self, directory: Path) -> None:
        self.slots = CallSlots(1, "streams")
        self._end: Callable[[], None] | None = None
        registry: Any = _OneVm(directory)
        self.parts = get_skeys(registry, self.slots, REQUEST, self._when_ended)

    def _when_ended(self, end: Callable[[], None]) -> bool:
        self._end = end
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


def test_a_call_that_has_ended_before_it_begins_asks_nothing_of_the_worker(runtime_dir: Path) -> None:
    said: list[bytes] = []

    def script(caller: Caller) -> None:
        caller.say(hello())
        said.append(caller.connection.recv(1 << 16))

    registry: Any = _OneVm(runtime_dir)
    with FakeWorker(runtime_dir, script), pytest.raises(Cancelled):
        list(get_skeys(registry, CallSlots(1, "streams"), REQUEST, lambda _: False))
    assert said == [b""]
