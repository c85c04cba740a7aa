"""Giving up the right to trace other processes: CAP_SYS_PTRACE is for the worker of an adopted VM, and for no other.

Capabilities are a thread's, and threads and programs that it starts inherit them: for a process with one thread yet.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from typing import Final

CAP_SYS_PTRACE: Final = 19
"""include/uapi/linux/capability.h @ v6.12, as all numbers here."""

_VERSION_3: Final = 0x20080522
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24

_libc: Final = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    # struct __user_cap_header_struct; pid 0 is the calling thread.
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Words(ctypes.Structure):
    # struct __user_cap_data_struct: 32 of the 64 bits of each set.
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


_Sets = _Words * 2


def give_up(capability: int) -> None:
    """Take a capability out of all sets, so that neither this process nor a program that it executes has it again.

    Of the bounding set only where the process has CAP_SETPCAP, as root has: else nothing but a file's own capabilities,
    or one with the set-user-ID bit of root, can bring it back. OSError where the kernel has no capabilities.
    """
    if _prctl(_PR_CAPBSET_READ, capability):
        with suppress(PermissionError):
            _prctl(_PR_CAPBSET_DROP, capability)
    sets = _get()
    word, bit = divmod(capability, 32)
    for name in ("effective", "permitted", "inheritable"):
        setattr(sets[word], name, getattr(sets[word], name) & ~(1 << bit))
    # The ambient set loses what these two lose.
    _set(sets)


def hold_back(capability: int) -> None:
    """Take a capability out of the effective set: this process can't use it, and programs that it executes can.

    OSError where the kernel has no capabilities.
    """
    sets = _get()
    word, bit = divmod(capability, 32)
    sets[word].effective &= ~(1 << bit)
    _set(sets)


def _get() -> ctypes.Array[_Words]:
    sets = _Sets()
    _check(_libc.capget(ctypes.byref(_Header(_VERSION_3, 0)), sets))
    return sets


def _set(sets: ctypes.Array[_Words]) -> None:
    _check(_libc.capset(ctypes.byref(_Header(_VERSION_3, 0)), sets))


def _prctl(option: int, argument: int) -> int:
    zero = ctypes.c_ulong(0)
    return _check(_libc.prctl(option, ctypes.c_ulong(argument), zero, zero, zero))


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
