"""GetSkeys: the stream of keys that a guest has."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing

from skeyd.checksum import crc32_joined
from skeyd.encoding import codec
from skeyd.errors import Reason, SkeydError
from skeyd.rpc import consistency, convert
from skeyd.rpc.calls import note
from skeyd.rpc.chunks import write_down
from skeyd.rpc.ending import Call, hanging_up
from skeyd.rpc.incarnation import require_incarnation
from skeyd.rpc.slots import CallSlots
from skeyd.storage_key import FRAME_SIZE
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.vms.pacing import Pace
from skeyd.vms.reading import GapRead, before, check_ranges, read_chunks
from skeyd.vms.registry import Registry
from skeyd.vms.session import Session


def get_skeys(
    registry: Registry, streams: CallSlots, request: pb.GetSkeysRequest, call: Call
) -> Iterator[pb.GetSkeysResponse | bytes]:
    """Answer a GetSkeys call, as the contract says."""
    vm_id = convert.vm_id_of(request.vm)
    note(vm=request.vm)
    asked = _Asked(request)
    with (
        streams.taken(request.vm),
        hanging_up(call) as hang_up,
        registry.session(vm_id, hang_up) as session,
        closing(_parts(session, request, asked)) as parts,
    ):
        yield from parts


class _Asked:
    # A request's fields, checked.
    def __init__(self, request: pb.GetSkeysRequest) -> None:
        self.ranges = convert.ranges_of(request.ranges)
        self.chunk_keys = convert.chunk_keys_of(request.max_chunk_keys)
        self.encodings = convert.encodings_of(request.encodings)
        self.slice_seconds = convert.slice_seconds_of(
            request.max_slice_time if request.HasField("max_slice_time") else None
        )
        self.resume = request.resume if request.HasField("resume") else None
        self.freeze_seconds = consistency.freeze_seconds_of(request)
        if self.resume is not None and self.freeze_seconds is not None:
            raise SkeydError(
                Reason.REQUEST_INVALID, "resume goes on with keys of another moment, and CONSISTENCY_FROZEN is of one"
            )


def _parts(
    session: Session, request: pb.GetSkeysRequest, asked: _Asked
) -> Generator[pb.GetSkeysResponse | bytes, None, None]:
    hello = session.hello
    if asked.resume is not None:
        require_incarnation(hello, request.vm, asked.resume.incarnation)
    ranges = check_ranges(session.memory_map, asked.ranges)
    keys, gap_frames, crc32, start_at = 0, 0, 0, None
    if asked.resume is not None:
        start_at, crc32 = asked.resume.gfn, asked.resume.crc32
        keys, gap_frames = before(session.memory_map, ranges, start_at)
        note(resumed_at=hex(start_at))
        if not keys and crc32:
            raise SkeydError(Reason.REQUEST_INVALID, f"no key comes before gfn {start_at:#x}, so resume.crc32 is 0")
    uses_keys, frozen_time = consistency.begin(session, ranges, asked.freeze_seconds, asked.slice_seconds)
    ended = pb.GetSkeysResponse.Trailer()
    if asked.freeze_seconds is not None:
        ended.frozen_time.CopyFrom(convert.duration_message(frozen_time))
    yield pb.GetSkeysResponse(
        header=pb.GetSkeysResponse.Header(
            vm=request.vm,
            uid=hello.uid,
            incarnation=hello.incarnation,
            frame_size=FRAME_SIZE,
            memory_slots=[convert.slot_message(slot) for slot in session.memory_map.slots],
            ranges=[convert.range_message(one) for one in ranges],
            uses_storage_keys=uses_keys,
            kernel=hello.kernel,
            kind=convert.kind_message(hello.kind),
            encodings=[pb.Encoding.Value(codec.NAMES[one]) for one in asked.encodings],
            max_slice_time=convert.duration_message(asked.slice_seconds),
            consistency=consistency.message(asked.freeze_seconds),
        )
    )
    if not uses_keys:
        yield pb.GetSkeysResponse(trailer=ended)
        return
    for part in read_chunks(session, ranges, asked.chunk_keys, Pace(asked.slice_seconds), start_at):
        count = part.frames.count
        if isinstance(part, GapRead):
            gap_frames += count
            yield pb.GetSkeysResponse(gap=pb.GetSkeysResponse.Gap(start_gfn=part.frames.start, count=count))
            continue
        message, chunk_crc32 = write_down(part, asked.encodings)
        keys += count
        crc32 = crc32_joined(crc32, chunk_crc32, count)
        note(keys=keys)
        yield message
    ended.keys, ended.gap_frames, ended.crc32 = keys, gap_frames, crc32
    yield pb.GetSkeysResponse(trailer=ended)
