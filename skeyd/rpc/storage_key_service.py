"""StorageKeyService."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import grpc

from skeyd import limits
from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.rpc import convert
from skeyd.rpc.calls import note
from skeyd.rpc.slots import CallSlots
from skeyd.storage_key import CHANGED, FRAME_SIZE, REFERENCED
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import storage_key_service_pb2_grpc
from skeyd.vms.reading import GapRead, check_ranges, read
from skeyd.vms.registry import Registry
from skeyd.vms.single import read_one, reset_referenced, write_one
from skeyd.vms.writing import KeyWriting


class StorageKeyService(storage_key_service_pb2_grpc.StorageKeyServiceServicer):
    """Read and set keys. Errors are raised as SkeydErrors; CallInterceptor turns them into statuses."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._streams = CallSlots(limits.MAX_KEY_STREAMS, "streams of keys")

    def GetSkeys(self, request: pb.GetSkeysRequest, context: grpc.ServicerContext) -> Iterator[pb.GetSkeysResponse]:
        """As the contract says."""
        vm_id = convert.vm_id_of(request.vm)
        note(vm=request.vm)
        asked = convert.ranges_of(request.ranges)
        chunk_keys = convert.chunk_keys_of(request.max_chunk_keys)
        with self._streams.taken(), self._registry.session(vm_id) as session:
            ranges = check_ranges(session.memory_map, asked)
            uses_keys = session.uses_keys()
            hello = session.hello
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
                )
            )
            keys, gap_frames, crc32 = 0, 0, 0
            for part in read(session, ranges, chunk_keys) if uses_keys else ():
                frames = part.frames
                if isinstance(part, GapRead):
                    gap_frames += frames.count
                    gap = pb.GetSkeysResponse.Gap(start_gfn=frames.start, count=frames.count)
                    yield pb.GetSkeysResponse(gap=gap)
                    continue
                keys += frames.count
                crc32 = zlib.crc32(part.keys, crc32)
                note(keys=keys)
                chunk = pb.Chunk(
                    start_gfn=frames.start,
                    count=frames.count,
                    encoding=pb.ENCODING_RAW,
                    data=part.keys,
                    crc32=part.crc32,
                )
                yield pb.GetSkeysResponse(chunk=chunk)
            trailer = pb.GetSkeysResponse.Trailer(keys=keys, gap_frames=gap_frames, crc32=crc32)
            yield pb.GetSkeysResponse(trailer=trailer)

    def SetSkeys(
        self, request_iterator: Iterator[pb.SetSkeysRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.SetSkeysResponse]:
        """As the contract says."""
        first = next(request_iterator, None)
        if first is None or first.WhichOneof("part") != "header":
            raise SkeydError(Reason.REQUEST_INVALID, "the first message of a SetSkeys stream is its header")
        header = first.header
        vm_id = convert.vm_id_of(header.vm)
        note(vm=header.vm)
        ranges = convert.ranges_of(header.ranges)
        if not ranges:
            raise SkeydError(Reason.REQUEST_INVALID, "the header names no ranges to set")
        # A slot is for streams that have said what they want.
        with self._streams.taken(), self._registry.writing(vm_id) as session:
            writing = KeyWriting(session, ranges, header.allow_enable)
            with writing.telling():
                for request in request_iterator:
                    match request.WhichOneof("part"):
                        case "chunk":
                            frames = _frames(request.chunk)
                            done = writing.chunk(frames, request.chunk.data, request.chunk.crc32)
                            note(keys=done.keys_set, repaired=done.keys_repaired)
                            yield pb.SetSkeysResponse(
                                progress=pb.SetSkeysResponse.Progress(
                                    next_gfn=done.next_gfn,
                                    keys_set=done.keys_set,
                                    keys_repaired=done.keys_repaired,
                                    enabled=done.enabled,
                                )
                            )
                        case "commit":
                            done = writing.commit()
                            yield pb.SetSkeysResponse(
                                result=pb.SetSkeysResponse.Result(
                                    keys_set=done.keys_set,
                                    keys_repaired=done.keys_repaired,
                                    enabled=done.enabled,
                                )
                            )
                            return
                        case _:
                            raise SkeydError(Reason.REQUEST_INVALID, "after the header come chunks and one commit")
                writing.cut()

    def GetSkey(self, request: pb.GetSkeyRequest, context: grpc.ServicerContext) -> pb.GetSkeyResponse:
        """As the contract says."""
        vm_id = convert.vm_id_of(request.vm)
        note(vm=request.vm, gfn=hex(request.gfn))
        with self._registry.session(vm_id) as session:
            found = read_one(session, request.gfn)
        return pb.GetSkeyResponse(key=found.key, call=_call(found.by_keyop))

    def SetSkey(self, request: pb.SetSkeyRequest, context: grpc.ServicerContext) -> pb.SetSkeyResponse:
        """As the contract says."""
        vm_id = convert.vm_id_of(request.vm)
        note(vm=request.vm, gfn=hex(request.gfn))
        if request.key > 0xFF:
            raise SkeydError(Reason.REQUEST_INVALID, f"a key is one byte, not {request.key:#x}")
        with self._registry.writing(vm_id) as session:
            done = write_one(session, request.gfn, request.key, request.allow_enable)
        note(repaired=int(done.repaired))
        return pb.SetSkeyResponse(
            old_key=done.old_key, repaired=done.repaired, enabled=done.enabled, call=_call(done.by_keyop)
        )

    def ResetReferenced(
        self, request: pb.ResetReferencedRequest, context: grpc.ServicerContext
    ) -> pb.ResetReferencedResponse:
        """As the contract says."""
        vm_id = convert.vm_id_of(request.vm)
        note(vm=request.vm, gfn=hex(request.gfn))
        with self._registry.writing(vm_id) as session:
            was = reset_referenced(session, request.gfn)
        return pb.ResetReferencedResponse(was_referenced=bool(was & REFERENCED), was_changed=bool(was & CHANGED))


def _call(by_keyop: bool) -> pb.KeyCall.ValueType:
    return pb.KEY_CALL_KEYOP if by_keyop else pb.KEY_CALL_SKEYS


def _frames(chunk: pb.Chunk) -> GfnRange:
    if chunk.encoding != pb.ENCODING_RAW:
        raise SkeydError(Reason.ENCODING_UNSUPPORTED, f"chunks must be ENCODING_RAW, not encoding {chunk.encoding}")
    if chunk.count > limits.MAX_CHUNK_KEYS:
        raise SkeydError(Reason.REQUEST_INVALID, f"a chunk has at most {limits.MAX_CHUNK_KEYS} keys, not {chunk.count}")
    return GfnRange(chunk.start_gfn, chunk.count)
