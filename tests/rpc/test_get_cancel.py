"""A GetSkeys call that ends early takes the worker's part of the work with it, and nobody else's."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from skeyd.errors import SkeydError
from skeyd.rpc.calls import Cancelled
from skeyd.v1 import storage_key_service_pb2 as pb
from tests.rpc.one_vm import GetCall
from tests.rpc.stubs import ranges
from tests.vms.fake_worker import Caller, FakeWorker, Script, hello
from tests.worker.processes import SECONDS

REQUEST = pb.GetSkeysRequest(vm="vms/web", ranges=ranges((0, 1 << 20)), max_chunk_keys=1 << 18)


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
        call = GetCall(runtime_dir, REQUEST)
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
        call = GetCall(runtime_dir, REQUEST)
        with pytest.raises(SkeydError, match="was lost"):
            list(call.parts)
        call.end()  # as gRPC does when it is over, which then changes nothing


class _Ended(GetCall):
    """A call that has ended before it begins."""

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return False


def test_a_call_that_has_ended_before_it_begins_asks_nothing_of_the_worker(runtime_dir: Path) -> None:
    # Nobody listens: whoever connected would be told so.
    call = _Ended(runtime_dir, REQUEST)
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
        call = GetCall(runtime_dir, REQUEST)
        reading = pool.submit(list, call.parts)
        assert connected.wait(SECONDS)
        call.end()
        # Nobody but the real registry makes a SkeydError of what the connection says.
        assert isinstance(reading.exception(SECONDS), ConnectionResetError)
        with call.slots.taken():
            pass
