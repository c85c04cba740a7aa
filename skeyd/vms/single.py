"""The key of one frame: by KVM_S390_KEYOP where the VM's kernel has it, else by the calls for ranges."""

from __future__ import annotations

from dataclasses import dataclass

from skeyd.errors import Reason, SkeydError, no_keyop, reserved_bit
from skeyd.gfn import GfnRange
from skeyd.storage_key import RESERVED
from skeyd.vms.session import Session


@dataclass(frozen=True, slots=True)
class OneRead:
    """A frame's key."""

    key: int | None
    """None: the guest uses no storage keys."""
    by_keyop: bool
    """Never where there is no key: GET said so."""


@dataclass(frozen=True, slots=True)
class OneWritten:
    """What setting a frame's key came to."""

    old_key: int | None
    """None: the guest used no storage keys."""
    repaired: bool
    enabled: bool
    by_keyop: bool


def read_one(session: Session, gfn: int) -> OneRead:
    """Read a frame's key. GFN_NOT_MAPPED."""
    session.memory_map.require_mapped(GfnRange(gfn, 1))
    if session.hello.keyop:
        key, _ = session.keyop("iske", gfn)
        # No key: the worker has asked GET whether the guest uses any, and KEYOP nothing.
        return OneRead(key, by_keyop=key is not None)
    return OneRead(_by_range(session, gfn), by_keyop=False)


def write_one(session: Session, gfn: int, key: int, allow_enable: bool) -> OneWritten:
    """Set a frame's key, verified. GFN_NOT_MAPPED, KEY_RESERVED_BIT, SKEYS_NOT_ENABLED.

    The old key and the new one are one step to the guest with KEYOP only.
    """
    session.require_writable()
    frame = GfnRange(gfn, 1)
    session.memory_map.require_mapped(frame)
    if key & RESERVED:
        raise reserved_bit(key, gfn)
    if session.hello.keyop:
        old, repaired = session.keyop("sske", gfn, key)
        if old is not None:
            return OneWritten(old, repaired, enabled=False, by_keyop=True)
        # KEYOP enables nothing. What follows does, or is refused.
    old = _by_range(session, gfn)
    repairs, enabled, _ = session.write_slice(frame, bytes([key]), allow_enable)
    return OneWritten(old, repairs > 0, enabled, by_keyop=False)


def reset_referenced(session: Session, gfn: int) -> int:
    """Reset a frame's R and return R and C as they were. GFN_NOT_MAPPED, CAP_S390_KEYOP_MISSING, SKEYS_NOT_ENABLED."""
    session.require_writable()
    session.memory_map.require_mapped(GfnRange(gfn, 1))
    if not session.hello.keyop:
        # Nothing else does it: the guest could set C between reading the key and setting it without R.
        raise no_keyop()
    found, _ = session.keyop("rrbe", gfn)
    if found is None:
        raise SkeydError(Reason.SKEYS_NOT_ENABLED, "the guest uses no storage keys, so there is no R to reset")
    return found


def _by_range(session: Session, gfn: int) -> int | None:
    ((_, keys),) = session.read_slices([GfnRange(gfn, 1)])
    if keys is None:
        return None
    if keys[0] & RESERVED:
        raise SkeydError(Reason.WORKER_FAILED, f"the worker tells of an impossible key at gfn {gfn:#x}")
    return keys[0]
