"""What a process has mapped, as /proc/PID/maps has it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from skeyd.injection.errors import GoneError

_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) ([0-9a-f:]+) (\d+) *(.*)")


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line: addresses in bytes, `end` is not in it."""

    start: int
    end: int
    access: str
    """As r-xp."""
    offset: int
    """Of the file, in bytes."""
    device: str
    inode: int
    """0: no file."""
    path: str


def mappings(pid: int) -> list[Mapping]:
    """Return the mappings of a process, in ascending order. GoneError."""
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise GoneError(pid, f"process {pid} has ended") from error
    found = [match for line in lines if (match := _LINE.fullmatch(line))]
    return [
        Mapping(int(one[1], 16), int(one[2], 16), one[3], int(one[4], 16), one[5], int(one[6]), one[7]) for one in found
    ]
