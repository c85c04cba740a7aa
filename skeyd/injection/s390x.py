"""s390x: registers, the stub, and how an interrupted system call goes on.

The stub is the call and then rt_sigreturn, eight bytes in all, which are written in one piece. A program can't load its
PSW and its last register in one step by itself, so it is the kernel that restores. That makes of a pending
restart_syscall an EINTR (restore_sigregs()); it only comes to that where the tracer has died.
"""

from __future__ import annotations

import errno
import struct
from typing import Final

from skeyd.injection import ptrace
from skeyd.injection.registers import (
    ERESTART_RESTARTBLOCK,
    INTERRUPTED,
    NT_PRFPREG,
    NT_PRSTATUS,
    RESTARTED,
    WORD,
    Call,
    Saved,
    signed,
)

NAME: Final = "s390x"
AUDIT_ARCH: Final = 0x80000016
# arch/s390/kernel/syscalls/syscall.tbl @ v6.12
IOCTL: Final = 54
MMAP: Final = 90
MUNMAP: Final = 91
RESTART_SYSCALL: Final = 7
_RT_SIGRETURN: Final = 173
_EINTR: Final = 4

# svc 0 (the number is in r1); lghi %r1,173; svc 0
STUB: Final = bytes.fromhex("0a00 a71900ad 0a00")
AFTER_CALL: Final = 2

_NT_S390_SYSTEM_CALL: Final = 0x307
_SYSTEM_CALL_SIZE: Final = 4
_FLOATING_SIZE: Final = 136
"""s390_fp_regs: u32 fpc, u32 pad, 16 registers of 8 bytes."""

# s390_regs, arch/s390/include/uapi/asm/ptrace.h @ v6.12: psw (mask, address), gprs, acrs, orig_gpr2
_GENERAL: Final = struct.Struct("=2Q16Q64sQ")
_ACCESS, _ORIG_GPR2 = 18, 19

# struct rt_sigframe, arch/s390/kernel/signal.c @ v6.12: callee_used_stack, svc_insn and its padding, siginfo
_FRAME_HEAD: Final = 160 + 8 + 128
# struct ucontext_extended: uc_flags, uc_link, uc_stack, _sigregs (psw, gprs, acrs, fp), sigmask, and room to grow
_UC_HEAD: Final = struct.Struct("=QQQi4xQ")
_SIGREGS: Final = struct.Struct("=2Q16Q64s")
_MASK_ROOM: Final = 128
_NO_STACK_FLAGS: Final = 7
"""No valid ss_flags, so that rt_sigreturn leaves the alternate stack as it is."""
# _sigregs_ext: the right halves of v0 to v15, v16 to v31, and room to grow. rt_sigreturn takes the vector registers
# from there whatever uc_flags says (restore_sigregs_ext()).
_NT_S390_VXRS_LOW, _NT_S390_VXRS_HIGH = 0x309, 0x30A
_VECTORS_LOW_SIZE: Final = 16 * 8
_VECTORS_HIGH_SIZE: Final = 16 * 16
_VECTORS_ROOM: Final = _VECTORS_LOW_SIZE + _VECTORS_HIGH_SIZE + 128
_SIZE: Final = _FRAME_HEAD + _UC_HEAD.size + _SIGREGS.size + _FLOATING_SIZE + _MASK_ROOM + _VECTORS_ROOM


def why_not(pid: int) -> str | None:
    """Nothing is known to be in the way."""
    del pid
    return None


def capture(tid: int) -> Saved:
    """Read everything that rt_sigreturn sets. OSError; ValueError: no 64-bit thread."""
    general = ptrace.get_regset(tid, NT_PRSTATUS, _GENERAL.size)
    if len(general) != _GENERAL.size:
        raise ValueError("it runs 31-bit code")
    return Saved(
        general,
        ptrace.get_regset(tid, _NT_S390_SYSTEM_CALL, _SYSTEM_CALL_SIZE),
        ptrace.get_regset(tid, NT_PRFPREG, _FLOATING_SIZE),
        ptrace.get_sigmask(tid),
        _vectors(tid),
    )


def _vectors(tid: int) -> bytes:
    try:
        low = ptrace.get_regset(tid, _NT_S390_VXRS_LOW, _VECTORS_LOW_SIZE)
        return low + ptrace.get_regset(tid, _NT_S390_VXRS_HIGH, _VECTORS_HIGH_SIZE)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return b""  # a machine without them, on which rt_sigreturn sets none


def block(saved: Saved) -> tuple[int, bytes]:
    """Return where the signal frame goes, and the frame."""
    values = list(_GENERAL.unpack(saved.general))
    mask_and_address, gprs = values[:2], values[2:18]
    result = signed(gprs[2])
    if saved.system_call != bytes(_SYSTEM_CALL_SIZE):
        if result in RESTARTED:
            mask_and_address[1] -= _instruction_length(saved.system_call)
            gprs[2] = values[_ORIG_GPR2]
        elif result == -ERESTART_RESTARTBLOCK:
            gprs[2] = -_EINTR & WORD
    content = b"".join(
        (
            bytes(_FRAME_HEAD),
            _UC_HEAD.pack(0, 0, 0, _NO_STACK_FLAGS, 0),
            _SIGREGS.pack(*mask_and_address, *gprs, values[_ACCESS]),
            saved.floating,
            saved.mask.ljust(_MASK_ROOM, b"\0"),
            saved.vectors.ljust(_VECTORS_ROOM, b"\0"),
        )
    )
    return (gprs[15] - len(content)) & ~7, content


def _instruction_length(system_call: bytes) -> int:
    # int_code: the instruction's length in its upper half.
    length: int = struct.unpack("=I", system_call)[0] >> 16
    return length or 2


def enter(tid: int, saved: Saved, stub: int, block: int, call: Call) -> None:
    """Set the registers for a call. The kernel restarts none: r2 has no more what asks for it.

    ValueError: its first argument would ask for it.
    """
    values = list(_GENERAL.unpack(saved.general))
    gprs = values[2:18]
    arguments = [value & WORD for value in call.arguments] + [0] * (6 - len(call.arguments))
    if signed(arguments[0]) in INTERRUPTED:
        raise ValueError(f"{arguments[0]:#x} can't be the first argument of a call")
    gprs[1], gprs[2:8], gprs[15] = call.number, arguments, block
    general = _GENERAL.pack(values[0], stub, *gprs, values[_ACCESS], 0)
    ptrace.set_regset(tid, NT_PRSTATUS, general)


def restore(tid: int, saved: Saved) -> None:
    """Set which system call it was, which alone changes nothing while r2 has a result, and then all registers."""
    ptrace.set_regset(tid, _NT_S390_SYSTEM_CALL, saved.system_call)
    ptrace.set_regset(tid, NT_PRSTATUS, saved.general)


def rescue(tid: int, block: bytes) -> None:
    """Set the registers to what rt_sigreturn would have set."""
    general = block[_FRAME_HEAD + _UC_HEAD.size :][: _SIGREGS.size]
    ptrace.set_regset(tid, _NT_S390_SYSTEM_CALL, bytes(_SYSTEM_CALL_SIZE))
    ptrace.set_regset(tid, NT_PRSTATUS, general + bytes(8))


def place(tid: int) -> tuple[int, int]:
    """Return the PSW's address and r15."""
    values = _GENERAL.unpack(ptrace.get_regset(tid, NT_PRSTATUS, _GENERAL.size))
    return values[1], values[2 + 15]


def is_interrupted(tid: int) -> bool:
    """Look at the system call's number and r2."""
    values = _GENERAL.unpack(ptrace.get_regset(tid, NT_PRSTATUS, _GENERAL.size))
    system_call = ptrace.get_regset(tid, _NT_S390_SYSTEM_CALL, _SYSTEM_CALL_SIZE)
    return system_call != bytes(_SYSTEM_CALL_SIZE) and signed(values[2 + 2]) in INTERRUPTED


def mmap(address: int, size: int, protection: int, flags: int) -> Call:
    """One argument: the address of the six, in the part of the frame that is for callees."""
    return Call("mmap", MMAP, (), struct.pack("=6Q", address, size, protection, flags, WORD, 0))


def block_size() -> int:
    """Bytes of a frame."""
    return _SIZE
