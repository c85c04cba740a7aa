"""Of which moment keys are to be: what requests ask for, and what answers say."""

from __future__ import annotations

from typing import Final

from skeyd import limits
from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, Ranges
from skeyd.rpc.calls import note
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.vms.session import Session

_Request = pb.GetSkeysRequest | pb.DigestSkeysRequest | pb.SummarizeSkeysRequest

_KNOWN: Final = (pb.CONSISTENCY_UNSPECIFIED, pb.CONSISTENCY_LIVE, pb.CONSISTENCY_FROZEN)


def freeze_seconds_of(request: _Request) -> float | None:
    """Return how long a VM may be frozen, or None: the keys may be live. REQUEST_INVALID."""
    if request.consistency not in _KNOWN:
        raise SkeydError(Reason.REQUEST_INVALID, f"there is no consistency {request.consistency}")
    if request.consistency != pb.CONSISTENCY_FROZEN:
        if request.HasField("freeze_budget"):
            raise SkeydError(Reason.REQUEST_INVALID, "freeze_budget is for CONSISTENCY_FROZEN")
        return None
    if not request.HasField("freeze_budget"):
        return limits.DEFAULT_FREEZE_SECONDS
    budget = request.freeze_budget
    seconds = budget.seconds + budget.nanos / 1e9
    if not 0 <= budget.nanos < 1_000_000_000 or not limits.MIN_FREEZE_SECONDS <= seconds <= limits.MAX_FREEZE_SECONDS:
        raise SkeydError(
            Reason.REQUEST_INVALID,
            f"freeze_budget is {limits.MIN_FREEZE_SECONDS:g} to {limits.MAX_FREEZE_SECONDS:g} s, "
            f"not {budget.seconds} s and {budget.nanos} ns",
        )
    return seconds


def message(freeze_seconds: float | None) -> pb.Consistency.ValueType:
    """Say of which moment keys are that were read so."""
    return pb.CONSISTENCY_LIVE if freeze_seconds is None else pb.CONSISTENCY_FROZEN


def begin(session: Session, ranges: Ranges, freeze_seconds: float | None, slice_seconds: float) -> tuple[bool, float]:
    """Make ready to read checked ranges, all at one moment if that is asked for.

    Returns whether the guest uses storage keys, and the seconds for which its VMM stood still. Refused as the contract
    says.
    """
    if freeze_seconds is None:
        return session.begin_reading(), 0.0
    frames = _mapped(session, ranges)
    if not frames:
        return session.uses_keys(), 0.0  # no keys, and so none that could be of two moments
    uses_keys, nanoseconds = session.freeze(frames, freeze_seconds, slice_seconds)
    note(frozen_ms=round(nanoseconds / 1e6, 3))
    return uses_keys, nanoseconds / 1e9


def _mapped(session: Session, ranges: Ranges) -> list[GfnRange]:
    return list(session.memory_map.mapped.shared(ranges))
