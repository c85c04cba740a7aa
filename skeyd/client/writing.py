"""SetSkeys: the messages of a stream, and what its answers come to."""

from __future__ import annotations

import queue
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from skeyd.checksum import crc32_joined
from skeyd.client.errors import OtherKeysError, StreamError
from skeyd.client.reading import Keys
from skeyd.client.slices import set_slice_time
from skeyd.encoding import codec
from skeyd.gfn import GfnRange
from skeyd.storage_key import only_key
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
    incarnation: str = ""
    """The VM that is meant, by its worker's incarnation: what is sent again is never applied to another that has its
    name by then (ClientError VM_REPLACED). Empty: any."""
    expected: KeysDigest | None = None
    """What the keys of the ranges must be before anything is set."""
    resulting: KeysDigest | None = None
    """What they must be after the last chunk, or all is rolled back. Not with `keep`."""
    slice_seconds: float | None = None
    """How long one ioctl may keep the kernel's lock, about; None: as long as the daemon says."""
    encodings: Collection[int] = codec.KNOWN
    """Those of skeyd.encoding.codec that chunks may have, if the daemon reads them; none but RAW is cheapest on one's
    own machine."""


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

    No chunk is looked at before the daemon has begun: it says there which encodings it reads, and where to go on. Where
    it answers without beginning, it remembers the request_id; `result` then takes the chunks, to compare their sum.

    Synchronization: each half is one thread's, and only one of them takes chunks.
    """

    def __init__(self, vm: str, ranges: Sequence[GfnRange], chunks: Iterable[Keys], options: SetOptions) -> None:
        self._vm = vm
        self._ranges = ranges
        self._chunks = chunks
        self._options = options
        self._begun: queue.SimpleQueue[pb.SetSkeysResponse.Begun | None] = queue.SimpleQueue()
        self._sum: _Sum | None = None
        """Of all keys. None: some are still to be sent."""
        self.raised: BaseException | None = None
        """What the chunks' iterator raised; the stream then ended without Commit."""

    def requests(self) -> Iterator[pb.SetSkeysRequest | bytes]:
        """Write the stream down, Commit included; chunks as the bytes that they are on the wire."""
        options = self._options
        header = pb.SetSkeysRequest.Header(
            vm=self._vm,
            ranges=[vm_pb2.GfnRange(start_gfn=one.start, count=one.count) for one in self._ranges],
            allow_enable=options.allow_enable,
            on_interrupt=pb.ON_INTERRUPT_KEEP if options.keep else pb.ON_INTERRUPT_ROLL_BACK,
            validate_only=options.validate_only,
            request_id=options.request_id,
            resume=options.resume,
            expected_digest=_digest_message(options.expected),
            resulting_digest=_digest_message(options.resulting),
            incarnation=options.incarnation,
        )
        set_slice_time(header, options.slice_seconds)
        yield pb.SetSkeysRequest(header=header)
        begun = self._begun.get()
        if begun is None:
            return  # the call is over, and its status says why
        encodings = set(begun.encodings).intersection(options.encodings)
        done = _Sum(begun.keys_set, begun.crc32)
        try:
            for chunk in _rest(iter(self._chunks), begun.keys_set, begun.crc32):
                keys = bytes(chunk.keys)
                crc32 = zlib.crc32(keys)
                encoding, data = codec.encode(keys, encodings, only_key(keys)) if encodings else (codec.RAW, keys)
                done.add(len(keys), crc32)
                yield chunk_message(chunk.frames.start, chunk.frames.count, encoding, (data,), crc32)
        except Exception as error:  # grpc would swallow it
            self.raised = error
            raise
        self._sum = done
        yield pb.SetSkeysRequest(commit=pb.SetSkeysRequest.Commit())

    def result(
        self, responses: Iterator[pb.SetSkeysResponse], progress: Callable[[int], None] | None = None
    ) -> SetResult:
        """Take the answers; `progress` is told how many keys are set so far.

        StreamError where they don't fit, OtherKeysError where they are those of a call that had other keys.
        """
        begun = False
        result: SetResult | None = None
        try:
            for response in responses:  # to its end: the status comes after the result
                part = response.WhichOneof("part")
                if result is not None or ((part == "begun") == begun and part != "result"):
                    raise StreamError(f"a {part} in the wrong place of the stream")
                match part:
                    case "begun":
                        begun = True
                        self._begun.put(response.begun)
                        if progress is not None and response.begun.keys_set:
                            progress(response.begun.keys_set)
                    case "progress" if progress is not None:
                        progress(response.progress.keys_set)
                    case "result":
                        if not begun:
                            self._begun.put(None)
                        result = self._checked(response.result, begun)
        finally:
            self._begun.put(None)
        if result is None:
            raise StreamError("the daemon ended the stream without a result")
        return result

    def _checked(self, done: pb.SetSkeysResponse.Result, begun: bool) -> SetResult:
        wanted = sum(one.count for one in self._ranges)
        if done.keys_set != wanted:
            raise StreamError(f"the daemon says that it set {done.keys_set} keys of {wanted}")
        validated = done.outcome == pb.SetSkeysResponse.OUTCOME_VALIDATED
        if validated != self._options.validate_only:
            raise StreamError(f"the daemon says that keys were {'only checked' if validated else 'set'}")
        if begun:
            self._require_sent(done)
        else:
            self._require_same(done)
        return SetResult(done.keys_set, done.keys_repaired, done.enabled, validated)

    def _require_sent(self, done: pb.SetSkeysResponse.Result) -> None:
        if self._sum is None:
            raise StreamError("the daemon says that all keys are set before all were sent")
        if done.crc32 != self._sum.crc32:
            raise StreamError(
                f"the daemon says that the keys that it set have CRC-32 {done.crc32:#010x}, and those that it was sent "
                f"have {self._sum.crc32:#010x}"
            )

    def _require_same(self, done: pb.SetSkeysResponse.Result) -> None:
        # The daemon knows the request by its header, and what it set before may have been other keys.
        request_id = self._options.request_id
        if not request_id or self._options.validate_only:
            raise StreamError("the daemon gave a result without Begun, and there is nothing that it could remember")
        mine = _Sum()
        for chunk in self._chunks:
            mine.add(chunk.frames.count, zlib.crc32(chunk.keys))
        if (mine.keys, mine.crc32) != (done.keys_set, done.crc32):
            raise OtherKeysError(
                f"request_id {request_id!r} was applied before with other keys (CRC-32 {done.crc32:#010x}) than the "
                f"{mine.keys} of this call (CRC-32 {mine.crc32:#010x}), of which none was set"
            )


@dataclass(slots=True)
class _Sum:
    # How many keys, and their CRC-32.
    keys: int = 0
    crc32: int = 0

    def add(self, count: int, crc32: int) -> None:
        # So many keys more, which have this CRC-32.
        self.keys += count
        self.crc32 = crc32_joined(self.crc32, crc32, count)


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
