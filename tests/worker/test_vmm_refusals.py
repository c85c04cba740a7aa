"""What keeps a VMM's thread from making calls, told as one of skeyd's reasons."""

from __future__ import annotations

import errno

import pytest

from skeyd.errors import Reason
from skeyd.injection.errors import (
    AlreadyTracedError,
    BufferLostError,
    FaultedError,
    GoneError,
    InjectionError,
    InUseError,
    NotAllowedError,
    NoVmError,
    RefusedError,
    TimedOutError,
    UnsupportedError,
)
from skeyd.worker.vmm_refusals import TRACE_REMEDY, of_injection


@pytest.mark.parametrize(
    ("error", "reason", "more"),
    [
        (GoneError(5, "gone"), Reason.VM_DEAD, {}),
        (NoVmError(5, 9), Reason.VMM_NOT_FOUND, {}),
        (AlreadyTracedError(5, 6), Reason.VMM_TRACED, {}),
        (InUseError(5, 6), Reason.VMM_TRACED, {}),
        (NotAllowedError(5, "no"), Reason.VMM_NOT_TRACEABLE, {"remedy": TRACE_REMEDY}),
        (RefusedError(5, "mmap", errno.ENOMEM), Reason.OUT_OF_MEMORY, {}),
        (RefusedError(5, "mmap", errno.EAGAIN), Reason.OUT_OF_MEMORY, {}),
        (RefusedError(5, "mmap", errno.EPERM), Reason.VMM_SANDBOXED, {"system_call": "mmap"}),
        (RefusedError(5, "ioctl", errno.ENOSYS, by_seccomp=True), Reason.VMM_SANDBOXED, {"system_call": "ioctl"}),
        (TimedOutError(5, "late"), Reason.VMM_STUCK, {}),
        (BufferLostError(5, "lost"), Reason.VMM_UNSUITABLE, {}),
        (FaultedError(5, "SIGSEGV"), Reason.VMM_UNSUITABLE, {}),
        (UnsupportedError(5, "no room"), Reason.VMM_UNSUITABLE, {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, InjectionError) else None,
)
def test_each_has_its_reason_and_says_whose_process_it_was(
    error: InjectionError, reason: Reason, more: dict[str, str]
) -> None:
    told = of_injection(error)
    assert (told.reason, told.metadata) == (reason, {"vmm_pid": "5", **more})
    assert str(error) in told.message
