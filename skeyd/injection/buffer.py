"""Memory in another process for what its calls read and write: mapped there by a call, and unmapped by one."""

from __future__ import annotations

import errno
from typing import Final, Self

from skeyd.injection.errors import InjectionError, InUseError, RefusedError, UnsupportedError
from skeyd.injection.injection import Injection
from skeyd.injection.maps import mappings
from skeyd.injection.proc import is_alive, myself
from skeyd.injection.target import Target

# include/uapi/asm-generic/mman-common.h and mman.h @ v6.12, for s390 and x86 alike
_PROT_READ_WRITE: Final = 1 | 2
_MAP_PRIVATE_ANONYMOUS: Final = 0x02 | 0x20
_MAP_FIXED_NOREPLACE: Final = 0x100000

_PAGE: Final = 4096
MARK: Final = b"skeyd: a buffer for calls; its owner is gone if you read this."
"""At the buffer's beginning, for whoever finds it."""
_HEAD: Final = _PAGE
_MOST: Final = 4 << 20
"""Bytes of a buffer, its head included. What a process has noted to be more is no buffer: it can write there too."""

_DISTANCE: Final = 1 << 20
"""Bytes to other mappings, so that the kernel joins it with none."""
_TRIES: Final = 8
_NOT_BELOW: Final = ("[stack]", "[vsyscall]")
"""One grows; the other is the kernel's, behind all that a program can map."""


class Buffer:
    """`size` bytes at `address` in a process, from `open` to `close`; slices come and go meanwhile.

    Where this process is killed in between, the next that opens one in the same process takes over what is left.
    Synchronization: none.
    """

    def __init__(self, target: Target, start: int, size: int) -> None:
        self.target = target
        self._start = start
        self.address = start + _HEAD
        self.size = size

    @classmethod
    def open(cls, injection: Injection, size: int) -> Self:
        """Map it, or take over one of that size that a killed process has left; one of another size is unmapped.

        InUseError: another process, which is alive, has one there. RefusedError: mmap is forbidden, or ENOMEM.
        UnsupportedError: there is no room. The others as Injection.call.
        """
        target = injection.target
        whole = _HEAD + -(-size // _PAGE) * _PAGE
        if whole > _MOST:
            raise ValueError(f"a buffer has {_MOST - _HEAD} bytes at most")
        start, left, owner = injection.note()
        if start:
            # This process's own is one that it could not close: it has one in a process at a time.
            if owner != myself() and is_alive(owner):
                raise InUseError(target.pid, owner)
            if _is_there(target, start, left):
                if left == whole:
                    injection.write_note(start, whole, myself())
                    target.memory.write(start, MARK)
                    return cls(target, start, size)
                injection.munmap(start, left)
            injection.write_note(0, 0, 0)
        start = _map(injection, whole)
        target.memory.write(start, MARK)
        return cls(target, start, size)

    def is_there(self) -> bool:
        """Whether the memory is what was mapped: it has the mark at its beginning. GoneError."""
        try:
            return self.target.memory.read(self._start, len(MARK)) == MARK
        except OSError:
            return False

    def read_into(self, offset: int, content: memoryview) -> None:
        """Fill `content` from the buffer. GoneError; OSError where somebody else has unmapped it."""
        self._check(offset, content.nbytes)
        self.target.memory.read_into(self.address + offset, content)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes. Errors as read_into."""
        self._check(offset, size)
        return self.target.memory.read(self.address + offset, size)

    def write(self, offset: int, content: bytes) -> None:
        """Write to the buffer. Errors as read_into."""
        self._check(offset, len(content))
        self.target.memory.write(self.address + offset, content)

    def close(self, injection: Injection) -> None:
        """Unmap it, in a slice of the same process. Errors as Injection.call; may be tried again then.

        What else the process has there by now stays: it has unmapped the buffer itself then.
        """
        size = self.address + -(-self.size // _PAGE) * _PAGE - self._start
        if _is_there(self.target, self._start, size):
            injection.munmap(self._start, size)
        injection.write_note(0, 0, 0)

    def _check(self, offset: int, size: int) -> None:
        if not 0 <= offset <= offset + size <= self.size:
            raise ValueError(f"{size} bytes at {offset} are not within {self.size}")


def _map(injection: Injection, size: int) -> int:
    pid = injection.target.pid
    for _ in range(_TRIES):
        start = _free_place(pid, size)
        # Before it is there, so that it is found whenever this process is killed.
        injection.write_note(start, size, myself())
        try:
            got = injection.mmap(start, size, _PROT_READ_WRITE, _MAP_PRIVATE_ANONYMOUS | _MAP_FIXED_NOREPLACE)
        except RefusedError as error:
            injection.write_note(0, 0, 0)
            if error.errno != errno.EEXIST:
                raise
            continue  # another thread has mapped something there just now
        except InjectionError:
            # Not known whether it came to be, and the note says so to the next.
            raise
        if got != start:
            injection.munmap(got, size)
            injection.write_note(0, 0, 0)
            raise UnsupportedError(pid, "the kernel has no MAP_FIXED_NOREPLACE (Linux 4.17)")
        return start
    raise UnsupportedError(pid, f"process {pid} takes every address before skeyd can")


def _free_place(pid: int, size: int) -> int:
    """Return the highest address with room around it that is not below a stack that grows."""
    end = 0
    best = None
    for one in mappings(pid):
        room = one.start - end
        if end and one.path not in _NOT_BELOW and room >= size + 2 * _DISTANCE:
            best = one.start - _DISTANCE - size
        end = one.end
    if best is None:
        raise UnsupportedError(pid, f"process {pid} has no room for {size} bytes between its mappings")
    return best


def _is_there(target: Target, start: int, size: int) -> bool:
    """Whether a buffer that was noted was mapped, and is: anonymous memory, marked at its beginning, or never used.

    The kernel may have joined it with what the process has mapped beside it. Where it has no mark, it has to be a
    mapping of its own: something else that a process had mapped there, of the same size, would have been used.
    """
    if not _HEAD < size <= _MOST or size % _PAGE or start % _PAGE:
        return False
    for one in mappings(target.pid):
        if one.start <= start and start + size <= one.end and (one.access, one.inode, one.path) == ("rw-p", 0, ""):
            if target.memory.read(start, len(MARK)) == MARK:
                return True
            return (one.start, one.end) == (start, start + size) and not any(target.memory.read(start, size))
    return False
