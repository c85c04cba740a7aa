"""ENCODING_RUNS: keys as runs of one key each.

For n runs: n lengths, each less one, as 16-bit numbers, little-endian; then n keys, a byte each, in the same order.
A run is of at most 65,536 keys; a longer one is written as several.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Iterator
from functools import lru_cache
from itertools import repeat
from operator import add, itemgetter, mul, sub
from typing import Final

from skeyd.encoding.sample import Pieces, sample
from skeyd.turns import give_way

RUN_MAX: Final = 65_536
"""Most keys in a run as it is written."""

RUN_BYTES: Final = 3
"""Bytes that a run takes."""

_SINGLES: Final = [bytes([key]) for key in range(256)]
_SAMPLES: Final = 8
_SAMPLE_KEYS: Final = 128
_BLOCK_KEYS: Final = 16_384
"""After so many keys `encode` looks whether it is still worth it, and lets others have their turn."""

_BLOCK_RUNS: Final = 1024
"""Runs that `decode` puts together at once, in some 0.2 ms."""


class RunsError(Exception):
    """Data that is not what `encode` makes of so many keys. The message says why."""


def encode_one(key: int, count: int) -> bytes:
    """Write down `count` times, at least once, the same key."""
    whole, rest = divmod(count, RUN_MAX)
    lengths = [RUN_MAX - 1] * whole + [rest - 1] * bool(rest)
    return _little_endian(array("H", lengths)).tobytes() + _SINGLES[key] * len(lengths)


def guess(keys: Pieces) -> float:
    """Guess from a sample which part of their size keys would have as runs. Some microseconds."""
    looked, runs = 0, 0
    for part in sample(keys, _SAMPLES, _SAMPLE_KEYS):
        numbers = int.from_bytes(part, "little")
        # A byte is zero where its key has the same one before it.
        marks = (numbers ^ numbers << 8).to_bytes(len(part) + 1, "little")[1:-1]
        looked += len(part)
        runs += len(marks) - marks.count(0)
    return runs * RUN_BYTES / looked


def encode(keys: bytes, most: int) -> bytes | None:
    """Write down at least one key; None where that takes over `most` bytes. About 2 ns a key and 0.2 µs a run."""
    lengths = array("H")
    firsts = bytearray()
    pattern = _pattern(keys)
    for at in range(0, len(keys), _BLOCK_KEYS):
        found = pattern.findall(keys, at, at + _BLOCK_KEYS)
        lengths.extend(map(sub, map(len, found), repeat(1)))
        firsts += bytes(map(itemgetter(0), found))
        if len(firsts) * RUN_BYTES > most:
            return None
        give_way()
    return _little_endian(lengths).tobytes() + firsts


def decode(data: bytes | memoryview, count: int) -> bytes:
    """Return the `count` keys that data stands for. RunsError, before memory is taken, where it stands for others.

    Memory is taken for twice the keys and the data, whatever the runs are.
    """
    runs, rest = divmod(len(data), RUN_BYTES)
    if rest or not runs:
        raise RunsError(f"{len(data)} bytes are not a number of runs of {RUN_BYTES} bytes each")
    lengths = array("H")
    lengths.frombytes(data[: 2 * runs])
    _little_endian(lengths)
    total = sum(sum(lengths[block]) for block in _blocks(runs)) + runs
    if total != count:
        raise RunsError(f"its runs are of {total} keys together, not of {count}")
    keys = bytes(data[2 * runs :])
    if keys == keys[:1] * runs:
        return _repeated(keys[0], count)
    # A block at a time: each run is an object until it is joined, which takes many times the bytes of a short one.
    return b"".join(_repeat(keys[block], lengths[block]) for block in _blocks(runs))


def _blocks(runs: int) -> Iterator[slice]:
    # Others have their turn after each.
    for at in range(0, runs, _BLOCK_RUNS):
        yield slice(at, at + _BLOCK_RUNS)
        give_way()


def _repeat(keys: bytes, lengths: array[int]) -> bytes:
    return b"".join(map(mul, map(_SINGLES.__getitem__, keys), map(add, lengths, repeat(1))))


@lru_cache(2)
def _repeated(key: int, count: int) -> bytes:
    # Remembered: a guest's memory that nobody has keyed is the same chunk again and again.
    return _SINGLES[key] * count


def _pattern(keys: bytes) -> re.Pattern[bytes]:
    # What finds the runs fastest is an expression with one branch for each key that there is.
    seen = set().union(*sample((keys,), _SAMPLES, _SAMPLE_KEYS))
    for at in range(0, len(keys), _BLOCK_KEYS):
        seen.update(keys[at : at + _BLOCK_KEYS].translate(None, bytes(seen)))
        give_way()
    return re.compile(b"|".join(re.escape(_SINGLES[key]) + b"+" for key in sorted(seen)))


def _little_endian(lengths: array[int]) -> array[int]:
    if sys.byteorder == "big":
        lengths.byteswap()
    return lengths
