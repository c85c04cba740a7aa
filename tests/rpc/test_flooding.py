"""What clients send costs little memory before anybody has looked at it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import grpc
import pytest

from skeyd.limits import MAX_KEY_STREAMS, MAX_MESSAGE_BYTES, SPARE_THREADS
from tests.daemon import DaemonProcess
from tests.rpc.standard_services import SERVING, check

MIB: Final = 1 << 20
CHECK: Final = "/grpc.health.v1.Health/Check"
GET_VM: Final = "/skeyd.v1.VmService/GetVm"
SET_SKEYS: Final = "/skeyd.v1.StorageKeyService/SetSkeys"
SECONDS: Final = 120.0
"""More than any of it takes on an emulated host."""

BOMB: Final = 64 * MIB
WAITING: Final = 120


def most_resident(daemon: DaemonProcess, *, again: bool = False) -> int:
    """Return the most memory that the front ever had, in bytes, or since it was asked `again`."""
    proc = Path("/proc", str(daemon.pid))
    found = next(line for line in (proc / "status").read_text().splitlines() if line.startswith("VmHWM:"))
    if again:
        (proc / "clear_refs").write_text("5")  # proc(5): begins the count anew
    return int(found.split()[1]) * 1024


def as_it_is(message: bytes) -> bytes:
    return message


@pytest.mark.parametrize("method", [CHECK, GET_VM, SET_SKEYS])
def test_a_message_that_is_packed_is_refused_and_not_unpacked(daemon: DaemonProcess, method: str) -> None:
    most_resident(daemon, again=True)
    before = most_resident(daemon)
    sends_all = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(daemon.target, sends_all, compression=grpc.Compression.Gzip) as channel:
        call = channel.stream_stream(method, request_serializer=as_it_is, response_deserializer=as_it_is)
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter([bytes(BOMB)]), timeout=SECONDS))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "ompression" in str(caught.value.details())
    assert most_resident(daemon) - before < BOMB // 4
    with grpc.insecure_channel(daemon.target) as channel:
        assert check(channel, seconds=SECONDS) == SERVING


def test_calls_that_wait_for_a_thread_hold_no_more_than_a_window_each(daemon: DaemonProcess) -> None:
    never = threading.Event()

    def nothing() -> Iterator[bytes]:
        never.wait()
        yield b""

    def much() -> Iterator[bytes]:
        yield bytes(MAX_MESSAGE_BYTES - 64)
        never.wait()

    with ExitStack() as resources:
        channels = [
            resources.enter_context(
                grpc.insecure_channel(
                    daemon.target, [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
                )
            )
            for _ in range(4)
        ]
        resources.callback(never.set)
        streams = [
            one.stream_stream(SET_SKEYS, request_serializer=as_it_is, response_deserializer=as_it_is)
            for one in channels
        ]
        # Every thread that streams have waits for a request.
        calls = [streams[0](nothing(), timeout=SECONDS) for _ in range(MAX_KEY_STREAMS + SPARE_THREADS)]
        before = most_resident(daemon)
        calls += [streams[number % 4](much(), timeout=SECONDS) for number in range(WAITING)]
        # They end when those before them have waited for as long as a request may take, and have sent by then all that
        # they could.
        for call in calls:
            with pytest.raises(grpc.RpcError):
                next(call)
        most = most_resident(daemon) - before
    # Those that get a thread in the end have their message received whole: 248 MiB were seen, 508 where windows grow.
    assert most < WAITING * MAX_MESSAGE_BYTES * 3 // 4
