"""Restartable sequences: code that the kernel takes back to its start where it was interrupted.

A thread must not be moved out of one unnoticed: the kernel looks at where it is when it goes on, finds the stub, and
forgets that there was a sequence to restart (rseq_ip_fixup() in kernel/rseq.c @ v6.12).
"""

from __future__ import annotations

import ctypes
import struct
from typing import Final

from skeyd.injection import ptrace
from skeyd.injection.memory import Memory

_GET_RSEQ_CONFIGURATION: Final = 0x420F
_CONFIGURATION: Final = struct.Struct("=QIIII")
"""struct ptrace_rseq_configuration, include/uapi/linux/ptrace.h @ v6.12."""
_POINTER_AT: Final = 8
"""Of rseq_cs in struct rseq, include/uapi/linux/rseq.h @ v6.12."""
_SEQUENCE: Final = struct.Struct("=IIQQQ")
"""struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip."""


def is_inside(memory: Memory, tid: int, place: int) -> bool:
    """Whether a stopped thread, whose next instruction is at `place`, is in such a sequence. OSError.

    False on kernels that don't tell (before Linux 5.13): such a thread is broken there.
    """
    buffer = ctypes.create_string_buffer(_CONFIGURATION.size)
    try:
        # SAFETY: the kernel writes at most as many bytes as it is told.
        ptrace.request(_GET_RSEQ_CONFIGURATION, tid, _CONFIGURATION.size, ctypes.addressof(buffer))
    except ProcessLookupError:
        raise
    except OSError:
        return False
    registered = _CONFIGURATION.unpack(buffer.raw)[0]
    if not registered:
        return False
    (pointer,) = struct.unpack("=Q", memory.read(registered + _POINTER_AT, 8))
    if not pointer:
        return False
    _, _, start, length, _ = _SEQUENCE.unpack(memory.read(pointer, _SEQUENCE.size))
    inside: bool = start <= place < start + length
    return inside
