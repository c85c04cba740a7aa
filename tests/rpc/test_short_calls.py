"""Every short method takes a slot of the short calls, in its VM's name, before it asks anybody anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import grpc
import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.rpc.host_service import HostService
from skeyd.rpc.slots import CallSlots
from skeyd.rpc.storage_key_service import StorageKeyService
from skeyd.rpc.vm_service import VmService
from skeyd.v1 import host_service_pb2, vm_service_pb2
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.vms.registry import Registry
from tests import vm_requests

VM = "vms/web"


class _Reached(Exception):  # noqa: N818 (says what happened)
    pass


class _Nobody:
    """A registry that no call may get to without a slot, and a call that goes on."""

    def __getattr__(self, name: str) -> Any:
        raise _Reached(name)


class _Call:
    def is_active(self) -> bool:
        return True

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return True


@dataclass(frozen=True)
class _Services:
    short_calls: CallSlots

    def keys(self) -> StorageKeyService:
        return StorageKeyService(_registry(), CallSlots(4, "streams", Reason.TOO_MANY_STREAMS), self.short_calls)

    def vms(self) -> VmService:
        return VmService(_registry(), None, self.short_calls, allow_adoption=True)

    def hosts(self) -> HostService:
        return HostService(_registry(), self.short_calls)


def _registry() -> Registry:
    return cast(Registry, _Nobody())


def _slots(most: int) -> CallSlots:
    return CallSlots(most, "calls", Reason.TOO_MANY_CALLS)


class _Method(NamedTuple):
    service: Callable[[_Services], Any]
    request: Any
    sharer: str = ""
    """Who may not have all slots; empty: all such calls have a bound of their own."""
    refusal: Reason = Reason.TOO_MANY_CALLS
    """Where the sharer has its share."""


OF_VM = Reason.TOO_MANY_CALLS_ON_VM
METHODS = {
    "GetHost": _Method(_Services.hosts, host_service_pb2.GetHostRequest(), "GetHost"),
    "CreateVm": _Method(_Services.vms, vm_requests.simulated("web", 1), VM, OF_VM),
    "AdoptVm": _Method(_Services.vms, vm_requests.adopted("web", 1), VM, OF_VM),
    "ListVmCandidates": _Method(_Services.vms, vm_service_pb2.ListVmCandidatesRequest(), "ListVmCandidates"),
    "GetVm": _Method(_Services.vms, vm_service_pb2.GetVmRequest(name=VM), VM, OF_VM),
    "ListVms": _Method(_Services.vms, vm_service_pb2.ListVmsRequest()),
    "DeleteVm": _Method(_Services.vms, vm_service_pb2.DeleteVmRequest(name=VM), VM, OF_VM),
    "GetSkey": _Method(_Services.keys, pb.GetSkeyRequest(vm=VM), VM, OF_VM),
    "SetSkey": _Method(_Services.keys, pb.SetSkeyRequest(vm=VM), VM, OF_VM),
    "ResetReferenced": _Method(_Services.keys, pb.ResetReferencedRequest(vm=VM), VM, OF_VM),
}


def _call(name: str, short_calls: CallSlots) -> None:
    method = METHODS[name]
    getattr(method.service(_Services(short_calls)), name)(method.request, cast(grpc.ServicerContext, _Call()))


@pytest.mark.parametrize("name", METHODS)
def test_where_all_slots_are_taken_the_call_is_refused_before_it_asks_anybody(name: str) -> None:
    some = _slots(1)
    with some.taken("vms/other"), pytest.raises(SkeydError) as refused:
        _call(name, some)
    assert refused.value.reason is Reason.TOO_MANY_CALLS
    with pytest.raises(_Reached):
        _call(name, some)
    with some.taken("vms/other"):
        pass  # the call that failed has given its slot back


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.sharer])
def test_where_its_vm_has_its_share_the_call_is_refused_and_beside_another_it_is_not(name: str) -> None:
    some = _slots(2)
    method = METHODS[name]
    with some.taken(method.sharer), pytest.raises(SkeydError) as refused:
        _call(name, some)
    assert refused.value.reason is method.refusal
    assert method.sharer in refused.value.message
    with some.taken("vms/other"), pytest.raises(_Reached):
        _call(name, some)


def test_no_short_method_is_left_out() -> None:
    streams = {"GetSkeys", "SetSkeys", "DigestSkeys", "SummarizeSkeys"}
    services = (
        host_service_pb2.DESCRIPTOR.services_by_name["HostService"],
        vm_service_pb2.DESCRIPTOR.services_by_name["VmService"],
        pb.DESCRIPTOR.services_by_name["StorageKeyService"],
    )
    assert {method.name for service in services for method in service.methods} == METHODS.keys() | streams
