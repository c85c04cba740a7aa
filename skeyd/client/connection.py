"""A connection to one daemon."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self

import grpc

from skeyd import limits
from skeyd.client.digesting import Digest, digest_of, digest_request
from skeyd.client.errors import ClientError, client_error, translated
from skeyd.client.freezing import require_frozen, set_frozen
from skeyd.client.reading import Keys, KeyStream, Position, get_skeys_response
from skeyd.client.single import OneKey, OneKeySet, one_key, one_key_set
from skeyd.client.slices import set_slice_time
from skeyd.client.summary import VmSummary, summarize_request, summary_of
from skeyd.client.writing import SetCall, SetOptions, SetResult, written
from skeyd.encoding import codec
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
from skeyd.wire import ChunkMessage

_KEY_SERVICE: Final = storage_key_service_pb2.DESCRIPTOR.services_by_name["StorageKeyService"].full_name

UNARY_SECONDS: Final = 60.0
"""Deadline of a call that isn't a stream."""

BULK_SECONDS: Final = 600.0
"""Deadline of a call that reads all keys of a guest and answers in a word. When it passes the daemon stops reading."""


def connect(target: str | None = None) -> Client:
    """Connect to a daemon: a gRPC target, or by default the unix socket of this machine's. Nothing is sent yet."""
    options = [
        # A proxy for the web has no business with storage keys, and plaintext goes no further than loopback.
        ("grpc.enable_http_proxy", 0),
        # Only none: what comes packed is unpacked before its size is looked at, by grpcio up to 1.51.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        # A stream has no deadline of its own, and a daemon that is stopped, or a host that is gone, says nothing.
        ("grpc.keepalive_time_ms", int(limits.KEEPALIVE_SECONDS * 1000)),
        ("grpc.keepalive_timeout_ms", int(limits.KEEPALIVE_TIMEOUT_SECONDS * 1000)),
        ("grpc.http2.max_pings_without_data", 0),  # as many as it takes
        # Where gRPC has asked for something else (how fast the connection is) it asks nothing more until that is
        # answered, which it would wait a minute for (seen with 1.85).
        ("grpc.http2.ping_timeout_ms", int(limits.KEEPALIVE_TIMEOUT_SECONDS * 1000)),
    ]
    return Client(grpc.insecure_channel(target or default_target(), options))


class Client:
    """Calls to one daemon. All raise ClientError; `with` closes the connection.

    Synchronization: any thread.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._host = host_service_pb2_grpc.HostServiceStub(channel)
        self._vms = vm_service_pb2_grpc.VmServiceStub(channel)
        self._keys = storage_key_service_pb2_grpc.StorageKeyServiceStub(channel)
        # The two calls that carry keys have parsers and writers of their own (skeyd.wire).
        self._get_skeys: grpc.UnaryStreamMultiCallable[
            storage_key_service_pb2.GetSkeysRequest, storage_key_service_pb2.GetSkeysResponse | ChunkMessage
        ] = channel.unary_stream(
            f"/{_KEY_SERVICE}/GetSkeys",
            request_serializer=storage_key_service_pb2.GetSkeysRequest.SerializeToString,
            response_deserializer=get_skeys_response,
        )
        self._set_skeys: grpc.StreamStreamMultiCallable[
            storage_key_service_pb2.SetSkeysRequest | bytes, storage_key_service_pb2.SetSkeysResponse
        ] = channel.stream_stream(
            f"/{_KEY_SERVICE}/SetSkeys",
            request_serializer=written,
            response_deserializer=storage_key_service_pb2.SetSkeysResponse.FromString,
        )

    def host(self) -> host_service_pb2.Host:
        """Ask what the host can do."""
        with translated():
            return self._host.GetHost(host_service_pb2.GetHostRequest(), timeout=UNARY_SECONDS).host

    def create_vm(self, request: vm_service_pb2.CreateVmRequest) -> vm_pb2.Vm:
        """Create a VM."""
        with translated():
            return self._vms.CreateVm(request, timeout=UNARY_SECONDS).vm

    def adopt_vm(self, request: vm_service_pb2.AdoptVmRequest) -> vm_pb2.Vm:
        """Adopt a VM of another process."""
        with translated():
            return self._vms.AdoptVm(request, timeout=UNARY_SECONDS).vm

    def list_vm_candidates(self) -> vm_service_pb2.ListVmCandidatesResponse:
        """Look for processes whose VMs can be adopted."""
        with translated():
            return self._vms.ListVmCandidates(vm_service_pb2.ListVmCandidatesRequest(), timeout=UNARY_SECONDS)

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
    def get_skeys(
        self,
        vm: str,
        ranges: Iterable[GfnRange] = (),
        max_chunk_keys: int = 0,
        *,
        encodings: Iterable[int] = codec.KNOWN,
        resume: Position | None = None,
        slice_seconds: float | None = None,
        frozen: bool = False,
        freeze_seconds: float | None = None,
    ) -> Iterator[KeyStream]:
        """Read keys: `with client.get_skeys("vms/a") as stream: for part in stream: …`. Leaving it ends the call.

        `resume` goes on with a stream that was cut, at its `position`; all else must be as it was then. `encodings` are
        those of skeyd.encoding.codec that the daemon may choose from; none but RAW is cheapest on one's own machine.
        `slice_seconds` is how long one ioctl may keep the kernel's lock, about, if not as long as the daemon says.
        `frozen`: all keys are of one moment, for which the VMM of an adopted VM stands still, `freeze_seconds` at most;
        such a stream can't be resumed. StreamError where the daemon doesn't say that they are.
        """
        request = storage_key_service_pb2.GetSkeysRequest(
            vm=vm,
            ranges=[vm_pb2.GfnRange(start_gfn=one.start, count=one.count) for one in ranges],
            max_chunk_keys=max_chunk_keys,
            encodings=[storage_key_service_pb2.Encoding.Value(codec.NAMES[one]) for one in encodings],
        )
        if resume is not None:
            request.resume.gfn = resume.gfn
            request.resume.incarnation = resume.incarnation
            request.resume.crc32 = resume.crc32
        set_slice_time(request, slice_seconds)
        set_frozen(request, frozen, freeze_seconds)
        call = self._get_skeys(request)
        try:
            stream = KeyStream(call, resume)
            require_frozen(stream.header, frozen)
            yield stream
        finally:
            call.cancel()

    def digest_skeys(
        self,
        vm: str,
        ranges: Iterable[GfnRange] = (),
        *,
        with_referenced_changed: bool = False,
        node: tuple[int, int] | None = None,
        slice_seconds: float | None = None,
        frozen: bool = False,
        freeze_seconds: float | None = None,
        seconds: float = BULK_SECONDS,
    ) -> Digest:
        """Digest keys where they are. `node`: (level, first gfn) of a node of the tree; None: the root.

        `slice_seconds`, `frozen` and `freeze_seconds` as in get_skeys; `seconds` is the deadline.

        StreamError where the answer does not fit together.
        """
        request = digest_request(vm, ranges, with_referenced_changed, node)
        set_slice_time(request, slice_seconds)
        set_frozen(request, frozen, freeze_seconds)
        with translated():
            response = self._keys.DigestSkeys(request, timeout=seconds)
        require_frozen(response, frozen)
        return digest_of(response, node, with_referenced_changed=with_referenced_changed)

    def summarize_skeys(
        self,
        vm: str,
        ranges: Iterable[GfnRange] = (),
        *,
        slice_seconds: float | None = None,
        frozen: bool = False,
        freeze_seconds: float | None = None,
        seconds: float = BULK_SECONDS,
    ) -> VmSummary:
        """Count keys where they are. StreamError where the answer does not fit together. Else as digest_skeys."""
        request = summarize_request(vm, ranges)
        set_slice_time(request, slice_seconds)
        set_frozen(request, frozen, freeze_seconds)
        with translated():
            response = self._keys.SummarizeSkeys(request, timeout=seconds)
        require_frozen(response, frozen)
        return summary_of(response)

    def set_skeys(
        self,
        vm: str,
        ranges: Sequence[GfnRange],
        chunks: Iterable[Keys],
        options: SetOptions | None = None,
        *,
        allow_enable: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> SetResult:
        """Set the keys of all frames of the ranges, all or none; the chunks must cover them in order.

        `allow_enable` is for who needs no other of the SetOptions. What `chunks` raises ends the stream without Commit
        and is raised here; so the old keys are set again, unless the options have `keep`. OtherKeysError: the options'
        `request_id` was applied before with other keys; to know that, all chunks are read and none is sent.
        """
        call = SetCall(vm, ranges, chunks, options or SetOptions(allow_enable=allow_enable))
        responses = self._set_skeys(call.requests())
        try:
            return call.result(responses, progress)
        except grpc.RpcError as error:
            if call.raised is not None:
                raise call.raised from error
            raise client_error(error) from error
        finally:
            responses.cancel()

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
