"""One VM that stands still, or whose readers do, delays no other VM and no health check."""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from skeyd.limits import MAX_KEY_STREAMS, MAX_LISTS, MAX_SHORT_CALLS
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_service_pb2
from tests.daemon import DaemonProcess
from tests.processes import links_of
from tests.rpc.standard_services import SERVING, check
from tests.rpc.stubs import SECONDS, Stubs, ranges, refusal, refused

QUICKLY = 4.0
"""Seconds; less than the front waits for a hello, and whoever waits behind a stopped worker waits for that."""

LARGE = 4 << 20
"""MiB of a guest whose keys no buffers hold."""

KEYS = "/skeyd.v1.StorageKeyService"


class Host:
    """A daemon with two VMs: one whose worker the test stops, and one that must not notice."""

    def __init__(self, daemon: DaemonProcess, stubs: Stubs) -> None:
        self.daemon = daemon
        self.stubs = stubs
        self.stopped = stubs.create("stopped", (0, LARGE)).name
        self.healthy = stubs.create("healthy", (0, 1)).name
        for vm in (self.stopped, self.healthy):
            stubs.set(vm, [(0, b"\x10")])
        self.pid = daemon.worker_pid("stopped")

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def short_calls(self, count: int) -> queue.SimpleQueue[Any]:
        """Ask the stopped VM for a key so many times at once; each call comes when it is done."""
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.calls = [
            self.stubs.keys.GetSkey.future(pb.GetSkeyRequest(vm=self.stopped), timeout=SECONDS) for _ in range(count)
        ]
        for one in self.calls:
            one.add_done_callback(done.put)
        return done

    def require_healthy(self) -> None:
        """Whatever is done with the other VM is done at once."""
        with Stubs(self.daemon.target) as another:
            keys = another.keys
            assert keys.GetSkey(pb.GetSkeyRequest(vm=self.healthy), timeout=QUICKLY).key == 0x10
            assert keys.SetSkey(pb.SetSkeyRequest(vm=self.healthy, gfn=1, key=0x20), timeout=QUICKLY).old_key == 0
            stream = keys.GetSkeys(pb.GetSkeysRequest(vm=self.healthy), timeout=QUICKLY)
            assert [one.WhichOneof("part") for one in stream] == ["header", "chunk", "trailer"]
            assert keys.DigestSkeys(pb.DigestSkeysRequest(vm=self.healthy), timeout=QUICKLY).node.keys == 256
            another.vms.GetVm(vm_service_pb2.GetVmRequest(name=self.healthy), timeout=QUICKLY)
            assert keys.SetSkey(pb.SetSkeyRequest(vm=self.healthy, gfn=1, key=0), timeout=QUICKLY).old_key == 0x20
            assert check(another.channel, seconds=QUICKLY) == SERVING


@pytest.fixture
def host(daemon: DaemonProcess) -> Iterator[Host]:
    """Make both VMs."""
    with Stubs(daemon.target) as stubs:
        yield Host(daemon, stubs)


def require_share_is_used(found: Any, vm: str) -> None:
    assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS_ON_VM")
    assert found.metadata == {"vm": vm}
    assert found.retry_seconds == 1


def test_short_calls_on_a_stopped_vm_are_refused_beyond_its_share_and_delay_no_other(host: Host) -> None:
    host.stop()
    more = 100
    done = host.short_calls(more)
    for _ in range(more - MAX_SHORT_CALLS // 2):
        require_share_is_used(refusal(done.get(timeout=QUICKLY).exception()), host.stopped)
    host.require_healthy()
    # Those that were let in learn what is wrong.
    for _ in range(MAX_SHORT_CALLS // 2):
        assert refusal(done.get(timeout=SECONDS).exception()).reason == "VM_QUARANTINED"


def test_lists_of_vms_that_wait_for_a_stopped_one_delay_no_other_call(host: Host) -> None:
    host.stop()
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    share, more = MAX_LISTS, 8
    calls = [
        host.stubs.vms.ListVms.future(vm_service_pb2.ListVmsRequest(), timeout=SECONDS) for _ in range(share + more)
    ]
    for one in calls:
        one.add_done_callback(done.put)
    for _ in range(more):
        assert refusal(done.get(timeout=QUICKLY).exception()).reason == "TOO_MANY_CALLS"
    host.require_healthy()
    for _ in range(share):
        assert len(done.get(timeout=SECONDS).result().vms) == 2


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped-worker", "readers-that-stand-still"])
def test_streams_of_one_vm_are_refused_beyond_its_share_and_delay_no_other(host: Host, stopped: bool) -> None:
    if stopped:
        host.stop()
    share, more = MAX_KEY_STREAMS // 2, 8
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    streams: list[Any] = [host.stubs.keys.GetSkeys(pb.GetSkeysRequest(vm=host.stopped)) for _ in range(share + more)]
    try:
        for one in streams:
            one.add_done_callback(done.put)
        for _ in range(more):
            require_share_is_used(refusal(done.get(timeout=QUICKLY)), host.stopped)
        host.require_healthy()
        assert stopped or done.empty()
    finally:
        for one in streams:
            one.cancel()


@pytest.mark.parametrize(
    "method", ["GetSkey", "SetSkey", "GetVm", "ListVms", "DeleteVm", "GetSkeys", "SetSkeys", "DigestSkeys"]
)
def test_a_call_that_is_cancelled_before_the_worker_said_hello_ends_at_once(host: Host, method: str) -> None:
    host.stop()
    vm = host.stopped
    stubs = host.stubs
    requests: dict[str, Any] = {
        "GetSkey": lambda: stubs.keys.GetSkey.future(pb.GetSkeyRequest(vm=vm)),
        "SetSkey": lambda: stubs.keys.SetSkey.future(pb.SetSkeyRequest(vm=vm)),
        "GetVm": lambda: stubs.vms.GetVm.future(vm_service_pb2.GetVmRequest(name=vm)),
        "ListVms": lambda: stubs.vms.ListVms.future(vm_service_pb2.ListVmsRequest()),
        "DeleteVm": lambda: stubs.vms.DeleteVm.future(vm_service_pb2.DeleteVmRequest(name=vm)),
        "GetSkeys": lambda: stubs.keys.GetSkeys(pb.GetSkeysRequest(vm=vm)),
        "SetSkeys": lambda: stubs.keys.SetSkeys(
            iter([pb.SetSkeysRequest(header=pb.SetSkeysRequest.Header(vm=vm, ranges=ranges((0, 1))))])
        ),
        "DigestSkeys": lambda: stubs.keys.DigestSkeys.future(pb.DigestSkeysRequest(vm=vm)),
    }
    service = "/skeyd.v1.VmService" if "Vm" in method else KEYS
    before = sockets_of(host.daemon.pid)
    call = requests[method]()
    end = time.monotonic() + SECONDS
    while sockets_of(host.daemon.pid) == before:
        assert time.monotonic() < end, "the front doesn't connect to the worker"
    call.cancel()
    line = host.daemon.wait_for_line("rpc", seconds=QUICKLY, method=f"{service}/{method}", code="CANCELLED")
    assert line.get("vm", vm) == vm
    assert line["ms"] < QUICKLY * 1000
    host.require_healthy()


def test_a_call_whose_deadline_passes_frees_its_slot(host: Host) -> None:
    host.stop()
    for _ in range(2 * MAX_SHORT_CALLS):
        with pytest.raises(grpc.RpcError) as caught:
            host.stubs.keys.GetSkey(pb.GetSkeyRequest(vm=host.stopped), timeout=0.05)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED or (
            # As many connections as a stopped worker's socket holds wait there, and it takes no more.
            refusal(caught.value).reason == "VM_QUARANTINED"
        )


def sockets_of(pid: int) -> int:
    """How many sockets a process holds open."""
    return sum(link.startswith("socket:") for link in links_of(pid))


def test_a_vm_that_can_not_be_asked_is_told_of_as_ever(host: Host) -> None:
    host.stop()
    found = refused(lambda: host.stubs.keys.GetSkey(pb.GetSkeyRequest(vm=host.stopped), timeout=SECONDS))
    assert (found.reason, "did not answer" in found.message) == ("VM_QUARANTINED", True)
