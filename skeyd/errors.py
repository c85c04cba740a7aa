"""The errors of skeyd: stable reasons with a meaning, wherever they arise. Everybody may import this.

skeyd/rpc/status.py gives each reason its gRPC status; docs/errors.md lists both and is made from them.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Mapping
from typing import Final


class Reason(enum.Enum):
    """What went wrong: the ErrorInfo reason that clients can rely on. The value says what it means."""

    # the request
    REQUEST_INVALID = "A field is missing, malformed or out of its range; the message names it."
    VM_ID_INVALID = "A VM's id or name is not of the form that the API describes."
    RANGE_EMPTY = "A range has a count of 0."
    RANGE_OVERFLOW = "A range ends beyond 2^64."
    RANGES_NOT_ASCENDING = "Ranges overlap or are not in ascending order."
    GFN_NOT_MAPPED = "A frame is in no memory slot of the VM."
    MEMORY_INVALID = "The kernel would refuse these memory slots, or did."
    MEMORY_FILE_UNUSABLE = "A file to back memory can't be used, or the daemon was started without --memory-dir."
    # the keys
    CHUNK_OUT_OF_ORDER = "A chunk does not begin where the one before it ended, or reaches out of its range."
    CHUNK_SIZE_MISMATCH = "A chunk's count is not that of its keys."
    CHUNK_CHECKSUM_MISMATCH = "The keys of a chunk are not those that its checksum was made of."
    ENCODING_UNSUPPORTED = "A chunk's encoding is not one that this daemon knows."
    CHUNK_ENCODING_INVALID = "A chunk's data is not what its encoding makes of `count` keys."
    KEY_RESERVED_BIT = "A key has the reserved bit 0x01, which the kernel refuses."
    STREAM_INCOMPLETE = "A SetSkeys stream ended without Commit, or with Commit before its ranges were covered."
    REQUEST_ID_REUSED = "The request_id was used for another request on this VM."
    NOTHING_TO_RESUME = "There is no SetSkeys of this request_id that was cut and kept."
    EXPECTED_DIGEST_MISMATCH = "The keys are not those of the expected digest; nothing was set."
    RESULT_DIGEST_MISMATCH = "All keys were set, and they are not those of the resulting digest."
    SKEYS_NOT_ENABLED = "The guest uses no storage keys, and the request does not allow enabling them."
    KEYS_NOT_STORED = "The kernel did not keep keys that it had accepted, and not after setting them again either."
    # the VM
    VM_NOT_FOUND = "There is no such VM."
    VM_EXISTS = "The id is taken; by a dead or quarantined VM too."
    VM_BUSY = "Another call that changes this VM or its keys runs: SetSkeys, SetSkey, DeleteVm, CreateVm, and so on."
    VM_REPLACED = "The VM that a stream or a comparison began with is gone, and another has its name."
    VM_DEAD = "The VM's worker or, of an adopted VM, its VMM is gone, or the kernel has declared the VM dead."
    VM_QUARANTINED = "Something is there that skeyd can't explain; it leaves it alone."
    WORKER_LOST = "The VM's worker went away or did not answer in time, or is being started."
    WORKER_FAILED = "A worker did not start, or did what the protocol forbids."
    # the VMM of an adopted VM
    ADOPTION_FORBIDDEN = "The daemon was started without --allow-adoption."
    VMM_NOT_FOUND = "There is no such process, or it has no such VM."
    VMM_NOT_TRACEABLE = "The kernel doesn't let the worker trace the VMM."
    VMM_TRACED = "A debugger or another skeyd traces the VMM, and the kernel allows one at a time."
    VMM_SANDBOXED = "The VMM's sandbox refuses a system call; the message names it."
    VMM_MEMORY_UNKNOWN = "Where the VM has memory can't be found out, of a guest without storage keys for one; name it."
    VMM_STUCK = "The VMM's thread did not stop in time, or the call that it made did not end in time."
    VMM_UNSUITABLE = "What the VMM is, or has done, keeps calls from being made in it; the message says what."
    FREEZE_EXPIRED = "The freeze_budget passed before all keys were read; what was held goes on, and none is given."
    FREEZE_UNSUPPORTED = "The VM's worker reads no keys of one moment: it is of an earlier build, or uses QMP."
    QMP_UNREACHABLE = "Nobody listens at the QMP socket, or the worker may not connect to it."
    QMP_BUSY = "The QMP monitor says nothing in time: another client has it, or the VMM is stopped or at work."
    QMP_FAILED = "What answers at the QMP socket refused a command, or is no QMP monitor."
    BACKEND_READ_ONLY = "The VM's keys are reached over QMP, which can read them and not set them."
    # the host
    KVM_UNAVAILABLE = "/dev/kvm is missing or not for the worker's user."
    CAP_S390_SKEYS_MISSING = "The kernel has no storage-key calls: it is no s390x host, or a very old one."
    CAP_S390_KEYOP_MISSING = "The VM's kernel has no KVM_S390_KEYOP, which came with Linux 7.0."
    PGSTE_UNAVAILABLE = "KVM_CREATE_VM answered EINVAL for want of PGSTE page tables."
    KERNEL_REFUSED = "The kernel answered an ioctl with an error that has no better name; the message has it."
    OUT_OF_MEMORY = "The kernel or the host has no memory for this."
    HOST_EXHAUSTED = "The daemon or its host has no descriptors or no disk space left; the VMs are not concerned."
    # limits
    TOO_MANY_VMS = "The host has as many VMs as the daemon allows."
    TOO_MANY_STREAMS = "As many streams run as the daemon allows."
    TOO_MANY_CALLS = (
        "As many short calls or health checks run or wait as the daemon allows, or as many ListVms, ListVmCandidates "
        "or GetHost."
    )
    TOO_MANY_CALLS_ON_VM = "As many calls on this VM run, or wait for it, as one VM may have; those on others go on."


class SkeydError(Exception):
    """A failure with a reason. `metadata` has what a program may want to know of it: a gfn, a VM, a remedy."""

    def __init__(self, reason: Reason, message: str, metadata: Mapping[str, str] | None = None) -> None:
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        super().__init__(message)

    def __repr__(self) -> str:
        return f"SkeydError({self.reason.name}, {self.message!r}, {self.metadata!r})"


def reserved_bit(key: int, gfn: int) -> SkeydError:
    """Return the refusal of a byte that is no key, for a frame."""
    return SkeydError(
        Reason.KEY_RESERVED_BIT, f"key {key:#04x} of gfn {gfn:#x} has the reserved bit 0x01", {"gfn": hex(gfn)}
    )


def no_keyop() -> SkeydError:
    """Return the refusal of what only KVM_S390_KEYOP does."""
    return SkeydError(
        Reason.CAP_S390_KEYOP_MISSING,
        "this VM's kernel has no KVM_S390_KEYOP (KVM_CAP_S390_KEYOP is 0), which came with Linux 7.0; no other call "
        "does it in one step",
    )


def read_only(vm_id: str) -> SkeydError:
    """Return the refusal to set keys of a VM whose keys its VMM prints."""
    name = f"vms/{vm_id}"
    return SkeydError(
        Reason.BACKEND_READ_ONLY,
        f"the keys of {name} are reached over QMP, which can't set any; adopt it with access by injection",
        {"vm": name},
    )


_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT)


def exhausted(error: OSError) -> SkeydError | None:
    """Return what it is to callers if an OSError says that the host is short of something, else None."""
    if error.errno == errno.ENOMEM:
        return SkeydError(Reason.OUT_OF_MEMORY, str(error.strerror))
    if error.errno in _EXHAUSTED:
        return SkeydError(Reason.HOST_EXHAUSTED, str(error.strerror))
    return None
