"""StorageKeyService."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from skeyd.errors import Reason, SkeydError
from skeyd.rpc import convert
from skeyd.rpc.audit import note_vmm
from skeyd.rpc.calls import note
from skeyd.rpc.digest_skeys import digest_skeys
from skeyd.rpc.ending import hanging_up
from skeyd.rpc.get_skeys import get_skeys
from skeyd.rpc.set_skeys import set_skeys
from skeyd.rpc.slots import CallSlots
from skeyd.rpc.summarize_skeys import summarize_skeys
from skeyd.storage_key import CHANGED, REFERENCED
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import storage_key_service_pb2_grpc
from skeyd.vms.registry import Registry
from skeyd.vms.single import read_one, reset_referenced, write_one


class StorageKeyService(storage_key_service_pb2_grpc.StorageKeyServiceServicer):
    """Read and set keys. Errors are raised as SkeydErrors; CallInterceptor turns them into statuses."""

    def __init__(self, registry: Registry, streams: CallSlots, short_calls: CallSlots) -> None:
        self._registry = registry
        self._streams = streams
        self._short_calls = short_calls

    def GetSkeys(  # type: ignore[override]  # chunks are written down already
        self, request: pb.GetSkeysRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GetSkeysResponse | bytes]:
        """As the contract says."""
        return get_skeys(self._registry, self._streams, request, context)

    def SetSkeys(
        self, request_iterator: Iterator[pb.SetSkeysRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.SetSkeysResponse]:
        """As the contract says."""
        return set_skeys(self._registry, self._streams, request_iterator, context)

    def GetSkey(self, request: pb.GetSkeyRequest, context: grpc.ServicerContext) -> pb.GetSkeyResponse:
        """As the contract says."""
        vm_id = convert.vm_id_of(request.vm)
        note(vm=request.vm, gfn=hex(request.gfn))
        with (
            self._short_calls.taken(request.vm),
            hanging_up(context) as hang_up,
            self._registry.session(vm_id, hang_up, brief=True) as session,
        ):
            found = read_one(session, request.gfn)
        return pb.GetSkeyResponse(key=found.key, call=_call(found.by_keyop))

    def SetSkey(self, request: pb.SetSkeyRequest, context: grpc.ServicerContext) -> pb.SetSkeyResponse:
        """As the contract says."""
        vm_id = convert.vm_id_of(request.vm)
        note(vm=request.vm, gfn=hex(request.gfn))
        if request.key > 0xFF:
            raise SkeydError(Reason.REQUEST_INVALID, f"a key is one byte, not {request.key:#x}")
        with (
            self._short_calls.taken(request.vm),
            hanging_up(context) as hang_up,
            self._registry.writing(vm_id, hang_up, brief=True) as session,
        ):
            note_vmm(session.hello.vmm)
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
        with (
            self._short_calls.taken(request.vm),
            hanging_up(context) as hang_up,
            self._registry.writing(vm_id, hang_up, brief=True) as session,
        ):
            note_vmm(session.hello.vmm)
            was = reset_referenced(session, request.gfn)
        return pb.ResetReferencedResponse(was_referenced=bool(was & REFERENCED), was_changed=bool(was & CHANGED))

    def DigestSkeys(self, request: pb.DigestSkeysRequest, context: grpc.ServicerContext) -> pb.DigestSkeysResponse:
        """As the contract says."""
        return digest_skeys(self._registry, self._streams, request, context)

    def SummarizeSkeys(
        self, request: pb.SummarizeSkeysRequest, context: grpc.ServicerContext
    ) -> pb.SummarizeSkeysResponse:
        """As the contract says."""
        return summarize_skeys(self._registry, self._streams, request, context)


def _call(by_keyop: bool) -> pb.KeyCall.ValueType:
    return pb.KEY_CALL_KEYOP if by_keyop else pb.KEY_CALL_SKEYS
