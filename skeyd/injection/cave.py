"""A place for the stub in a process that has none: behind the last byte of the vDSO's code, or of a library's.

A segment of code rarely ends where a page does; what lies between is mapped, executable, and no part of the program.
`Cave.find` knows from the program headers where it begins, and takes its last 64 bytes, where they are zero. There lie

- the stub (`Machine.STUB`), the same bytes whoever writes it, so several tracers and threads can use it at once;
- a note: where in the process a buffer is, or is about to be. It is written before the buffer is mapped and taken away
  after it is unmapped, so that whoever comes after a killed tracer finds what that one left.

Writing there gives the process a copy of that page of its own (files and other processes see nothing), which it keeps
when the bytes are zero again. The vDSO comes first: every program has it, it never moves, and few programs of s390x
have room anywhere else, since their data begins in the same page of the file.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Final

from skeyd.injection import proc, ptrace
from skeyd.injection.errors import UnsupportedError
from skeyd.injection.machine import Machine
from skeyd.injection.maps import Mapping, mappings
from skeyd.injection.memory import Memory

SIZE: Final = 64
_WORD: Final = 8
_NOTE: Final = struct.Struct("=QQQ")
_NOTE_AT: Final = 32
"""Behind the stub, which is shorter on every machine."""
_PAGE: Final = 4096

# include/uapi/linux/elf.h @ v6.12
_EHDR: Final = struct.Struct("=16sHHIQQQIHHHHHH")
_PHDR: Final = struct.Struct("=IIQQQQQQ")
_PT_LOAD: Final = 1
_PF_X: Final = 1
_IDENT: Final = b"\x7fELF\x02" + (b"\x01" if sys.byteorder == "little" else b"\x02")
_MOST_HEADERS: Final = 64


class Cave:
    """One such place. What is written there is written through a thread that is stopped and traced by this one."""

    def __init__(self, pid: int, memory: Memory, address: int, machine: Machine) -> None:
        self.pid = pid
        self._memory = memory
        self.address = address
        """Of the stub."""
        self._machine = machine

    @classmethod
    def find(cls, pid: int, memory: Memory, machine: Machine) -> Cave:
        """Return the place that has a stub or a note already, or else the first that is free. UnsupportedError."""
        free = None
        everything = mappings(pid)
        for address in _in_vdso(memory, everything):
            if _is_ours(memory.read(address, SIZE), machine):
                return cls(pid, memory, address, machine)
        # Libraries come and go, so which of them is the first changes.
        for address in _in_files(memory, everything):
            content = memory.read(address, SIZE)
            if any(content) and _is_ours(content, machine):
                return cls(pid, memory, address, machine)
            if not any(content) and free is None:
                free = cls(pid, memory, address, machine)
        if free is None:
            raise UnsupportedError(pid, f"no code of process {pid} ends {SIZE} bytes before a page does")
        return free

    def holds(self, address: int) -> bool:
        """Whether an address is within the stub."""
        return self.address <= address < self.address + len(self._machine.STUB)

    def write_stub(self, tid: int) -> bool:
        """Write what of the stub is not there yet; whether there was nothing of it."""
        is_new = not any(self._memory.read(self.address, len(self._machine.STUB)))
        self._write(tid, self.address, self._machine.STUB)
        return is_new

    def note(self) -> tuple[int, int, int]:
        """Return address and size in bytes of the buffer that there is or may be, and its owner; address 0: none."""
        address, size, owner = _NOTE.unpack(self._memory.read(self.address + _NOTE_AT, _NOTE.size))
        return address, size, owner

    def write_note(self, tid: int, address: int, size: int, owner: int) -> None:
        """Note where a buffer is going to be; address 0: there is none any more."""
        at, words = self.address + _NOTE_AT, _NOTE.pack(address, size, owner)
        # The address counts, and the others are there whenever it is.
        parts = [(at + place, words[place : place + _WORD]) for place in range(0, _NOTE.size, _WORD)]
        for where, word in reversed(parts) if address else parts:
            self._write(tid, where, word)

    def erase(self, tid: int) -> bool:
        """Make the stub zero again, where no thread of the process waits in it; whether it was done.

        A thread that runs at this moment is in the stub only for some ten instructions after a call that a killed
        tracer had it make; for those there was time since this one began.
        """
        for other in proc.threads(self.pid):
            try:
                call = proc.system_call(self.pid, other) if other != tid else None
            except OSError:
                return False
            if call is not None and self.holds(call[-1]):
                return False
        self._write(tid, self.address, bytes(len(self._machine.STUB)))
        return True

    def _write(self, tid: int, address: int, content: bytes) -> None:
        there = self._memory.read(address, len(content))
        for at in range(0, len(content), _WORD):
            if there[at : at + _WORD] != content[at : at + _WORD]:
                ptrace.poke(tid, address + at, content[at : at + _WORD])


def _is_ours(content: bytes, machine: Machine) -> bool:
    # A tracer may have been killed between two words of a stub.
    stub = machine.STUB.ljust(_NOTE_AT, b"\0")
    words = [content[at : at + _WORD] for at in range(0, _NOTE_AT, _WORD)]
    wanted = [stub[at : at + _WORD] for at in range(0, _NOTE_AT, _WORD)]
    rest = content[_NOTE_AT + _NOTE.size :]
    return all(word in (right, bytes(_WORD)) for word, right in zip(words, wanted, strict=True)) and not any(rest)


def _in_vdso(memory: Memory, everything: Sequence[Mapping]) -> Iterator[int]:
    for code in everything:
        if code.path == "[vdso]" and code.access == "r-xp":
            end = _end_of_code(memory, code, code)
            if end is not None and code.end - end >= SIZE:
                yield code.end - SIZE


def _in_files(memory: Memory, everything: Sequence[Mapping]) -> Iterator[int]:
    heads: dict[tuple[str, int], Mapping] = {}
    for code in everything:  # ascending
        if code.inode and code.offset == 0:
            heads[code.device, code.inode] = code
        head = heads.get((code.device, code.inode))
        if code.access == "r-xp" and code.inode and head is not None:
            end = _end_of_code(memory, head, code)
            if end is not None and code.end - end >= SIZE:
                yield code.end - SIZE


def _end_of_code(memory: Memory, head: Mapping, code: Mapping) -> int | None:
    """Return the address behind the last byte of the segment that a mapping is for, or None: it can't be told."""
    try:
        header = memory.read(head.start, _EHDR.size)
        ident, _, _, _, _, table, _, _, _, size, count, *_ = _EHDR.unpack(header)
        if not ident.startswith(_IDENT) or size != _PHDR.size or count > _MOST_HEADERS:
            return None
        headers = memory.read(head.start + table, size * count)
    except OSError:
        return None
    for kind, flags, offset, _, _, in_file, in_memory, _ in _PHDR.iter_unpack(headers):
        begin = offset - offset % _PAGE
        pages = -(-(offset % _PAGE + in_file) // _PAGE) * _PAGE
        # The kernel maps all of the vDSO's file, section headers too; of another file, the segment's pages.
        size_fits = pages <= code.end - code.start if not code.inode else pages == code.end - code.start
        is_it = kind == _PT_LOAD and flags & _PF_X and begin == code.offset and size_fits
        if is_it and in_file == in_memory:
            end: int = code.start + offset % _PAGE + in_file
            return end
    return None
