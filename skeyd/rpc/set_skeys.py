"""SetSkeys: keys for a guest, chunk by chunk, all or none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial

import grpc

from skeyd import limits
from skeyd.digest import DIGEST_BYTES
from skeyd.encoding import codec
from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.rpc import convert
from skeyd.rpc.audit import note_vmm
from skeyd.rpc.calls import note
from skeyd.rpc.ending import hanging_up, require_active
from skeyd.rpc.incarnation import require_incarnation
from skeyd.rpc.slots import CallSlots
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.vms.registry import Registry
from skeyd.vms.writing import UNCHANGED, KeysDigest, KeyWriting, Progress, WriteOptions
from skeyd.wire import ChunkMessage
from skeyd.worker.outcomes import REQUEST_ID


def set_skeys(
    registry: Registry,
    streams: CallSlots,
    requests: Iterator[pb.SetSkeysRequest],
    context: grpc.ServicerContext,
) -> Iterator[pb.SetSkeysResponse]:
    """Answer a SetSkeys call, as the contract says. What it is refused with says what became of the keys."""
    try:
        yield from _answers(registry, streams, requests, context)
    except SkeydError as error:
        # Whatever came after KeyWriting.told has been told; before that nothing was begun.
        error.metadata.setdefault("outcome", UNCHANGED)
        raise


def _answers(
    registry: Registry,
    streams: CallSlots,
    requests: Iterator[pb.SetSkeysRequest],
    context: grpc.ServicerContext,
) -> Iterator[pb.SetSkeysResponse]:
    first = next(requests, None)
    if first is None or first.WhichOneof("part") != "header":
        raise SkeydError(Reason.REQUEST_INVALID, "the first message of a SetSkeys stream is its header")
    header = first.header
    vm_id = convert.vm_id_of(header.vm)
    note(vm=header.vm)
    ranges = convert.ranges_of(header.ranges)
    if not ranges:
        raise SkeydError(Reason.REQUEST_INVALID, "the header names no ranges to set")
    options = _options(header)
    if options.request_id:
        note(request_id=options.request_id)
    # Who only checks keys excludes nobody who sets them. A slot is for streams that have said what they want.
    opened = registry.session if options.validate_only else registry.writing
    with streams.taken(header.vm), hanging_up(context) as hang_up, opened(vm_id, hang_up) as session:
        note_vmm(session.hello.vmm)
        writing = KeyWriting(session, ranges, options, partial(require_active, context))
        with writing.told():
            if header.incarnation:
                require_incarnation(session.hello, header.vm, header.incarnation)
            if not writing.begin():
                note(replayed=True)
                yield pb.SetSkeysResponse(result=_result(writing.progress, options))
                return
            yield pb.SetSkeysResponse(
                begun=pb.SetSkeysResponse.Begun(
                    incarnation=session.hello.incarnation,
                    next_gfn=writing.progress.next_gfn,
                    keys_set=writing.progress.keys_set,
                    crc32=writing.progress.crc32,
                    encodings=codec.KNOWN,
                    max_slice_time=convert.duration_message(options.slice_seconds),
                )
            )
            for request in requests:
                match request.WhichOneof("part"):
                    case "chunk":
                        done = _set(writing, request.chunk)
                        note(keys=done.keys_set, repaired=done.keys_repaired)
                        yield pb.SetSkeysResponse(
                            progress=pb.SetSkeysResponse.Progress(
                                next_gfn=done.next_gfn,
                                keys_set=done.keys_set,
                                keys_repaired=done.keys_repaired,
                                enabled=done.enabled,
                                crc32=done.crc32,
                            )
                        )
                    case "commit":
                        yield pb.SetSkeysResponse(result=_result(writing.commit(), options))
                        return
                    case _:
                        raise SkeydError(Reason.REQUEST_INVALID, "after the header come chunks and one commit")
            writing.cut()


def _options(header: pb.SetSkeysRequest.Header) -> WriteOptions:
    keep = header.on_interrupt == pb.ON_INTERRUPT_KEEP
    if not keep and header.on_interrupt not in (pb.ON_INTERRUPT_UNSPECIFIED, pb.ON_INTERRUPT_ROLL_BACK):
        raise SkeydError(Reason.REQUEST_INVALID, f"there is no on_interrupt {header.on_interrupt}")
    if not REQUEST_ID.fullmatch(header.request_id):
        raise SkeydError(
            Reason.REQUEST_INVALID,
            f"a request_id has 1 to 128 printable ASCII characters and no space, not {header.request_id[:140]!r}",
        )
    if header.resume and not (keep and header.request_id and not header.validate_only):
        raise SkeydError(
            Reason.REQUEST_INVALID, "what is resumed has ON_INTERRUPT_KEEP and a request_id, and isn't validate_only"
        )
    if keep and header.HasField("resulting_digest"):
        # What must be so or is undone, and what is never undone: the wrong keys would stay.
        raise SkeydError(
            Reason.REQUEST_INVALID,
            "resulting_digest has all rolled back that doesn't fit it, and ON_INTERRUPT_KEEP rolls nothing back",
            {"field": "resulting_digest"},
        )
    return WriteOptions(
        allow_enable=header.allow_enable,
        keep=keep,
        validate_only=header.validate_only,
        request_id=header.request_id,
        fingerprint=_fingerprint(header),
        resume=header.resume,
        slice_seconds=convert.slice_seconds_of(header.max_slice_time if header.HasField("max_slice_time") else None),
        expected=_digest(header, "expected_digest"),
        resulting=_digest(header, "resulting_digest"),
    )


def _digest(header: pb.SetSkeysRequest.Header, field: str) -> KeysDigest | None:
    if not header.HasField(field):  # type: ignore[arg-type]  # one of its fields' names
        return None
    given: pb.KeysDigest = getattr(header, field)
    if len(given.sha256) != DIGEST_BYTES:
        raise SkeydError(Reason.REQUEST_INVALID, f"{field} has {DIGEST_BYTES} bytes, not {len(given.sha256)}")
    return KeysDigest(given.sha256, given.with_referenced_changed)


def _fingerprint(header: pb.SetSkeysRequest.Header) -> str:
    # Of all that a request_id stands for: how the call is made, that it goes on or is a rehearsal, is not part of it.
    asked = pb.SetSkeysRequest.Header()
    asked.CopyFrom(header)
    asked.ClearField("resume")
    asked.ClearField("max_slice_time")
    asked.ClearField("validate_only")
    asked.ClearField("incarnation")
    if asked.on_interrupt == pb.ON_INTERRUPT_ROLL_BACK:
        # That is what it is where nothing is said, which is how clients of other languages may put it.
        asked.ClearField("on_interrupt")
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).hexdigest()


def _result(done: Progress, options: WriteOptions) -> pb.SetSkeysResponse.Result:
    response = pb.SetSkeysResponse
    return response.Result(
        keys_set=done.keys_set,
        keys_repaired=done.keys_repaired,
        enabled=done.enabled,
        outcome=response.OUTCOME_VALIDATED if options.validate_only else response.OUTCOME_APPLIED,
        crc32=done.crc32,
    )


def _set(writing: KeyWriting, chunk: pb.Chunk | ChunkMessage) -> Progress:
    frames = _frames(chunk)
    writing.require_next(frames)
    try:
        keys = codec.decode(chunk.encoding, chunk.data, frames.count)
    except SkeydError as error:
        where = {"gfn": hex(frames.start)}
        raise SkeydError(error.reason, f"the chunk at gfn {frames.start:#x}: {error.message}", where) from None
    return writing.chunk(frames, keys, chunk.crc32)


def _frames(chunk: pb.Chunk | ChunkMessage) -> GfnRange:
    if chunk.count > limits.MAX_CHUNK_KEYS:
        raise SkeydError(Reason.REQUEST_INVALID, f"a chunk has at most {limits.MAX_CHUNK_KEYS} keys, not {chunk.count}")
    return GfnRange(chunk.start_gfn, chunk.count)
