"""What a worker says of SetSkeys calls, and how it is written into the packets of skeyd.worker.protocol.

    front → worker   {"op": "begin", "request_id", "fingerprint", "keep", "resume"}      → {"ok": Begun}
                     {"op": "require_unused", "request_id", "fingerprint"}              → {"ok": {}}
                     {"op": "commit", "keys_set", "crc32"}                              → {"ok": Begun, "applied"}
                     {"op": "abandon"}                                                  → {"ok": {"last_write"?}}

"set" requests between them are part of the call. "commit" says what they were to set; where the worker has set
something else the call ends without one. "abandon" is sent again while the outcome is "rolling_back": each has a step
of that done, so that no answer takes longer than that of a "set", and says how much is left. The end of the connection
does the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, Self

from skeyd.errors import SkeydError
from skeyd.gfn import GfnRange
from skeyd.storage_key import GFN_LIMIT
from skeyd.worker.packets import Fields, ProtocolError

OUTCOMES: Final = ("applied", "rolling_back", "rolled_back", "dirty", "kept")
STATES: Final = ("begun", "resumed", "applied")

REQUEST_ID: Final = re.compile(r"[!-~]{0,128}")
"""Printable ASCII without spaces; empty where a call has none."""
FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")

DIRTY_RANGES: Final = 256
"""Most ranges that are listed; so many fit a packet."""

CRC_MAX: Final = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Begun:
    """How far a call has come: one that begins, one that goes on, one that was applied."""

    state: str
    """One of STATES."""
    keys_set: int
    repaired: int
    crc32: int
    """Of all keys set, in order."""
    enabled: bool

    def to_message(self) -> dict[str, Any]:
        """Write it down."""
        return {
            "state": self.state,
            "keys_set": self.keys_set,
            "repaired": self.repaired,
            "crc32": self.crc32,
            "enabled": self.enabled,
        }

    @classmethod
    def from_message(cls, message: Fields) -> Self:
        """Read it. ProtocolError for anything that is none."""
        keys_set = message.integer("keys_set", 0, GFN_LIMIT)
        return cls(
            message.choice("state", STATES),
            keys_set,
            message.integer("repaired", 0, GFN_LIMIT),
            message.integer("crc32", 0, CRC_MAX),
            message.boolean("enabled"),
        )


@dataclass(frozen=True, slots=True)
class LastWrite:
    """What became, or is becoming, of the last SetSkeys call that set a key."""

    outcome: str
    """One of OUTCOMES."""
    request_id: str
    keys_set: int
    """Keys that were set and verified before it ended."""
    crc32: int
    """Of those keys."""
    enabled: bool
    """It made the guest use storage keys."""
    end: int
    """The frame after the last of those; 0 where there is none."""
    dirty: tuple[GfnRange, ...] = ()
    """Frames whose keys are neither known to be the old nor the new ones: ascending and apart. Of a call that is "kept"
    those of the slice that the kernel stopped in the middle of."""
    left: int = 0
    """Of a call that is "rolling_back": frames that are still to have their old keys."""

    def to_message(self) -> dict[str, Any]:
        """Write it down."""
        return {
            "outcome": self.outcome,
            "request_id": self.request_id,
            "keys_set": self.keys_set,
            "crc32": self.crc32,
            "enabled": self.enabled,
            "end": self.end,
            "dirty": [{"start": one.start, "count": one.count} for one in self.dirty],
            "left": self.left,
        }

    @classmethod
    def from_message(cls, message: Fields) -> Self:
        """Read it. ProtocolError for anything that is none."""
        try:
            dirty = tuple(
                GfnRange(one.integer("start", 0, GFN_LIMIT - 1), one.integer("count", 1, GFN_LIMIT))
                for one in message.objects("dirty", DIRTY_RANGES)
            )
        except SkeydError as error:
            raise ProtocolError(error.message) from None
        outcome = message.choice("outcome", OUTCOMES)
        if (dirty and outcome not in ("dirty", "rolling_back", "kept")) or (outcome == "dirty" and not dirty):
            raise ProtocolError(f"outcome {outcome} with {len(dirty)} dirty ranges")
        return cls(
            outcome,
            message.text("request_id", REQUEST_ID),
            message.integer("keys_set", 0, GFN_LIMIT),
            message.integer("crc32", 0, CRC_MAX),
            message.boolean("enabled"),
            message.integer("end", 0, GFN_LIMIT),
            dirty,
            # A worker of an earlier build doesn't say.
            message.integer("left", 0, GFN_LIMIT) if message.has("left") else 0,
        )
