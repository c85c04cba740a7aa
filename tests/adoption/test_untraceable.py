"""A VMM that the kernel lets no worker trace: its keys are read over QMP, where a monitor is named and nothing else is.

The VMM is any process here, and what listens at its monitor a test; tests/adoption/test_qemu.py has a real one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2, vm_service_pb2
from tests.adoption.untraceable import WITHOUT_RIGHT, require_rights
from tests.daemon import DaemonProcess
from tests.injection.victims import Victim
from tests.qmp.monitors import FakeMonitor
from tests.qmp.printer import Printer
from tests.rpc.stubs import Stubs, refusal

FRAMES: Final = 1024
KEYS: Final = bytes(gfn % 16 << 4 for gfn in range(FRAMES))
NAME: Final = "vms/guest"


@pytest.fixture
def daemon(runtime_dir: Path) -> Iterator[DaemonProcess]:
    """Run a daemon whose workers have no CAP_SYS_PTRACE."""
    require_rights()
    daemon = DaemonProcess(runtime_dir / "skeyd", WITHOUT_RIGHT)
    try:
        daemon.start("--allow-adoption")
        yield daemon
    finally:
        daemon.end_everything()


@pytest.fixture
def vmm() -> Iterator[Victim]:
    """Run a process with all rights that this one has."""
    with Victim("poll") as victim:
        yield victim


@pytest.fixture
def monitor(vmm: Victim, runtime_dir: Path) -> Iterator[FakeMonitor]:
    """Listen for it as its monitor would."""
    printer = Printer(KEYS)
    printer.answers |= {
        "query-cpus-fast": [{"thread-id": vmm.pid}],
        "query-kvm": {"enabled": True, "present": True},
        "qom-get": "s390-ccw-virtio-7.2-machine",
        "query-memory-size-summary": {"base-memory": FRAMES << 12, "plugged-memory": 0},
        "query-memory-devices": [],
        "human-monitor-command": "  key: 0x10\n",
    }
    with FakeMonitor(runtime_dir / "qmp", printer.converse) as fake:
        yield fake
    printer.let_go()


def adopt(stubs: Stubs, vmm: Victim, **fields: Any) -> vm_pb2.Vm:
    return stubs.vms.AdoptVm(vm_service_pb2.AdoptVmRequest(vm_id="guest", pid=vmm.pid, **fields)).vm


def test_its_keys_are_read_over_qmp_and_the_answer_says_so(stubs: Stubs, vmm: Victim, monitor: FakeMonitor) -> None:
    vm = adopt(stubs, vmm, qmp_socket=monitor.path)
    assert (vm.vmm.access, vm.vmm.memory_source) == (vm_pb2.ACCESS_QMP, vm_pb2.MEMORY_SOURCE_QMP)
    assert (vm.vmm.pid, vm.vmm.HasField("vm_fd")) == (vmm.pid, False)
    assert vm.kernel == os.uname().release
    assert [(one.start_gfn, one.count) for one in vm.memory_slots] == [(0, FRAMES)]
    assert stubs.get(NAME).keys == KEYS
    assert stubs.get(NAME, (3, 5)).keys == KEYS[3:8]
    with pytest.raises(grpc.RpcError) as caught:
        stubs.keys.SetSkey(pb.SetSkeyRequest(vm=NAME, gfn=0, key=0x70))
    assert refusal(caught.value).reason == "BACKEND_READ_ONLY"


@pytest.mark.parametrize("way", ["no monitor", "injection"])
def test_where_nothing_else_is_wanted_it_is_refused(stubs: Stubs, vmm: Victim, monitor: FakeMonitor, way: str) -> None:
    slots = [vm_service_pb2.MemorySlotSpec(memory_size=FRAMES << 12)]
    fields: dict[str, Any] = {"memory_slots": slots}
    if way == "injection":
        fields = {"qmp_socket": monitor.path, "access": vm_pb2.ACCESS_INJECTION}
    with pytest.raises(grpc.RpcError) as caught:
        adopt(stubs, vmm, **fields)
    found = refusal(caught.value)
    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "VMM_NOT_TRACEABLE")
    assert found.metadata["vmm_pid"] == str(vmm.pid)
    assert stubs.names() == []


def test_a_frozen_reading_is_refused(stubs: Stubs, vmm: Victim, monitor: FakeMonitor) -> None:
    adopt(stubs, vmm, qmp_socket=monitor.path)
    request = pb.GetSkeysRequest(vm=NAME, consistency=pb.CONSISTENCY_FROZEN)
    with pytest.raises(grpc.RpcError) as caught:
        list(stubs.keys.GetSkeys(request))
    found = refusal(caught.value)
    assert (found.code, found.reason) == (grpc.StatusCode.UNIMPLEMENTED, "FREEZE_UNSUPPORTED")
    assert "over QMP" in found.message
