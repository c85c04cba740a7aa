"""skeyd.standard: gRPC's standard messages, in a pool of their own."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from skeyd import standard

MESSAGES = [
    "google.rpc.Status",
    "google.rpc.ErrorInfo",
    "google.rpc.RetryInfo",
    "grpc.health.v1.HealthCheckRequest",
    "grpc.health.v1.HealthCheckResponse",
    "grpc.reflection.v1.ServerReflectionRequest",
    "grpc.reflection.v1.ServerReflectionResponse",
    "grpc.reflection.v1alpha.ServerReflectionRequest",
    "grpc.reflection.v1alpha.ServerReflectionResponse",
]


@pytest.mark.parametrize("name", MESSAGES)
def test_each_message_is_there_and_reads_what_it_writes(name: str) -> None:
    made = standard.message(name)
    assert made.DESCRIPTOR.full_name == name
    assert made.FromString(made().SerializeToString()) == made()


def test_a_message_that_there_is_not_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        standard.message("google.rpc.Nothing")


def test_their_numbers_on_the_wire_are_the_standard_ones() -> None:
    """Bytes as other implementations write them."""
    info = standard.message("google.rpc.ErrorInfo")(reason="R", domain="skeyd", metadata={"k": "v"})
    assert info.SerializeToString() == b"\n\x01R\x12\x05skeyd\x1a\x06\n\x01k\x12\x01v"
    status = standard.message("google.rpc.Status")(code=5, message="m")
    status.details.add().Pack(info)
    assert status.details[0].type_url == "type.googleapis.com/google.rpc.ErrorInfo"
    assert status.SerializeToString().startswith(b"\x08\x05\x12\x01m\x1a")
    retry = standard.message("google.rpc.RetryInfo")()
    retry.retry_delay.seconds = 1
    assert retry.SerializeToString() == b"\n\x02\x08\x01"
    health = standard.message("grpc.health.v1.HealthCheckResponse")
    assert (health.UNKNOWN, health.SERVING, health.NOT_SERVING, health.SERVICE_UNKNOWN) == (0, 1, 2, 3)
    assert health(status=health.SERVING).SerializeToString() == b"\x08\x01"


@pytest.mark.parametrize("name", MESSAGES)
def test_nothing_of_it_is_in_the_default_pool(name: str) -> None:
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName(name)


def test_another_packages_version_of_the_same_files_can_be_loaded_beside_it() -> None:
    """What googleapis-common-protos and grpcio-health-checking do when they are imported, before skeyd and after."""
    # In a process of its own: what is in the default pool stays there.
    program = """
import sys
from importlib import resources
from google.protobuf import descriptor_pb2, descriptor_pool

def load_as_others_do():
    data = resources.files("skeyd").joinpath("standard.binpb").read_bytes()
    for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:
        if file.package.startswith("google.rpc") or file.package.startswith("grpc."):
            # not quite the same: a pool refuses two different files of one name
            file.message_type.add().name = "OfAnother" + file.name.split("/")[-1].removesuffix(".proto")
        descriptor_pool.Default().AddSerializedFile(file.SerializeToString())

if sys.argv[1] == "before":
    load_as_others_do()
import skeyd.client
import skeyd.server
from skeyd.rpc import status
from skeyd.errors import Reason, SkeydError
if sys.argv[1] == "after":
    load_as_others_do()
assert status.details(SkeydError(Reason.VM_BUSY, "busy", {"vm": "vms/a"}))
assert descriptor_pool.Default().FindMessageTypeByName("google.rpc.OfAnotherstatus")
"""
    for when in ("before", "after"):
        done = subprocess.run(
            [sys.executable, "-c", program, when], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr


def test_the_committed_file_holds_the_standard_files_and_what_they_import() -> None:
    data = resources.files("skeyd").joinpath("standard.binpb").read_bytes()
    names = [file.name for file in descriptor_pb2.FileDescriptorSet.FromString(data).file]
    assert sorted(names) == [
        "google/protobuf/any.proto",
        "google/protobuf/duration.proto",
        "google/rpc/error_details.proto",
        "google/rpc/status.proto",
        "grpc/health/v1/health.proto",
        "grpc/reflection/v1/reflection.proto",
        "grpc/reflection/v1alpha/reflection.proto",
    ]
