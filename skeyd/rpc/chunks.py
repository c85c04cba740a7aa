"""A chunk of GetSkeys, from the worker's memory to the bytes of its message."""

from __future__ import annotations

from collections.abc import Collection

from skeyd.checksum import crc32_repeated
from skeyd.encoding import codec, runs
from skeyd.storage_key import only_key
from skeyd.vms.read_ahead import ChunkRead
from skeyd.vms.reading import require_keys
from skeyd.wire import chunk_message


def write_down(chunk: ChunkRead, encodings: Collection[int]) -> tuple[bytes, int]:
    """Write a chunk down as a GetSkeysResponse, in one of the encodings or RAW: (its bytes, the keys' CRC-32).

    The same keys and encodings give the same bytes, wherever the keys lie: a stream that was cut goes on with them. The
    chunk is released when that is done. RAW keys are copied once, from where the worker has put them. What it changes
    there meanwhile doesn't fit the checksum. WORKER_FAILED where they are no keys.
    """
    frames, views = chunk.frames, chunk.views
    if views and codec.RUNS in encodings:
        only = {only_key(view) for view in views if len(view)}
        if len(only) == 1 and (key := only.pop()) is not None:
            return _one_key(chunk, key)
    views, crc32 = require_keys(chunk)
    chosen = codec.choose(views, encodings)
    if chosen != codec.RAW:
        encoding, data = codec.encode_as(chosen, b"".join(views))
        message = chunk_message(frames.start, frames.count, encoding, (data,), crc32)
    else:
        message = chunk_message(frames.start, frames.count, codec.RAW, views, crc32)
    chunk.release()
    return message, crc32


def _one_key(chunk: ChunkRead, key: int) -> tuple[bytes, int]:
    frames = chunk.frames
    require_keys(ChunkRead(frames, (memoryview(bytes([key])),)))
    chunk.release()
    crc32 = crc32_repeated(key, frames.count)
    data = runs.encode_one(key, frames.count)
    if len(data) < frames.count:
        return chunk_message(frames.start, frames.count, codec.RUNS, (data,), crc32), crc32
    return chunk_message(frames.start, frames.count, codec.RAW, (bytes([key]) * frames.count,), crc32), crc32
