"""A guest of a few instructions that sets the keys of all its 64 MiB, over and over, each round other ones."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

_START: Final = 0x10000
_PROGRAM: Final = bytes.fromhex(
    "c01000000005"  #        larl  %r1,go          in 64-bit mode from here on
    "010e"  #                sam64
    "07f1"  #                br    %r1
    "a7990000"  # go:        lghi  %r9,0           16 times the round
    "a7290000"  # round:     lghi  %r2,0           the address of a frame
    "a53e0400"  #            llilh %r3,0x0400      64 MiB
    "eb42000c000c"  # frame: srlg  %r4,%r2,12      its number
    "eb640007000c"  #        srlg  %r6,%r4,7
    "b9820046"  #            xgr   %r4,%r6
    "b9080049"  #            agr   %r4,%r9
    "b22b0042"  #            sske  %r4,%r2
    "a72b1000"  #            aghi  %r2,4096
    "b9210023"  #            clgr  %r2,%r3
    "a744fff0"  #            jl    frame
    "a79b0010"  #            aghi  %r9,16          other access-control bits in the next
    "a7f4ffe8"  #            j     round
)


def key_of(gfn: int, of_round: int) -> int:
    """Return the ACC and F that a frame's key has in a round; R and C are also the machine's."""
    return ((gfn ^ gfn >> 7) + 16 * of_round) & 0xF8


def write_guest(path: Path) -> Path:
    """Write the program down as an ELF file that QEMU takes as a kernel."""
    header = struct.pack(
        ">16sHHIQQQIHHHHHH", b"\x7fELF\2\2\1" + bytes(9), 2, 22, 1, _START, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    size = len(_PROGRAM)
    segment = struct.pack(">IIQQQQQQ", 1, 5, 120, _START, _START, size, size, 2)
    path.write_bytes(header + segment + _PROGRAM)
    return path
