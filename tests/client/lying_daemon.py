"""A daemon that answers whatever a test wants it to: the generated servicers on a socket, and no truth behind them."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import (
    storage_key_service_pb2_grpc,
    vm_pb2,
    vm_service_pb2,
    vm_service_pb2_grpc,
)
from tests.rpc.stubs import ranges


class LyingDaemon(storage_key_service_pb2_grpc.StorageKeyServiceServicer, vm_service_pb2_grpc.VmServiceServicer):
    """Serves while it is entered. Its answers are attributes."""

    def __init__(self, directory: Path) -> None:
        self.target = f"unix:{directory}/s"
        self.reading: Callable[[grpc.ServicerContext], Iterator[pb.GetSkeysResponse]] = lambda _: iter(())
        """What GetSkeys answers."""
        self.writing: Callable[[Iterator[pb.SetSkeysRequest], grpc.ServicerContext], Iterator[pb.SetSkeysResponse]] = (
            lambda _requests, _context: iter(())
        )
        """What SetSkeys answers."""
        self.looking: Callable[[grpc.ServicerContext], vm_pb2.Vm] = lambda _: vm_pb2.Vm()
        """What GetVm answers."""
        self.one_read = pb.GetSkeyResponse()
        """What GetSkey answers."""
        self.one_set = pb.SetSkeyResponse()
        """What SetSkey answers."""
        self.digesting: Callable[[pb.DigestSkeysRequest], pb.DigestSkeysResponse] = lambda _: pb.DigestSkeysResponse()
        """What DigestSkeys answers."""
        self.summaries_asked: list[pb.SummarizeSkeysRequest] = []
        """What SummarizeSkeys was asked."""
        self.summary = pb.SummarizeSkeysResponse()
        """What SummarizeSkeys answers."""
        self.called = threading.Event()
        """Set when a call has come."""
        self._pool = ThreadPoolExecutor(4)
        self._server = grpc.server(self._pool)
        storage_key_service_pb2_grpc.add_StorageKeyServiceServicer_to_server(self, self._server)
        vm_service_pb2_grpc.add_VmServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.target)

    def GetSkeys(  # noqa: N802
        self, request: pb.GetSkeysRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GetSkeysResponse]:
        self.called.set()
        return self.reading(context)

    def SetSkeys(  # noqa: N802
        self, request_iterator: Iterator[pb.SetSkeysRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.SetSkeysResponse]:
        self.called.set()
        return self.writing(request_iterator, context)

    def GetSkey(  # noqa: N802
        self, request: pb.GetSkeyRequest, context: grpc.ServicerContext
    ) -> pb.GetSkeyResponse:
        return self.one_read

    def SetSkey(  # noqa: N802
        self, request: pb.SetSkeyRequest, context: grpc.ServicerContext
    ) -> pb.SetSkeyResponse:
        return self.one_set

    def ResetReferenced(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    def DigestSkeys(  # noqa: N802
        self, request: pb.DigestSkeysRequest, context: grpc.ServicerContext
    ) -> pb.DigestSkeysResponse:
        self.called.set()
        return self.digesting(request)

    def SummarizeSkeys(  # noqa: N802
        self, request: pb.SummarizeSkeysRequest, context: grpc.ServicerContext
    ) -> pb.SummarizeSkeysResponse:
        self.called.set()
        self.summaries_asked.append(request)
        return self.summary

    def GetVm(  # noqa: N802
        self, request: vm_service_pb2.GetVmRequest, context: grpc.ServicerContext
    ) -> vm_service_pb2.GetVmResponse:
        self.called.set()
        return vm_service_pb2.GetVmResponse(vm=self.looking(context))

    def CreateVm(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    def AdoptVm(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    def ListVmCandidates(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    def ListVms(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    def DeleteVm(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    def says(self, *parts: pb.GetSkeysResponse) -> None:
        """Have GetSkeys answer these parts and end well."""
        self.reading = lambda _: iter(parts)

    def __enter__(self) -> LyingDaemon:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()
        self._pool.shutdown()


def header(*wanted: tuple[int, int], uses_keys: bool = True, **other: Any) -> pb.GetSkeysResponse:
    """Begin a GetSkeys stream; `other` are more fields of the Header."""
    return pb.GetSkeysResponse(
        header=pb.GetSkeysResponse.Header(
            vm="vms/a", frame_size=4096, uses_storage_keys=uses_keys, ranges=ranges(*wanted), **other
        )
    )


def chunk(start: int, keys: bytes, **other: Any) -> pb.GetSkeysResponse:
    """Go on with it; `other` replaces fields of the Chunk."""
    fields: dict[str, Any] = {
        "start_gfn": start,
        "count": len(keys),
        "encoding": pb.ENCODING_RAW,
        "data": keys,
        "crc32": zlib.crc32(keys),
    }
    return pb.GetSkeysResponse(chunk=pb.Chunk(**{**fields, **other}))


def gap(start: int, count: int) -> pb.GetSkeysResponse:
    """Go on with it."""
    return pb.GetSkeysResponse(gap=pb.GetSkeysResponse.Gap(start_gfn=start, count=count))


def trailer(sent: bytes, gap_frames: int = 0, **other: Any) -> pb.GetSkeysResponse:
    """End it; `other` replaces fields of the Trailer."""
    fields: dict[str, Any] = {"keys": len(sent), "gap_frames": gap_frames, "crc32": zlib.crc32(sent)}
    return pb.GetSkeysResponse(trailer=pb.GetSkeysResponse.Trailer(**{**fields, **other}))
