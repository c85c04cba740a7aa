"""Keys as guests have them: made by a rule that is written down here, the same at every run.

A mix is a block of 4 Mi keys (those of 16 GiB of guest), repeated; chunks are smaller, so no encoding sees that it is.
We know of no public trace of real guests' keys: each mix is a model, and its numbers are choices. What is known is
where keys come from:

random      every key is random: the worst case for every encoding.
one         one key throughout: a guest that has just been started, or cleared its memory.
linux-like  Linux gives all memory key 0 without fetch protection (PAGE_DEFAULT_KEY, arch/s390/include/asm/page.h)
            and makes nothing of keys itself, so only referenced (R) and changed (C) differ, which the machine sets.
            Memory is handed out in blocks of 2^order frames (the buddy allocator), huge pages are 256 frames, and
            readahead brings in files by 32. By frames some 45 % were never touched (key 0, areas of 4 to 32 MiB),
            30 % are huge pages (RC), 20 % files that are read (R), and the rest small blocks (RC) and pages whose R
            was reset by whoever looked (C, or 0). Runs are 60 keys long on average.
zos-like    z/OS protects by key: 0 to 7 are the system's (0 supervisor, 1 job scheduling, 5 data management, 6 VTAM
            and TCP/IP, 7 databases), 8 is for ordinary programs (z/OS MVS Programming: Authorized Assembler Services
            Guide, "Storage protection"). Most private storage is fetch protected. Frames are handed out one by one or
            a few at a time from all of memory, so neighbours belong to different address spaces; but large frames of
            1 MiB back buffer pools (a third of all frames here), and unused memory lies in areas (nearly as much).
            Runs are 14 keys long on average.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

from skeyd.storage_key import CHANGED, REFERENCED, StorageKey

BLOCK: Final = 1 << 22
RC: Final = REFERENCED | CHANGED
ONE_KEY: Final = StorageKey(1, False, True, True).to_byte()
_SEED: Final = 1972
_CLEAR_RESERVED: Final = bytes(value & 0xFE for value in range(256))


def _random(maker: random.Random) -> bytes:
    return b"".join(maker.randbytes(1 << 20) for _ in range(BLOCK >> 20)).translate(_CLEAR_RESERVED)


def _one(maker: random.Random) -> bytes:  # noqa: ARG001  as the others
    return bytes([ONE_KEY]) * BLOCK


def _linux_like(maker: random.Random) -> bytes:
    keys = bytearray()
    while len(keys) < BLOCK:
        what = maker.random()
        if what < 0.004:  # never touched
            keys += bytes(1024 << maker.randrange(4))
        elif what < 0.044:  # a huge page
            keys += bytes([RC]) * 256
        elif what < 0.49:  # other anonymous memory, and the kernel's
            keys += bytes([RC]) * (1 << min(8, int(maker.expovariate(0.7))))
        elif what < 0.89:  # a file that is read
            keys += bytes([REFERENCED]) * maker.choice((1, 4, 8, 16, 32, 32, 32))
        else:  # R was reset
            keys += bytes([maker.choice((0, CHANGED))]) * maker.choice((1, 1, 2, 4))
    return bytes(keys[:BLOCK])


def _zos_like(maker: random.Random) -> bytes:
    owners = [(acc, fetch) for acc, fetch, share in _ZOS_OWNERS for _ in range(share)]
    keys = bytearray()
    while len(keys) < BLOCK:
        what = maker.random()
        if what < 0.002:  # unused
            keys += bytes(2048)
        elif what < 0.018:  # a large frame
            keys += bytes([StorageKey(7, True, True, maker.random() < 0.7).to_byte()]) * 256
        else:
            acc, fetch = maker.choice(owners)
            touched = maker.random()
            key = StorageKey(acc, fetch, touched < 0.9, touched < 0.65).to_byte()
            keys += bytes([key]) * (1 + min(63, int(maker.expovariate(0.25))))
    return bytes(keys[:BLOCK])


_ZOS_OWNERS: Final = (
    # Key, fetch protection, share in percent.
    (0, False, 20),  # the nucleus and common storage
    (0, True, 12),
    (1, True, 8),
    (5, True, 6),
    (6, True, 8),
    (7, True, 14),
    (8, True, 32),
)

MIXES: Final[dict[str, Callable[[random.Random], bytes]]] = {
    "random": _random,
    "one": _one,
    "linux-like": _linux_like,
    "zos-like": _zos_like,
}


def write(name: str, path: Path, count: int) -> None:
    """Write `count` keys of a mix into a file."""
    block = MIXES[name](random.Random(_SEED))  # noqa: S311  keys to measure with, no secrets
    with path.open("wb") as file:
        for at in range(0, count, BLOCK):
            file.write(block[: min(BLOCK, count - at)])


def mean_run(path: Path) -> float:
    """Return how long runs of one key are in a file, on average over its first block."""
    with path.open("rb") as file:
        keys = file.read(BLOCK)
    differing = 0
    for start in range(0, len(keys), 1 << 20):
        # Whole numbers, since a loop over millions of keys takes seconds.
        part, after = keys[start : start + (1 << 20)], keys[start + 1 : start + 1 + (1 << 20)]
        part = part[: len(after)]
        changed = int.from_bytes(part, "big") ^ int.from_bytes(after, "big")
        differing += len(part) - changed.to_bytes(len(part), "big").count(0)
    return len(keys) / (1 + differing)
