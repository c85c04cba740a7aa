"""SetSkeys calls as the worker knows them: old keys kept until Commit, set again where there is none.

The front that a call came through may die at any moment, and with it all that it knew: so what was set, what it was
before, and what became of it is the worker's to know. A call belongs to a connection, and ends with it.
"""

from __future__ import annotations

import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.worker.journal import Journal, JournalDamagedError
from skeyd.worker.keys import Keys, Written
from skeyd.worker.outcomes import DIRTY_RANGES, Begun, LastWrite
from skeyd.worker.restoring import Restoring

REMEMBERED: Final = 64
"""Applied calls whose request_id is remembered."""

DIRTY_KEPT: Final = 1 << 16
"""Ranges of dirty frames that are told apart while a call is rolled back."""

RETRY_SECONDS: Final = 0.5
"""After so long what could not be set again for no frame's fault is tried once more."""

PATIENCE_SECONDS: Final = 60.0
"""Where nothing could be set again for so long, a part at a time is given up."""

_PASSES: Final = frozenset((Reason.VMM_TRACED, Reason.VMM_STUCK))
"""However long it takes: it ends by itself, or with the VM. A debugger goes, and a thread that waits goes on."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a SetSkeys is to the worker."""

    request_id: str
    """Empty: it has none, and can be neither repeated nor resumed."""
    fingerprint: str
    """Of the request: a request_id stands for one of them."""
    keep: bool
    """What was set stays when the call is cut."""


@dataclass(frozen=True, slots=True)
class Done:
    """How far a call has come."""

    keys_set: int = 0
    repaired: int = 0
    crc32: int = 0
    """Of all keys set, in order."""
    enabled: bool = False
    end: int = 0
    """The frame after the last one that was set."""

    def plus(self, frames: GfnRange, keys: bytes, written: Written) -> Done:
        """Count a slice that was set and verified."""
        return Done(
            self.keys_set + frames.count,
            self.repaired + written.repaired,
            zlib.crc32(keys, self.crc32),
            self.enabled or written.enabled,
            frames.end,
        )


class _Open:
    def __init__(self, owner: object, call: Call, journal: Journal | None, done: Done, resumed: bool) -> None:
        self.owner: object | None = owner
        """None: nobody's any more, it is being rolled back."""
        self.begun_by = owner
        self.call = call
        self.journal = journal
        """None: nothing is to be undone."""
        self.journaled = 0
        """Keys that were put into it."""
        self.done = done
        self.asked = resumed
        """The kernel was asked to set something, in this call or in the one that it goes on with."""
        self.restoring: Restoring | None = None
        """What was taken off the journal and isn't all set again."""
        self.failing_since: float | None = None
        """Since when nothing could be set again. By the monotonic clock, as the next."""
        self.not_before = 0.0
        """When setting again is to be tried next."""
        self.was_keyless = False
        """The guest used no keys when the kernel was first asked to set some."""
        self.dirty: list[GfnRange] = []
        self.uncertain: list[GfnRange] = []
        """What the kernel was asked to set and nobody knows whether it did."""


@dataclass(frozen=True, slots=True)
class _Kept:
    call: Call
    done: Done
    uncertain: tuple[GfnRange, ...]


class Transactions:
    """The SetSkeys calls on one VM: one at a time, or one that is being rolled back.

    Synchronization: none; one thread owns it, and the Keys of the same VM.
    """

    def __init__(self, keys: Keys, open_file: Callable[[], int]) -> None:
        self._keys = keys
        self._open_file = open_file
        self._open: _Open | None = None
        self._kept: _Kept | None = None
        self._applied: OrderedDict[str, tuple[str, Done]] = OrderedDict()
        self.last_write: LastWrite | None = None
        """What became of the last call that set a key and has ended."""
        self._last_owner: object | None = None
        """Whose that was, unless he has begun another."""
        self._stopped = False

    @property
    def rolling_back(self) -> bool:
        """Whether `step` has something to do."""
        return self._open is not None and self._open.owner is None

    def seconds_left(self) -> float | None:
        """Return in how many seconds `step` has something to do; None: it hasn't."""
        if self._open is None or self._open.owner is not None:
            return None
        return max(0.0, self._open.not_before - time.monotonic())

    def stop(self) -> None:
        """Let no key be set any more but those that roll back, of the call that runs too. It is abandoned."""
        self._stopped = True
        if self._open is not None and self._open.owner is not None:
            self.abandon(self._open.owner)

    def require_idle(self) -> None:
        """VM_BUSY where a call runs, or is rolled back: nobody else may set a key then. WORKER_LOST after `stop`."""
        self._require_not_stopped()
        if self._open is not None:
            what = "is being rolled back" if self.rolling_back else "runs"
            raise SkeydError(Reason.VM_BUSY, f"a SetSkeys {what} on this VM")

    def owned_by(self, owner: object) -> bool:
        """Whether the call that runs is this owner's."""
        return self._open is not None and self._open.owner is owner

    def forget_kept(self) -> None:
        """Note that somebody else sets keys: from now on nobody can go on as if they were all his own."""
        self._kept = None

    def begin(self, owner: object, call: Call, resume: bool) -> Begun:
        """Begin a call, go on with one that was kept, or tell what one that was applied came to.

        SkeydError VM_BUSY, REQUEST_ID_REUSED, NOTHING_TO_RESUME; REQUEST_INVALID: what is resumed keeps what it sets,
        since there are no old keys of what was set before.
        """
        if resume and not call.keep:
            raise SkeydError(Reason.REQUEST_INVALID, "a call that is resumed can't be rolled back")
        if self._last_owner is owner:
            self._last_owner = None
        applied = self._applied.get(call.request_id) if call.request_id else None
        if applied is not None:
            fingerprint, done = applied
            _require_same(call.request_id, call.fingerprint, fingerprint)
            return _begun("applied", done)
        self.require_idle()
        done, uncertain = Done(), list[GfnRange]()
        if resume:
            if self._kept is None or not call.request_id or self._kept.call.request_id != call.request_id:
                raise SkeydError(
                    Reason.NOTHING_TO_RESUME,
                    f"no SetSkeys of request_id {call.request_id!r} was cut and kept, or another has set keys since",
                )
            _require_same(call.request_id, call.fingerprint, self._kept.call.fingerprint)
            done, uncertain = self._kept.done, list(self._kept.uncertain)
        self._open = _Open(owner, call, None if call.keep else Journal(self._open_file), done, resume)
        self._open.uncertain = uncertain
        return _begun("resumed" if resume else "begun", done)

    def require_unused(self, request_id: str, fingerprint: str) -> None:
        """REQUEST_ID_REUSED where another request of this id was applied."""
        applied = self._applied.get(request_id)
        if applied is not None:
            _require_same(request_id, fingerprint, applied[0])

    def set(
        self, owner: object, frames: GfnRange, keys: bytes, allow_enable: bool, look: Callable[[], None] = lambda: None
    ) -> Written:
        """Set a slice of the owner's call, verified; before that, keep its old keys. As Keys.write, HOST_EXHAUSTED."""
        current = self._mine(owner)
        # Nothing that is refused before the kernel is asked may leave old keys to set again.
        self._keys.check(frames, keys)
        if current.journal is None:
            uses_keys = self._keys.uses_keys()
            self._keys.require_enabled(uses_keys, allow_enable)
        else:
            if current.journaled + frames.count > self._keys.frames():
                # A front sets each frame once, or the room for old keys would have no bound.
                raise SkeydError(Reason.WORKER_FAILED, "a SetSkeys of more keys than the VM has frames")
            old = bytearray(frames.count)
            uses_keys = self._keys.read(frames, memoryview(old))
            self._keys.require_enabled(uses_keys, allow_enable)
            # Of a guest that used no keys they are zero: the keys that it has once it uses some.
            current.journal.push(frames, old)
            current.journaled += frames.count
        current.was_keyless |= not uses_keys and not current.done.enabled
        current.asked = True
        self._kept = None
        # Until it is known: whatever ends the write, the kernel may have set some of it.
        current.uncertain = [*_without(current.uncertain, frames), frames]
        written = self._keys.write_checked(frames, keys, uses_keys, look)
        current.uncertain.pop()
        current.done = current.done.plus(frames, keys, written)
        return written

    def commit(self, owner: object, keys_set: int, crc32: int) -> Done:
        """End the owner's call: what it set stays, and the old keys are forgotten.

        SkeydError WORKER_FAILED where it set other keys than the owner believes, or the kernel stopped in the middle of
        a slice that was not set again: it then ends as `abandon` has it.
        """
        current = self._mine(owner)
        done = current.done
        if (done.keys_set, done.crc32) != (keys_set, crc32) or current.uncertain:
            self.abandon(owner)
            raise SkeydError(
                Reason.WORKER_FAILED,
                f"{done.keys_set} keys with CRC-32 {done.crc32:#010x} were set, not {keys_set} with {crc32:#010x}"
                if not current.uncertain
                else f"nobody knows the keys of {current.uncertain[0]}",
            )
        if current.journal is not None:
            current.journal.close()
        self._open = None
        self._kept = None
        request_id = current.call.request_id
        if request_id:
            self._applied[request_id] = (current.call.fingerprint, current.done)
            while len(self._applied) > REMEMBERED:
                self._applied.popitem(last=False)
        self._note("applied", current)
        return current.done

    def abandon(self, owner: object) -> None:
        """Take note that the owner's call ends without Commit, if it has one; `step` then does what is to be done."""
        current = self._open
        if current is None or current.owner is not owner:
            return
        current.owner = None
        if current.journal is None or not current.asked:
            self._settle()

    def step(self) -> None:
        """Set the old keys of one slice again, and verify them; where the kernel refuses some, a part of that.

        Where it can't be done now, and no frame is why, it is done later (`seconds_left`): of a VM of another process
        that somebody else traces, or whose thread hangs, however long that takes; for other reasons PATIENCE_SECONDS
        long. Whatever goes wrong is part of the outcome; what nobody foresaw is raised too.
        """
        current = self._open
        if current is None or current.owner is not None or time.monotonic() < current.not_before:
            return
        journal = current.journal
        assert journal is not None  # noqa: S101  else it was settled at once
        try:
            if current.restoring is None:
                popped = journal.pop()
                if popped is None:
                    self._settle()
                    return
                current.restoring = Restoring(self._keys, *popped)
            left = current.restoring.left()
            current.restoring.step(current.dirty)
            if current.restoring.left() < left:
                current.failing_since = None
        except JournalDamagedError as damaged:
            # What lies below it is whole, and is set again all the same.
            current.dirty += damaged.frames
        except (SkeydError, OSError, MemoryError) as error:
            now = time.monotonic()
            if current.failing_since is None:
                current.failing_since = now
            passes = isinstance(error, SkeydError) and error.reason in _PASSES
            if passes or now < current.failing_since + PATIENCE_SECONDS:
                current.not_before = now + RETRY_SECONDS
                return
            self._give_up(current, journal)
        except Exception:
            self._give_up(current, journal)
            raise
        if current.restoring is not None and current.restoring.is_done:
            current.restoring = None
        if len(current.dirty) > DIRTY_KEPT:
            current.dirty = _joined(current.dirty, DIRTY_KEPT // 2)

    @staticmethod
    def _give_up(current: _Open, journal: Journal) -> None:
        # What is in work; where not even that could be had, all.
        if current.restoring is not None:
            current.restoring.give_up(current.dirty)
        else:
            current.dirty += journal.rest()
            journal.close()

    def outcome(self) -> LastWrite | None:
        """Say what became, or is becoming, of the last call that set a key."""
        if self.rolling_back:
            assert self._open is not None  # noqa: S101  it rolls back
            return self._described("rolling_back", self._open)
        return self.last_write

    def outcome_for(self, owner: object) -> LastWrite | None:
        """Say what became, or is becoming, of the owner's last call; None: it set nothing."""
        if self._open is not None and self._open.begun_by is owner:
            return self.outcome() if self.rolling_back else None
        return self.last_write if self._last_owner is owner else None

    def _require_not_stopped(self) -> None:
        if self._stopped:
            raise SkeydError(Reason.WORKER_LOST, "the VM's worker was told to end, and sets no key any more")

    def _mine(self, owner: object) -> _Open:
        self._require_not_stopped()
        if self._open is None or self._open.owner is not owner:
            raise SkeydError(Reason.WORKER_FAILED, "this connection has no SetSkeys to go on with")
        return self._open

    def _settle(self) -> None:
        # The end of a call without Commit, once all that can be done is done.
        current = self._open
        assert current is not None  # noqa: S101  called for one
        if current.journal is not None:
            current.journal.close()
        self._open = None
        if not current.asked:
            return
        if current.was_keyless and not current.done.enabled:
            current.done = replace(current.done, enabled=self._may_use_keys())
        if current.journal is None:
            if current.call.request_id:
                self._kept = _Kept(current.call, current.done, tuple(current.uncertain))
            self._note("kept", current)
        else:
            self._note("dirty" if current.dirty else "rolled_back", current)

    def _may_use_keys(self) -> bool:
        # That can't be undone, so it is said where nobody can know.
        try:
            return self._keys.uses_keys()
        except (SkeydError, OSError, MemoryError):
            return True

    def _note(self, outcome: str, current: _Open) -> None:
        if current.asked:
            self.last_write = self._described(outcome, current)
            self._last_owner = current.begun_by

    def _described(self, outcome: str, current: _Open) -> LastWrite:
        return LastWrite(
            outcome,
            current.call.request_id,
            current.done.keys_set,
            current.done.crc32,
            current.done.enabled,
            current.done.end,
            tuple(_joined(current.uncertain if outcome == "kept" else current.dirty)),
            self._left(current) if outcome == "rolling_back" else 0,
        )

    @staticmethod
    def _left(current: _Open) -> int:
        in_work = current.restoring.left() if current.restoring is not None else 0
        return in_work + (current.journal.frames() if current.journal is not None else 0)


def _require_same(request_id: str, fingerprint: str, before: str) -> None:
    if fingerprint != before:
        raise SkeydError(Reason.REQUEST_ID_REUSED, f"request_id {request_id!r} was that of another request on this VM")


def _without(ranges: list[GfnRange], gone: GfnRange) -> list[GfnRange]:
    left: list[GfnRange] = []
    for one in ranges:
        if one.start < gone.start:
            left.append(GfnRange(one.start, min(one.end, gone.start) - one.start))
        if one.end > gone.end:
            start = max(one.start, gone.end)
            left.append(GfnRange(start, one.end - start))
    return left


def _begun(state: str, done: Done) -> Begun:
    return Begun(state, done.keys_set, done.repaired, done.crc32, done.enabled)


def _joined(ranges: list[GfnRange], most: int = DIRTY_RANGES) -> list[GfnRange]:
    # Ascending, those that touch or overlap joined, and so many at most: the last reaches to the end of all.
    joined: list[GfnRange] = []
    for one in sorted(ranges):
        if joined and one.start <= joined[-1].end:
            last = joined[-1]
            joined[-1] = GfnRange(last.start, max(last.end, one.end) - last.start)
        else:
            joined.append(one)
    if len(joined) > most:
        first = joined[most - 1].start
        joined[most - 1 :] = [GfnRange(first, joined[-1].end - first)]
    return joined
