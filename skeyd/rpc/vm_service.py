"""VmService."""

from __future__ import annotations

from pathlib import Path

import grpc

from skeyd import limits
from skeyd.errors import Reason, SkeydError
from skeyd.rpc import convert
from skeyd.rpc.audit import note_vmm, noting_refused_vmm
from skeyd.rpc.calls import note
from skeyd.rpc.ending import all_hanging_up, hanging_up, require_active
from skeyd.rpc.slots import CallSlots
from skeyd.rpc.vm_candidates import list_vm_candidates
from skeyd.v1 import vm_service_pb2, vm_service_pb2_grpc
from skeyd.vms.registry import Registry


class VmService(vm_service_pb2_grpc.VmServiceServicer):
    """Create, adopt, look at, delete. Errors are raised as SkeydErrors; CallInterceptor turns them into statuses."""

    def __init__(
        self, registry: Registry, memory_dir: Path | None, short_calls: CallSlots, *, allow_adoption: bool
    ) -> None:
        self._allow_adoption = allow_adoption
        self._registry = registry
        self._short_calls = short_calls
        self._lists = CallSlots(limits.MAX_LISTS, "ListVms and ListVmCandidates", Reason.TOO_MANY_CALLS)
        self._memory_dir = memory_dir

    def CreateVm(
        self, request: vm_service_pb2.CreateVmRequest, context: grpc.ServicerContext
    ) -> vm_service_pb2.CreateVmResponse:
        """As the contract says."""
        spec = convert.spec_of(request, self._memory_dir)
        note(vm=f"vms/{spec.vm_id}")
        with self._short_calls.taken(f"vms/{spec.vm_id}"):
            vm = self._registry.create(spec)
        return vm_service_pb2.CreateVmResponse(vm=convert.vm_message(vm))

    def AdoptVm(
        self, request: vm_service_pb2.AdoptVmRequest, context: grpc.ServicerContext
    ) -> vm_service_pb2.AdoptVmResponse:
        """As the contract says."""
        self._require_adoption()
        spec = convert.adoption_spec_of(request)
        asked = {"pid": request.pid, "vmm_name": request.name, "qmp_socket": request.qmp_socket}
        note(vm=f"vms/{spec.vm_id}", **{name: value for name, value in asked.items() if value})
        with self._short_calls.taken(f"vms/{spec.vm_id}"), noting_refused_vmm():
            vm = self._registry.create(spec)
        note_vmm(vm.vmm)
        return vm_service_pb2.AdoptVmResponse(vm=convert.vm_message(vm))

    def ListVmCandidates(
        self, request: vm_service_pb2.ListVmCandidatesRequest, context: grpc.ServicerContext
    ) -> vm_service_pb2.ListVmCandidatesResponse:
        """As the contract says."""
        self._require_adoption()
        # It waits for a new process, and for all VMs.
        with (
            self._short_calls.taken("ListVmCandidates", Reason.TOO_MANY_CALLS),
            self._lists.taken(),
            all_hanging_up(context) as hang_ups,
        ):
            response = list_vm_candidates(self._registry, hang_ups)
            require_active(context)
        return response

    def GetVm(
        self, request: vm_service_pb2.GetVmRequest, context: grpc.ServicerContext
    ) -> vm_service_pb2.GetVmResponse:
        """As the contract says."""
        vm_id = convert.vm_id_of(request.name)
        note(vm=request.name)
        with self._short_calls.taken(request.name), hanging_up(context) as hang_up:
            vm = self._registry.get(vm_id, hang_up)
        return vm_service_pb2.GetVmResponse(vm=convert.vm_message(vm))

    def ListVms(
        self, request: vm_service_pb2.ListVmsRequest, context: grpc.ServicerContext
    ) -> vm_service_pb2.ListVmsResponse:
        """As the contract says."""
        # It waits for all VMs, and so for the slowest.
        with self._short_calls.taken(), self._lists.taken(), all_hanging_up(context) as hang_ups:
            vms = self._registry.list_all(hang_ups)
            require_active(context)
        note(vms=len(vms))
        return vm_service_pb2.ListVmsResponse(vms=[convert.vm_message(vm) for vm in vms])

    def DeleteVm(
        self, request: vm_service_pb2.DeleteVmRequest, context: grpc.ServicerContext
    ) -> vm_service_pb2.DeleteVmResponse:
        """As the contract says."""
        vm_id = convert.vm_id_of(request.name)
        note(vm=request.name)
        with self._short_calls.taken(request.name), hanging_up(context) as hang_up:
            self._registry.delete(vm_id, hang_up, lambda vm: note_vmm(vm.vmm))
        return vm_service_pb2.DeleteVmResponse()

    def _require_adoption(self) -> None:
        if not self._allow_adoption:
            raise SkeydError(
                Reason.ADOPTION_FORBIDDEN, "adopting VMs is off; the daemon was started without --allow-adoption"
            )
