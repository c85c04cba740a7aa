"""glibc's malloc, told what this process is like: messages of some MiB, again and again, in many threads.

By default each of them is mapped anew and unmapped, which costs more than all else that is done with it. Kept in the
heap, and given back only beyond 64 MiB, they cost nothing; only all three settings together do that.
"""

from __future__ import annotations

import ctypes
from typing import Final

SETTINGS: Final = {
    "M_MMAP_THRESHOLD": (-3, 32 << 20),
    "M_TRIM_THRESHOLD": (-1, 64 << 20),
    "M_TOP_PAD": (-2, 8 << 20),
}
"""By name (malloc.h of glibc, mallopt(3)): number and bytes."""


def tune() -> bool:
    """Tune malloc for the process; best before there are other threads. False where it is not glibc's."""
    libc = ctypes.CDLL(None)
    # Others have a mallopt too, with other numbers.
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    done = [libc.mallopt(number, size) for number, size in SETTINGS.values()]
    return all(done)
