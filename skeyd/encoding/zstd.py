"""ENCODING_ZSTD: one Zstandard frame (RFC 8878) that says its content's size. Needs the package zstandard."""

from __future__ import annotations

import threading
from typing import Any, Final

from skeyd.encoding.sample import Pieces, sample

try:
    import zstandard
except ImportError:
    zstandard = None  # type: ignore[assignment]

AVAILABLE: Final = zstandard is not None
"""Whether the package is there. Without it nothing here may be called."""

_LEVEL: Final = 1
_SAMPLES: Final = 16
_SAMPLE_KEYS: Final = 512
_WINDOW_MAX: Final = 1 << 23
"""Bytes that a decoder must be ready to keep: what RFC 8878 (3.1.1.1.2) recommends to support."""


class ZstdError(Exception):
    """Data that is not one frame of so many keys. The message says why."""


class _Tools(threading.local):
    # Neither may be used by two threads at once.
    def __init__(self) -> None:
        self.compressor: Any = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True, write_dict_id=False)
        self.decompressor: Any = zstandard.ZstdDecompressor(max_window_size=_WINDOW_MAX)


_tools = _Tools() if AVAILABLE else None


def guess(keys: Pieces) -> float:
    """Guess from a sample which part of their size keys would have. Some 20 microseconds."""
    looked = b"".join(sample(keys, _SAMPLES, _SAMPLE_KEYS))
    return len(encode(looked)) / len(looked)


def encode(keys: bytes) -> bytes:
    """Write keys down."""
    assert _tools is not None  # noqa: S101  a mistake of the caller's
    frame: bytes = _tools.compressor.compress(keys)
    return frame


def decode(data: bytes | memoryview, count: int) -> bytes:
    """Return the `count` keys that data stands for. ZstdError, before memory is taken, where it says it has others.

    What it then has beyond what it said is never unpacked.
    """
    assert _tools is not None  # noqa: S101  a mistake of the caller's
    try:
        about = zstandard.get_frame_parameters(data)
        if not data[:4] == zstandard.FRAME_HEADER:
            raise ZstdError("it is no Zstandard frame")
        if about.content_size != count:
            # A frame that doesn't say gives a number that is no count.
            raise ZstdError(f"its frame doesn't say that it has {count} keys")
        if about.dict_id:
            raise ZstdError("its frame needs a dictionary")
        if about.window_size > _WINDOW_MAX:
            raise ZstdError(f"its frame needs a window of {about.window_size} bytes, over {_WINDOW_MAX}")
        keys: bytes = _tools.decompressor.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ZstdError(str(error)) from None
    if len(keys) != count:
        raise ZstdError(f"its frame has {len(keys)} keys, not {count}")
    return keys
