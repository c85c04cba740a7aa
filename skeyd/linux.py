"""The few Linux calls outside KVM that skeyd makes by hand: locks that die with their holder, and sealed memory.

Standard library only; the front and the workers both use it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

MAP_NORESERVE: Final = 0x4000
"""include/uapi/asm-generic/mman.h @ v6.12, for s390 and x86 alike. Python's mmap module has it since 3.13 only."""

_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_UCRED: Final = struct.Struct("=iII")
_TIMEVAL: Final = struct.Struct("ll")


def take_lock(fd: int) -> bool:
    """Lock a file opened for writing, for this process's life or until fd is closed. False: another process has it.

    A POSIX record lock: the kernel gives it back however the process ends, and `lock_is_held` can look at it without
    taking it. It is also given back when *any* descriptor of the file is closed in this process: open the file once.
    """
    try:
        os.lockf(fd, os.F_TLOCK, 0)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def lock_is_held(fd: int) -> bool:
    """Whether another process holds the lock of a file opened for writing. Takes nothing."""
    try:
        os.lockf(fd, os.F_TEST, 0)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return True
        raise
    return False


def open_unnamed(directory_fd: int) -> int:
    """Open a new file that has no name, in a directory; it is gone when it is closed, however that comes about."""
    return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory_fd)


def sealed_memfd(name: str, size: int) -> int:
    """Make a memfd of `size` bytes that nobody can cut or grow, so that no reader of a mapping can meet a SIGBUS."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_sealed_memfd(fd: int, size: int) -> bool:
    """Whether a descriptor that somebody sent is what `sealed_memfd` makes, of that size."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return seals & _SEALS == _SEALS and os.fstat(fd).st_size == size


def wide_pipe(size: int) -> tuple[int, int]:
    """Make a pipe for a stranger to open by its path in /proc/PID/fd and write into: (end to read, end to write).

    It holds `size` bytes where the kernel allows that, so that the ends wait for each other less often. Reading never
    waits.
    """
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        os.set_blocking(read, False)
        # To write, for any user: who has no descriptor of it has no path to it either.
        os.fchmod(write, 0o622)
        with suppress(OSError):  # more than fs.pipe-max-size, or than this user may have
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, size)
    except BaseException:
        os.close(read)
        os.close(write)
        raise
    return read, write


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a unix socket, by the kernel's word (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


def peer_of(connection: socket.socket) -> Peer:
    """Ask the kernel who connected, or who listened."""
    return Peer(*_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


@contextmanager
def signals_by_socket(numbers: Iterable[int]) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Have these signals arrive as bytes, their numbers, at the first socket; what is sent at the second does so, too.

    For the main thread. To wait for a signal with a lock, which queues and events do too, is to miss one that comes
    just before the wait: handlers run in the main thread, and nothing wakes it (seen with Python 3.11 and 3.14).
    """
    told, teller = socket.socketpair()
    with told, teller:
        teller.setblocking(False)
        signal.set_wakeup_fd(teller.fileno())
        try:
            for number in numbers:
                signal.signal(number, _noted)
            yield told, teller
        finally:
            signal.set_wakeup_fd(-1)


def _noted(*_: object) -> None:
    pass  # by the socket


def write_in_vain(fd: int, seconds: int = 1) -> None:
    """Have nobody who writes to this pipe or socket wait for its reader: what there is no room for gets EAGAIN.

    For who doesn't ask, as libraries in C that write to standard error. On a pipe at once, and only where it is written
    to through this number: the parent's flags are its own. On a socket after so many seconds, since it can't be opened
    anew. Anything else is left as it is, and so is a pipe that this user may not open.
    """
    kind = os.fstat(fd).st_mode
    if stat.S_ISFIFO(kind):
        try:
            anew = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return
        os.dup2(anew, fd, inheritable=os.get_inheritable(fd))
        os.close(anew)
    elif stat.S_ISSOCK(kind):
        with socket.socket(fileno=os.dup(fd)) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(seconds, 0))
