"""Keys in a Zstandard frame: back and forth, and frames that say too much, too little or not what they hold."""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from skeyd.encoding import zstd
from skeyd.encoding.zstd import ZstdError, decode, encode, guess
from tests.rpc.stubs import some_keys

ROOT: Final = Path(__file__).parents[2]
THREADS: Final = 4
LINUX_LIKE = (b"\x06" * 90 + b"\x00" * 30 + b"\x16" * 60) * 100


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=2000))
def test_what_is_written_is_read_again(keys: bytes) -> None:
    data = encode(keys)
    assert decode(data, len(keys)) == keys
    assert decode(memoryview(data), len(keys)) == keys


def test_the_frame_says_how_many_keys_it_has_and_needs_no_dictionary() -> None:
    about = zstandard.get_frame_parameters(encode(LINUX_LIKE))
    assert (about.content_size, about.dict_id) == (len(LINUX_LIKE), 0)


def test_a_guess_tells_runs_from_noise() -> None:
    assert guess((LINUX_LIKE,)) < 0.3
    assert guess((some_keys(1 << 20),)) > 0.8
    assert guess((b"\x10",)) > 0


_IN_THREADS = """
import random, sys, threading
from concurrent.futures import ThreadPoolExecutor
from skeyd.encoding.zstd import decode, encode

THREADS = int(sys.argv[1])
start = threading.Barrier(THREADS)


def run(seed):
    rng = random.Random(seed)
    keys = b"".join(bytes([rng.randrange(0, 256, 2)]) * rng.randrange(1, 90) for _ in range(4000))
    start.wait()
    return all(decode(encode(keys), len(keys)) == keys for _ in range(150))


with ThreadPoolExecutor(THREADS) as pool:
    print(list(pool.map(run, range(THREADS))))
"""


def test_threads_that_encode_and_decode_at_once_have_each_their_own_keys() -> None:
    # In a process of its own: threads that share a compressor end it with a segmentation fault, if all goes well.
    done = subprocess.run(
        [sys.executable, "-c", _IN_THREADS, str(THREADS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{[True] * THREADS}\n"), done.stderr


def test_no_two_threads_have_the_same_tools() -> None:
    assert zstd._tools is not None
    tools, start = zstd._tools, threading.Barrier(THREADS)

    def mine(_: int) -> tuple[Any, Any]:
        start.wait()  # each of them in a thread
        return tools.compressor, tools.decompressor

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(mine, range(THREADS)))
    for kind in zip(*found, strict=True):
        assert len(set(map(id, kind))) == THREADS


def _sizeless(keys: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(keys)


def _lying(keys: bytes, size: int) -> bytes:
    # A single-segment frame whose 4-byte content size says something else.
    honest = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=20)).compress(
        keys
    )
    assert honest[4] & 0xE0 == 0xA0, "single segment, 4 bytes of size"
    assert struct.unpack_from("<I", honest, 5)[0] == len(keys)
    return honest[:5] + struct.pack("<I", size) + honest[9:]


_MANY = LINUX_LIKE * 10

BAD: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 0),
    "no frame": (b"\x10" * 20, 20),
    "one key fewer": (encode(LINUX_LIKE), len(LINUX_LIKE) + 1),
    "one key more": (encode(LINUX_LIKE), len(LINUX_LIKE) - 1),
    "no size": (_sizeless(LINUX_LIKE), len(LINUX_LIKE)),
    "no size and no count": (_sizeless(LINUX_LIKE), 0),
    "cut": (encode(LINUX_LIKE)[:-1], len(LINUX_LIKE)),
    "cut in its head": (encode(LINUX_LIKE)[:5], len(LINUX_LIKE)),
    "something after it": (encode(LINUX_LIKE) + b"\0", len(LINUX_LIKE)),
    "a second frame": (encode(LINUX_LIKE) * 2, len(LINUX_LIKE)),
    "a frame to be skipped first": (struct.pack("<II", 0x184D2A50, 4) + b"\0" * 4 + encode(LINUX_LIKE), 1),
    "a frame to be skipped only": (struct.pack("<II", 0x184D2A50, 4) + b"\0" * 4, 4),
    "says fewer than it has": (_lying(_MANY, len(_MANY) - 1), len(_MANY) - 1),
    "says far fewer than it has": (_lying(_MANY, 70_000), 70_000),
    "says more than it has": (_lying(_MANY, len(_MANY) + 1), len(_MANY) + 1),
}


@pytest.mark.parametrize(("data", "count"), BAD.values(), ids=BAD)
def test_data_that_stands_for_other_keys_is_refused(data: bytes, count: int) -> None:
    with pytest.raises(ZstdError) as refused:
        decode(data, count)
    assert str(refused.value)


def test_a_window_that_a_decoder_need_not_have_is_refused_by_name() -> None:
    # Streamed, so that the frame isn't a single segment and has a window of its own, of 16 MiB.
    writer = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=24, enable_ldm=True)
    ).compressobj(size=1 << 25)
    keys = b"\x10" * (1 << 25)
    data = writer.compress(keys) + writer.flush()
    assert zstandard.get_frame_parameters(data).window_size == 1 << 24
    with pytest.raises(ZstdError, match="window"):
        decode(data, 1 << 25)


def test_a_frame_with_a_dictionary_is_refused() -> None:
    samples: list[Any] = [bytes([key, 6, 0, 16] * 64) for key in range(0, 256, 2)] * 8
    dictionary = zstandard.train_dictionary(1024, samples)
    data = zstandard.ZstdCompressor(dict_data=dictionary).compress(LINUX_LIKE)
    assert zstandard.get_frame_parameters(data).dict_id
    with pytest.raises(ZstdError, match="dictionary"):
        decode(data, len(LINUX_LIKE))


def test_a_bomb_is_refused_before_memory_is_spent() -> None:
    bomb = encode(b"\x10" * (256 << 20))
    assert len(bomb) < 64 << 10
    tracemalloc.start()
    try:
        with pytest.raises(ZstdError):
            decode(bomb, 1 << 20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@settings(deadline=None)
@given(st.binary(max_size=100), st.integers(0, 300))
def test_any_bytes_are_refused_unless_they_are_a_frame(data: bytes, count: int) -> None:
    for tried in (data, b"\x28\xb5\x2f\xfd" + data):
        try:
            keys = decode(tried, count)
        except ZstdError:
            continue
        assert len(keys) == count


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_gives_so_many_keys_or_a_refusal(at: int, byte: int) -> None:
    data = bytearray(encode(LINUX_LIKE))
    data[at % len(data)] = byte
    try:
        keys = decode(bytes(data), len(LINUX_LIKE))
    except ZstdError:
        return
    assert len(keys) == len(LINUX_LIKE)
