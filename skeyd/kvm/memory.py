"""Guest memory: mappings in this process that a memory slot can be laid over."""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
from array import array
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from skeyd.kvm.abi import MEMORY_ALIGNMENT
from skeyd.kvm.errors import ClosedError
from skeyd.linux import MAP_NORESERVE

_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_PROT_NONE: Final = 0
# include/uapi/asm-generic/mman-common.h @ v6.12; Python's mmap module has no name for it
_MAP_FIXED: Final = 0x10
# include/uapi/linux/uio.h @ v6.12, UIO_MAXIOV: most ranges a call
_IOVECS: Final = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)


class GuestMemory:
    """A mapping of `size` bytes at a 1 MiB aligned address, made by one of the three class methods.

    Untouched pages cost nothing: swap space isn't reserved. Closing unmaps it; closing twice is fine. Close it after
    the Vm whose slot it is, else the kernel answers EFAULT for its frames.

    Synchronization: none; one thread owns it.
    """

    def __init__(self, address: int, size: int) -> None:
        self._address: int | None = address
        self.size = size
        """Bytes."""

    @classmethod
    def anonymous(cls, size: int) -> GuestMemory:
        """Map private anonymous memory. OSError ENOMEM where the address space or its limit doesn't hold it."""
        return cls._map(size, -1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    @classmethod
    def memfd(cls, size: int, name: str = "skeyd-guest") -> GuestMemory:
        """Map a new memfd, shared. The mapping keeps it; no descriptor stays open."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            return cls._map(size, fd, mmap.MAP_SHARED)
        finally:
            os.close(fd)

    @classmethod
    def file(cls, path: str, size: int) -> GuestMemory:
        """Map the first `size` bytes of a file that exists, shared. It is never created, grown or cut.

        ValueError: no regular file, or shorter than `size` (touching what isn't there would be a SIGBUS).
        OSError: it can't be opened for reading and writing, or is a symbolic link (ELOOP).
        """
        # O_NONBLOCK: a FIFO of that name must not hold the process up.
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise ValueError(f"{path} is no regular file")
            if found.st_size < size:
                raise ValueError(f"{path} has {found.st_size} bytes, fewer than the slot's {size}")
            return cls._map(size, fd, mmap.MAP_SHARED)
        finally:
            os.close(fd)

    @classmethod
    def _map(cls, size: int, fd: int, flags: int) -> GuestMemory:
        if size <= 0 or size % MEMORY_ALIGNMENT:
            raise ValueError(f"guest memory is a multiple of {MEMORY_ALIGNMENT} bytes, not {size}")
        # Reserve address space with room to align in, lay the memory over the aligned part, give back the rest.
        # SAFETY: MAP_FIXED replaces only what this reservation, made the line before, holds.
        reserved = size + MEMORY_ALIGNMENT
        hold = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        start = _mmap(None, reserved, _PROT_NONE, hold, -1)
        aligned = -(-start // MEMORY_ALIGNMENT) * MEMORY_ALIGNMENT
        try:
            access = mmap.PROT_READ | mmap.PROT_WRITE
            _mmap(aligned, size, access, flags | MAP_NORESERVE | _MAP_FIXED, fd)
        except OSError:
            _munmap(start, reserved)
            raise
        _munmap(start, aligned - start)
        _munmap(aligned + size, start + reserved - aligned - size)
        return cls(aligned, size)

    @property
    def address(self) -> int:
        """Where it is mapped in this process. ClosedError after close."""
        if self._address is None:
            raise ClosedError("this guest memory is closed")
        return self._address

    def view(self) -> memoryview:
        """Return the memory as writable bytes, for as long as it is mapped: using the view later is a SIGSEGV."""
        return memoryview((ctypes.c_ubyte * self.size).from_address(self.address)).cast("B")

    def touch(self, offsets: Sequence[int]) -> int:
        """Read the byte at each offset, in order, so that its page and page table are there: how many were read.

        Fewer than there are offsets where the kernel can't or won't: a file that was cut, no memory left. The kernel
        reads and not this process, for which a byte that isn't there would be a SIGBUS.
        """
        done = 0
        while done < len(offsets):
            part = offsets[done : done + _IOVECS]
            read = self._read(part)
            done += max(read, 0)
            if read < len(part):
                break
        return done

    def _read(self, offsets: Sequence[int]) -> int:
        address = self.address
        if not all(0 <= offset < self.size for offset in offsets):
            raise ValueError(f"an offset is not within {self.size} bytes")
        # Two struct iovec arrays, each of an address and a length: one byte from each place, all into one buffer.
        remote = array("Q", bytes(16 * len(offsets)))
        remote[0::2] = array("Q", [address + offset for offset in offsets])
        remote[1::2] = array("Q", [1]) * len(offsets)
        into = ctypes.create_string_buffer(len(offsets))
        local = array("Q", [ctypes.addressof(into), len(offsets)])
        # SAFETY: the kernel writes to `into` only, len(offsets) bytes; all three arrays live until it is done.
        result: int = _libc.process_vm_readv(
            os.getpid(), local.buffer_info()[0], 1, remote.buffer_info()[0], len(offsets), 0
        )
        return result

    def close(self) -> None:
        """Unmap it."""
        if self._address is not None:
            address, self._address = self._address, None
            _munmap(address, self.size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _mmap(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    result: int | None = _libc.mmap(address, size, protection, flags, fd, 0)
    if result is None or result == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"mmap of {size} bytes: {os.strerror(number)}")
    return result


def _munmap(address: int, size: int) -> None:
    if size and _libc.munmap(address, size):
        number = ctypes.get_errno()
        raise OSError(number, f"munmap of {size} bytes: {os.strerror(number)}")
