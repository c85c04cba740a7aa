"""What can go wrong when another process is to make a call. None of them leaves it changed, but where it says so."""

from __future__ import annotations

import errno as errno_names
import os


def describe(number: int) -> str:
    """Return an errno's name and what it means."""
    return f"{errno_names.errorcode.get(number, str(number))} ({os.strerror(number)})"


class InjectionError(Exception):
    """Nothing was or can be done in a process. `pid` is the process or thread that it is about."""

    def __init__(self, pid: int, message: str) -> None:
        self.pid = pid
        super().__init__(message)


class GoneError(InjectionError):
    """The process or the thread has ended, or another has its number by now."""


class AlreadyTracedError(InjectionError):
    """Another process traces it: a debugger, or another skeyd. `tracer` is its pid; 0: it is gone meanwhile."""

    def __init__(self, pid: int, tracer: int) -> None:
        self.tracer = tracer
        super().__init__(pid, f"{pid} is traced by process {tracer} already, and has one tracer only")


class InUseError(InjectionError):
    """Another skeyd, which is alive, has memory in the process. `owner` is its pid."""

    def __init__(self, pid: int, owner: int) -> None:
        self.owner = owner & 0xFFFFFFFF
        super().__init__(pid, f"process {pid} is used by process {self.owner} already")


class NotAllowedError(InjectionError):
    """The kernel allows this process no tracing of it."""


class TimedOutError(InjectionError):
    """It took longer than it may. The thread has been let go as it was, as soon as it could be stopped."""


class RefusedError(InjectionError):
    """A system call that was made in the process failed. `call` is its name, `errno` what it answered.

    A sandbox (seccomp) answers EPERM, ENOSYS or what it likes, and `by_seccomp` is None where that can't be told from
    the kernel's own answer; True where it raised SIGSYS, which the thread was not given.
    """

    def __init__(self, pid: int, call: str, errno: int, by_seccomp: bool | None = None) -> None:
        self.call = call
        self.errno = errno
        self.by_seccomp = by_seccomp
        if by_seccomp:
            message = f"the sandbox (seccomp) of {pid} forbids the system call {call}"
        else:
            message = f"{call} in process {pid} answered {describe(errno)}"
            if errno in (errno_names.EPERM, errno_names.ENOSYS):
                message += "; its sandbox (seccomp) may be what forbids it"
        super().__init__(pid, message)


class UnsupportedError(InjectionError):
    """This machine, or what the process is made of, is nothing that can be handled without harm."""


class NoVmError(InjectionError):
    """A descriptor of the process is no KVM VM, or not any more. `fd` is its number."""

    def __init__(self, pid: int, fd: int) -> None:
        self.fd = fd
        super().__init__(pid, f"descriptor {fd} of process {pid} is no KVM VM")


class BufferLostError(InjectionError):
    """The process has unmapped the memory that its calls read and write."""


class FaultedError(InjectionError):
    """The thread faulted while it was ours. The signal was kept from it, and it was put back as it was."""
