"""ListVmCandidates: which processes have VMs that could be adopted, and as which VMs they were already."""

from __future__ import annotations

from skeyd.errors import Reason, SkeydError
from skeyd.rpc.calls import note
from skeyd.v1 import vm_service_pb2 as pb
from skeyd.vms.hang_up import HangUps
from skeyd.vms.registry import Registry
from skeyd.vms.vm import VmState
from skeyd.worker.candidates import Candidate
from skeyd.worker.packets import ProtocolError


def list_vm_candidates(registry: Registry, hang_ups: HangUps) -> pb.ListVmCandidatesResponse:
    """Look at all processes and all VMs. WORKER_FAILED."""
    try:
        found = registry.find_candidates()
    except ProtocolError as error:
        raise SkeydError(Reason.WORKER_FAILED, f"the search for VMs broke the protocol: {error}") from error
    # Of a VM that is dead nobody is left in the process.
    adopted = {
        (vm.vmm.pid, vm.vmm.start_time): f"vms/{vm.vm_id}"
        for vm in registry.list_all(hang_ups)
        if vm.vmm is not None and vm.state is not VmState.DEAD
    }
    note(candidates=len(found.candidates), unreadable=found.unreadable)
    return pb.ListVmCandidatesResponse(
        candidates=[_message(one, adopted.get((one.pid, one.start_time), "")) for one in found.candidates],
        unreadable_processes=found.unreadable,
        left_out=found.left_out,
        skeyd_workers=found.workers,
    )


def _message(candidate: Candidate, adopted_as: str) -> pb.VmCandidate:
    return pb.VmCandidate(
        pid=candidate.pid,
        start_time=candidate.start_time,
        uid=candidate.uid,
        executable=candidate.executable,
        name=candidate.name,
        vm_fds=candidate.vm_fds,
        vcpu_fds=candidate.vcpus,
        mapped_bytes=candidate.mapped,
        resident_bytes=candidate.resident,
        adopted_as=adopted_as,
        refusal=candidate.refusal,
        refusal_detail=candidate.refusal_detail,
    )
