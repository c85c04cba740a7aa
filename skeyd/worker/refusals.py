"""From the kernel's refusals to skeyd's reasons: one place, so that nobody else interprets an errno."""

from __future__ import annotations

import errno

from skeyd.errors import Reason, SkeydError, no_keyop
from skeyd.gfn import GfnRange
from skeyd.kvm import abi, probe
from skeyd.kvm.errors import KvmError


def of_key_call(error: KvmError, frames: GfnRange) -> SkeydError:
    """Say what it means that GET, SET or KEYOP of these frames, all of them in memory slots, was refused."""
    where = {"gfn": hex(frames.start), "count": str(frames.count), "errno": str(error.errno)}
    match error.errno:
        case errno.EFAULT:
            return SkeydError(Reason.GFN_NOT_MAPPED, f"{error}: a frame of {frames} has no memory behind it", where)
        case errno.EIO if error.returned is None:
            # The other EIO, "another process's VM", can't be: this process created the VM and never execs or forks.
            return SkeydError(Reason.VM_DEAD, f"{error}: the kernel has declared the VM dead", where)
        case errno.ENOMEM:
            return SkeydError(Reason.OUT_OF_MEMORY, f"{error} for {frames}", where)
        case errno.ENOTTY if error.ioctl == abi.NAMES[abi.KVM_S390_KEYOP]:
            return no_keyop()
        case errno.ENOTTY:
            return SkeydError(Reason.CAP_S390_SKEYS_MISSING, f"{error}: this kernel has no storage-key calls", where)
    return SkeydError(Reason.KERNEL_REFUSED, f"{error} for {frames}", where)


def of_opening_kvm(error: OSError | KvmError) -> SkeydError:
    """Say what it means that /dev/kvm could not be opened, or is no KVM device."""
    remedy = {
        errno.ENOENT: "load KVM (modprobe kvm)",
        errno.EACCES: "let the worker's user use it (group kvm)",
    }.get(error.errno or 0, "")
    said = str(error) if isinstance(error, KvmError) else error.strerror
    return SkeydError(
        Reason.KVM_UNAVAILABLE,
        f"/dev/kvm: {said}" + (f"; {remedy}" if remedy else ""),
        {"errno": str(error.errno), "remedy": remedy},
    )


def no_capability() -> SkeydError:
    """Say that KVM_CHECK_EXTENSION denied the storage-key calls."""
    return SkeydError(
        Reason.CAP_S390_SKEYS_MISSING,
        "this kernel's KVM has no storage-key calls (KVM_CAP_S390_SKEYS is 0): only simulated VMs can be created here",
        {"remedy": "use an IBM Z or LinuxONE host, or a VM of kind simulated"},
    )


def of_create_vm(error: KvmError) -> SkeydError:
    """Say what it means that KVM_CREATE_VM was refused on a host with the capability."""
    if error.errno == errno.EINVAL:
        return SkeydError(
            Reason.PGSTE_UNAVAILABLE,
            f"{error}: up to Linux 6.19 the worker needs PGSTE page tables; {probe.PGSTE_REMEDY}",
            {"remedy": probe.PGSTE_REMEDY},
        )
    if error.errno == errno.ENOMEM:
        return SkeydError(Reason.OUT_OF_MEMORY, str(error))
    return SkeydError(Reason.KERNEL_REFUSED, str(error), {"errno": str(error.errno)})


def of_memory(error: KvmError | OSError | ValueError, slot: int, is_file: bool) -> SkeydError:
    """Say what it means that a slot's memory could not be had, or not be given to the VM."""
    where = {"slot": str(slot)}
    if isinstance(error, KvmError):
        reason = Reason.OUT_OF_MEMORY if error.errno == errno.ENOMEM else Reason.MEMORY_INVALID
        return SkeydError(reason, f"memory slot {slot}: {error}", where)
    if is_file and not (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        said = error.strerror if isinstance(error, OSError) else str(error)
        return SkeydError(Reason.MEMORY_FILE_UNUSABLE, f"memory slot {slot}: {said}", where)
    if isinstance(error, OSError):
        return SkeydError(Reason.OUT_OF_MEMORY, f"memory slot {slot}: {error.strerror}", where)
    return SkeydError(Reason.MEMORY_INVALID, f"memory slot {slot}: {error}", where)
