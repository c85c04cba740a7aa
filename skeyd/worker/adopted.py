"""Kind "adopted": a VM that another process owns, a QEMU most often; a thread of that process makes the calls."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Final

from skeyd.errors import Reason, SkeydError, exhausted
from skeyd.gfn import GfnRange, MemoryMap
from skeyd.injection.errors import GoneError, InjectionError, NotAllowedError, TimedOutError, UnsupportedError
from skeyd.injection.target import VM_LINK, Target
from skeyd.injection.vm import ForeignVm
from skeyd.kvm import abi
from skeyd.kvm.errors import KvmError
from skeyd.worker import refusals, vmm_memory, vmm_refusals
from skeyd.worker.adoption import Adoption, Vmm, VmmProcess
from skeyd.worker.held_capture import HeldCapture
from skeyd.worker.own_capture import keyless
from skeyd.worker.packets import printable
from skeyd.worker.protocol import SLICE_KEYS, Spec, is_skeyd_worker
from skeyd.worker.slots import memory_map
from skeyd.worker.vmm_name import name_of

CLOSING_SECONDS: Final = 1.0
"""For so long an adoption that has failed tries to leave nothing."""
_CLOSING_PAUSE_SECONDS: Final = 0.05


class AdoptedVm:
    """A Backend over the real kernel, through the VM's owner. docs/injection.md has why that is never harmed.

    Each call holds one thread of the owner for the ioctl, for as long as the Spec allows at most. SkeydErrors are about
    the owner (VM_DEAD where it has ended, VMM_TRACED, VMM_SANDBOXED, …), KvmErrors about the VM, as every Backend's.
    The constructor's SkeydErrors leave nothing in the owner, but where they have the metadata "left_behind": somebody
    else had it then. `close` leaves nothing.
    """

    def __init__(self, spec: Spec) -> None:
        if spec.adoption is None:
            raise SkeydError(Reason.WORKER_FAILED, "an adopted VM's spec says of no process whose it is")
        self.kernel = os.uname().release
        process: VmmProcess | None = None
        try:
            with ExitStack() as undo, _told():
                target, process = _found(spec.adoption, undo)
                fd = _vm_fd(target, spec.adoption)
                self._vm = ForeignVm(target, fd, SLICE_KEYS, spec.adoption.hold_ms / 1000)
                undo.enter_context(_Closing(self._vm))
                if not self._vm.check_extension(abi.KVM_CAP_S390_SKEYS):
                    raise refusals.no_capability()
                self.memory_map: MemoryMap = memory_map(vmm_memory.slots(self._vm, spec.slots), "vmm")
                self.vmm = Vmm.of(process, fd, "named" if spec.slots else "probed", "injection")
                self.has_keyop = bool(self._vm.check_extension(abi.KVM_CAP_S390_KEYOP))
                self._target = target
                self._resources = undo.pop_all()
        except SkeydError as error:
            # Calls may have been made in it by now, and who was to be adopted is written down whatever came of it.
            error.metadata.update(process.to_metadata() if process else {})
            raise
        except KvmError as error:
            failed = _of_first_call(error)
            failed.metadata.update(process.to_metadata() if process else {})
            raise failed from error

    print_keys: None = None
    """Its keys are read slice by slice."""

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
            # Linux 7.0 and 7.1 give a key of a frame that has none (docs/kernel.md), and that a frame is in a slot is
            # whoever's word it was that adopted this.
            self._vm.look_at_skeys(gfn, 1)
            return self._vm.keyop(operation, gfn, key)

    def capture(
        self, frames: Sequence[GfnRange], into: memoryview, seconds: float, slice_seconds: float
    ) -> HeldCapture:
        """Read them in a process of its own, which holds all threads of the owner and lets them go at its end."""
        parts = [(one.start, one.count) for one in frames]

        def read(seconds: float) -> int:
            began = time.monotonic_ns()
            try:
                with _told(but=(TimedOutError,)):
                    uses_keys = self._vm.read_frozen(parts, into, seconds, slice_seconds)
            except KvmError as error:
                raise refusals.of_key_call(error, GfnRange(parts[0][0], parts[0][1])) from error
            if not uses_keys:
                raise keyless(frames[0])
            return time.monotonic_ns() - began

        def killed() -> None:
            # It may have left a thread in the stub, or a handler on top of one, as any tracer that is killed.
            self._target.stub_is_ours = False

        return HeldCapture(read, seconds, killed)

    def release(self) -> None:
        """Leave nothing of skeyd's in the owner. SkeydError where that can't be done now; it may be tried again."""
        with _told():
            self._vm.close()

    def close(self) -> None:
        """Let the owner go, with nothing of skeyd's in it. The VM goes on."""
        with _told():
            self._resources.close()


def _found(adoption: Adoption, undo: ExitStack) -> tuple[Target, VmmProcess]:
    # The owner, held by its pidfd.
    pid, start_time = adoption.pid, adoption.start_time
    if adoption.name:
        # Here, so that who knows the pid doesn't pay for it.
        from skeyd.worker.vmm_search import only_one_named

        pid, found_start_time = only_one_named(adoption.name)
        start_time = start_time or found_start_time
    try:
        target = undo.enter_context(Target(pid))
        if start_time not in (0, target.start_time):
            raise GoneError(pid, f"process {pid} was started at {target.start_time}")
        try:
            name = name_of(pid)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise GoneError(pid, f"process {pid} has ended") from error
        target.check()  # so the name was its own
        if adoption.name and name != adoption.name:
            raise GoneError(pid, f"process {pid} is named {name!r} now")
    except GoneError as error:
        raise SkeydError(Reason.VMM_NOT_FOUND, str(error), {"vmm_pid": str(error.pid)}) from error
    return target, VmmProcess(target.pid, target.start_time, target.uid, printable(target.executable), name)


def _vm_fd(target: Target, adoption: Adoption) -> int:
    try:
        links = target.links()
    except PermissionError as error:
        raise NotAllowedError(target.pid, f"the descriptors of process {target.pid} can't be read") from error
    if is_skeyd_worker(links.values()):
        # Two would set keys that don't know of each other.
        raise UnsupportedError(target.pid, f"process {target.pid} is a worker of skeyd: its VM is served already")
    if adoption.fd >= 0:
        return adoption.fd
    fds = sorted(fd for fd, link in links.items() if link == VM_LINK)
    if len(fds) != 1:
        which = f"the VMs {', '.join(map(str, fds))}: name one" if fds else "no VM"
        raise SkeydError(Reason.VMM_NOT_FOUND, f"process {target.pid} has {which}", {"vmm_pid": str(target.pid)})
    return fds[0]


class _Closing:
    # Closes a VM in the end. Where something else has gone wrong that is tried for a while, and what stays is said.

    def __init__(self, vm: ForeignVm) -> None:
        self._vm = vm

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = time.monotonic() + (CLOSING_SECONDS if error is not None else 0.0)
        while True:
            try:
                self._vm.close()
                return
            except InjectionError as failed:
                if time.monotonic() < end:
                    time.sleep(_CLOSING_PAUSE_SECONDS)
                    continue
                if error is None:
                    raise
                if isinstance(error, SkeydError):
                    error.metadata["left_behind"] = f"memory for calls, until the next adoption: {failed}"
                return


@contextmanager
def _told(but: tuple[type[InjectionError], ...] = ()) -> Iterator[None]:
    try:
        yield
    except but:
        raise
    except InjectionError as error:
        raise vmm_refusals.of_injection(error) from error
    except OSError as error:
        # Of looking at the process, which takes descriptors and memory here.
        failed = exhausted(error) or SkeydError(
            Reason.VMM_UNSUITABLE, f"the VM's process can't be used: {error.strerror or error}"
        )
        raise failed from error


def _of_first_call(error: KvmError) -> SkeydError:
    if error.errno == errno.EIO and error.returned is None:
        return SkeydError(
            Reason.VMM_UNSUITABLE,
            f"{error}: the VM was made by another process, which this one has the descriptor from, or it is dead; "
            "adopt the process that made it",
        )
    return SkeydError(Reason.KERNEL_REFUSED, str(error), {"errno": str(error.errno)})
