"""Streams of keys, checked on the way: what a caller gets is what the daemon sent, whole and in order."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from skeyd.client.errors import StreamError, translated
from skeyd.errors import SkeydError
from skeyd.gfn import GfnRange
from skeyd.storage_key import StorageKey, first_reserved
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2

CHUNK_KEYS: Final = 262_144
"""Keys in a chunk that this client sends."""


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
class SetResult:
    """What a SetSkeys came to."""

    keys_set: int
    keys_repaired: int
    """How many the kernel had lost at first."""
    enabled: bool
    """The guest uses storage keys since this call."""


@dataclass(frozen=True, slots=True)
class OneKey:
    """The key of one frame."""

    key: int | None
    """None: the guest uses no storage keys."""
    call: str
    """The kernel's call that read it: "keyop" or "skeys"."""


@dataclass(frozen=True, slots=True)
class OneKeySet:
    """What setting the key of one frame came to."""

    old_key: int | None
    """None: the guest used no storage keys."""
    repaired: bool
    """The kernel had lost it at first."""
    enabled: bool
    """The guest uses storage keys since this call."""
    call: str
    """As in OneKey. Only with "keyop" were the old key read and the new one set in one step."""


class KeyStream:
    """The answer of GetSkeys: a header, then keys and gaps by iterating, once.

    Iterating raises StreamError where a checksum, the order or the trailer is wrong, ClientError where the call fails.
    A stream that ended without either was whole.
    """

    def __init__(self, responses: Iterator[pb.GetSkeysResponse]) -> None:
        self._responses = responses
        with translated():
            first = next(responses, None)
        if first is None or first.WhichOneof("part") != "header":
            raise StreamError("the stream does not begin with a header")
        self.header = first.header
        """As the contract describes it."""
        self.ranges = tuple(_frames(one.start_gfn, one.count) for one in self.header.ranges)
        self.uses_storage_keys = self.header.uses_storage_keys

    def frames(self) -> int:
        """Frames that the stream will tell of, keys and gaps together; 0 for a guest that uses no storage keys."""
        return sum(one.count for one in self.ranges) if self.uses_storage_keys else 0

    def __iter__(self) -> Iterator[Keys | Gap]:
        expected = iter(self.ranges if self.uses_storage_keys else ())
        rest: GfnRange | None = next(expected, None)
        keys, gap_frames, crc32 = 0, 0, 0
        while True:
            with translated():
                response = next(self._responses, None)
            if response is None:
                raise StreamError("the stream ended without its trailer")
            part: Keys | Gap
            match response.WhichOneof("part"):
                case "chunk":
                    part = self._keys(response.chunk)
                    keys += part.frames.count
                    crc32 = zlib.crc32(part.keys, crc32)
                case "gap":
                    part = Gap(_frames(response.gap.start_gfn, response.gap.count))
                    gap_frames += part.frames.count
                case "trailer":
                    trailer = response.trailer
                    if rest is not None or (keys, gap_frames, crc32) != (
                        trailer.keys,
                        trailer.gap_frames,
                        trailer.crc32,
                    ):
                        raise StreamError("the stream's end does not match what came before it")
                    with translated():
                        if next(self._responses, None) is not None:
                            raise StreamError("the stream goes on after its trailer")
                    return
                case other:
                    raise StreamError(f"a {other} in the middle of the stream")
            frames = part.frames
            if rest is None or frames.start != rest.start or frames.end > rest.end:
                raise StreamError(f"frames {frames} came out of order")
            rest = GfnRange(frames.end, rest.end - frames.end) if frames.end < rest.end else next(expected, None)
            yield part

    def _keys(self, chunk: pb.Chunk) -> Keys:
        frames = _frames(chunk.start_gfn, chunk.count)
        if chunk.encoding != pb.ENCODING_RAW:
            raise StreamError(f"chunk {frames} has the unknown encoding {chunk.encoding}")
        if len(chunk.data) != chunk.count or zlib.crc32(chunk.data) != chunk.crc32:
            raise StreamError(f"the keys of chunk {frames} are not those that were sent")
        if first_reserved(chunk.data) is not None:
            raise StreamError(f"chunk {frames} has a key with the reserved bit 0x01")
        return Keys(frames, chunk.data)


def _frames(start: int, count: int) -> GfnRange:
    try:
        return GfnRange(start, count)
    except SkeydError as error:
        raise StreamError(f"the stream tells of an impossible range: {error.message}") from error


def set_requests(
    vm: str, ranges: Sequence[GfnRange], chunks: Iterable[Keys], allow_enable: bool
) -> Iterator[pb.SetSkeysRequest]:
    """Write down a SetSkeys stream, Commit included."""
    messages = [vm_pb2.GfnRange(start_gfn=one.start, count=one.count) for one in ranges]
    yield pb.SetSkeysRequest(header=pb.SetSkeysRequest.Header(vm=vm, ranges=messages, allow_enable=allow_enable))
    for chunk in chunks:
        yield pb.SetSkeysRequest(
            chunk=pb.Chunk(
                start_gfn=chunk.frames.start,
                count=chunk.frames.count,
                encoding=pb.ENCODING_RAW,
                data=chunk.keys,
                crc32=zlib.crc32(chunk.keys),
            )
        )
    yield pb.SetSkeysRequest(commit=pb.SetSkeysRequest.Commit())


def set_result(responses: Iterator[pb.SetSkeysResponse], progress: Callable[[int], None] | None) -> SetResult:
    """Take the answers of a SetSkeys stream; `progress` is told how many keys are set so far."""
    result: SetResult | None = None
    for response in responses:  # to its end: the status comes after the result
        match response.WhichOneof("part"):
            case "result":
                done = response.result
                result = SetResult(done.keys_set, done.keys_repaired, done.enabled)
            case "progress" if progress is not None:
                progress(response.progress.keys_set)
    if result is None:
        raise StreamError("the daemon ended the stream without a result")
    return result


def repeated(key: int, ranges: Sequence[GfnRange]) -> Iterator[Keys]:
    """Give every frame of the ranges one key, in chunks."""
    for one in ranges:
        for start in range(one.start, one.end, CHUNK_KEYS):
            count = min(CHUNK_KEYS, one.end - start)
            yield Keys(GfnRange(start, count), bytes([key]) * count)


def one_key(response: pb.GetSkeyResponse) -> OneKey:
    """Take the answer of GetSkey. StreamError for a key that is none."""
    key = response.key if response.HasField("key") else None
    return OneKey(_checked(key), _call_name(response.call))


def one_key_set(response: pb.SetSkeyResponse) -> OneKeySet:
    """Take the answer of SetSkey. StreamError for a key that is none."""
    old = response.old_key if response.HasField("old_key") else None
    return OneKeySet(_checked(old), response.repaired, response.enabled, _call_name(response.call))


def _checked(key: int | None) -> int | None:
    if key is not None:
        try:
            StorageKey.from_byte(key)
        except ValueError as error:
            raise StreamError(f"the daemon tells of an impossible key: {error}") from None
    return key


def _call_name(call: pb.KeyCall.ValueType) -> str:
    return {pb.KEY_CALL_KEYOP: "keyop", pb.KEY_CALL_SKEYS: "skeys"}.get(call, "")
