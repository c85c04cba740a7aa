"""Which encoding a chunk gets, and its keys again. The numbers are those of skeyd.v1.Encoding; a test compares them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from skeyd.encoding import runs, zstd
from skeyd.encoding.sample import Pieces
from skeyd.errors import Reason, SkeydError

RAW: Final = 1
"""One byte a key."""
RUNS: Final = 2
"""skeyd.encoding.runs."""
ZSTD: Final = 3
"""skeyd.encoding.zstd."""

KNOWN: Final = (RAW, RUNS, *((ZSTD,) if zstd.AVAILABLE else ()))
"""What this program can write and read, the cheapest first."""

NAMES: Final = {RAW: "ENCODING_RAW", RUNS: "ENCODING_RUNS", ZSTD: "ENCODING_ZSTD"}
"""As the contract has them."""

_RUNS_GOOD: Final = 0.125
"""Part of the raw size up to which runs are worth the time that they take: above, 1 Gbit/s are faster with raw keys."""
_RUNS_MOST: Final = 0.25
"""Where more come than a sample let expect."""
_ZSTD_GOOD: Final = 0.5


def encode(keys: bytes, offered: Collection[int], only_key: int | None) -> tuple[int, bytes]:
    """Write at least one key down in one of the offered encodings, or RAW: (which, data).

    `only_key` is what skeyd.storage_key.only_key says of them. The same keys give the same data, whatever was before.
    What is random is given up after some 20 microseconds.
    """
    if RUNS in offered and only_key is not None:
        data = runs.encode_one(only_key, len(keys))
        return (RUNS, data) if len(data) < len(keys) else (RAW, keys)
    return encode_as(choose((keys,), offered), keys)


def encode_as(chosen: int, keys: bytes) -> tuple[int, bytes]:
    """Write keys down in the encoding that was chosen, or RAW where the sample has misled: (which, data)."""
    data: bytes | None
    if chosen == ZSTD:
        data = zstd.encode(keys)
        if len(data) < len(keys) * _ZSTD_GOOD:
            return ZSTD, data
    elif chosen == RUNS:
        data = runs.encode(keys, int(len(keys) * _RUNS_MOST))
        if data:
            return RUNS, data
    return RAW, keys


def choose(keys: Pieces, offered: Collection[int]) -> int:
    """Guess from a sample which of the offered encodings, or RAW, fits keys.

    Nothing else has a say, so that a chunk is the same bytes whenever it is read and wherever its memory ends.
    """
    if ZSTD in offered and zstd.AVAILABLE:
        # Several times as fast as runs that are found in Python, and shorter.
        return ZSTD if zstd.guess(keys) <= _ZSTD_GOOD else RAW
    return RUNS if RUNS in offered and runs.guess(keys) <= _RUNS_GOOD else RAW


def decode(encoding: int, data: bytes | memoryview, count: int) -> bytes | memoryview:
    """Return the `count` keys of a chunk: `data` itself if they are RAW.

    SkeydError ENCODING_UNSUPPORTED, CHUNK_SIZE_MISMATCH for RAW data of another size, CHUNK_ENCODING_INVALID for data
    that doesn't stand for exactly `count` keys, or takes as many bytes as they do. Memory is taken when that is known.
    """
    if encoding not in KNOWN:
        known = ", ".join(NAMES[one] for one in KNOWN)
        name = NAMES.get(encoding, "none that there is")
        raise SkeydError(
            Reason.ENCODING_UNSUPPORTED, f"encoding {encoding} of a chunk is {name}; what is known here is {known}"
        )
    if encoding == RAW:
        if len(data) != count:
            raise SkeydError(Reason.CHUNK_SIZE_MISMATCH, f"it has {len(data)} keys and a count of {count}")
        return data
    if len(data) >= count:
        raise SkeydError(
            Reason.CHUNK_ENCODING_INVALID,
            f"{len(data)} bytes of {NAMES[encoding]} are no fewer than the {count} keys that they stand for",
        )
    try:
        return runs.decode(data, count) if encoding == RUNS else zstd.decode(data, count)
    except (runs.RunsError, zstd.ZstdError) as error:
        raise SkeydError(Reason.CHUNK_ENCODING_INVALID, f"{NAMES[encoding]}: {error}") from None
