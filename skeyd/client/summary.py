"""SummarizeSkeys: what the daemon's answer comes to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from skeyd.client.errors import StreamError
from skeyd.errors import SkeydError
from skeyd.gfn import GfnRange
from skeyd.storage_key import StorageKey
from skeyd.summary import Run, Summary
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2


@dataclass(frozen=True, slots=True)
class VmSummary:
    """How many frames of a VM have which key."""

    uses_storage_keys: bool
    """False: there is nothing to count."""
    summary: Summary
    gap_frames: int
    """Frames inside the ranges that are in no memory slot."""
    incarnation: str
    """Of the VM's worker."""


def summarize_request(vm: str, ranges: Iterable[GfnRange]) -> pb.SummarizeSkeysRequest:
    """Write a SummarizeSkeys request down."""
    return pb.SummarizeSkeysRequest(
        vm=vm, ranges=[vm_pb2.GfnRange(start_gfn=one.start, count=one.count) for one in ranges]
    )


def summary_of(response: pb.SummarizeSkeysResponse) -> VmSummary:
    """Take the answer of SummarizeSkeys. StreamError where its numbers do not fit together."""
    counts = {one.key: one.count for one in response.counts}
    longest = None
    try:
        for key in counts:
            StorageKey.from_byte(key)
        if response.HasField("longest_run"):
            run = response.longest_run
            longest = Run(GfnRange(run.start_gfn, run.count), run.key)
    except (ValueError, SkeydError) as error:
        raise StreamError(f"the daemon tells of impossible keys: {error}") from None
    most = 0 if longest is None else longest.frames.count
    if (
        list(counts) != sorted(counts)
        or len(counts) != len(response.counts)
        or not all(counts.values())
        or sum(counts.values()) != response.keys
        or not len(counts) <= response.runs <= response.keys
        or (longest is None) != (not counts)
        or (longest is not None and most > counts.get(longest.key, 0))
        or most * response.runs < response.keys
        or response.uses_storage_keys != bool(counts)
    ):
        raise StreamError("the daemon tells of a summary whose numbers do not fit together")
    return VmSummary(
        response.uses_storage_keys, Summary(counts, response.runs, longest), response.gap_frames, response.incarnation
    )
