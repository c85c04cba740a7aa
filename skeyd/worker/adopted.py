"""Kind "adopted": a VM that another process owns, a QEMU most often; a thread of that process makes the calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import MemoryMap
from skeyd.injection.errors import GoneError, InjectionError, NotAllowedError
from skeyd.injection.target import Target
from skeyd.injection.vm import ForeignVm
from skeyd.kvm import abi
from skeyd.worker import refusals, vmm_refusals
from skeyd.worker.adoption import Vmm
from skeyd.worker.packets import printable
from skeyd.worker.protocol import SLICE_KEYS, Spec
from skeyd.worker.slots import memory_map


class AdoptedVm:
    """A Backend over the real kernel, through the VM's owner. docs/injection.md has why that is never harmed.

    Each call holds one thread of the owner for the ioctl, for as long as the Spec allows at most. SkeydErrors are about
    the owner (VM_DEAD where it has ended, VMM_TRACED, VMM_SANDBOXED, …), KvmErrors about the VM, as every Backend's.
    The constructor's SkeydErrors leave nothing in the owner, nor does `close`.
    """

    def __init__(self, spec: Spec) -> None:
        if spec.adoption is None:
            raise SkeydError(Reason.WORKER_FAILED, "an adopted VM's spec says of no process whose it is")
        self.kernel = os.uname().release
        self.memory_map: MemoryMap = memory_map(spec.slots, "vmm")
        with ExitStack() as undo, _told():
            try:
                target = undo.enter_context(Target(spec.adoption.pid))
                if spec.adoption.start_time not in (0, target.start_time):
                    raise GoneError(target.pid, f"process {target.pid} was started at {target.start_time}")
            except GoneError as error:
                raise SkeydError(Reason.VMM_NOT_FOUND, str(error), {"vmm_pid": str(error.pid)}) from error
            fd = spec.adoption.fd if spec.adoption.fd >= 0 else _only_vm(target)
            self._vm = undo.enter_context(ForeignVm(target, fd, SLICE_KEYS, spec.adoption.hold_ms / 1000))
            self.vmm = Vmm(target.pid, target.start_time, target.uid, printable(target.executable), fd)
            if not self._vm.check_extension(abi.KVM_CAP_S390_SKEYS):
                raise refusals.no_capability()
            self.has_keyop = bool(self._vm.check_extension(abi.KVM_CAP_S390_KEYOP))
            self._target = target
            self._resources = undo.pop_all()

    snapshot: Callable[[], None] | None = None
    """A running guest's keys are read slice by slice."""

    def fileno(self) -> int:
        """Return a descriptor that is readable once the owner has ended; it stays this object's."""
        return self._target.fileno()

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """As the ioctl."""
        with _told():
            return self._vm.get_skeys(start_gfn, buffer)

    def prepare_set(self, start_gfn: int, keys: bytes | bytearray) -> None:
        """Do nothing: the page tables are the owner's, and what is lost is set again."""

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
        """As the ioctl."""
        with _told():
            self._vm.set_skeys(start_gfn, buffer)

    def keyop(self, operation: int, gfn: int, key: int = 0) -> int:
        """As the ioctl."""
        with _told():
            return self._vm.keyop(operation, gfn, key)

    def release(self) -> None:
        """Leave nothing of skeyd's in the owner. SkeydError where that can't be done now; it may be tried again."""
        with _told():
            self._vm.close()

    def close(self) -> None:
        """Let the owner go, with nothing of skeyd's in it. The VM goes on."""
        with _told():
            self._resources.close()


def _only_vm(target: Target) -> int:
    try:
        fds = target.vm_fds()
    except PermissionError as error:
        raise NotAllowedError(target.pid, f"the descriptors of process {target.pid} can't be read") from error
    if len(fds) != 1:
        which = f"the VMs {', '.join(map(str, fds))}: name one" if fds else "no VM"
        raise SkeydError(Reason.VMM_NOT_FOUND, f"process {target.pid} has {which}", {"vmm_pid": str(target.pid)})
    return fds[0]


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except InjectionError as error:
        raise vmm_refusals.of_injection(error) from error
