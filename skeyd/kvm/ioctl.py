"""The one place that calls ioctl, and the one place where an errno becomes a KvmError."""

from __future__ import annotations

import errno
import fcntl

from skeyd.kvm import abi
from skeyd.kvm.errors import KvmError


def call(fd: int, request: int, argument: int | bytes | bytearray = 0) -> int:
    """Make one ioctl of the table and return what it returned, 0 or more.

    A structure goes in as bytes, and as a bytearray where the kernel writes it back. fcntl releases the interpreter
    lock for structures up to 1,024 bytes, so other threads run while the kernel works.
    Raises KvmError with the errno. EINTR is retried where it is safe: all calls here start over from nothing.
    """
    while True:
        try:
            # An int result is what fcntl.ioctl gives for an int argument; for bytes it gives a copy of the buffer and
            # hides the return value, so structures go in as a bytearray that it may write to.
            return fcntl.ioctl(fd, request, bytearray(argument) if isinstance(argument, bytes) else argument)
        except InterruptedError:
            # SET answers EINTR before it has set anything (KSM unmerge with a signal pending); the rest never do, KEYOP
            # included, which would not give the same answer twice.
            continue
        except OSError as error:
            raise KvmError(abi.NAMES[request], error.errno or errno.EIO) from error
