"""From chunks to a guest's keys: what SetSkeys takes, checked whole before the kernel sees any of it, all or none."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from skeyd.checksum import crc32_joined
from skeyd.digest import Digester
from skeyd.errors import Reason, SkeydError, reserved_bit
from skeyd.gfn import GfnRange, Ranges
from skeyd.limits import DEFAULT_SLICE_SECONDS, ROLL_BACK_STALL_SECONDS
from skeyd.storage_key import look_through
from skeyd.vms.pacing import Pace
from skeyd.vms.reading import KeysRead, read
from skeyd.vms.session import Session
from skeyd.worker.outcomes import Begun, LastWrite
from skeyd.worker.protocol import SLICE_KEYS

UNCHANGED: Final = "UNCHANGED"
UNKNOWN: Final = "UNKNOWN"
_TOLD_HERE: Final = ("outcome", "dirty", "next_gfn", "keys_set", "crc32")
"""What an error says of the keys is the front's to say: a worker's own words of it would be believed beside that."""

_PAUSE_SECONDS: Final = 0.001
_MOST_PAUSE_SECONDS: Final = 0.25
"""Between questions how far a rollback has come, where it has come no further: twice as long each time."""


@dataclass(frozen=True, slots=True)
class KeysDigest:
    """The digest of keys: the root of their hash tree (skeyd.digest)."""

    sha256: bytes
    with_referenced_changed: bool


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """How keys are to be set."""

    allow_enable: bool = False
    keep: bool = False
    """What was set stays when the call ends without Commit; else it is rolled back."""
    validate_only: bool = False
    request_id: str = ""
    """Empty: the call can be neither repeated nor resumed."""
    fingerprint: str = "0" * 64
    """Of the request, 64 hexadecimal digits: a request_id stands for one of them."""
    resume: bool = False
    """Go on with the call of this request_id that was cut and kept."""
    expected: KeysDigest | None = None
    """What the keys of the ranges must be before anything is set."""
    resulting: KeysDigest | None = None
    """What they must be after the last chunk."""
    slice_seconds: float = DEFAULT_SLICE_SECONDS
    """How long one ioctl may keep the kernel's lock."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it has come."""

    next_gfn: int
    """The frame that the next chunk must begin with; after the last one the end of the last range."""
    keys_set: int
    """With validate_only: keys checked."""
    keys_repaired: int
    enabled: bool
    """This call made the guest use storage keys."""
    crc32: int
    """Of those keys, in order."""


class KeyWriting:
    """One SetSkeys: ranges known beforehand, filled by chunks in order.

    Every SkeydError out of `told` carries the metadata "outcome": UNCHANGED, ROLLED_BACK, DIRTY, KEPT or UNKNOWN, and
    what goes with it: "dirty" ranges; for KEPT "next_gfn", "keys_set" and "crc32", and "uncertain", the frames that the
    kernel stopped in the middle of, if it did; "enabled" where the guest uses storage keys since. Where the session
    ends otherwise the worker does by itself what is to be done.
    """

    def __init__(
        self,
        session: Session,
        ranges: Ranges,
        options: WriteOptions,
        still_wanted: Callable[[], None] = lambda: None,
    ) -> None:
        """`still_wanted` is called in the middle of what takes long, and raises where nobody waits for it any more."""
        self._session = session
        self._still_wanted = still_wanted
        self._ranges = ranges
        self._options = options
        self._pace = Pace(options.slice_seconds)
        self._range = 0
        self._begun = False
        self._committed = False
        self.progress = Progress(ranges[0].start, 0, 0, False, 0)
        resulting = options.resulting
        # Of what comes, where it is only checked: it is what the guest would have.
        self._validated = (
            Digester(with_referenced_changed=resulting.with_referenced_changed)
            if options.validate_only and resulting is not None
            else None
        )

    def begin(self) -> bool:
        """Check what can be checked beforehand, and begin. False: it was applied before, and there is nothing to do."""
        self._session.require_writable()
        for wanted in self._ranges:
            self._session.memory_map.require_mapped(wanted)
        options = self._options
        if not options.allow_enable and not self._session.uses_keys():
            raise SkeydError(
                Reason.SKEYS_NOT_ENABLED,
                f"the guest of vms/{self._session.hello.vm_id} uses no storage keys; setting one enables them for "
                "good, which the request must allow",
            )
        if options.validate_only:
            if options.request_id:
                self._session.require_unused(options.request_id, options.fingerprint)
            self._require_expected()
            return True
        begun = self._session.begin(options.request_id, options.fingerprint, keep=options.keep, resume=options.resume)
        self._begun = begun.state != "applied"
        self._take_over(begun)
        if not self._begun:
            self._require_whole(begun)
        elif not options.resume:
            # Not before it has begun: nobody else sets a key from here on.
            self._require_expected()
        return self._begun

    def require_next(self, frames: GfnRange) -> None:
        """Refuse with CHUNK_OUT_OF_ORDER a chunk of other frames than those that follow."""
        if self._range == len(self._ranges):
            raise SkeydError(
                Reason.CHUNK_OUT_OF_ORDER,
                f"a chunk at gfn {frames.start:#x} after all ranges were covered",
                {"gfn": hex(frames.start)},
            )
        if frames.start != self.progress.next_gfn:
            raise SkeydError(
                Reason.CHUNK_OUT_OF_ORDER,
                f"the next chunk begins at gfn {self.progress.next_gfn:#x}, not {frames.start:#x}",
                {"gfn": hex(frames.start)},
            )
        if frames.end > self._ranges[self._range].end:
            raise SkeydError(
                Reason.CHUNK_OUT_OF_ORDER,
                f"the chunk {frames} reaches beyond its range {self._ranges[self._range]}",
                {"gfn": hex(self._ranges[self._range].end)},
            )

    def chunk(self, frames: GfnRange, keys: bytes | memoryview, crc32: int) -> Progress:
        """Set the keys of one chunk and verify them."""
        self.require_next(frames)
        self._check(frames, keys, crc32)
        if self._validated is not None:
            self._validated.add(frames, keys)
        at, before = 0, self.progress.crc32
        while at < frames.count:
            piece = GfnRange(frames.start + at, min(self._pace.keys, frames.count - at))
            with memoryview(keys) as view:
                part = view[at : at + piece.count]
                repaired, enabled = 0, False
                if not self._options.validate_only:
                    repaired, enabled, took = self._session.write_slice(piece, part, self._options.allow_enable)
                    self._pace.took(piece.count, took)
                at += piece.count
                # Of the whole chunk it is known, and is not computed again.
                whole = at == frames.count
                joined = crc32_joined(before, crc32, at) if whole else zlib.crc32(part, self.progress.crc32)
                self._advance(piece, repaired, enabled, joined)
        return self.progress

    def commit(self) -> Progress:
        """Have what was set stay. STREAM_INCOMPLETE where something is missing."""
        if self._range < len(self._ranges):
            self._incomplete("Commit came before the keys of all ranges")
        self._require_resulting()
        if not self._options.validate_only:
            done = self._session.commit(self.progress.keys_set, self.progress.crc32)
            self._committed = True
            self._require_whole(done)
        return self.progress

    def cut(self) -> None:
        """Take note that the stream ended without Commit: STREAM_INCOMPLETE."""
        self._incomplete("the stream ended without Commit")

    @contextmanager
    def told(self) -> Iterator[None]:
        """End the call where a SkeydError comes from within, and have it say what became of the keys."""
        try:
            yield
        except SkeydError as error:
            self._tell(error)
            raise

    def _tell(self, error: SkeydError) -> None:
        for name in _TOLD_HERE:
            error.metadata.pop(name, None)
        last: LastWrite | None = None
        if self._committed:
            # By a worker that has set something else: there is nothing to undo, and nobody can know what there is.
            error.metadata["outcome"] = UNKNOWN
            return
        next_gfn = 0
        if self._begun:
            try:
                last = self._end()
                # Where the worker is; what it said of the last slice may have been no answer.
                next_gfn = self._after(last.keys_set)[1] if last is not None else 0
            except SkeydError:
                # It was lost before or now; what it does when it lives is as ever, and nobody here can know.
                error.metadata["outcome"] = UNKNOWN
                if self.progress.enabled:
                    error.metadata["enabled"] = "true"
                return
        if last is None:
            error.metadata["outcome"] = UNCHANGED
            error.metadata.pop("uncertain", None)
            error.metadata.pop("enabled", None)
            return
        error.metadata["outcome"] = last.outcome.upper()
        error.metadata.pop("enabled", None)
        if last.enabled:
            error.metadata["enabled"] = "true"
        error.metadata.pop("uncertain", None)
        if last.outcome == "kept":
            error.metadata["next_gfn"] = hex(next_gfn)
            error.metadata["keys_set"] = str(last.keys_set)
            error.metadata["crc32"] = f"{last.crc32:#010x}"
        if last.dirty:
            error.metadata["uncertain" if last.outcome == "kept" else "dirty"] = _listed(last.dirty)

    def _end(self) -> LastWrite | None:
        # For as long as old keys come back. Where none do, somebody else may have the VM's process for a while, or the
        # worker lies; the worker goes on all the same, and GetVm tells how it ended.
        left, pause, stalled = -1, 0.0, time.monotonic()
        while True:
            last = self._session.abandon()
            if last is None or last.outcome != "rolling_back":
                self._require_possible(last)
                return last
            if left < 0 or last.left < left:
                left, pause, stalled = last.left, 0.0, time.monotonic()
            elif time.monotonic() >= stalled + ROLL_BACK_STALL_SECONDS:
                raise self._strange(f"{last.left} keys are still to be rolled back")
            else:
                time.sleep(pause)
                pause = min(2 * pause + _PAUSE_SECONDS, _MOST_PAUSE_SECONDS)

    def _require_possible(self, last: LastWrite | None) -> None:
        # What a client is told it builds upon: that nothing has changed, or where to go on.
        if last is None:
            if self.progress.keys_set:
                raise self._strange(f"nothing was set of {self.progress.keys_set} keys that it had set")
        elif last.outcome == "applied" or (last.outcome == "kept") != self._options.keep:
            raise self._strange(f"a call that was not committed is {last.outcome}")
        elif (last.keys_set, last.crc32) != (self.progress.keys_set, self.progress.crc32):
            raise self._strange(f"it had set {last.keys_set} keys, and not {self.progress.keys_set}")

    def _require_expected(self) -> None:
        expected = self._options.expected
        if expected is None:
            return
        if not self._session.uses_keys():
            raise SkeydError(
                Reason.EXPECTED_DIGEST_MISMATCH, "the guest uses no storage keys, and so they have no digest"
            )
        found = self._digest(expected)
        if found != expected.sha256:
            raise SkeydError(
                Reason.EXPECTED_DIGEST_MISMATCH,
                f"the keys of the ranges have digest {found.hex()}, not {expected.sha256.hex()}",
                {"sha256": found.hex()},
            )

    def _require_resulting(self) -> None:
        resulting = self._options.resulting
        if resulting is None:
            return
        found = _root(self._validated) if self._validated is not None else self._digest(resulting)
        if found != resulting.sha256:
            raise SkeydError(
                Reason.RESULT_DIGEST_MISMATCH,
                f"the keys of the ranges now have digest {found.hex()}, not {resulting.sha256.hex()}",
                {"sha256": found.hex()},
            )

    def _digest(self, wanted: KeysDigest) -> bytes:
        digester = Digester(with_referenced_changed=wanted.with_referenced_changed)
        for part in read(self._session, self._ranges, SLICE_KEYS, Pace(self._options.slice_seconds)):
            self._still_wanted()
            if isinstance(part, KeysRead):
                digester.add(part.frames, part.keys)
        return _root(digester)

    def _take_over(self, begun: Begun) -> None:
        # Where a call goes on that has set keys before.
        self._range, next_gfn = self._after(begun.keys_set)
        self.progress = Progress(next_gfn, begun.keys_set, begun.repaired, begun.enabled, begun.crc32)

    def _after(self, keys_set: int) -> tuple[int, int]:
        # The range and the frame that follow so many keys.
        left = keys_set
        for number, one in enumerate(self._ranges):
            if left < one.count:
                return number, one.start + left
            left -= one.count
        if left:
            raise self._strange(f"it has set {keys_set} keys of {self._ranges.frames()}")
        return len(self._ranges), self._ranges[-1].end

    def _require_whole(self, done: Begun) -> None:
        mine = (self.progress.keys_set, self.progress.crc32)
        if (done.keys_set, done.crc32) != mine or done.keys_set != self._ranges.frames():
            raise self._strange(f"it applied {done.keys_set} keys with CRC-32 {done.crc32:#010x}, not {mine}")

    def _strange(self, what: str) -> SkeydError:
        return SkeydError(Reason.WORKER_FAILED, f"the worker of vms/{self._session.hello.vm_id} says that {what}")

    def _check(self, frames: GfnRange, keys: bytes | memoryview, crc32: int) -> None:
        if len(keys) != frames.count:
            raise SkeydError(
                Reason.CHUNK_SIZE_MISMATCH,
                f"the chunk at gfn {frames.start:#x} has {len(keys)} keys and a count of {frames.count}",
                {"gfn": hex(frames.start)},
            )
        bad, found = look_through(keys)
        if found != crc32:
            raise SkeydError(
                Reason.CHUNK_CHECKSUM_MISMATCH,
                f"the keys of the chunk at gfn {frames.start:#x} have CRC-32 {found:#010x}, not {crc32:#010x}",
                {"gfn": hex(frames.start)},
            )
        if bad is not None:
            raise reserved_bit(keys[bad], frames.start + bad)

    def _advance(self, piece: GfnRange, repaired: int, enabled: bool, crc32: int) -> None:
        next_gfn = piece.end
        if next_gfn == self._ranges[self._range].end:
            self._range += 1
            if self._range < len(self._ranges):
                next_gfn = self._ranges[self._range].start
        before = self.progress
        self.progress = Progress(
            next_gfn,
            before.keys_set + piece.count,
            before.keys_repaired + repaired,
            before.enabled or enabled,
            crc32,
        )

    def _incomplete(self, what: str) -> None:
        came = self.progress.keys_set
        raise SkeydError(
            Reason.STREAM_INCOMPLETE,
            f"{what}: {came} keys came, {self._ranges.frames() - came} are missing from "
            f"gfn {self.progress.next_gfn:#x} on",
        )


def _root(digester: Digester) -> bytes:
    root = digester.tree().root
    assert root is not None  # noqa: S101  there are ranges, and every frame of them has a key
    return root.sha256


_LISTED_MAX: Final = 240
"""Characters that fit into a metadata value of a status, with the mark that there are more."""


def _listed(ranges: tuple[GfnRange, ...]) -> str:
    text = ""
    for one in ranges:
        more = f"{text},{one}" if text else str(one)
        if len(more) > _LISTED_MAX:
            return f"{text},…"
        text = more
    return text
