"""HostService."""

from __future__ import annotations

import os
import platform

import google.protobuf
import grpc

import skeyd
from skeyd import limits
from skeyd.errors import Reason, SkeydError
from skeyd.rpc import convert
from skeyd.rpc.slots import CallSlots
from skeyd.v1 import host_service_pb2, host_service_pb2_grpc
from skeyd.vms.registry import Registry
from skeyd.worker.packets import Fields, ProtocolError
from skeyd.worker.protocol import MAX_MEMORY_SLOTS


class HostService(host_service_pb2_grpc.HostServiceServicer):
    """Says what the host can do."""

    def __init__(self, registry: Registry, short_calls: CallSlots) -> None:
        self._registry = registry
        self._short_calls = short_calls

    def GetHost(
        self, request: host_service_pb2.GetHostRequest, context: grpc.ServicerContext
    ) -> host_service_pb2.GetHostResponse:
        """As the contract says."""
        try:
            with self._short_calls.taken("GetHost", Reason.TOO_MANY_CALLS):
                return host_service_pb2.GetHostResponse(host=_host(self._registry.probe_host()))
        except ProtocolError as error:
            raise SkeydError(Reason.WORKER_FAILED, f"the probe broke the protocol: {error}") from error


def _host(report: Fields) -> host_service_pb2.Host:
    kernel = os.uname()
    return host_service_pb2.Host(
        kernel_release=kernel.release,
        machine=kernel.machine,
        skeyd_version=skeyd.__version__,
        python_version=platform.python_version(),
        grpc_version=grpc.__version__,
        protobuf_version=google.protobuf.__version__,
        can_own_vms=convert.answer_of(report, "can_own_vms"),
        findings=[
            host_service_pb2.Finding(
                name=one.text("name"),
                answer=convert.answer_of(one, "answer"),
                detail=one.text("detail"),
                remedy=one.text("remedy"),
            )
            for one in report.objects("findings", 64)
        ],
        limits=host_service_pb2.Limits(
            max_chunk_keys=limits.MAX_CHUNK_KEYS,
            default_chunk_keys=limits.DEFAULT_CHUNK_KEYS,
            max_ranges=limits.MAX_RANGES,
            max_memory_slots=MAX_MEMORY_SLOTS,
            max_vms=limits.MAX_VMS,
            max_key_streams=limits.MAX_KEY_STREAMS,
        ),
    )
