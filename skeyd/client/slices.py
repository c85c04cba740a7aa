"""How long one ioctl may keep the kernel's lock, as requests say it."""

from __future__ import annotations

from skeyd.v1 import storage_key_service_pb2 as pb


def set_slice_time(
    request: pb.GetSkeysRequest | pb.SetSkeysRequest.Header | pb.DigestSkeysRequest | pb.SummarizeSkeysRequest,
    seconds: float | None,
) -> None:
    """Write it into a request; None leaves it to the daemon."""
    if seconds is not None:
        # As a whole: 0 s is an empty message, and still one that is there.
        request.max_slice_time.SetInParent()
        slice_time = request.max_slice_time
        slice_time.seconds, slice_time.nanos = divmod(round(seconds * 1e9), 1_000_000_000)
