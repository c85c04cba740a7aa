"""GetSkeys, checked on the way: what a caller gets is what the daemon sent, whole and in order."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from skeyd.checksum import crc32_joined, crc32_repeated
from skeyd.client.errors import StreamError, translated
from skeyd.encoding import codec
from skeyd.errors import SkeydError
from skeyd.gfn import GfnRange
from skeyd.limits import MAX_CHUNK_KEYS, MAX_RANGES_BYTES
from skeyd.storage_key import first_reserved, only_key
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.wire import ChunkMessage, is_one_chunk, read_chunk_message


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of frames that follow one another."""

    frames: GfnRange
    keys: bytes
    """One byte a frame."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Frames that are in no memory slot and have no keys."""

    frames: GfnRange


@dataclass(frozen=True, slots=True)
class Position:
    """Where a stream of keys is, and all that another needs to go on there."""

    gfn: int
    """The frame that comes next; after all of them the end of the last range."""
    incarnation: str
    """The worker's."""
    crc32: int
    """Of all keys before it."""
    keys: int
    """How many those are."""
    gap_frames: int
    """Frames in gaps before it."""


class KeyStream:
    """The answer of GetSkeys: a header, then keys and gaps by iterating, once.

    Iterating raises StreamError where a checksum, the order or the trailer is wrong, ClientError where the call fails.
    A stream that ended without either was whole, and so was it together with those that it resumed.
    """

    def __init__(self, responses: Iterator[pb.GetSkeysResponse | ChunkMessage], resume: Position | None = None) -> None:
        self._responses: Iterator[Any] = responses
        with translated():
            first: Any = next(self._responses, None)
        if first is None or first.WhichOneof("part") != "header":
            raise StreamError("the stream does not begin with a header")
        self.header = first.header
        """As the contract describes it."""
        self.ranges = tuple(_frames(one.start_gfn, one.count) for one in self.header.ranges)
        self.uses_storage_keys = self.header.uses_storage_keys
        if resume is not None and resume.incarnation != self.header.incarnation:
            raise StreamError(
                f"the stream is of incarnation {self.header.incarnation!r}, not of {resume.incarnation!r}"
            )
        if resume is None:
            resume = Position(self.ranges[0].start if self.ranges else 0, self.header.incarnation, 0, 0, 0)
        self.frozen = self.header.consistency == pb.CONSISTENCY_FROZEN
        """All keys are of one moment."""
        self.frozen_seconds: float | None = None
        """How long the VMM stood still for them, after a whole stream; None before, and where nothing was frozen."""
        self.position = resume
        """After what was given out last. To resume there is to get exactly what would have followed."""

    def frames(self) -> int:
        """Frames that the stream will tell of, keys and gaps together; 0 for a guest that uses no storage keys."""
        return sum(one.count for one in self._rest())

    def __iter__(self) -> Iterator[Keys | Gap]:
        expected = iter(self._rest())
        rest: GfnRange | None = next(expected, None)
        while True:
            with translated():
                response = next(self._responses, None)
            if response is None:
                raise StreamError("the stream ended without its trailer")
            part: Keys | Gap
            before = self.position
            keys, gap_frames, crc32 = before.keys, before.gap_frames, before.crc32
            match response.WhichOneof("part"):
                case "chunk":
                    part = self._keys(response.chunk)
                    keys += part.frames.count
                    crc32 = crc32_joined(crc32, response.chunk.crc32, part.frames.count)
                case "gap":
                    part = Gap(_frames(response.gap.start_gfn, response.gap.count))
                    gap_frames += part.frames.count
                case "trailer":
                    if rest is not None:
                        raise StreamError("the stream's end came before all of its frames")
                    self._end(response.trailer)
                    return
                case other:
                    raise StreamError(f"a {other} in the middle of the stream")
            del response
            frames = part.frames
            if rest is None or frames.start != rest.start or frames.end > rest.end:
                raise StreamError(f"frames {frames} came out of order")
            rest = GfnRange(frames.end, rest.end - frames.end) if frames.end < rest.end else next(expected, None)
            gfn = rest.start if rest is not None else frames.end
            self.position = Position(gfn, before.incarnation, crc32, keys, gap_frames)
            yield part

    def _rest(self) -> Iterator[GfnRange]:
        for one in self.ranges if self.uses_storage_keys else ():
            if self.position.gfn < one.end:
                start = max(one.start, self.position.gfn)
                yield GfnRange(start, one.end - start)

    def _end(self, trailer: pb.GetSkeysResponse.Trailer) -> None:
        told = (trailer.keys, trailer.gap_frames, trailer.crc32)
        if told != (self.position.keys, self.position.gap_frames, self.position.crc32):
            raise StreamError("the stream's end does not match what came before it")
        if self.frozen:
            self.frozen_seconds = trailer.frozen_time.seconds + trailer.frozen_time.nanos / 1e9
        with translated():
            if next(self._responses, None) is not None:
                raise StreamError("the stream goes on after its trailer")

    def _keys(self, chunk: pb.Chunk | ChunkMessage) -> Keys:
        frames = _frames(chunk.start_gfn, chunk.count)
        if chunk.encoding != codec.RAW and chunk.encoding not in self.header.encodings:
            raise StreamError(f"chunk {frames} has encoding {chunk.encoding}, which the header doesn't tell of")
        if chunk.count > MAX_CHUNK_KEYS:
            raise StreamError(f"chunk {frames} has more than {MAX_CHUNK_KEYS} keys")
        try:
            keys = bytes(codec.decode(chunk.encoding, chunk.data, chunk.count))
        except SkeydError as error:
            raise StreamError(f"chunk {frames} is not what it should be: {error.message}") from error
        only = only_key(keys)
        if (zlib.crc32(keys) if only is None else crc32_repeated(only, len(keys))) != chunk.crc32:
            raise StreamError(f"the keys of chunk {frames} are not those that were sent")
        if first_reserved(keys if only is None else keys[:1]) is not None:
            raise StreamError(f"chunk {frames} has a key with the reserved bit 0x01")
        return Keys(frames, keys)


def get_skeys_response(message: bytes) -> pb.GetSkeysResponse | ChunkMessage:
    """Parse a message of the stream, as skeyd.wire does where it can. StreamError for a header of absurd size.

    Parsed it would take many times its bytes.
    """
    chunk = read_chunk_message(message)
    if chunk is not None:
        return chunk
    if len(message) > MAX_RANGES_BYTES and not is_one_chunk(message):
        raise StreamError(f"the stream has a message of {len(message)} bytes, and it is no chunk")
    return pb.GetSkeysResponse.FromString(message)


def _frames(start: int, count: int) -> GfnRange:
    try:
        return GfnRange(start, count)
    except SkeydError as error:
        raise StreamError(f"the stream tells of an impossible range: {error.message}") from error
