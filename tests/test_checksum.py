"""CRC-32 put together from pieces is that of the whole."""

from __future__ import annotations

import zlib

from hypothesis import example, given, settings
from hypothesis import strategies as st

from skeyd.checksum import crc32_joined, crc32_repeated


@settings(deadline=None)
@given(st.binary(max_size=300), st.binary(max_size=300))
@example(b"", b"")
@example(b"", b"\x10")
@example(b"\x10", b"")
@example(b"\x10" * 7, bytes(1 << 20))
def test_the_crc_of_two_pieces_is_that_of_the_whole(first: bytes, second: bytes) -> None:
    joined = crc32_joined(zlib.crc32(first), zlib.crc32(second), len(second))
    assert joined == zlib.crc32(first + second)


@settings(deadline=None)
@given(st.integers(0, 255), st.integers(0, 5000))
def test_the_crc_of_one_byte_again_and_again_is_that_of_the_bytes(byte: int, count: int) -> None:
    assert crc32_repeated(byte, count) == zlib.crc32(bytes([byte]) * count)
    assert crc32_repeated(byte, count) == zlib.crc32(bytes([byte]) * count), "remembered"
