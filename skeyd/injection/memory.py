"""The memory of another process, moved by process_vm_readv and process_vm_writev."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any, Final

from skeyd.injection.errors import GoneError

_libc = ctypes.CDLL(None, use_errno=True)
for _function in (_libc.process_vm_readv, _libc.process_vm_writev):
    _function.restype = ctypes.c_ssize_t
    _function.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    )

_AT_ONCE: Final = 1 << 26
"""Bytes a call: one moves less than 2 GiB, and keeps the other's pages in memory meanwhile."""


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def read(pid: int, address: int, size: int) -> bytes:
    """Return `size` bytes. OSError EFAULT: not all of it is there; GoneError: the process has ended."""
    buffer = bytearray(size)
    if size:
        read_into(pid, address, memoryview(buffer))
    return bytes(buffer)


def read_into(pid: int, address: int, buffer: memoryview) -> None:
    """Fill `buffer`, writable bytes, from an address of the process. Errors as for read."""
    _move(_libc.process_vm_readv, pid, address, buffer)


def write(pid: int, address: int, content: bytes) -> None:
    """Write where the process itself may. Errors as for read; what lies before the hole may have been written."""
    if content:
        _move(_libc.process_vm_writev, pid, address, memoryview(bytearray(content)))


def _move(function: Any, pid: int, address: int, buffer: memoryview) -> None:
    keep = (ctypes.c_ubyte * buffer.nbytes).from_buffer(buffer)
    start = ctypes.addressof(keep)
    try:
        done = 0
        while done < buffer.nbytes:
            size = min(buffer.nbytes - done, _AT_ONCE)
            local, remote = _Iovec(start + done, size), _Iovec(address + done, size)
            # SAFETY: the kernel moves at most `size` bytes at start + done, which `keep` holds in place.
            moved = function(pid, ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)
            if moved <= 0:
                failed = ctypes.get_errno() if moved else errno.EFAULT
                if failed == errno.ESRCH:
                    raise GoneError(pid, f"process {pid} has ended")
                raise OSError(failed, f"{os.strerror(failed)}: {size} bytes at {address + done:#x} of process {pid}")
            done += moved
    finally:
        del keep
