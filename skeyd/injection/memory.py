"""The memory of one program that another process runs: what is read and written is that program's or nobody's.

By its file in /proc, which stays with the memory that it was opened for. process_vm_writev takes a process's number,
and what that has for memory may be another program's by then: a process that has a set-user-ID program executed at the
right moment would have its own bytes written there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Self

from skeyd.injection.errors import GoneError, NotAllowedError


class Memory:
    """Memory of a process from `open` to `close`. Synchronization: none."""

    def __init__(self, pid: int, fd: int) -> None:
        self._pid = pid
        self._fd = fd

    @classmethod
    def open(cls, pid: int) -> Self:
        """Take the memory that the process has now. NotAllowedError, GoneError."""
        try:
            return cls(pid, os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC))
        except (FileNotFoundError, ProcessLookupError) as error:
            raise GoneError(pid, f"process {pid} has ended") from error
        except PermissionError as error:
            raise NotAllowedError(
                pid,
                f"the memory of process {pid} can't be opened: that takes its user, or CAP_DAC_OVERRIDE beside the "
                "right to trace",
            ) from error

    def read(self, address: int, size: int) -> bytes:
        """Return `size` bytes. OSError EFAULT: not all of it is there; GoneError: it is nobody's memory any more."""
        buffer = bytearray(size)
        self.read_into(address, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, address: int, buffer: memoryview) -> None:
        """Fill `buffer`, writable bytes, from an address. Errors as for read."""
        done = 0
        while done < buffer.nbytes:
            done += self._moved(lambda at: os.preadv(self._fd, [buffer[at:]], address + at), done, address)

    def write(self, address: int, content: bytes) -> None:
        """Write. Errors as for read; what lies before the hole may have been written.

        Where the process itself may not write, the page becomes its own first, as with a debugger, or it is EFAULT.
        """
        view = memoryview(content)
        done = 0
        while done < view.nbytes:
            done += self._moved(lambda at: os.pwritev(self._fd, [view[at:]], address + at), done, address)

    def close(self) -> None:
        """Close it. Closing twice is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _moved(self, move: Callable[[int], int], at: int, address: int) -> int:
        try:
            moved = move(at)
        except OSError as error:
            # A hole is EIO here.
            number = errno.EFAULT if error.errno in (errno.EIO, errno.EFAULT, errno.EINVAL) else error.errno or 0
            raise OSError(number, f"{os.strerror(number)}: {address + at:#x} of process {self._pid}") from error
        if not moved:
            # mem_rw() in fs/proc/base.c @ v6.12: the last user of this memory is gone.
            raise GoneError(self._pid, f"process {self._pid} has ended, or runs another program now")
        return moved
