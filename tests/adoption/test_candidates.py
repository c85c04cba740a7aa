"""ListVmCandidates, and AdoptVm by name: who may, what comes out of the daemon, and that it can't be fooled."""

from __future__ import annotations

import os
import platform
import signal
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.injection import proc
from skeyd.rpc.vm_candidates import list_vm_candidates
from skeyd.v1 import vm_pb2, vm_service_pb2
from skeyd.vms.hang_up import HangUps
from skeyd.vms.registry import Registry
from skeyd.vms.vm import Vm, VmState
from skeyd.worker.adoption import Vmm
from skeyd.worker.candidates import Candidate, Found
from skeyd.worker.packets import Fields
from tests.adoption.owners import owner
from tests.adoption.pretended import adopted
from tests.daemon import DaemonProcess
from tests.injection.victims import Victim, differences
from tests.rpc.stubs import MIB, Refusal, Stubs, refusal


def candidates(stubs: Stubs) -> vm_service_pb2.ListVmCandidatesResponse:
    return stubs.vms.ListVmCandidates(vm_service_pb2.ListVmCandidatesRequest())


def candidate(stubs: Stubs, victim: Victim) -> vm_service_pb2.VmCandidate:
    (found,) = [one for one in candidates(stubs).candidates if one.pid == victim.pid]
    return found


def refused(stubs: Stubs, **fields: Any) -> Refusal:
    slots = [vm_service_pb2.MemorySlotSpec(memory_size=MIB)]
    with pytest.raises(grpc.RpcError) as caught:
        stubs.vms.AdoptVm(vm_service_pb2.AdoptVmRequest(vm_id="guest", memory_slots=slots, **fields))
    assert stubs.names() == []
    return refusal(caught.value)


def test_nobody_is_told_unless_the_daemon_was_started_so(shared_daemon: DaemonProcess) -> None:
    with Stubs(shared_daemon.target) as stubs, pytest.raises(grpc.RpcError) as caught:
        candidates(stubs)
    found = refusal(caught.value)
    assert (found.code, found.reason) == (grpc.StatusCode.PERMISSION_DENIED, "ADOPTION_FORBIDDEN")


def test_a_candidate_is_what_adopting_takes(daemon: DaemonProcess, stubs: Stubs) -> None:
    with owner(2, "-name", "guest=web 1", vcpus=1) as victim:
        before = victim.look()
        found = candidate(stubs, victim)
        assert (found.start_time, found.uid) == (proc.start_time(victim.pid), os.geteuid())
        assert found.executable == str(Path(f"/proc/{victim.pid}/exe").readlink())
        assert (found.name, list(found.vm_fds), found.vcpu_fds) == ("web 1", [4, 5], 1)
        assert 1 << 20 < found.resident_bytes < found.mapped_bytes
        assert (found.adopted_as, found.refusal, found.refusal_detail) == ("", "", "")
        assert differences(before, victim.look()) == {}
    line = daemon.wait_for_line("rpc", method="/skeyd.v1.VmService/ListVmCandidates")
    assert line["code"] == "OK"
    assert line["candidates"] >= 1


def test_one_that_is_adopted_is_said_to_be_as_what(daemon: DaemonProcess, stubs: Stubs) -> None:
    with owner() as victim, owner() as other:
        vmm = Vmm(victim.pid, proc.start_time(victim.pid), 0, "", "", 4, "named")
        another_time = Vmm(other.pid, proc.start_time(other.pid) + 1, 0, "", "", 4, "named")
        with adopted(daemon.runtime_dir, "guest", vmm) as worker, adopted(daemon.runtime_dir, "old", another_time):
            assert candidate(stubs, victim).adopted_as == "vms/guest"
            assert candidate(stubs, other).adopted_as == ""
            worker.process.send_signal(signal.SIGSTOP)
            assert candidate(stubs, victim).adopted_as == "vms/guest"  # by its record
            worker.process.kill()
            worker.process.wait()
            assert candidate(stubs, victim).adopted_as == ""


@pytest.mark.skipif(platform.machine() != "s390x", reason="an owned VM takes a machine with storage keys")
def test_a_vm_that_skeyd_has_made_is_none(stubs: Stubs) -> None:
    before = candidates(stubs)
    request = vm_service_pb2.CreateVmRequest(vm_id="own", kind=vm_pb2.VM_KIND_OWNED)
    request.memory_slots.add(memory_size=MIB)
    made = stubs.vms.CreateVm(request).vm
    found = candidates(stubs)
    assert made.worker_pid not in [one.pid for one in found.candidates]
    assert found.skeyd_workers == before.skeyd_workers + 1
    stubs.delete("vms/own")


# --- what the process that looks says, and what becomes of it -------------------------------------------------------

ONE = Candidate(7, 70, 64055, "/usr/bin/qemu-system-s390x", "web", (9, 11), 4, 5 << 20, 3 << 20, "VMM_TRACED", "by 8")


class _Registry:
    def __init__(self, said: dict[str, Any], *vms: Vm) -> None:
        self._said = said
        self._vms = vms

    def find_candidates(self) -> Found:
        return Found.from_message(Fields(self._said, "answer"))

    def list_all(self, hang_ups: HangUps) -> list[Vm]:
        return list(self._vms)


def asked(said: dict[str, Any], *vms: Vm) -> vm_service_pb2.ListVmCandidatesResponse:
    return list_vm_candidates(cast(Registry, _Registry(said, *vms)), HangUps())


def test_every_field_arrives() -> None:
    vmm = Vmm(7, 70, 64055, "", "", 9, "named")
    found = asked(
        Found((ONE,), 5, 6, 8).to_message(),
        Vm("first", VmState.READY),
        Vm("dead", VmState.DEAD, vmm=vmm),
        Vm("web", VmState.READY, vmm=vmm),
        Vm("other", VmState.READY, vmm=Vmm(7, 71, 0, "", "", 9, "named")),
    )
    assert found == vm_service_pb2.ListVmCandidatesResponse(
        candidates=[
            vm_service_pb2.VmCandidate(
                pid=7,
                start_time=70,
                uid=64055,
                executable="/usr/bin/qemu-system-s390x",
                name="web",
                vm_fds=[9, 11],
                vcpu_fds=4,
                mapped_bytes=5 << 20,
                resident_bytes=3 << 20,
                adopted_as="vms/web",
                refusal="VMM_TRACED",
                refusal_detail="by 8",
            )
        ],
        unreadable_processes=5,
        left_out=6,
        skeyd_workers=8,
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"candidates": [{**ONE.to_message(), "name": "a\x1b[2J"}]},
        {"candidates": [{**ONE.to_message(), "refusal": "REFUSED"}]},
    ],
)
def test_an_answer_that_is_none_is_the_workers_failure(wrong: dict[str, Any]) -> None:
    with pytest.raises(SkeydError) as caught:
        asked({**Found((ONE,), 0, 0, 0).to_message(), **wrong} if wrong else {})
    assert caught.value.reason is Reason.WORKER_FAILED
    assert "broke the protocol" in caught.value.message


# --- by name --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pid": 1, "name": "web"},
        {"pid": -1, "name": "web"},
        {"name": "a" * 256},
        {"name": "a\nb"},
        {"name": "\u202e"},
    ],
)
def test_a_vmm_has_one_pid_or_one_name(stubs: Stubs, fields: dict[str, Any]) -> None:
    found = refused(stubs, **fields)
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")


def test_a_name_that_is_nobodys_or_of_several_is_not_found(stubs: Stubs) -> None:
    with owner(1, "-name", "of-two") as one, owner(1, "-name", "guest=of-two") as other, owner(0, "-name", "of-none"):
        pids = ", ".join(map(str, sorted((one.pid, other.pid))))
        for name, said, metadata in (
            ("of-two", f"it could be any: {pids}", {"vmm_name": "of-two", "vmm_pids": pids}),
            ("of-none", "no process that has a VM is named", {"vmm_name": "of-none"}),
        ):
            found = refused(stubs, name=name)
            assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "VMM_NOT_FOUND")
            assert said in found.message
            assert found.metadata == metadata


def test_a_name_leads_to_its_process(stubs: Stubs) -> None:
    with owner(1, "-name", "guest=of-several,,1") as victim, owner(2, "-name", "guest=of-several"):
        assert "has the VMs 4, 5: name one" in refused(stubs, name="of-several").message
        name = "of-several,1"
        found = refused(stubs, name=name, start_time=1)
        assert f"process {victim.pid} was started at" in found.message
        assert found.reason == "VMM_NOT_FOUND"
        found = refused(stubs, name=name, vm_fd=0)
        assert (found.reason, found.metadata["vmm_pid"]) == ("VMM_NOT_FOUND", str(victim.pid))
        if platform.machine() != "s390x":
            before = victim.look()
            found = refused(stubs, name=name, start_time=proc.start_time(victim.pid), vm_fd=4)
            assert (found.reason, found.metadata["vmm_name"]) == ("CAP_S390_SKEYS_MISSING", name)
            assert victim.ping() == 1
            assert differences(before, victim.look()).keys() <= {"VmPeak"}
