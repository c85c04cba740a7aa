"""A connection to one daemon."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self

import grpc

from skeyd.client.errors import ClientError, StreamError, client_error, translated
from skeyd.client.keys import (
    Keys,
    KeyStream,
    OneKey,
    OneKeySet,
    SetResult,
    one_key,
    one_key_set,
    set_requests,
    set_result,
)
from skeyd.gfn import GfnRange
from skeyd.paths import default_target
from skeyd.v1 import (
    host_service_pb2,
    host_service_pb2_grpc,
    storage_key_service_pb2,
    storage_key_service_pb2_grpc,
    vm_pb2,
    vm_service_pb2,
    vm_service_pb2_grpc,
)

UNARY_SECONDS: Final = 60.0
"""Deadline of a call that isn't a stream."""


def connect(target: str | None = None) -> Client:
    """Connect to a daemon: a gRPC target, or by default the unix socket of this machine's. Nothing is sent yet."""
    # A proxy for the web has no business with storage keys, and plaintext goes no further than loopback.
    return Client(grpc.insecure_channel(target or default_target(), [("grpc.enable_http_proxy", 0)]))


class Client:
    """Calls to one daemon. All raise ClientError; `with` closes the connection.

    Synchronization: any thread.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._host = host_service_pb2_grpc.HostServiceStub(channel)
        self._vms = vm_service_pb2_grpc.VmServiceStub(channel)
        self._keys = storage_key_service_pb2_grpc.StorageKeyServiceStub(channel)

    def host(self) -> host_service_pb2.Host:
        """Ask what the host can do."""
        with translated():
            return self._host.GetHost(host_service_pb2.GetHostRequest(), timeout=UNARY_SECONDS).host

    def create_vm(self, request: vm_service_pb2.CreateVmRequest) -> vm_pb2.Vm:
        """Create a VM."""
        with translated():
            return self._vms.CreateVm(request, timeout=UNARY_SECONDS).vm

    def get_vm(self, name: str) -> vm_pb2.Vm:
        """Look at a VM, "vms/{vm}"."""
        with translated():
            return self._vms.GetVm(vm_service_pb2.GetVmRequest(name=name), timeout=UNARY_SECONDS).vm

    def list_vms(self) -> Sequence[vm_pb2.Vm]:
        """Look at all VMs."""
        with translated():
            return self._vms.ListVms(vm_service_pb2.ListVmsRequest(), timeout=UNARY_SECONDS).vms

    def delete_vm(self, name: str) -> None:
        """End a VM."""
        with translated():
            self._vms.DeleteVm(vm_service_pb2.DeleteVmRequest(name=name), timeout=UNARY_SECONDS)

    def get_skey(self, vm: str, gfn: int) -> OneKey:
        """Read the key of one frame. StreamError where the answer is none."""
        with translated():
            request = storage_key_service_pb2.GetSkeyRequest(vm=vm, gfn=gfn)
            return one_key(self._keys.GetSkey(request, timeout=UNARY_SECONDS))

    def set_skey(self, vm: str, gfn: int, key: int, *, allow_enable: bool = False) -> OneKeySet:
        """Set the key of one frame, verified."""
        with translated():
            request = storage_key_service_pb2.SetSkeyRequest(vm=vm, gfn=gfn, key=key, allow_enable=allow_enable)
            return one_key_set(self._keys.SetSkey(request, timeout=UNARY_SECONDS))

    def reset_referenced(self, vm: str, gfn: int) -> tuple[bool, bool]:
        """Reset R of one frame: (whether it was referenced, whether it was changed)."""
        with translated():
            request = storage_key_service_pb2.ResetReferencedRequest(vm=vm, gfn=gfn)
            was = self._keys.ResetReferenced(request, timeout=UNARY_SECONDS)
            return was.was_referenced, was.was_changed

    @contextmanager
    def get_skeys(self, vm: str, ranges: Iterable[GfnRange] = (), max_chunk_keys: int = 0) -> Iterator[KeyStream]:
        """Read keys: `with client.get_skeys("vms/a") as stream: for part in stream: …`. Leaving it ends the call."""
        request = storage_key_service_pb2.GetSkeysRequest(
            vm=vm,
            ranges=[vm_pb2.GfnRange(start_gfn=one.start, count=one.count) for one in ranges],
            max_chunk_keys=max_chunk_keys,
        )
        call = self._keys.GetSkeys(request)
        try:
            yield KeyStream(call)
        finally:
            call.cancel()

    def set_skeys(
        self,
        vm: str,
        ranges: Sequence[GfnRange],
        chunks: Iterable[Keys],
        *,
        allow_enable: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> SetResult:
        """Set the keys of all frames of the ranges; the chunks must cover them in order.

        What `chunks` raises ends the stream without Commit and is raised here.
        """
        raised: list[BaseException] = []

        def requests() -> Iterator[storage_key_service_pb2.SetSkeysRequest]:
            try:
                yield from set_requests(vm, ranges, chunks, allow_enable)
            except Exception as error:  # grpc would swallow it
                raised.append(error)
                raise

        call = self._keys.SetSkeys(requests())
        try:
            result = set_result(call, progress)
        except grpc.RpcError as error:
            if raised:
                raise raised[0] from error
            raise client_error(error) from error
        finally:
            call.cancel()
        wanted = sum(one.count for one in ranges)
        if result.keys_set != wanted:
            raise StreamError(f"the daemon says that it set {result.keys_set} keys of {wanted}")
        return result

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


__all__ = ["Client", "ClientError", "connect"]
