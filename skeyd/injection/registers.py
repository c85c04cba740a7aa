"""A thread's registers as they are kept and compared, and the numbers of the kernel's that they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# include/linux/errno.h @ v6.12: what an interrupted system call "returns", for the kernel and tracers to see only
ERESTARTSYS: Final = 512
ERESTARTNOINTR: Final = 513
ERESTARTNOHAND: Final = 514
ERESTART_RESTARTBLOCK: Final = 516

RESTARTED: Final = frozenset((-ERESTARTSYS, -ERESTARTNOINTR, -ERESTARTNOHAND))
"""Where no handler runs, the call is made again with the same arguments."""
INTERRUPTED: Final = RESTARTED | {-ERESTART_RESTARTBLOCK}
"""The last is gone on with by restart_syscall, which knows how much time is left."""

NT_PRSTATUS: Final = 1
NT_PRFPREG: Final = 2
"""include/uapi/linux/elf.h @ v6.12."""

WORD: Final = (1 << 64) - 1


def signed(value: int) -> int:
    """Return a register as a signed number."""
    return value - (1 << 64) if value >> 63 else value


@dataclass(frozen=True, slots=True)
class Saved:
    """What a thread had when it was stopped, as the kernel's register sets."""

    general: bytes
    system_call: bytes = b""
    """s390x: NT_S390_SYSTEM_CALL."""
    floating: bytes = b""
    """s390x: NT_PRFPREG. On x86_64 nothing touches them."""
    mask: bytes = b""
    """s390x: the signals that it blocks."""
    vectors: bytes = b""
    """s390x: what NT_PRFPREG leaves out of the vector registers; empty where the machine has none."""


@dataclass(frozen=True, slots=True)
class Call:
    """A system call: its name for errors, its number, and up to six arguments, each a 64-bit register."""

    name: str
    number: int
    arguments: tuple[int, ...]
    in_block: bytes = b""
    """What the call reads from memory, if it does: it is written to the block's beginning each time that the call is
    made, and its address there is the one argument."""
