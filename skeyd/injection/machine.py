"""What differs from one architecture to the next, and which one this is."""

from __future__ import annotations

import os
from typing import Final, Protocol

from skeyd.injection import s390x, x86_64
from skeyd.injection.registers import Call, Saved


class Machine(Protocol):
    """An architecture. Its functions that take a tid want a thread that is stopped and traced by this one."""

    NAME: str
    AUDIT_ARCH: int
    """Of its native system calls, as PTRACE_GET_SYSCALL_INFO tells it."""
    STUB: bytes
    """Code, whole words of 8 bytes: one system call, and then the thread has its registers from the block again.

    It has no data and no addresses in it, so that it is the same everywhere and any number of threads may be in it.
    """
    AFTER_CALL: int
    """Where in the stub the system call returns to."""
    IOCTL: int
    MUNMAP: int
    RESTART_SYSCALL: int
    """What goes on with a call that was interrupted, where the kernel knows how."""

    def why_not(self, pid: int) -> str | None:
        """Say why processes like this one can't be made to call without harm, or None."""

    def capture(self, tid: int) -> Saved:
        """Read all that the thread is given back afterwards. OSError."""

    def block(self, saved: Saved) -> tuple[int, bytes]:
        """Return where below the thread's stack the block goes, and the block."""

    def enter(self, tid: int, saved: Saved, stub: int, block: int, call: Call) -> None:
        """Have the thread make a call, as soon as it goes on, and then restore itself. One request: all or nothing."""

    def restore(self, tid: int, saved: Saved) -> None:
        """Give a thread back its registers, so that the kernel sees what it saw and restarts what it interrupted.

        For a thread that is stopped where signals are delivered, not at a system call. The last request changes all.
        """

    def rescue(self, tid: int, block: bytes) -> None:
        """Do what the stub would: for a thread that a killed tracer left in a call that was interrupted."""

    def place(self, tid: int) -> tuple[int, int]:
        """Return the addresses of the instruction that comes next, and of the stack."""

    def is_interrupted(self, tid: int) -> bool:
        """Whether the thread is stopped in a system call that the kernel would make again."""

    def block_size(self) -> int:
        """Bytes of a block."""

    def mmap(self, address: int, size: int, protection: int, flags: int) -> Call:
        """Return the call that maps private anonymous memory."""


MACHINES: Final[dict[str, Machine]] = {x86_64.NAME: x86_64, s390x.NAME: s390x}


def this_machine() -> Machine | None:
    """Return the machine that this process runs on, or None: none that is known."""
    return MACHINES.get(os.uname().machine)
