"""What is mapped in this process, by the kernel's word."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PAGEMAP_ENTRY: Final = struct.Struct("=Q")  # Documentation/admin-guide/mm/pagemap.rst @ v6.12
_PRESENT: Final = 63


@dataclass(frozen=True)
class Mapping:
    """A line of /proc/self/maps."""

    start: int
    end: int
    access: str
    """As "rw-p": read, write, execute; p is private and s is shared."""
    path: str


def mappings() -> list[Mapping]:
    """Return all of them, ascending."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access, _, _, _, *path = line.split(maxsplit=5)
        start, end = (int(one, 16) for one in addresses.split("-"))
        found.append(Mapping(start, end, access, path[0] if path else ""))
    return found


def mapped_bytes(start: int, end: int) -> int:
    """How much of a stretch of addresses is mapped."""
    return sum(max(0, min(end, one.end) - max(start, one.start)) for one in mappings())


def pages_present(start: int, size: int) -> list[bool]:
    """Tell of each page of a mapping whether it is there; to read it changes nothing."""
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(start // mmap.PAGESIZE * _PAGEMAP_ENTRY.size)
        entries = pagemap.read(size // mmap.PAGESIZE * _PAGEMAP_ENTRY.size)
    return [bool(entry >> _PRESENT & 1) for (entry,) in _PAGEMAP_ENTRY.iter_unpack(entries)]
