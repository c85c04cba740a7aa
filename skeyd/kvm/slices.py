"""How many keys an ioctl may have, so that it keeps the kernel's lock for about as long as it may."""

from __future__ import annotations

from typing import Final

FIRST_KEYS: Final = 16_384
"""In the first ioctl, of which nobody knows how long it takes."""

_FEWEST_KEYS: Final = 1_024
"""What a call costs by itself would else have it made for each key."""

_GROWTH: Final = 4
"""How many times larger than the one before an ioctl is at most."""


def next_keys(keys: int, seconds: float, limit: float) -> int:
    """Return how many keys the next ioctl may have, after one of `keys` took so many seconds."""
    fitting = int(keys * limit / max(seconds, 1e-9))
    return max(_FEWEST_KEYS, min(keys * _GROWTH, fitting))
