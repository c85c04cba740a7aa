"""A client whose daemon says nothing: it asks, and finds out; and it may ask as often as it does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from skeyd import limits
from skeyd.client import ClientError
from skeyd.client.connection import Client
from skeyd.client.reading import Keys
from skeyd.client.writing import SetOptions
from skeyd.gfn import GfnRange
from skeyd.v1 import vm_pb2, vm_service_pb2
from tests.daemon import DaemonProcess
from tests.rpc import impatient
from tests.rpc.stubs import MIB

NAME = "vms/web"


def create(client: Client) -> None:
    slot = vm_service_pb2.MemorySlotSpec(memory_size=MIB)
    client.create_vm(vm_service_pb2.CreateVmRequest(vm_id="web", kind=vm_pb2.VM_KIND_SIMULATED, memory_slots=[slot]))


def set_and_wait(client: Client, begun: threading.Event, over: threading.Event) -> None:
    """Begin to set keys, and say nothing more."""

    def chunks() -> Iterator[Keys]:
        yield Keys(GfnRange(0, 1), b"\x10")
        over.wait()

    client.set_skeys(NAME, [GfnRange(0, 2)], chunks(), SetOptions(allow_enable=True), progress=lambda _: begun.set())


def outcome(client: Client, begun: threading.Event, over: threading.Event, told: list[ClientError]) -> threading.Thread:
    def run() -> None:
        try:
            set_and_wait(client, begun, over)
        except ClientError as error:
            told.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_daemon_that_is_stopped_is_found_out(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "KEEPALIVE_SECONDS", 0.5)
    monkeypatch.setattr(limits, "KEEPALIVE_TIMEOUT_SECONDS", 0.5)
    begun, over, told = threading.Event(), threading.Event(), list[ClientError]()
    with daemon.connect() as client:
        create(client)
        thread = outcome(client, begun, over, told)
        try:
            assert begun.wait(30)
            os.kill(daemon.pid, signal.SIGSTOP)
            thread.join(30)
            assert [error.code for error in told] == [grpc.StatusCode.UNAVAILABLE]
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
            over.set()
            thread.join(30)


def test_a_client_that_asks_again_and_again_is_no_attacker(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Once a second, which is as often as gRPC does at most, before the daemon has waited for as long as it does; that
    # one never asks, since it hears of the client.
    monkeypatch.setattr(limits, "KEEPALIVE_SECONDS", 1.0)
    daemon = DaemonProcess(runtime_dir, impatient.through(6.0, 1.9))
    begun, over, told = threading.Event(), threading.Event(), list[ClientError]()
    try:
        daemon.start()
        with daemon.connect() as client:
            create(client)
            thread = outcome(client, begun, over, told)
            try:
                thread.join(30)
                assert [error.code for error in told] == [grpc.StatusCode.CANCELLED]
            finally:
                over.set()
                thread.join(30)
    finally:
        daemon.end_everything()
