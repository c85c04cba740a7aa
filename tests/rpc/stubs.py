"""Raw gRPC: the generated stubs and nothing of skeyd.client, so that the wire is what a test sees."""

from __future__ import annotations

import itertools
import queue
import random
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import grpc
import pytest

from skeyd import standard
from skeyd.v1 import (
    host_service_pb2_grpc,
    storage_key_service_pb2_grpc,
    vm_pb2,
    vm_service_pb2,
    vm_service_pb2_grpc,
)
from skeyd.v1 import storage_key_service_pb2 as pb

MIB: Final = 1 << 20
FRAMES_A_MIB: Final = 256
SECONDS: Final = 60.0
"""Deadline of every call: a test that waits for longer has failed."""

GENERATIONS: Final = (
    vm_pb2.SIMULATED_KERNEL_LINUX_4_19,
    vm_pb2.SIMULATED_KERNEL_LINUX_7_0,
    vm_pb2.SIMULATED_KERNEL_LINUX_7_2,
)

_EVEN: Final = bytes(byte & 0xFE for byte in range(256))
_ids = itertools.count(1)


def new_id() -> str:
    """Return an id that no other test of this process has."""
    return f"test-{next(_ids)}"


def some_keys(count: int, seed: int = 0) -> bytes:
    """Return keys that look like nothing in particular; the same ones for the same seed."""
    return random.Random(seed).randbytes(count).translate(_EVEN)  # noqa: S311  no secret


@dataclass(frozen=True)
class Refusal:
    """How a call was refused, taken from the status and from the details in the trailers."""

    code: grpc.StatusCode
    message: str
    reason: str
    domain: str
    metadata: dict[str, str]
    retry_seconds: int | None


def refusal(error: grpc.RpcError) -> Refusal:
    """Take an error apart as a client of any language would; AssertionError where its two halves differ."""
    trailers: dict[str, Any] = dict(error.trailing_metadata())  # type: ignore[arg-type]  # pairs, whatever the stub says
    status = standard.message("google.rpc.Status").FromString(trailers["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    info, retry = standard.message("google.rpc.ErrorInfo")(), standard.message("google.rpc.RetryInfo")()
    assert status.details[0].Unpack(info)
    wait = len(status.details) > 1 and status.details[1].Unpack(retry)
    return Refusal(
        code=error.code(),
        message=error.details() or "",
        reason=info.reason,
        domain=info.domain,
        metadata=dict(info.metadata),
        retry_seconds=retry.retry_delay.seconds if wait else None,
    )


def refused(call: Callable[[], object]) -> Refusal:
    """Make a call that must be refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return refusal(caught.value)


def ranges(*wanted: tuple[int, int]) -> list[vm_pb2.GfnRange]:
    """Write (first gfn, count) down."""
    return [vm_pb2.GfnRange(start_gfn=start, count=count) for start, count in wanted]


KEEP: Final = pb.ON_INTERRUPT_KEEP


def header(vm: str, *wanted: tuple[int, int], allow_enable: bool = False, **other: Any) -> pb.SetSkeysRequest:
    """Begin a SetSkeys stream; `other` are further fields of its Header."""
    return pb.SetSkeysRequest(
        header=pb.SetSkeysRequest.Header(vm=vm, ranges=ranges(*wanted), allow_enable=allow_enable, **other)
    )


def chunk(start: int, keys: bytes, **other: Any) -> pb.SetSkeysRequest:
    """Go on with it; `other` replaces fields of the Chunk, for chunks that are wrong."""
    fields: dict[str, Any] = {
        "start_gfn": start,
        "count": len(keys),
        "encoding": pb.ENCODING_RAW,
        "data": keys,
        "crc32": zlib.crc32(keys),
    }
    return pb.SetSkeysRequest(chunk=pb.Chunk(**{**fields, **other}))


def commit() -> pb.SetSkeysRequest:
    """End it."""
    return pb.SetSkeysRequest(commit=pb.SetSkeysRequest.Commit())


@dataclass(frozen=True)
class Read:
    """A GetSkeys stream that was whole: header first, trailer last, and every checksum right."""

    header: pb.GetSkeysResponse.Header
    parts: list[pb.Chunk | pb.GetSkeysResponse.Gap]
    trailer: pb.GetSkeysResponse.Trailer

    @property
    def keys(self) -> bytes:
        """All keys in the order in which they came."""
        return b"".join(part.data for part in self.parts if isinstance(part, pb.Chunk))

    @property
    def layout(self) -> list[tuple[str, int, int]]:
        """What came: ("chunk" or "gap", first gfn, frames)."""
        return [("chunk" if isinstance(part, pb.Chunk) else "gap", part.start_gfn, part.count) for part in self.parts]


def whole(responses: Iterable[pb.GetSkeysResponse]) -> Read:
    """Take a GetSkeys stream to its end and check all that the contract promises of any."""
    first, *middle, last = responses
    assert first.WhichOneof("part") == "header"
    assert last.WhichOneof("part") == "trailer"
    parts: list[pb.Chunk | pb.GetSkeysResponse.Gap] = []
    for response in middle:
        match response.WhichOneof("part"):
            case "chunk":
                part = response.chunk
                assert part.encoding == pb.ENCODING_RAW
                assert len(part.data) == part.count
                assert part.crc32 == zlib.crc32(part.data)
                parts.append(part)
            case "gap":
                parts.append(response.gap)
            case other:
                raise AssertionError(f"a {other} between header and trailer")
    read = Read(first.header, parts, last.trailer)
    assert last.trailer.keys == len(read.keys)
    assert last.trailer.crc32 == zlib.crc32(read.keys)
    assert last.trailer.gap_frames == sum(count for kind, _, count in read.layout if kind == "gap")
    return read


def parts(answers: Iterable[pb.SetSkeysResponse]) -> list[str | None]:
    """Say what each answer of a SetSkeys stream is."""
    return [answer.WhichOneof("part") for answer in answers]


class Stubs:
    """A channel with all generated stubs on it."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)])
        self.hosts = host_service_pb2_grpc.HostServiceStub(self.channel)
        self.vms = vm_service_pb2_grpc.VmServiceStub(self.channel)
        self.keys = storage_key_service_pb2_grpc.StorageKeyServiceStub(self.channel)

    def create(
        self,
        vm_id: str,
        *slots: tuple[int, int],
        kernel: vm_pb2.SimulatedKernel.ValueType = vm_pb2.SIMULATED_KERNEL_UNSPECIFIED,
    ) -> vm_pb2.Vm:
        """Create a simulated VM; slots are (address, size) in MiB."""
        request = vm_service_pb2.CreateVmRequest(
            vm_id=vm_id,
            kind=vm_pb2.VM_KIND_SIMULATED,
            memory_slots=[
                vm_service_pb2.MemorySlotSpec(guest_phys_addr=address * MIB, memory_size=size * MIB)
                for address, size in slots
            ],
            simulated_kernel=kernel,
        )
        return self.vms.CreateVm(request, timeout=SECONDS).vm

    def look_at(self, name: str) -> vm_pb2.Vm:
        """Get one VM."""
        return self.vms.GetVm(vm_service_pb2.GetVmRequest(name=name), timeout=SECONDS).vm

    def names(self) -> list[str]:
        """List the names of all VMs."""
        return [vm.name for vm in self.vms.ListVms(vm_service_pb2.ListVmsRequest(), timeout=SECONDS).vms]

    def delete(self, name: str) -> None:
        """Delete a VM."""
        self.vms.DeleteVm(vm_service_pb2.DeleteVmRequest(name=name), timeout=SECONDS)

    def get(self, vm: str, *wanted: tuple[int, int], chunk_keys: int = 0) -> Read:
        """Read keys: a stream that must be whole."""
        request = pb.GetSkeysRequest(vm=vm, ranges=ranges(*wanted), max_chunk_keys=chunk_keys)
        return whole(self.keys.GetSkeys(request, timeout=SECONDS))

    def send(self, *requests: pb.SetSkeysRequest) -> tuple[list[pb.SetSkeysResponse], Refusal | None]:
        """Send a SetSkeys stream and close it: all answers, and how it was refused if it was."""
        answers: list[pb.SetSkeysResponse] = []
        try:
            for answer in self.keys.SetSkeys(iter(requests), timeout=SECONDS):
                answers.append(answer)  # noqa: PERF402  those before an error count
        except grpc.RpcError as error:
            return answers, refusal(error)
        return answers, None

    def set(
        self, vm: str, wanted: Sequence[tuple[int, bytes]], *, allow_enable: bool = True, **other: Any
    ) -> pb.SetSkeysResponse.Result:
        """Set keys, one chunk a range: a stream that must be applied whole. `other` are fields of its Header."""
        answers, error = self.send(
            header(vm, *((start, len(keys)) for start, keys in wanted), allow_enable=allow_enable, **other),
            *(chunk(start, keys) for start, keys in wanted),
            commit(),
        )
        assert error is None, error
        assert parts(answers) == ["begun", *["progress"] * len(wanted), "result"]
        return answers[-1].result

    def settled(self, vm: str) -> vm_pb2.LastWrite:
        """Wait until no SetSkeys is being rolled back: what became of the last one."""
        end = time.monotonic() + SECONDS
        while (last := self.look_at(vm).last_write).outcome == vm_pb2.WRITE_OUTCOME_ROLLING_BACK:
            assert time.monotonic() < end, "it is being rolled back for ever"
        return last

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.channel.close()


class SetStream:
    """A SetSkeys stream that goes on message by message, for as long as the test likes."""

    def __init__(self, stubs: Stubs, seconds: float = SECONDS) -> None:
        self._requests: queue.SimpleQueue[pb.SetSkeysRequest | None] = queue.SimpleQueue()
        self.call = stubs.keys.SetSkeys(self._sent(), timeout=seconds)

    def send(self, request: pb.SetSkeysRequest) -> None:
        """Send a message."""
        self._requests.put(request)

    def ask(self, request: pb.SetSkeysRequest) -> pb.SetSkeysResponse:
        """Send a message and take its answer."""
        self.send(request)
        return next(self.call)

    def begin(self, vm: str, *wanted: tuple[int, int], **other: Any) -> pb.SetSkeysResponse.Begun:
        """Send the header and take its answer, which must be that it is good."""
        answer = self.ask(header(vm, *wanted, **other))
        assert answer.WhichOneof("part") == "begun"
        return answer.begun

    def finish(self) -> None:
        """Close the sending half."""
        self._requests.put(None)

    def _sent(self) -> Iterator[pb.SetSkeysRequest]:
        while (request := self._requests.get()) is not None:
            yield request

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.call.cancel()
        self.finish()  # the thread that sends waits for it
