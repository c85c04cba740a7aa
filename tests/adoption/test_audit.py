"""The log's line of each call that adopts a VM, changes it or lets it go says whose it is, done or refused."""

from __future__ import annotations

import os
import platform
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, cast

import grpc
import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.injection import proc
from skeyd.rpc import calls, convert
from skeyd.rpc.audit import noting_refused_vmm
from skeyd.rpc.slots import CallSlots
from skeyd.rpc.vm_service import VmService
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2, vm_service_pb2
from skeyd.vms.registry import Registry
from skeyd.vms.runtime import RuntimeDirectory, VmDirectory
from skeyd.vms.vm import VmState
from skeyd.worker.adoption import VMM_METADATA, Vmm
from skeyd.worker.packets import Fields
from skeyd.worker.protocol import Spec
from tests import vm_requests
from tests.adoption.owners import owner
from tests.adoption.pretended import adopted, worker_of
from tests.daemon import DaemonProcess
from tests.injection.victims import Victim
from tests.rpc.stubs import MIB, Stubs, chunk, commit, header, refusal

VMM: Final = Vmm(4711, 123_456, 64055, "/usr/bin/qemu-system-s390x", "web, 1", 13, "named")
WHO: Final[dict[str, Any]] = {
    "vmm_pid": 4711,
    "vmm_start_time": 123_456,
    "vmm_uid": 64055,
    "vmm_executable": "/usr/bin/qemu-system-s390x",
    "vmm_name": "web, 1",
}
NAME: Final = "vms/guest"


def line(daemon: DaemonProcess, method: str) -> dict[str, Any]:
    """Wait for the next line of a method."""
    service = "VmService" if method.endswith("Vm") else "StorageKeyService"
    return daemon.wait_for_line("rpc", method=f"/skeyd.v1.{service}/{method}")


def who(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what a line has of a VMM."""
    return {name: entry[name] for name in VMM_METADATA if name in entry}


def refused(call: Any, request: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    return refusal(caught.value).reason


def test_calls_that_set_keys_of_an_adopted_vm_say_whose_it_is(daemon: DaemonProcess, stubs: Stubs) -> None:
    with adopted(daemon.runtime_dir, "guest", VMM):
        stubs.set(NAME, [(0, b"\x10" * 256)])
        entry = line(daemon, "SetSkeys")
        assert (entry["code"], entry["keys"], who(entry)) == ("OK", 256, WHO)
        stubs.keys.SetSkey(pb.SetSkeyRequest(vm=NAME, gfn=1, key=0x20))
        entry = line(daemon, "SetSkey")
        assert (entry["code"], entry["gfn"], who(entry)) == ("OK", "0x1", WHO)
        stubs.keys.ResetReferenced(pb.ResetReferencedRequest(vm=NAME, gfn=1))
        entry = line(daemon, "ResetReferenced")
        assert (entry["code"], entry["gfn"], who(entry)) == ("OK", "0x1", WHO)


def test_and_where_they_are_refused(daemon: DaemonProcess, stubs: Stubs) -> None:
    with adopted(daemon.runtime_dir, "guest", VMM):
        _, error = stubs.send(header(NAME, (0, 2), allow_enable=True), chunk(0, b"\x10\x11"), commit())
        assert error is not None
        entry = line(daemon, "SetSkeys")
        assert (entry["reason"], error.reason, who(entry)) == ("KEY_RESERVED_BIT", "KEY_RESERVED_BIT", WHO)
        for method, request in (
            ("SetSkey", pb.SetSkeyRequest(vm=NAME, gfn=256, key=0x10)),
            ("ResetReferenced", pb.ResetReferencedRequest(vm=NAME, gfn=256)),
        ):
            assert refused(getattr(stubs.keys, method), request) == "GFN_NOT_MAPPED"
            entry = line(daemon, method)
            assert (entry["reason"], who(entry)) == ("GFN_NOT_MAPPED", WHO)


def test_of_a_vm_that_was_not_adopted_nothing_is_said(daemon: DaemonProcess, stubs: Stubs) -> None:
    stubs.create("guest", (0, 1))
    stubs.set(NAME, [(0, b"\x10")])
    assert who(line(daemon, "SetSkeys")) == {}
    stubs.delete(NAME)
    assert who(line(daemon, "DeleteVm")) == {}


def test_who_lets_an_adopted_vm_go_says_whose_it_was(daemon: DaemonProcess, stubs: Stubs) -> None:
    with adopted(daemon.runtime_dir, "guest", VMM) as worker:
        stubs.delete(NAME)
        entry = line(daemon, "DeleteVm")
        assert (entry["code"], entry["vm"], who(entry)) == ("OK", NAME, WHO)
        worker.process.wait(30)
    assert stubs.names() == []


def test_and_where_it_cannot_be_let_go(daemon: DaemonProcess, stubs: Stubs) -> None:
    with adopted(daemon.runtime_dir, "guest", VMM, "VMM_TRACED"):
        assert refused(stubs.vms.DeleteVm, vm_service_pb2.DeleteVmRequest(name=NAME)) == "VMM_TRACED"
        entry = line(daemon, "DeleteVm")
        assert (entry["reason"], who(entry)) == ("VMM_TRACED", WHO)
        assert stubs.look_at(NAME).state == vm_pb2.VM_STATE_READY


def test_of_a_vm_that_is_dead_its_record_says_whose_it_was(daemon: DaemonProcess, stubs: Stubs) -> None:
    with adopted(daemon.runtime_dir, "guest", VMM) as worker:
        ready = stubs.look_at(NAME)
        assert (ready.state, ready.vmm.pid, ready.vmm.name) == (vm_pb2.VM_STATE_READY, 4711, "web, 1")
        worker.process.kill()
        worker.process.wait()
        dead = stubs.look_at(NAME)
        assert (dead.state, dead.vmm) == (vm_pb2.VM_STATE_DEAD, ready.vmm)
        stubs.delete(NAME)
        entry = line(daemon, "DeleteVm")
        assert (entry["code"], who(entry)) == ("OK", WHO)


@pytest.mark.skipif(platform.machine() == "s390x", reason="this machine has storage keys: test_qemu.py")
def test_who_adopts_in_vain_says_whose_thread_was_made_to_call(runtime_dir: Path) -> None:
    with ExitStack() as resources:
        daemon = DaemonProcess(runtime_dir)
        resources.callback(daemon.end_everything)
        daemon.start("--allow-adoption")
        stubs = resources.enter_context(Stubs(daemon.target))
        victim = resources.enter_context(owner(1, "-name", "guest=of-the-audit"))
        for how in ({"pid": victim.pid}, {"name": "of-the-audit"}):
            request = vm_service_pb2.AdoptVmRequest(
                vm_id="guest", memory_slots=[vm_service_pb2.MemorySlotSpec(memory_size=MIB)], **how
            )
            assert refused(stubs.vms.AdoptVm, request) == "CAP_S390_SKEYS_MISSING"
            entry = line(daemon, "AdoptVm")
            assert entry["reason"] == "CAP_S390_SKEYS_MISSING"
            assert who(entry) == {
                "vmm_pid": victim.pid,
                "vmm_start_time": proc.start_time(victim.pid),
                "vmm_uid": os.geteuid(),
                "vmm_executable": str(Path(f"/proc/{victim.pid}/exe").readlink()),
                "vmm_name": "of-the-audit",
            }
        # Before anybody is known, it is what was asked for.
        nobody = vm_requests.adopted("guest", 1)
        nobody.pid = 1 << 22
        assert refused(stubs.vms.AdoptVm, nobody) == "VMM_NOT_FOUND"
        assert who(line(daemon, "AdoptVm")) == {"vmm_pid": 1 << 22}


# --- adopting, without storage keys ---------------------------------------------------------------------------------


class _Pretender:
    """Starts workers that pretend."""

    def __init__(self, directory: Path, resources: ExitStack) -> None:
        self._directory = directory
        self._resources = resources
        self.workers: list[Victim] = []

    def start(self, directory: VmDirectory, spec: Spec) -> None:
        worker = worker_of(self._directory / "vms" / spec.vm_id, spec, VMM)
        self.workers.append(self._resources.enter_context(worker))

    def probe_host(self) -> Fields:
        raise NotImplementedError

    find_candidates = probe_host

    def reap(self) -> None:
        pass


class _Context:
    def is_active(self) -> bool:
        return True

    def add_callback(self, callback: Any) -> bool:
        return True


def test_who_adopts_says_whose_it_is_and_the_record_keeps_it(runtime_dir: Path) -> None:
    with ExitStack() as resources:
        runtime = resources.enter_context(RuntimeDirectory.open(runtime_dir))
        starter = _Pretender(runtime_dir, resources)
        registry = Registry(runtime, starter)
        resources.callback(registry.close)
        short_calls = CallSlots(2, "calls", Reason.TOO_MANY_CALLS)
        service = VmService(registry, None, short_calls, allow_adoption=True)
        noted: dict[str, Any] = {}
        token = calls._notes.set(noted)
        resources.callback(calls._notes.reset, token)
        context = cast(grpc.ServicerContext, _Context())
        made = service.AdoptVm(vm_requests.adopted("guest", 1), context).vm
        assert (made.vmm.pid, made.vmm.name) == (4711, "web, 1")
        assert noted == {"vm": NAME, "pid": 1, **WHO}
        with runtime.open_vm("guest") as directory:
            assert directory.read_record().vmm == VMM
        starter.workers[0].process.kill()
        starter.workers[0].process.wait()
        assert (registry.get("guest").state, registry.get("guest").vmm) == (VmState.DEAD, VMM)
        noted.clear()
        service.DeleteVm(vm_service_pb2.DeleteVmRequest(name=NAME), context)
        assert noted == {"vm": NAME, **WHO}


def test_a_record_that_cannot_be_written_keeps_nobody_from_adopting(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as resources:
        runtime = resources.enter_context(RuntimeDirectory.open(runtime_dir))
        registry = Registry(runtime, _Pretender(runtime_dir, resources))
        resources.callback(registry.close)
        real = VmDirectory.write_record

        def full(directory: VmDirectory, spec: Spec) -> None:
            if spec.vmm is not None:
                raise OSError(28, "No space left on device")
            real(directory, spec)

        monkeypatch.setattr(VmDirectory, "write_record", full)
        spec = convert.adoption_spec_of(vm_requests.adopted("guest", 1))
        assert registry.create(spec).vmm == VMM
        assert registry.get("guest").state is VmState.READY


def test_only_numbers_of_a_refusal_become_numbers() -> None:
    noted: dict[str, Any] = {}
    token = calls._notes.set(noted)
    try:
        with pytest.raises(SkeydError), noting_refused_vmm():
            raise SkeydError(
                Reason.VMM_STUCK, "", {"vmm_pid": "7", "vmm_name": "8", "vmm_executable": "/x", "system_call": "9"}
            )
    finally:
        calls._notes.reset(token)
    assert noted == {"vmm_pid": 7, "vmm_name": "8", "vmm_executable": "/x"}
