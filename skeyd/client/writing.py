"""SetSkeys: the messages of a stream, and what its answers come to."""

from __future__ import annotations

import queue
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from skeyd.client.errors import StreamError
from skeyd.client.reading import Keys
from skeyd.encoding import codec
from skeyd.gfn import GfnRange
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2
from skeyd.wire import chunk_message

CHUNK_KEYS: Final = 262_144
"""Keys in a chunk that this client sends."""


@dataclass(frozen=True, slots=True)
class KeysDigest:
    """The digest of keys: the root of their hash tree (skeyd.digest)."""

    sha256: bytes
    """32 bytes."""
    with_referenced_changed: bool = False
    """It covers R and C too."""


@dataclass(frozen=True, slots=True)
class SetOptions:
    """How keys are to be set. The contract (proto/skeyd/v1, SetSkeysRequest.Header) says more of each."""

    allow_enable: bool = False
    """Keys may be enabled for a guest that uses none. That can't be undone."""
    keep: bool = False
    """What was set stays when the call ends in the middle; else the old keys are set again."""
    validate_only: bool = False
    """Check everything and change nothing."""
    request_id: str = ""
    """Names the request: it may be sent again, and is applied once. 1 to 128 printable ASCII characters."""
    resume: bool = False
    """Go on with the call of this request_id that had `keep` and was cut. The chunks are all of them once more."""
    expected: KeysDigest | None = None
    """What the keys of the ranges must be before anything is set."""
    resulting: KeysDigest | None = None
    """What they must be after the last chunk, or all is rolled back."""


@dataclass(frozen=True, slots=True)
class SetResult:
    """What a SetSkeys came to."""

    keys_set: int
    """With validate_only: keys checked."""
    keys_repaired: int
    """How many the kernel had lost at first."""
    enabled: bool
    """The guest uses storage keys since this call."""
    validated_only: bool = False
    """Nothing was set."""


class SetCall:
    """The two halves of one SetSkeys: `requests` is what is sent, `result` takes what comes back.

    Synchronization: each half is one thread's.
    """

    def __init__(self, vm: str, ranges: Sequence[GfnRange], chunks: Iterable[Keys], options: SetOptions) -> None:
        self._vm = vm
        self._ranges = ranges
        self._chunks = chunks
        self._options = options
        self._begun: queue.SimpleQueue[pb.SetSkeysResponse.Begun | None] = queue.SimpleQueue()
        self.raised: BaseException | None = None
        """What the chunks' iterator raised; the stream then ended without Commit."""

    def requests(self) -> Iterator[pb.SetSkeysRequest | bytes]:
        """Write the stream down, Commit included; chunks as the bytes that they are on the wire."""
        options = self._options
        yield pb.SetSkeysRequest(
            header=pb.SetSkeysRequest.Header(
                vm=self._vm,
                ranges=[vm_pb2.GfnRange(start_gfn=one.start, count=one.count) for one in self._ranges],
                allow_enable=options.allow_enable,
                on_interrupt=pb.ON_INTERRUPT_KEEP if options.keep else pb.ON_INTERRUPT_ROLL_BACK,
                validate_only=options.validate_only,
                request_id=options.request_id,
                resume=options.resume,
                expected_digest=_digest_message(options.expected),
                resulting_digest=_digest_message(options.resulting),
            )
        )
        try:
            chunks = iter(self._chunks)
            if options.resume:
                begun = self._begun.get()
                if begun is None:
                    return  # the call is over, and its status says why
                chunks = _rest(chunks, begun.keys_set, begun.crc32)
            for chunk in chunks:
                yield chunk_message(
                    chunk.frames.start, chunk.frames.count, codec.RAW, (chunk.keys,), zlib.crc32(chunk.keys)
                )
        except Exception as error:  # grpc would swallow it
            self.raised = error
            raise
        yield pb.SetSkeysRequest(commit=pb.SetSkeysRequest.Commit())

    def result(
        self, responses: Iterator[pb.SetSkeysResponse], progress: Callable[[int], None] | None = None
    ) -> SetResult:
        """Take the answers; `progress` is told how many keys are set so far. StreamError where they don't fit."""
        result: SetResult | None = None
        try:
            for response in responses:  # to its end: the status comes after the result
                match response.WhichOneof("part"):
                    case "begun":
                        self._begun.put(response.begun)
                        if progress is not None and response.begun.keys_set:
                            progress(response.begun.keys_set)
                    case "progress" if progress is not None:
                        progress(response.progress.keys_set)
                    case "result":
                        result = self._checked(response.result)
        finally:
            self._begun.put(None)
        if result is None:
            raise StreamError("the daemon ended the stream without a result")
        return result

    def _checked(self, done: pb.SetSkeysResponse.Result) -> SetResult:
        wanted = sum(one.count for one in self._ranges)
        if done.keys_set != wanted:
            raise StreamError(f"the daemon says that it set {done.keys_set} keys of {wanted}")
        validated = done.outcome == pb.SetSkeysResponse.OUTCOME_VALIDATED
        if validated != self._options.validate_only:
            raise StreamError(f"the daemon says that keys were {'only checked' if validated else 'set'}")
        return SetResult(done.keys_set, done.keys_repaired, done.enabled, validated)


def _digest_message(digest: KeysDigest | None) -> pb.KeysDigest | None:
    if digest is None:
        return None
    return pb.KeysDigest(sha256=digest.sha256, with_referenced_changed=digest.with_referenced_changed)


def _rest(chunks: Iterator[Keys], keys_set: int, crc32: int) -> Iterator[Keys]:
    # What is left of the chunks after so many keys, which must be those that the daemon has.
    found = 0
    while keys_set:
        chunk = next(chunks, None)
        if chunk is None:
            raise StreamError(f"the daemon goes on after {keys_set} keys more than there are")
        done = min(keys_set, chunk.frames.count)
        keys_set -= done
        found = zlib.crc32(memoryview(chunk.keys)[:done], found)
        if done < chunk.frames.count:
            frames = GfnRange(chunk.frames.start + done, chunk.frames.count - done)
            chunks = chain([Keys(frames, chunk.keys[done:])], chunks)
    if found != crc32:
        raise StreamError("the keys that the daemon has set are not those that this call begins with")
    yield from chunks


def written(request: pb.SetSkeysRequest | bytes) -> bytes:
    """Return a message as it is on the wire."""
    return request if isinstance(request, bytes) else request.SerializeToString()


def repeated(key: int, ranges: Sequence[GfnRange]) -> Iterator[Keys]:
    """Give every frame of the ranges one key, in chunks."""
    for one in ranges:
        for start in range(one.start, one.end, CHUNK_KEYS):
            count = min(CHUNK_KEYS, one.end - start)
            yield Keys(GfnRange(start, count), bytes([key]) * count)
