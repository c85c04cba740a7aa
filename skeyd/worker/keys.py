"""Keys that stay: reading and verified setting over any Backend.

SET, GET, compare, SET again what differs. Linux 4.19 to 6.19 lose keys silently (docs/kernel.md, "The lost keys"),
and no other user of the ioctl looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from skeyd.errors import Reason, SkeydError, reserved_bit
from skeyd.gfn import GfnRange
from skeyd.kvm.errors import KvmError
from skeyd.storage_key import differing_runs, first_reserved, lost_runs
from skeyd.worker import refusals
from skeyd.worker.backend import Backend

REPAIRS: Final = 3
"""How often lost keys are set again. One is enough for every loss that was seen."""


def _nobody_looks() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Written:
    """What a write came to."""

    repaired: int
    """Keys that the kernel had lost at first."""
    enabled: bool
    """The guest uses storage keys since this write."""


class Keys:
    """The keys of one VM. Every frame is checked against the memory slots before the kernel is asked.

    Synchronization: none; one thread owns it, so nothing comes between a SET and its read-back.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._map = backend.memory_map
        self._longest_ns = 0

    def take_longest(self) -> int:
        """Return how long the longest call of the kernel took since this was asked last, in nanoseconds."""
        longest, self._longest_ns = self._longest_ns, 0
        return longest

    def frames(self) -> int:
        """Return how many frames have a key."""
        return sum(slot.frames.count for slot in self._map.slots)

    def uses_keys(self) -> bool:
        """Whether the guest uses storage keys: GET of one frame, which changes nothing."""
        first = self._map.slots[0].frames.start
        return self.read(GfnRange(first, 1), memoryview(bytearray(1)))

    def read(self, frames: GfnRange, into: memoryview) -> bool:
        """Fill `into` with the keys of the frames. False: the guest uses none, and `into` is untouched."""
        self._map.require_mapped(frames)
        with self._call(frames):
            return self._backend.get_skeys(frames.start, into)

    def check(self, frames: GfnRange, keys: bytes) -> None:
        """Refuse with GFN_NOT_MAPPED or KEY_RESERVED_BIT what the kernel must not be asked to set."""
        self._map.require_mapped(frames)
        bad = first_reserved(keys)
        if bad is not None:
            raise reserved_bit(keys[bad], frames.start + bad)

    @staticmethod
    def require_enabled(uses_keys: bool, allow_enable: bool) -> None:
        """Refuse with SKEYS_NOT_ENABLED to set keys for a guest that uses none, unless that is allowed."""
        if not uses_keys and not allow_enable:
            raise SkeydError(
                Reason.SKEYS_NOT_ENABLED,
                "the guest uses no storage keys; setting one enables them for good, which the request must allow",
            )

    def write(self, frames: GfnRange, keys: bytes, allow_enable: bool) -> Written:
        """Set the keys of the frames and prove it.

        SkeydError: KEY_RESERVED_BIT, GFN_NOT_MAPPED, SKEYS_NOT_ENABLED, before the kernel is asked to set anything;
        else as write_checked.
        """
        self.check(frames, keys)
        uses_keys = self.uses_keys()
        self.require_enabled(uses_keys, allow_enable)
        return self.write_checked(frames, keys, uses_keys)

    def write_checked(
        self,
        frames: GfnRange,
        keys: bytes,
        uses_keys: bool,
        look: Callable[[], None] = _nobody_looks,
        *,
        exact: bool = False,
    ) -> Written:
        """Set keys that `check` has seen, of a guest that uses keys or may begin to, and prove it.

        `exact`: what has R or C too many when it is read back is set again once. The kernel may have lost it, and what
        was there before be the same but for them; else that is left to the guest, which may have touched the frame.
        `look` is called before each SET, and raises a SkeydError where there is to be no more. A SkeydError has the
        metadata "uncertain", the range of which some frames may have been set, and "enabled" where the guest uses keys
        since.
        """
        try:
            repaired = self._set_verified(frames, keys, look, exact)
        except SkeydError as error:
            error.metadata["uncertain"] = str(frames)
            with suppress(SkeydError):
                # SET enables keys even when it then fails.
                if not uses_keys and self.uses_keys():
                    error.metadata["enabled"] = "true"
            raise
        return Written(repaired, not uses_keys)

    def _set_verified(self, frames: GfnRange, keys: bytes, look: Callable[[], None], exact: bool) -> int:
        wanted = bytearray(keys)
        found = bytearray(len(keys))
        self._backend.prepare_set(frames.start, wanted)
        look()
        self._set(frames, memoryview(wanted))
        self._read_back(frames, found)
        lost = lost_runs(wanted, found)
        repaired = sum(length for _, length in lost)
        again = differing_runs(wanted, found, 0xFF) if exact else lost
        for _ in range(REPAIRS):
            if not again:
                return repaired
            for index, length in again:
                part = GfnRange(frames.start + index, length)
                look()
                self._set(part, memoryview(wanted)[index : index + length])
            self._read_back(frames, found)
            again = lost_runs(wanted, found)
        # R that is still missing may be the guest's doing, which resets it as it likes. ACC and F are changed by SETs,
        # and by a guest that runs and sets keys itself: its own take part in this race as in any (docs/design.md).
        wrong = differing_runs(wanted, found)
        if wrong:
            gfn = frames.start + wrong[0][0]
            count = sum(length for _, length in wrong)
            raise SkeydError(
                Reason.KEYS_NOT_STORED,
                f"the kernel did not keep {count} keys of {frames}, the first at gfn {gfn:#x}, in {REPAIRS} repairs",
                {"gfn": hex(gfn), "count": str(count)},
            )
        return repaired

    def _read_back(self, frames: GfnRange, found: bytearray) -> None:
        if not self.read(frames, memoryview(found)):
            raise SkeydError(Reason.KEYS_NOT_STORED, f"after a SET of {frames} the kernel says the guest uses no keys")

    def _set(self, frames: GfnRange, keys: memoryview) -> None:
        with self._call(frames):
            self._backend.set_skeys(frames.start, keys)

    @contextmanager
    def _call(self, frames: GfnRange) -> Iterator[None]:
        started = time.monotonic_ns()
        try:
            yield
        except KvmError as error:
            raise refusals.of_key_call(error, frames) from error
        finally:
            self._longest_ns = max(self._longest_ns, time.monotonic_ns() - started)
