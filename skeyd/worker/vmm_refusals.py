"""What keeps calls from being made in a VMM, as skeyd's reasons. By itself: only an adopted VM's worker loads it."""

from __future__ import annotations

import errno
from typing import Final

from skeyd.errors import Reason, SkeydError
from skeyd.injection.errors import (
    AlreadyTracedError,
    GoneError,
    InjectionError,
    InUseError,
    NotAllowedError,
    NoVmError,
    RefusedError,
    TimedOutError,
)

TRACE_REMEDY: Final = "give the worker CAP_SYS_PTRACE"


def of_injection(error: InjectionError) -> SkeydError:
    """Say what it means that a VMM, or a thread of it, could not be made to call."""
    where = {"vmm_pid": str(error.pid)}
    match error:
        case GoneError():
            return SkeydError(Reason.VM_DEAD, f"the VM's VMM is gone: {error}", where)
        case NoVmError():
            return SkeydError(Reason.VMM_NOT_FOUND, str(error), where)
        case AlreadyTracedError() | InUseError():
            return SkeydError(Reason.VMM_TRACED, str(error), where)
        case NotAllowedError():
            return SkeydError(Reason.VMM_NOT_TRACEABLE, f"{error}; {TRACE_REMEDY}", {**where, "remedy": TRACE_REMEDY})
        # EAGAIN is mmap's where a process that locks all its memory may lock no more.
        case RefusedError(errno=errno.ENOMEM | errno.EAGAIN):
            return SkeydError(Reason.OUT_OF_MEMORY, str(error), where)
        case RefusedError():
            return SkeydError(Reason.VMM_SANDBOXED, str(error), {**where, "system_call": error.call})
        case TimedOutError():
            return SkeydError(Reason.VMM_STUCK, str(error), where)
    return SkeydError(Reason.VMM_UNSUITABLE, str(error), where)
