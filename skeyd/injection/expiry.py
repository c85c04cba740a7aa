"""The end of this process, laid into the kernel's hands: at a time, or with its parent. What it traces goes on then.

A process that holds another one's threads can itself be stopped, starved, or stuck in a wait; no code of its own may
then be what lets them go. A killed tracer harms nothing at any instant (docs/injection.md).
"""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Any, Final

_CLOCK_MONOTONIC: Final = 1
_SIGEV_SIGNAL: Final = 0
_TIMER_ABSTIME: Final = 1
"""include/uapi/linux/time.h and include/uapi/asm-generic/siginfo.h @ v6.12."""
_PR_SET_PDEATHSIG: Final = 1
"""include/uapi/linux/prctl.h @ v6.12."""
_SIGEVENT_SIZE: Final = 64


class _Sigevent(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_ubyte * (_SIGEVENT_SIZE - 16)),
    )


class _Itimerspec(ctypes.Structure):
    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


_libc = ctypes.CDLL(None, use_errno=True)


def end_at(end: float) -> None:
    """Have this process killed at a time of time.monotonic(), whatever it does, and stopped or not (seen). OSError.

    There is no way back.
    """
    library: Any = _libc if hasattr(_libc, "timer_create") else ctypes.CDLL("librt.so.1", use_errno=True)
    timer = ctypes.c_void_p()
    event = _Sigevent(signo=signal.SIGKILL, notify=_SIGEV_SIGNAL)
    # SAFETY: both structures are as large as the kernel's, and live until the calls have returned.
    _check(library.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)))
    whole, part = divmod(max(1, round(end * 1e9)), 1_000_000_000)
    when = _Itimerspec(0, 0, whole, part)
    _check(library.timer_settime(timer, _TIMER_ABSTIME, ctypes.byref(when), None))


def end_with_parent(parent: int) -> None:
    """Have this process killed when its parent ends, or now if that is no longer `parent`. OSError."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0))
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
