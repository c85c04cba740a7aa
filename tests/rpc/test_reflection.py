"""Reflection over the real daemon: raw, and as `buf curl`, a client that nobody here wrote, makes use of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format

from skeyd.v1 import storage_key_service_pb2
from tests.daemon import DaemonProcess
from tests.rpc.fixtures import NewVm
from tests.rpc.standard_services import Reflection
from tests.rpc.stubs import Stubs, some_keys

SERVICES = [
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    "skeyd.v1.HostService",
    "skeyd.v1.StorageKeyService",
    "skeyd.v1.VmService",
]
NOT_FOUND, INVALID_ARGUMENT = 5, 3


@pytest.fixture(params=["v1", "v1alpha"])
def reflection(stubs: Stubs, request: pytest.FixtureRequest) -> Iterator[Reflection]:
    """Open a stream to each version."""
    stream = Reflection(stubs.channel, request.param)
    yield stream
    stream.close()


def files_of(answer: Any) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    """Take the files of an answer by name."""
    files = map(descriptor_pb2.FileDescriptorProto.FromString, answer.file_descriptor_response.file_descriptor_proto)
    return {file.name: file for file in files}


def test_all_services_are_listed(reflection: Reflection) -> None:
    answer = reflection.ask(list_services="")
    assert [one.name for one in answer.list_services_response.service] == SERVICES


def test_an_answer_repeats_its_question(reflection: Reflection) -> None:
    answer = reflection.ask(host="a-host", list_services="*")
    assert answer.valid_host == "a-host"
    assert answer.original_request == reflection.request(host="a-host", list_services="*")


def test_a_file_comes_with_all_that_it_imports_and_itself_first(reflection: Reflection) -> None:
    answer = reflection.ask(file_by_filename="skeyd/v1/storage_key_service.proto")
    files = files_of(answer)
    assert next(iter(files)) == "skeyd/v1/storage_key_service.proto"
    assert set(files) == {
        "skeyd/v1/storage_key_service.proto",
        "skeyd/v1/vm.proto",
        "google/protobuf/duration.proto",
        "google/protobuf/timestamp.proto",
    }


@pytest.mark.parametrize(
    ("symbol", "file"),
    [
        ("skeyd.v1.VmService", "skeyd/v1/vm_service.proto"),
        ("skeyd.v1.VmService.CreateVm", "skeyd/v1/vm_service.proto"),
        ("skeyd.v1.SetSkeysRequest.Header", "skeyd/v1/storage_key_service.proto"),
        ("skeyd.v1.VmKind", "skeyd/v1/vm.proto"),
        ("skeyd.v1.Vm.name", "skeyd/v1/vm.proto"),
        ("grpc.health.v1.Health", "grpc/health/v1/health.proto"),
        ("grpc.reflection.v1.ServerReflection", "grpc/reflection/v1/reflection.proto"),
    ],
)
def test_a_symbol_is_found_in_its_file(reflection: Reflection, symbol: str, file: str) -> None:
    assert next(iter(files_of(reflection.ask(file_containing_symbol=symbol)))) == file


def test_what_comes_is_the_contract_that_the_daemon_was_built_from(reflection: Reflection) -> None:
    pool = descriptor_pool.DescriptorPool()
    waiting = files_of(reflection.ask(file_containing_symbol="skeyd.v1.StorageKeyService"))
    while waiting:  # each after those that it imports
        name = next(name for name, file in waiting.items() if not set(file.dependency) & set(waiting))
        pool.AddSerializedFile(waiting.pop(name).SerializeToString())
    ours = storage_key_service_pb2.DESCRIPTOR.serialized_pb
    assert pool.FindFileByName("skeyd/v1/storage_key_service.proto").serialized_pb == ours


@pytest.mark.parametrize(
    "question",
    [
        {"file_by_filename": "skeyd/v2/vm.proto"},
        {"file_by_filename": ""},
        {"file_by_filename": "/etc/passwd"},
        {"file_containing_symbol": "skeyd.v1.Nothing"},
        {"file_containing_symbol": "skeyd.v1.VmService.Nothing"},
        {"file_containing_symbol": "skeyd.v1"},
        {"file_containing_symbol": "skeyd"},
        {"file_containing_symbol": ""},
        {"file_containing_symbol": "\0"},
        {"file_containing_symbol": "x" * 60_000},  # nearly the most that a request may be (MAX_REQUEST_BYTES)
        {"file_containing_extension": {"containing_type": "skeyd.v1.Vm", "extension_number": 1}},
        {"all_extension_numbers_of_type": "skeyd.v1.Vm"},
    ],
    ids=lambda question: f"{next(iter(question))}={str(next(iter(question.values())))[:20]!r}",
)
def test_what_is_not_known_is_not_found_and_the_stream_goes_on(
    reflection: Reflection, question: dict[str, Any]
) -> None:
    assert reflection.ask(**question).error_response.error_code == NOT_FOUND
    assert len(reflection.ask(list_services="").list_services_response.service) == len(SERVICES)


def test_a_question_that_asks_for_nothing_is_refused_and_the_stream_goes_on(reflection: Reflection) -> None:
    assert reflection.ask().error_response.error_code == INVALID_ARGUMENT
    assert len(reflection.ask(list_services="").list_services_response.service) == len(SERVICES)


class Buf:
    """`buf curl`, which learns the contract from the daemon's reflection."""

    def __init__(self, daemon: DaemonProcess, home: Path) -> None:
        self._socket = daemon.target.removeprefix("unix:")
        self._environment = {"HOME": str(home), "PATH": os.environ["PATH"]}

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Run it."""
        buf = Path(sys.executable).parent / "buf"
        done = subprocess.run(
            [buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--unix-socket", self._socket, *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr


@pytest.fixture
def buf_curl(shared_daemon: DaemonProcess, tmp_path: Path) -> Buf:
    """Call the shared daemon over its unix socket."""
    return Buf(shared_daemon, tmp_path)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_buf_curl_lists_the_services(buf_curl: Buf, version: str) -> None:
    listed = buf_curl("--reflect-protocol", f"grpc-{version}", "--list-services", "http://localhost")
    assert listed.split() == SERVICES


def test_buf_curl_reads_keys(buf_curl: Buf, stubs: Stubs, new_vm: NewVm) -> None:
    vm = new_vm((0, 1), (2, 1))
    keys = some_keys(256)
    stubs.set(vm, [(0, keys), (512, keys)])

    answer = buf_curl(
        "-d", json.dumps({"vm": vm, "maxChunkKeys": 200}), "http://localhost/skeyd.v1.StorageKeyService/GetSkeys"
    )

    parts = [json_format.ParseDict(one, storage_key_service_pb2.GetSkeysResponse()) for one in _json_values(answer)]
    assert [part.WhichOneof("part") for part in parts] == [
        "header",
        "chunk",
        "chunk",
        "gap",
        "chunk",
        "chunk",
        "trailer",
    ]
    assert b"".join(part.chunk.data for part in parts) == keys * 2
    assert parts[-1].trailer.keys == 512


def test_buf_curl_is_told_the_reason_of_a_refusal(buf_curl: Buf) -> None:
    said = buf_curl("-d", '{"name": "vms/nobody"}', "http://localhost/skeyd.v1.VmService/GetVm", code=8 * NOT_FOUND)
    assert "not_found" in said
    assert "there is no vms/nobody" in said


def _json_values(text: str) -> Iterator[dict[str, Any]]:
    decoder, at = json.JSONDecoder(), 0
    while at < len(text.rstrip()):
        value, at = decoder.raw_decode(text, at)
        at += len(text[at:]) - len(text[at:].lstrip())
        yield value
