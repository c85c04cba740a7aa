"""One writer a VM: others are refused, readers are not, and the lock never outlives the stream that holds it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import grpc
import pytest

from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2
from tests.daemon import DaemonProcess
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import KEEP, Refusal, SetStream, Stubs, chunk, commit, header, refusal, refused, some_keys

SET_SKEYS = "/skeyd.v1.StorageKeyService/SetSkeys"
OLD, NEW = some_keys(1024, 1), b"\xf8" * 8


@pytest.fixture
def vm(new_vm: NewVm, stubs: Stubs) -> str:
    """Make a VM whose keys are OLD."""
    name = new_vm((0, 4))
    stubs.set(name, [(0, OLD)])
    return name


def begin(stream: SetStream, vm: str, **other: Any) -> None:
    """Take the VM's writer lock and set the first 8 of 16 keys: with the answer it is certain that this is done."""
    assert stream.begin(vm, (0, 16), **other).next_gfn == 0
    assert stream.ask(chunk(0, NEW)).progress.next_gfn == 8


def assert_busy(found: Refusal, vm: str) -> None:
    assert (found.code, found.reason, found.domain) == (grpc.StatusCode.ABORTED, "VM_BUSY", "skeyd")
    assert found.metadata["vm"] == vm
    assert vm in found.message
    assert found.retry_seconds == 1


def test_a_second_writer_is_refused_and_the_first_one_ends_as_if_nothing_were(stubs: Stubs, vm: str) -> None:
    with SetStream(stubs) as first:
        begin(first, vm)
        _, second = stubs.send(header(vm, (512, 8)), chunk(512, NEW), commit())
        assert second is not None
        assert_busy(second, vm)
        assert first.ask(chunk(8, NEW)).progress.keys_set == 16
        assert first.ask(commit()).result.keys_set == 16
    assert stubs.get(vm).keys == NEW * 2 + OLD[16:]


def test_a_vm_is_not_deleted_while_its_keys_are_set(stubs: Stubs, vm: str) -> None:
    with SetStream(stubs) as stream:
        begin(stream, vm)
        assert_busy(refused(lambda: stubs.delete(vm)), vm)
        stream.ask(chunk(8, NEW))
        assert stream.ask(commit()).result.keys_set == 16
    assert stubs.get(vm).keys[:16] == NEW * 2


def test_reading_goes_on_while_keys_are_set_and_sees_what_is_set_so_far(stubs: Stubs, vm: str) -> None:
    with SetStream(stubs) as stream:
        begin(stream, vm)
        assert stubs.get(vm).keys == NEW + OLD[8:]
        assert stubs.look_at(vm).uses_storage_keys


def test_writers_of_two_vms_do_not_know_of_each_other(stubs: Stubs, vm: str, new_vm: NewVm) -> None:
    other = new_vm((0, 4))
    with SetStream(stubs) as one, SetStream(stubs) as another:
        begin(one, vm)
        another.begin(other, (0, 8), allow_enable=True)
        another.ask(chunk(0, NEW))
        assert another.ask(commit()).result.enabled


def wait_for_broken_stream(daemon: DaemonProcess, vm: str) -> None:
    """Wait for the stream's line in the log, which is the last that it does."""
    # A cut stream looks to the daemon cancelled or at its end, whichever word of grpc's comes first. OK is
    # the fixture's.
    while daemon.wait_for_line("rpc", method=SET_SKEYS, vm=vm)["code"] == "OK":
        pass


def assert_free(stubs: Stubs, daemon: DaemonProcess, vm: str, *, keep: bool = False) -> None:
    """Wait until daemon and worker have noticed that the stream is broken, and write again."""
    wait_for_broken_stream(daemon, vm)
    last = stubs.settled(vm)
    if keep:
        assert (last.outcome, last.next_gfn) == (vm_pb2.WRITE_OUTCOME_KEPT, 8)
        assert stubs.get(vm).keys == NEW + OLD[8:], "what was answered is set, and nothing else"
    else:
        assert (last.outcome, last.next_gfn) == (vm_pb2.WRITE_OUTCOME_ROLLED_BACK, 0)
        assert stubs.get(vm).keys == OLD, "the old keys are back"
    assert (last.request_id, last.keys_set, list(last.dirty)) == ("", 8, [])
    assert stubs.set(vm, [(0, OLD[:16])]).keys_set == 16
    assert stubs.look_at(vm).last_write.outcome == vm_pb2.WRITE_OUTCOME_APPLIED


both_ways = pytest.mark.parametrize("keep", [False, True], ids=["roll-back", "keep"])


def how(keep: bool) -> dict[str, Any]:
    """Header fields of a stream that is to be kept, or of one that says nothing of it."""
    return {"on_interrupt": KEEP} if keep else {}


@both_ways
def test_a_stream_that_its_client_cancels_frees_the_vm(
    stubs: Stubs, shared_daemon: DaemonProcess, vm: str, keep: bool
) -> None:
    with SetStream(stubs) as stream:
        begin(stream, vm, **how(keep))
        stream.call.cancel()
        assert_free(stubs, shared_daemon, vm, keep=keep)


@both_ways
def test_a_stream_whose_deadline_passes_frees_the_vm(
    stubs: Stubs, shared_daemon: DaemonProcess, vm: str, keep: bool
) -> None:
    # The deadline has to be met after the chunk was answered; should the machine be that slow, the stream is longer.
    for seconds in (1, 4, 16):
        with SetStream(stubs, seconds) as stream:
            try:
                begin(stream, vm, **how(keep))
            except grpc.RpcError:
                wait_for_broken_stream(shared_daemon, vm)
                continue
            with pytest.raises(grpc.RpcError) as caught:
                next(stream.call)
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            assert_free(stubs, shared_daemon, vm, keep=keep)
            return


CLIENT = """
import sys
import grpc
from tests.rpc.stubs import SetStream, Stubs, chunk

target, vm, on_interrupt = sys.argv[1:]
with Stubs(target) as stubs, SetStream(stubs) as stream:
    stream.begin(vm, (0, 16), on_interrupt=int(on_interrupt))
    stream.ask(chunk(0, b"\\xf8" * 8))
    print("set", flush=True)
    sys.stdin.read()
"""


@both_ways
@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_a_client_that_is_killed_in_the_middle_frees_the_vm(
    stubs: Stubs, shared_daemon: DaemonProcess, vm: str, over: str, keep: bool
) -> None:
    target = shared_daemon.target if over == "unix" else shared_daemon.tcp
    on_interrupt = str(KEEP if keep else pb.ON_INTERRUPT_ROLL_BACK)
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, target, vm, on_interrupt], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as client:
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == b"set\n"
            _, busy = stubs.send(header(vm, (0, 8)), chunk(0, NEW), commit())
            assert busy is not None
            assert_busy(busy, vm)
            shared_daemon.wait_for_line("rpc", method=SET_SKEYS, vm=vm, code="ABORTED")
        finally:
            client.kill()
    assert_free(stubs, shared_daemon, vm, keep=keep)


@pytest.mark.parametrize(
    "last",
    [chunk(0, NEW), chunk(8, b"\x01" * 8), pb.SetSkeysRequest(), commit()],
    ids=["out-of-order", "reserved-bit", "empty", "commit-too-early"],
)
@both_ways
def test_a_stream_that_is_refused_frees_the_vm(stubs: Stubs, vm: str, last: pb.SetSkeysRequest, keep: bool) -> None:
    with SetStream(stubs) as stream:
        begin(stream, vm, **how(keep))
        with pytest.raises(grpc.RpcError) as caught:
            stream.ask(last)
        told = refusal(caught.value).metadata
        # Who is told is told in the end: there is nothing to wait for.
        if keep:
            assert (told["outcome"], told["keys_set"], told["next_gfn"]) == ("KEPT", "8", "0x8")
        else:
            assert told["outcome"] == "ROLLED_BACK"
            assert "keys_set" not in told
        assert stubs.get(vm).keys == (NEW + OLD[8:] if keep else OLD)
        assert stubs.set(vm, [(0, OLD[:16])]).keys_set == 16


def test_a_refused_header_frees_the_vm(stubs: Stubs, vm: str) -> None:
    for wanted in ((2048, 8), (0, 0)):
        _, error = stubs.send(header(vm, wanted))
        assert error is not None
        assert error.metadata["outcome"] == "UNCHANGED"
    assert stubs.set(vm, [(0, OLD[:16])]).keys_set == 16
