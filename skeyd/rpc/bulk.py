"""Reading many keys for an answer that is short: what DigestSkeys and SummarizeSkeys have in common."""

from __future__ import annotations

from collections.abc import Iterator

from skeyd.gfn import GfnRange, Ranges
from skeyd.rpc import convert
from skeyd.rpc.calls import note
from skeyd.rpc.ending import Call, require_active
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.vms.pacing import Pace
from skeyd.vms.read_ahead import ChunkRead
from skeyd.vms.reading import read_chunks, require_keys
from skeyd.vms.session import Session
from skeyd.worker.protocol import SLICE_KEYS


def parts_of(
    session: Session, ranges: Ranges, slice_seconds: float, call: Call
) -> Iterator[tuple[GfnRange, bytes | None]]:
    """Read checked ranges of a guest that uses storage keys: (frames, their keys, or None where they are in no slot).

    Cancelled where nobody waits for the answer any more.
    """
    keys = 0
    parts = read_chunks(session, ranges, SLICE_KEYS, Pace(slice_seconds))
    while True:
        require_active(call)
        part = next(parts, None)
        if part is None:
            return
        found = None
        if isinstance(part, ChunkRead):
            found = part.copy() or b""
            # The copy: what the worker can still change isn't worth a look.
            require_keys(ChunkRead(part.frames, (memoryview(found),) if found else None))
            keys += part.frames.count
            note(keys=keys)
        yield part.frames, found


def slice_seconds_of(request: pb.DigestSkeysRequest | pb.SummarizeSkeysRequest) -> float:
    """Return how long an ioctl may take. REQUEST_INVALID."""
    return convert.slice_seconds_of(request.max_slice_time if request.HasField("max_slice_time") else None)
