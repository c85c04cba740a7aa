"""SummarizeSkeys: keys counted without being moved."""

from __future__ import annotations

from skeyd.rpc import consistency, convert
from skeyd.rpc.bulk import parts_of, slice_seconds_of
from skeyd.rpc.calls import note
from skeyd.rpc.ending import Call, hanging_up
from skeyd.rpc.slots import CallSlots
from skeyd.summary import Summarizer
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.vms.reading import check_ranges
from skeyd.vms.registry import Registry


def summarize_skeys(
    registry: Registry, streams: CallSlots, request: pb.SummarizeSkeysRequest, call: Call
) -> pb.SummarizeSkeysResponse:
    """Answer a SummarizeSkeys call, as the contract says."""
    vm_id = convert.vm_id_of(request.vm)
    note(vm=request.vm)
    asked = convert.ranges_of(request.ranges)
    slice_seconds = slice_seconds_of(request)
    freeze_seconds = consistency.freeze_seconds_of(request)
    summarizer, gap_frames = Summarizer(), 0
    with streams.taken(request.vm), hanging_up(call) as hang_up, registry.session(vm_id, hang_up) as session:
        ranges = check_ranges(session.memory_map, asked)
        uses_keys, _ = consistency.begin(session, ranges, freeze_seconds, slice_seconds)
        answer = pb.SummarizeSkeysResponse(
            uses_storage_keys=uses_keys,
            incarnation=session.hello.incarnation,
            consistency=consistency.message(freeze_seconds),
        )
        if not uses_keys:
            return answer
        beginnings = {one.start for one in ranges}
        for frames, keys in parts_of(session, ranges, slice_seconds, call):
            if keys is None:
                gap_frames += frames.count
                continue
            if frames.start in beginnings:
                summarizer.end_run()
            summarizer.add(frames, keys)
    found = summarizer.summary()
    answer.keys, answer.gap_frames, answer.runs = found.keys, gap_frames, found.runs
    for key, count in found.counts.items():
        answer.counts.add(key=key, count=count)
    if found.longest_run is not None:
        longest = found.longest_run.frames
        answer.longest_run.start_gfn, answer.longest_run.count = longest.start, longest.count
        answer.longest_run.key = found.longest_run.key
    return answer
