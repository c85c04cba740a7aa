"""What is mapped in this process, by the kernel's word."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
