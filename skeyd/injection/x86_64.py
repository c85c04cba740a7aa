"""x86_64: registers, the stub, and how an interrupted system call goes on.

The stub makes the call, pops nine registers and ends in IRETQ, which takes rip, flags and rsp from the stack in one
step and needs no kernel. rt_sigreturn would do for the registers, and not for the rest: it has a pending
restart_syscall return EINTR (restore_sigcontext() in arch/x86/kernel/signal_64.c @ v6.12), and sets all of the FPU's
state from its frame. Here nothing touches the FPU: the kernel's calls leave it alone, and so does the stub.
"""

from __future__ import annotations

import struct
from typing import Final

from skeyd.injection import ptrace
from skeyd.injection.registers import (
    INTERRUPTED,
    NT_PRSTATUS,
    RESTARTED,
    WORD,
    Call,
    Saved,
    signed,
)

NAME: Final = "x86_64"
AUDIT_ARCH: Final = 0xC000003E
# arch/x86/entry/syscalls/syscall_64.tbl @ v6.12
MMAP: Final = 9
MUNMAP: Final = 11
IOCTL: Final = 16
RESTART_SYSCALL: Final = 219

# syscall; pop r9, r8, r10, rdx, rsi, rdi, r11, rcx, rax; iretq
STUB: Final = bytes.fromhex("0f05 4159 4158 415a 5a 5e 5f 415b 59 58 48cf").ljust(24, b"\0")
AFTER_CALL: Final = 2

_POPPED: Final = ("r9", "r8", "r10", "rdx", "rsi", "rdi", "r11", "rcx", "rax", "rip", "cs", "eflags", "rsp", "ss")
_ARGUMENTS: Final = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
_BLOCK: Final = struct.Struct(f"={len(_POPPED)}Q")

_RED_ZONE: Final = 128
"""Bytes below rsp that a function may use without saying so (System V ABI, AMD64 supplement)."""

# struct user_regs_struct: arch/x86/include/asm/user_64.h @ v6.12
_NAMES: Final = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
_GENERAL: Final = struct.Struct(f"={len(_NAMES)}Q")

_USER_CS: Final = 0x33
"""__USER_CS: 64-bit code."""
_PLAIN_FLAGS: Final = 0x202
"""Interrupts on, direction forward, nothing else; IRETQ faults where the flag NT is set."""


def why_not(pid: int) -> str | None:
    """Shadow stacks: IRETQ would find none of its return on them, and raise a fault that kills the process."""
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        features = next((line for line in file if line.startswith("x86_Thread_features:")), "")
    return "it uses shadow stacks (CET)" if "shstk" in features.split() else None


def _unpack(general: bytes) -> dict[str, int]:
    return dict(zip(_NAMES, _GENERAL.unpack(general), strict=True))


def capture(tid: int) -> Saved:
    """Read the general registers. OSError; ValueError: the thread runs 32-bit code."""
    general = ptrace.get_regset(tid, NT_PRSTATUS, _GENERAL.size)
    if len(general) != _GENERAL.size or _unpack(general)["cs"] != _USER_CS:
        raise ValueError("it runs 32-bit code")
    return Saved(general)


def block(saved: Saved) -> tuple[int, bytes]:
    """Return where the block goes, and what the stub pops."""
    registers = _unpack(saved.general)
    # The kernel decides this by what it finds; a thread that restores itself has to bring the outcome along.
    if signed(registers["orig_rax"]) >= 0 and signed(registers["rax"]) in INTERRUPTED:
        again = signed(registers["rax"]) in RESTARTED
        registers["rax"] = registers["orig_rax"] if again else RESTART_SYSCALL
        registers["rip"] -= 2
    content = _BLOCK.pack(*(registers[name] for name in _POPPED))
    return (registers["rsp"] - _RED_ZONE - len(content)) & ~15, content


def enter(tid: int, saved: Saved, stub: int, block: int, call: Call) -> None:
    """Set the registers for a call."""
    registers = _unpack(saved.general)
    registers |= {name: value & WORD for name, value in zip(_ARGUMENTS, call.arguments, strict=False)}
    # orig_rax -1: the thread is in no system call, so the kernel restarts none when it goes on from here.
    registers |= {"rax": call.number, "orig_rax": WORD, "rip": stub, "rsp": block, "eflags": _PLAIN_FLAGS}
    _set(tid, registers)


def restore(tid: int, saved: Saved) -> None:
    """Set all registers, orig_rax among them, by which the kernel knows what to restart."""
    ptrace.set_regset(tid, NT_PRSTATUS, saved.general)


def rescue(tid: int, block: bytes) -> None:
    """Set the registers to what the stub would have popped. Its others are still the thread's own."""
    registers = _unpack(ptrace.get_regset(tid, NT_PRSTATUS, _GENERAL.size))
    registers |= dict(zip(_POPPED, _BLOCK.unpack(block), strict=True))
    registers["orig_rax"] = WORD
    _set(tid, registers)


def place(tid: int) -> tuple[int, int]:
    """Return rip and rsp."""
    registers = _unpack(ptrace.get_regset(tid, NT_PRSTATUS, _GENERAL.size))
    return registers["rip"], registers["rsp"]


def is_interrupted(tid: int) -> bool:
    """Look at orig_rax and rax."""
    registers = _unpack(ptrace.get_regset(tid, NT_PRSTATUS, _GENERAL.size))
    return signed(registers["orig_rax"]) >= 0 and signed(registers["rax"]) in INTERRUPTED


def mmap(address: int, size: int, protection: int, flags: int) -> Call:
    """Six arguments in registers."""
    return Call("mmap", MMAP, (address, size, protection, flags, WORD, 0))


def block_size() -> int:
    """Bytes of a block."""
    return _BLOCK.size


def _set(tid: int, registers: dict[str, int]) -> None:
    ptrace.set_regset(tid, NT_PRSTATUS, _GENERAL.pack(*(registers[name] for name in _NAMES)))
