"""gRPC server reflection, v1 and v1alpha: clients such as `buf curl` learn the contract from the daemon itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool

from skeyd import standard
from skeyd.rpc.slots import CallSlots

VERSIONS: Final = ("v1", "v1alpha")


def service_name(version: str) -> str:
    """Return the full name of the reflection service of a version."""
    return f"grpc.reflection.{version}.ServerReflection"


class Reflection:
    """Describes the services of this server. Synchronization: any thread."""

    def __init__(self, services: Iterable[str], watches: CallSlots) -> None:
        self._services = sorted(services)
        self._watches = watches
        self._pools = (descriptor_pool.Default(), standard.POOL)

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """Return what a server needs to serve both versions."""
        return [self._handler(version) for version in VERSIONS]

    def _handler(self, version: str) -> grpc.GenericRpcHandler:
        request = standard.message(f"grpc.reflection.{version}.ServerReflectionRequest")
        response = standard.message(f"grpc.reflection.{version}.ServerReflectionResponse")

        def info(requests: Iterator[Any], _: grpc.ServicerContext) -> Iterator[Any]:
            with self._watches.taken():
                for one in requests:
                    yield self._answer(one, response(valid_host=one.host, original_request=one))

        method = grpc.stream_stream_rpc_method_handler(info, request.FromString, response.SerializeToString)
        return grpc.method_handlers_generic_handler(service_name(version), {"ServerReflectionInfo": method})

    def _answer(self, request: Any, response: Any) -> Any:
        match request.WhichOneof("message_request"):
            case "list_services":
                for name in self._services:
                    response.list_services_response.service.add().name = name
            case "file_by_filename":
                self._describe(response, _file_by_name, request.file_by_filename)
            case "file_containing_symbol":
                self._describe(response, _file_of_symbol, request.file_containing_symbol)
            case "file_containing_extension" | "all_extension_numbers_of_type":
                # proto3 has no extensions but options, and skeyd's contract none of those
                _refuse(response, grpc.StatusCode.NOT_FOUND, "there are no extensions")
            case _:
                _refuse(response, grpc.StatusCode.INVALID_ARGUMENT, "the request asks for nothing")
        return response

    def _describe(self, response: Any, find: Callable[[DescriptorPool, str], FileDescriptor], name: str) -> None:
        for pool in self._pools:
            try:
                file = find(pool, name)
            except KeyError:
                continue
            for one in _with_imports(file):
                response.file_descriptor_response.file_descriptor_proto.append(one.serialized_pb)
            return
        _refuse(response, grpc.StatusCode.NOT_FOUND, f"{name[:80]!r} is not known here")


def _file_by_name(pool: DescriptorPool, name: str) -> FileDescriptor:
    return pool.FindFileByName(name)


def _file_of_symbol(pool: DescriptorPool, name: str) -> FileDescriptor:
    try:
        file = pool.FindFileContainingSymbol(name)
    except KeyError:
        # protobuf's own pools know no methods by their full names, and the contract of reflection does
        service, _, method = name.rpartition(".")
        return pool.FindServiceByName(service).methods_by_name[method].containing_service.file
    if f"{file.package}.".startswith(f"{name}."):
        # protobuf in C++, Debian's, takes a package for a symbol too, and answers with any one of its files
        raise KeyError(name)
    return file


def _with_imports(file: FileDescriptor) -> list[FileDescriptor]:
    found = {file.name: file}
    waiting = [file]
    while waiting:
        for one in waiting.pop().dependencies:
            if one.name not in found:
                found[one.name] = one
                waiting.append(one)
    return list(found.values())


def _refuse(response: Any, code: grpc.StatusCode, message: str) -> None:
    response.error_response.error_code = code.value[0]
    response.error_response.error_message = message
