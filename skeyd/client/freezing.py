"""Keys of one moment, as requests ask for them and answers tell of them."""

from __future__ import annotations

from skeyd.client.errors import StreamError
from skeyd.v1 import storage_key_service_pb2 as pb

_Request = pb.GetSkeysRequest | pb.DigestSkeysRequest | pb.SummarizeSkeysRequest
_Answer = pb.GetSkeysResponse.Header | pb.DigestSkeysResponse | pb.SummarizeSkeysResponse


def set_frozen(request: _Request, frozen: bool, freeze_seconds: float | None) -> None:
    """Write it into a request; None leaves the budget to the daemon. ValueError: a budget, and nothing to be frozen."""
    if not frozen:
        if freeze_seconds is not None:
            raise ValueError("freeze_seconds is for frozen reading")
        return
    request.consistency = pb.CONSISTENCY_FROZEN
    if freeze_seconds is not None:
        # As a whole: 0 s is an empty message, and still one that is there.
        request.freeze_budget.SetInParent()
        budget = request.freeze_budget
        budget.seconds, budget.nanos = divmod(round(freeze_seconds * 1e9), 1_000_000_000)


def require_frozen(answer: _Answer, frozen: bool) -> None:
    """StreamError where keys were to be of one moment and are not: a daemon that knows of none overlooks the wish."""
    if frozen and answer.consistency != pb.CONSISTENCY_FROZEN:
        raise StreamError("the keys were to be of one moment, and the daemon doesn't say that they are")
