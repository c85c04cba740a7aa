"""A daemon that writes down what it is asked for, and says of VMs what a test wants it to."""

from __future__ import annotations

from pathlib import Path

import grpc

from skeyd.v1 import vm_pb2, vm_service_pb2
from tests.client.lying_daemon import LyingDaemon


class NotingDaemon(LyingDaemon):
    """Makes every VM that it is asked for, on paper."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.created: list[vm_service_pb2.CreateVmRequest] = []
        """What CreateVm was asked."""
        self.adopted: list[vm_service_pb2.AdoptVmRequest] = []
        """What AdoptVm was asked."""
        self.candidates = vm_service_pb2.ListVmCandidatesResponse()
        """What ListVmCandidates answers."""
        self.vms: list[vm_pb2.Vm] = []
        """What ListVms answers."""

    def CreateVm(  # noqa: N802
        self, request: vm_service_pb2.CreateVmRequest, context: grpc.ServicerContext
    ) -> vm_service_pb2.CreateVmResponse:
        self.created.append(request)
        return vm_service_pb2.CreateVmResponse(vm=vm_pb2.Vm(name=f"vms/{request.vm_id}", kind=request.kind))

    def AdoptVm(  # noqa: N802
        self, request: vm_service_pb2.AdoptVmRequest, context: grpc.ServicerContext
    ) -> vm_service_pb2.AdoptVmResponse:
        self.adopted.append(request)
        vmm = vm_pb2.Vmm(pid=request.pid, name=request.name, access=request.access)
        if request.access != vm_pb2.ACCESS_QMP:
            vmm.vm_fd = request.vm_fd
        vm = vm_pb2.Vm(name=f"vms/{request.vm_id}", kind=vm_pb2.VM_KIND_ADOPTED, vmm=vmm)
        return vm_service_pb2.AdoptVmResponse(vm=vm)

    def ListVmCandidates(  # noqa: N802
        self, request: vm_service_pb2.ListVmCandidatesRequest, context: grpc.ServicerContext
    ) -> vm_service_pb2.ListVmCandidatesResponse:
        return self.candidates

    def ListVms(  # noqa: N802
        self, request: vm_service_pb2.ListVmsRequest, context: grpc.ServicerContext
    ) -> vm_service_pb2.ListVmsResponse:
        return vm_service_pb2.ListVmsResponse(vms=self.vms)

    def GetVm(  # noqa: N802
        self, request: vm_service_pb2.GetVmRequest, context: grpc.ServicerContext
    ) -> vm_service_pb2.GetVmResponse:
        return vm_service_pb2.GetVmResponse(vm=next(vm for vm in self.vms if vm.name == request.name))

    def __enter__(self) -> NotingDaemon:
        super().__enter__()
        return self
