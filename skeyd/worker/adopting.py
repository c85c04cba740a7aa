"""How a VM is adopted: whose it is, where it has memory, and which way there is to its keys."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from skeyd.errors import Reason, SkeydError
from skeyd.worker.adoption import Adoption, VmmProcess
from skeyd.worker.protocol import Spec

if TYPE_CHECKING:
    from skeyd.worker.adopted import AdoptedVm
    from skeyd.worker.dumped import DumpedVm

# What a VM doesn't need its worker doesn't load: both ways to the keys are imported where they are taken.

ADOPT_SECONDS: Final = 5.0
"""How long all may take that is asked of a QMP monitor when a VM is adopted."""


@dataclass(frozen=True, slots=True)
class _Told:
    # What is known once the monitor was asked.
    spec: Spec
    process: VmmProcess
    memory_source: str
    has_kvm: bool
    kernel: str


def adopt(spec: Spec) -> AdoptedVm | DumpedVm:
    """Reach the VM of another process in the way that the spec says. Its `release` is to be called before the end.

    SkeydErrors as of AdoptedVm; with a qmp_socket QMP's too, and VMM_UNSUITABLE where it can't tell the memory slots.
    """
    adoption = spec.adoption
    if adoption is None:
        raise SkeydError(Reason.WORKER_FAILED, "an adopted VM's spec says of no process whose it is")
    if not adoption.qmp_socket:
        return _injecting(spec)
    told = _ask(spec, adoption)
    try:
        return _reach(told, adoption)
    except SkeydError as error:
        # As AdoptedVm's.
        error.metadata.update(told.process.to_metadata())
        raise


def _reach(told: _Told, adoption: Adoption) -> AdoptedVm | DumpedVm:
    if adoption.access != "qmp":
        if not told.has_kvm:
            raise SkeydError(
                Reason.VMM_NOT_FOUND,
                "the guest runs without KVM, and so its process has no VM; its keys can be read with access qmp",
                {"remedy": "ask for access qmp"},
            )
        try:
            vm = _injecting(told.spec)
        except SkeydError as error:
            if adoption.access or error.reason is not Reason.VMM_NOT_TRACEABLE:
                raise
        else:
            vm.vmm = replace(vm.vmm, memory_source=told.memory_source)
            return vm
    from skeyd.worker.dumped import DumpedVm

    return DumpedVm(told.spec, told.process, told.memory_source, told.kernel)


def _injecting(spec: Spec) -> AdoptedVm:
    from skeyd.worker.adopted import AdoptedVm

    return AdoptedVm(spec)


def _ask(spec: Spec, adoption: Adoption) -> _Told:
    from skeyd.qmp.monitor import Monitor
    from skeyd.worker import qmp_refusals, qmp_vmm

    with qmp_refusals.told(), Monitor(adoption.qmp_socket, ADOPT_SECONDS) as monitor:
        pid, start_time = qmp_vmm.process_of(monitor, adoption.pid, adoption.start_time)
        process = VmmProcess(pid, start_time, *qmp_vmm.looks_of(pid))
        slots, source = spec.slots, "named"
        if not slots:
            slots, source = qmp_vmm.memory_slots(monitor), "qmp"
        has_kvm = qmp_vmm.has_kvm(monitor)
        kernel = os.uname().release if has_kvm else f"QEMU {monitor.version}, without KVM"
    spec = replace(spec, slots=slots, adoption=replace(adoption, pid=pid, start_time=start_time))
    return _Told(spec, process, source, has_kvm, kernel)
