"""AdoptVm: who may, what is refused, and that the process whose VM it is goes on as if nobody had come.

On any machine with KVM: where it has no storage keys, that is what is found out through the process.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from skeyd.v1 import vm_pb2, vm_service_pb2
from skeyd.worker.adoption import HOLD_MAX_MS
from skeyd.worker.protocol import LOCK
from tests.adoption import owners
from tests.adoption.qemu_vm import buffers_in
from tests.daemon import DaemonProcess
from tests.injection.victims import Victim, cannot, differences, look_at_process
from tests.rpc.stubs import Refusal, Stubs, refusal

MIB: Final = 1 << 20
OWNER: Final = """
import fcntl, os, sys
kvm = os.open("/dev/kvm", os.O_RDWR)
vms = [fcntl.ioctl(kvm, 0xAE01, 0) for _ in range(int(sys.argv[1]))]
print("ready", flush=True)
for _ in sys.stdin: print("pong", len(vms), flush=True)
"""
"""Has so many VMs, without memory, and answers."""


def slot(**fields: Any) -> vm_service_pb2.MemorySlotSpec:
    return vm_service_pb2.MemorySlotSpec(**{"memory_size": MIB, **fields})


GOOD: Final[dict[str, Any]] = {"vm_id": "guest", "memory_slots": [slot()]}


def owner(vms: int = 1) -> Victim:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        cannot("/dev/kvm is missing, or not for this user")
    return Victim(command=[sys.executable, "-c", OWNER, str(vms)])


def adopt(stubs: Stubs, **fields: Any) -> vm_pb2.Vm:
    return stubs.vms.AdoptVm(vm_service_pb2.AdoptVmRequest(**{**GOOD, **fields})).vm


def refused(stubs: Stubs, **fields: Any) -> Refusal:
    with pytest.raises(grpc.RpcError) as caught:
        adopt(stubs, **fields)
    assert stubs.names() == []
    return refusal(caught.value)


PASSED_ON: Final = """
import fcntl, os, sys
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xAE01, 0)
print("ready", flush=True)
child = os.fork()
if child: print(child, flush=True)
os.waitpid(child, 0) if child else os.read(os.pipe()[0], 1)
"""
"""Its child has the VM's descriptor, and not the VM."""


def test_a_vm_of_another_process_is_refused_with_whose_descriptor_it_was(stubs: Stubs, daemon: DaemonProcess) -> None:
    owner().__enter__().__exit__(None, None, None)  # skips where there is no KVM
    with Victim(command=[sys.executable, "-c", PASSED_ON]) as victim:
        child = int(victim.line())
        try:
            found = refused(stubs, pid=child)
            assert found.reason == "VMM_UNSUITABLE"
            assert "adopt the process that made it" in found.message
            assert found.metadata["vmm_pid"] == str(child)
            assert daemon.wait_for_line("rpc", reason="VMM_UNSUITABLE")["vmm_pid"] == child
            assert buffers_in(child) == []
        finally:
            os.kill(child, signal.SIGKILL)
            assert victim.process.stdin is not None
            victim.process.stdin.close()
            victim.process.wait(60)


def test_nobody_adopts_anything_unless_the_daemon_was_started_so(shared_daemon: DaemonProcess) -> None:
    with Stubs(shared_daemon.target) as stubs, pytest.raises(grpc.RpcError) as caught:
        adopt(stubs, pid=os.getpid())
    found = refusal(caught.value)
    assert (found.code, found.reason) == (grpc.StatusCode.PERMISSION_DENIED, "ADOPTION_FORBIDDEN")
    assert "--allow-adoption" in found.message


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"vm_id": "No"}, "VM_ID_INVALID"),
        ({"pid": 0}, "REQUEST_INVALID"),
        ({"pid": -1}, "REQUEST_INVALID"),
        ({"pid": (1 << 31) + 1}, "REQUEST_INVALID"),
        ({"vm_fd": 1 << 31}, "REQUEST_INVALID"),
        ({"qmp_socket": "run/qmp"}, "REQUEST_INVALID"),
        ({"qmp_socket": "/run/\n/qmp"}, "REQUEST_INVALID"),
        ({"qmp_socket": "/" + "x" * 1024}, "REQUEST_INVALID"),
        ({"qmp_socket": "/run/qmp", "pid": -1}, "REQUEST_INVALID"),
        ({"qmp_socket": "/run/qmp", "access": 3}, "REQUEST_INVALID"),
        ({"qmp_socket": "/run/qmp", "access": vm_pb2.ACCESS_QMP, "vm_fd": 3}, "REQUEST_INVALID"),
        ({"qmp_socket": "/run/qmp", "pid": 0, "name": "web"}, "REQUEST_INVALID"),
        ({"access": vm_pb2.ACCESS_QMP}, "REQUEST_INVALID"),
        ({"memory_slots": [vm_service_pb2.MemorySlotSpec(memory_size=4096)]}, "MEMORY_INVALID"),
        (
            {"memory_slots": [vm_service_pb2.MemorySlotSpec(memory_size=MIB, backing=vm_pb2.MEMORY_BACKING_MEMFD)]},
            "REQUEST_INVALID",
        ),
        ({"memory_slots": [vm_service_pb2.MemorySlotSpec(memory_size=MIB, file="a")]}, "REQUEST_INVALID"),
        ({"max_hold_time": Duration()}, "REQUEST_INVALID"),
        ({"max_hold_time": Duration(nanos=999_999)}, "REQUEST_INVALID"),
        ({"max_hold_time": Duration(seconds=-1)}, "REQUEST_INVALID"),
        ({"max_hold_time": Duration(seconds=1, nanos=-1)}, "REQUEST_INVALID"),
        ({"max_hold_time": Duration(seconds=HOLD_MAX_MS // 1000, nanos=1_000_000)}, "REQUEST_INVALID"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_started(
    stubs: Stubs, wrong: dict[str, Any], reason: str
) -> None:
    found = refused(stubs, **{"pid": os.getpid(), **wrong})
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


def test_a_process_that_is_not_there_or_has_no_such_vm_is_not_found(stubs: Stubs) -> None:
    with owner(0) as nobody, owner(2) as several:
        for fields, said in (
            ({"pid": 1 << 22}, "there is no process"),
            ({"pid": nobody.pid}, "has no VM"),
            ({"pid": nobody.pid, "vm_fd": 0}, "descriptor 0 of process"),
            ({"pid": nobody.pid, "start_time": 1}, "was started at"),
            ({"pid": several.pid}, "has the VMs 4, 5: name one"),
        ):
            found = refused(stubs, **fields)
            assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "VMM_NOT_FOUND"), found
            assert said in found.message
            assert found.metadata["vmm_pid"] == str(fields["pid"])


def test_a_worker_of_skeyds_is_not_adopted_its_vm_is_served_already(stubs: Stubs, tmp_path: Path) -> None:
    with owners.owner(1, lock=str(tmp_path / LOCK)) as worker:
        before = look_at_process(worker.pid)
        for fields in ({}, {"vm_fd": 4}):
            found = refused(stubs, pid=worker.pid, **fields)
            assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "VMM_UNSUITABLE")
            assert "is a worker of skeyd" in found.message
        assert differences(before, look_at_process(worker.pid)) == {}


def test_a_process_that_is_traced_is_said_to_be(stubs: Stubs) -> None:
    # By this test's own hand: the kernel's "one tracer only" is what a debugger would cause.
    from skeyd.injection.tracee import Tracee

    with owner() as traced:
        tracee = Tracee.seize(traced.pid, traced.pid)
        found = refused(stubs, pid=traced.pid)
        assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "VMM_TRACED")
        assert found.retry_seconds == 1
        assert f"process {os.getpid()}" in found.message
        tracee.interrupt()
        tracee.wait(float("inf"))
        tracee.detach()


@pytest.mark.skipif(platform.machine() == "s390x", reason="this machine has storage keys: test_qemu.py")
def test_a_kernel_without_storage_keys_is_told_through_the_process_which_goes_on(stubs: Stubs) -> None:
    with owner() as victim:
        assert victim.ping() == 1
        refused(stubs, pid=victim.pid)  # after the first it has had a buffer, and VmPeak tells of it
        before = look_at_process(victim.pid)
        for fields in ({}, {"vm_fd": 4}, {"max_hold_time": Duration(seconds=HOLD_MAX_MS // 1000)}):
            found = refused(stubs, pid=victim.pid, **fields)
            assert (found.code, found.reason) == (grpc.StatusCode.UNIMPLEMENTED, "CAP_S390_SKEYS_MISSING")
        assert differences(before, look_at_process(victim.pid)) == {}
        assert victim.ping() == 1
