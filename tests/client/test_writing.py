"""What the client makes of SetSkeys."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from skeyd.client import Client, ClientError, Keys, SetOptions, SetResult, StreamError, connect
from skeyd.client.writing import CHUNK_KEYS, repeated
from skeyd.gfn import GfnRange
from skeyd.v1 import storage_key_service_pb2 as pb
from tests.client.lying_daemon import LyingDaemon
from tests.daemon import DaemonProcess
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import Stubs, some_keys

ALL = [GfnRange(0, 16)]
FIRST, SECOND = Keys(GfnRange(0, 8), b"\x10" * 8), Keys(GfnRange(8, 8), b"\x20" * 8)


@pytest.fixture
def client(shared_daemon: DaemonProcess) -> Iterator[Client]:
    """Connect to the real daemon."""
    with shared_daemon.connect() as connected:
        yield connected


def test_the_result_says_what_was_done(client: Client, stubs: Stubs, new_vm: NewVm) -> None:
    vm = new_vm((0, 1))
    told: list[int] = []
    result = client.set_skeys(vm, ALL, [FIRST, SECOND], allow_enable=True, progress=told.append)
    assert result == SetResult(keys_set=16, keys_repaired=0, enabled=True)
    assert told == [8, 16]
    assert stubs.get(vm, (0, 16)).keys == FIRST.keys + SECOND.keys


def test_chunks_may_come_from_any_iterable(client: Client, stubs: Stubs, new_vm: NewVm) -> None:
    vm = new_vm((0, 1))
    keys = some_keys(16)
    client.set_skeys(vm, ALL, iter([Keys(GfnRange(0, 16), keys)]), allow_enable=True)
    assert stubs.get(vm, (0, 16)).keys == keys


def test_a_refusal_carries_its_reason_and_what_became_of_the_keys(client: Client, stubs: Stubs, new_vm: NewVm) -> None:
    vm = new_vm((0, 1))
    with pytest.raises(ClientError) as caught:
        client.set_skeys(vm, ALL, [FIRST, FIRST], allow_enable=True)
    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "CHUNK_OUT_OF_ORDER")
    assert error.metadata == {"gfn": "0x0", "outcome": "ROLLED_BACK", "enabled": "true"}
    assert str(error) == f"CHUNK_OUT_OF_ORDER: {error.message}"
    assert stubs.get(vm, (0, 16)).keys == bytes(16)


def test_chunks_that_do_not_cover_the_ranges_are_refused_at_commit(client: Client, new_vm: NewVm) -> None:
    with pytest.raises(ClientError) as caught:
        client.set_skeys(new_vm((0, 1)), ALL, [FIRST], allow_enable=True)
    assert caught.value.reason == "STREAM_INCOMPLETE"
    assert "Commit came before" in caught.value.message


def wait_for_end(daemon: DaemonProcess, vm: str) -> dict[str, Any]:
    """Wait for the line of a call that was broken off, which may have been before its header came and named the VM."""
    while True:
        line = daemon.wait_for_line("rpc", method="/skeyd.v1.StorageKeyService/SetSkeys")
        if line.get("vm", vm) == vm:
            return line


class SourceError(Exception):
    """What a source of chunks fails with."""


@pytest.mark.parametrize("before", [[], [FIRST]], ids=["at-once", "in-the-middle"])
def test_what_the_source_of_chunks_raises_is_raised_and_nothing_is_committed(
    client: Client, shared_daemon: DaemonProcess, stubs: Stubs, new_vm: NewVm, before: list[Keys]
) -> None:
    vm = new_vm((0, 1))
    raised = SourceError("the file is cut off")

    def chunks() -> Iterator[Keys]:
        yield from before
        raise raised

    with pytest.raises(SourceError) as caught:
        client.set_skeys(vm, ALL, chunks(), allow_enable=True)
    assert caught.value is raised
    line = wait_for_end(shared_daemon, vm)
    assert line["code"] in ("CANCELLED", "ABORTED") or "vm" not in line
    # What was sent before may have been set, and is no more; and the lock is free.
    stubs.settled(vm)
    assert stubs.get(vm, (0, 16)).keys in (b"", bytes(16) if before else b"")
    assert client.set_skeys(vm, ALL, [FIRST, SECOND], allow_enable=True).keys_set == 16


def test_what_progress_raises_ends_the_call(client: Client, shared_daemon: DaemonProcess, new_vm: NewVm) -> None:
    vm = new_vm((0, 1))

    def progress(_: int) -> None:
        raise SourceError

    with pytest.raises(SourceError):
        client.set_skeys(vm, ALL, [FIRST, SECOND], allow_enable=True, progress=progress)
    assert wait_for_end(shared_daemon, vm)["vm"] == vm


@pytest.fixture
def lying(tmp_path: Path) -> Iterator[LyingDaemon]:
    """Serve lies."""
    with LyingDaemon(tmp_path) as daemon:
        yield daemon


def progress_of(keys_set: int) -> pb.SetSkeysResponse:
    return pb.SetSkeysResponse(progress=pb.SetSkeysResponse.Progress(next_gfn=keys_set, keys_set=keys_set))


BEGUN = pb.SetSkeysResponse(begun=pb.SetSkeysResponse.Begun())
SENT = zlib.crc32(FIRST.keys + SECOND.keys)


def result_of(keys_set: int, crc32: int = SENT) -> pb.SetSkeysResponse:
    return pb.SetSkeysResponse(result=pb.SetSkeysResponse.Result(keys_set=keys_set, crc32=crc32))


LIES = {
    "nothing": [],
    "no-result": [progress_of(8), progress_of(16)],
    "an-empty-message": [pb.SetSkeysResponse()],
    "fewer-keys": [progress_of(8), progress_of(16), result_of(15)],
    "more-keys": [result_of(17)],
    "no-keys": [result_of(0)],
    "other-keys": [result_of(16, SENT ^ 1)],
    "no-checksum": [result_of(16, 0)],
    "the-keys-of-the-first-chunk": [result_of(16, zlib.crc32(FIRST.keys))],
}


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("validate_only", [False, True])
@pytest.mark.parametrize("answers", LIES.values(), ids=LIES)
def test_a_stream_that_ends_well_without_saying_that_all_keys_are_set_is_an_error(
    lying: LyingDaemon, answers: list[pb.SetSkeysResponse], validate_only: bool, begun: bool
) -> None:
    def writing(requests: Iterator[pb.SetSkeysRequest], _: grpc.ServicerContext) -> Iterator[pb.SetSkeysResponse]:
        next(requests)
        if begun:
            yield BEGUN
            list(requests)
        for answer in answers:
            if validate_only and answer.WhichOneof("part") == "result":
                answer.result.outcome = pb.SetSkeysResponse.OUTCOME_VALIDATED
            yield answer

    lying.writing = writing
    with connect(lying.target) as client, pytest.raises(StreamError):
        client.set_skeys("vms/a", ALL, [FIRST, SECOND], SetOptions(validate_only=validate_only))


def test_a_result_before_all_keys_were_sent_is_an_error(lying: LyingDaemon) -> None:
    over = threading.Event()

    def writing(requests: Iterator[pb.SetSkeysRequest], _: grpc.ServicerContext) -> Iterator[pb.SetSkeysResponse]:
        next(requests)
        yield from (BEGUN, result_of(16))

    def chunks() -> Iterator[Keys]:
        yield FIRST
        over.wait(30)
        yield SECOND

    lying.writing = writing
    with connect(lying.target) as client:
        with pytest.raises(StreamError, match="before all were sent"):
            client.set_skeys("vms/a", ALL, chunks())
        over.set()


@pytest.mark.parametrize(
    "options", [SetOptions(), SetOptions(request_id="a", validate_only=True)], ids=["no-id", "validate"]
)
def test_a_result_without_begun_needs_a_request_that_can_be_remembered(lying: LyingDaemon, options: SetOptions) -> None:
    answer = result_of(16)
    answer.result.outcome = (
        pb.SetSkeysResponse.OUTCOME_VALIDATED if options.validate_only else pb.SetSkeysResponse.OUTCOME_APPLIED
    )
    lying.writing = lambda *_: iter([answer])
    with connect(lying.target) as client, pytest.raises(StreamError, match="without Begun"):
        client.set_skeys("vms/a", ALL, [FIRST, SECOND], options)


@pytest.mark.parametrize(
    "answers",
    [
        [BEGUN, BEGUN, result_of(16)],
        [progress_of(8), BEGUN, result_of(16)],
        [BEGUN, result_of(16), result_of(16)],
        [BEGUN, result_of(16), progress_of(16)],
        [result_of(16), BEGUN],
    ],
)
def test_answers_in_another_order_are_an_error(lying: LyingDaemon, answers: list[pb.SetSkeysResponse]) -> None:
    def writing(requests: Iterator[pb.SetSkeysRequest], _: grpc.ServicerContext) -> Iterator[pb.SetSkeysResponse]:
        next(requests)
        for number, answer in enumerate(answers):
            yield answer
            if number == 0 and answer == BEGUN:
                list(requests)

    lying.writing = writing
    with connect(lying.target) as client, pytest.raises(StreamError, match="wrong place"):
        client.set_skeys("vms/a", ALL, [FIRST, SECOND], SetOptions(request_id="a"))


def test_no_chunk_is_asked_for_before_the_daemon_has_begun(lying: LyingDaemon) -> None:
    asked = threading.Event()
    seen: list[bool] = []

    def writing(requests: Iterator[pb.SetSkeysRequest], _: grpc.ServicerContext) -> Iterator[pb.SetSkeysResponse]:
        next(requests)
        seen.append(asked.is_set())
        yield BEGUN
        list(requests)
        yield result_of(16)

    def chunks() -> Iterator[Keys]:
        asked.set()
        yield from (FIRST, SECOND)

    lying.writing = writing
    with connect(lying.target) as client:
        assert client.set_skeys("vms/a", ALL, chunks()).keys_set == 16
    assert seen == [False]


def test_what_is_sent_is_the_contract(lying: LyingDaemon) -> None:
    sent: list[pb.SetSkeysRequest] = []

    def writing(requests: Iterator[pb.SetSkeysRequest], _: grpc.ServicerContext) -> Iterator[pb.SetSkeysResponse]:
        sent.append(next(requests))
        yield BEGUN
        sent.extend(requests)
        yield result_of(16)

    lying.writing = writing
    with connect(lying.target) as client:
        client.set_skeys("vms/a", ALL, [FIRST, SECOND])
    assert [one.WhichOneof("part") for one in sent] == ["header", "chunk", "chunk", "commit"]
    assert not sent[0].header.allow_enable
    assert sent[1].chunk == pb.Chunk(start_gfn=0, count=8, encoding=pb.ENCODING_RAW, data=FIRST.keys, crc32=0x063B114F)
    assert (sent[2].chunk.start_gfn, sent[2].chunk.data) == (8, SECOND.keys)


def test_repeated_gives_every_frame_one_key_in_chunks_that_the_daemon_takes() -> None:
    chunks = list(repeated(0x38, [GfnRange(5, CHUNK_KEYS + 1), GfnRange(2**64 - 1, 1)]))
    assert [chunk.frames for chunk in chunks] == [
        GfnRange(5, CHUNK_KEYS),
        GfnRange(5 + CHUNK_KEYS, 1),
        GfnRange(2**64 - 1, 1),
    ]
    assert all(chunk.keys == b"\x38" * chunk.frames.count for chunk in chunks)
