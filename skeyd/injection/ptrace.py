"""The requests of ptrace that skeyd makes, one function each. Nothing is decided here.

All of them are for the thread that has attached, which is the thread of this process, and not the process, that seized
it. Each raises OSError with the kernel's errno; ESRCH: there is no such thread, or it is not stopped, or not ours.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from dataclasses import dataclass
from typing import Final

# include/uapi/linux/ptrace.h @ v6.12, and arch/{x86,s390}/include/uapi/asm, which agree in all of these
_POKEDATA: Final = 5
_CONT: Final = 7
_DETACH: Final = 17
_SYSCALL: Final = 24
_GETSIGINFO: Final = 0x4202
_GETREGSET: Final = 0x4204
_SETREGSET: Final = 0x4205
_SEIZE: Final = 0x4206
_INTERRUPT: Final = 0x4207
_GETSIGMASK: Final = 0x420A
_GET_SYSCALL_INFO: Final = 0x420E

O_TRACESYSGOOD: Final = 1
"""Stops at system calls are told apart from a SIGTRAP. There is no PTRACE_O_EXITKILL here: it would kill a VMM."""
O_TRACEEXEC: Final = 16
"""A thread stops when it has executed another program."""

EVENT_EXEC: Final = 4
EVENT_STOP: Final = 128

SIGSET_SIZE: Final = 8
"""Bytes of the kernel's sigset_t."""

SYSCALL_INFO_ENTRY: Final = 1
SYSCALL_INFO_EXIT: Final = 2

_SYSCALL_INFO: Final = struct.Struct("=B3xIQQ")
_ENTRY: Final = struct.Struct("=7Q")
_SYSCALL_INFO_SIZE: Final = 88

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@dataclass(frozen=True, slots=True)
class SyscallInfo:
    """Where in a system call a thread is stopped: struct ptrace_syscall_info's op, arch, and of an exit the result."""

    op: int
    arch: int
    """AUDIT_ARCH_*: whose system calls it makes."""
    result: int
    """At an exit: what the call returned, an errno as a negative number. Otherwise 0."""
    number: int = -1
    """At an entry: which call it is."""
    arguments: tuple[int, ...] = ()
    """At an entry: all six registers."""


def request(number: int, tid: int, address: int | None = None, data: int | None = None) -> int:
    """Make one request. Every other function here ends in this one."""
    ctypes.set_errno(0)
    result: int = _libc.ptrace(number, tid, address, data)
    failed = ctypes.get_errno()
    if result == -1 and failed:
        raise OSError(failed, os.strerror(failed))
    return result


def seize(tid: int, options: int) -> None:
    """Become the tracer of a thread, which goes on. EPERM: not allowed, or it has a tracer."""
    request(_SEIZE, tid, 0, options)


def interrupt(tid: int) -> None:
    """Have a running thread stop soon."""
    request(_INTERRUPT, tid)


def cont(tid: int, signal: int = 0) -> None:
    """Let a stopped thread go on, with a signal if it is stopped for one."""
    request(_CONT, tid, 0, signal)


def cont_to_syscall(tid: int, signal: int = 0) -> None:
    """As cont, up to the next entry into a system call or exit from one."""
    request(_SYSCALL, tid, 0, signal)


def detach(tid: int, signal: int = 0) -> None:
    """Be the tracer of a stopped thread no longer; it goes on, with a signal if it is stopped for one."""
    request(_DETACH, tid, 0, signal)


def poke(tid: int, address: int, word: bytes) -> None:
    """Write 8 bytes, in one piece, also where the thread itself may not write: the page becomes the process's own."""
    request(_POKEDATA, tid, address, int.from_bytes(word, sys.byteorder))


def get_regset(tid: int, kind: int, size: int) -> bytes:
    """Return a register set (NT_*), as many bytes as there are, up to `size`."""
    buffer = ctypes.create_string_buffer(size)
    vector = _Iovec(ctypes.addressof(buffer), size)
    # SAFETY: the kernel writes at most `size` bytes to the buffer, and the length to the vector; both live until then.
    request(_GETREGSET, tid, kind, ctypes.addressof(vector))
    return buffer.raw[: vector.length]


def set_regset(tid: int, kind: int, registers: bytes) -> None:
    """Set a register set, all of it at once."""
    buffer = ctypes.create_string_buffer(registers, len(registers))
    vector = _Iovec(ctypes.addressof(buffer), len(registers))
    # SAFETY: the kernel reads the buffer, len(registers) bytes, and writes the length to the vector.
    request(_SETREGSET, tid, kind, ctypes.addressof(vector))


def get_sigmask(tid: int) -> bytes:
    """Return the signals that the thread blocks; of one in ppoll and the like, what it blocks outside of the call."""
    buffer = ctypes.create_string_buffer(SIGSET_SIZE)
    # SAFETY: the kernel writes SIGSET_SIZE bytes.
    request(_GETSIGMASK, tid, SIGSET_SIZE, ctypes.addressof(buffer))
    return buffer.raw


def get_siginfo(tid: int) -> tuple[int, int]:
    """Return si_signo and si_code of the signal that a thread is stopped for. EINVAL: it is stopped for none."""
    buffer = ctypes.create_string_buffer(128)
    # SAFETY: sizeof(siginfo_t) is 128 (include/uapi/asm-generic/siginfo.h).
    request(_GETSIGINFO, tid, 0, ctypes.addressof(buffer))
    signo, _, code = struct.unpack_from("=iii", buffer.raw)
    return signo, code


def get_syscall_info(tid: int) -> SyscallInfo:
    """Tell where in a system call a stopped thread is (Linux 5.3 and later)."""
    buffer = ctypes.create_string_buffer(_SYSCALL_INFO_SIZE)
    # SAFETY: the kernel writes at most _SYSCALL_INFO_SIZE bytes.
    request(_GET_SYSCALL_INFO, tid, _SYSCALL_INFO_SIZE, ctypes.addressof(buffer))
    op, arch, *_ = _SYSCALL_INFO.unpack_from(buffer.raw)
    if op == SYSCALL_INFO_ENTRY:
        number, *arguments = _ENTRY.unpack_from(buffer.raw, _SYSCALL_INFO.size)
        return SyscallInfo(op, arch, 0, number, tuple(arguments))
    (result,) = struct.unpack_from("=q", buffer.raw, _SYSCALL_INFO.size)
    return SyscallInfo(op, arch, result if op == SYSCALL_INFO_EXIT else 0)
