"""Key streams are bounded, and however many of them are stuck, short calls are answered."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import grpc
import pytest

from skeyd.limits import (
    CALL_THREADS,
    CHECK_THREADS,
    DEFAULT_CHUNK_KEYS,
    MAX_KEY_STREAMS,
    MAX_WAITING,
    REQUEST_SECONDS,
    SPARE_THREADS,
)
from skeyd.rpc.health import SERVICE as HEALTH
from skeyd.v1 import storage_key_service_pb2 as pb
from tests.daemon import DaemonProcess
from tests.rpc.standard_services import SERVING, check
from tests.rpc.stubs import SetStream, Stubs, chunk, header, refusal

SHARE = MAX_KEY_STREAMS // 2
"""Streams that one VM has alone."""

QUICKLY = 10.0
"""Seconds; a call that waits for a stream waits for ever."""


def test_stalled_streams_are_bounded_and_keep_no_short_call_waiting(daemon: DaemonProcess) -> None:
    with Stubs(daemon.target) as stubs:
        # A guest of 4 TiB has 1 Gi keys, so that no stream can end unread: windows were seen to grow beyond 16 MiB.
        vm = stubs.create("large", (0, 4 << 20)).name
        stubs.set(vm, [(0, b"\x10")])
        request = pb.GetSkeysRequest(vm=vm)
        # Without a deadline: on a slow machine the first of them would pass it while the last is made.
        stalled = [stubs.keys.GetSkeys(request) for _ in range(SHARE)]
        assert [next(one).WhichOneof("part") for one in stalled] == ["header"] * SHARE

        # More than the threads that are spared for refusals; and few, since the daemon cuts who stands for a minute.
        for _ in range(2 * SPARE_THREADS):
            with pytest.raises(grpc.RpcError) as caught:
                next(stubs.keys.GetSkeys(request, timeout=QUICKLY))
        found = refusal(caught.value)
        assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS_ON_VM")
        assert str(MAX_KEY_STREAMS) in found.message
        assert found.retry_seconds == 1
        _, write = stubs.send(header(vm, (0, 1)), chunk(0, b"\x20"))
        assert write is not None
        assert write.reason == "TOO_MANY_CALLS_ON_VM"

        with Stubs(daemon.target) as another:
            assert check(another.channel, seconds=QUICKLY) == SERVING
            assert another.look_at(vm).uses_storage_keys
            assert another.names() == [vm]
            small = another.create("small", (0, 1)).name
            another.delete(small)

        stalled.pop().cancel()
        while daemon.wait_for_line("rpc", method="/skeyd.v1.StorageKeyService/GetSkeys")["code"] != "CANCELLED":
            pass
        assert stubs.get(vm, (0, 1)).keys == b"\x10"

        # A stream that stood still for so long goes on where it stopped.
        patient = stalled.pop()
        starts = [next(patient).chunk.start_gfn for _ in range(100)]
        assert starts == [n * DEFAULT_CHUNK_KEYS for n in range(100)]
        patient.cancel()
        for one in stalled:
            one.cancel()


def test_writers_that_say_nothing_keep_nobody_waiting_for_long(daemon: DaemonProcess) -> None:
    with Stubs(daemon.target) as stubs, ExitStack() as streams:
        vm = stubs.create("guest", (0, 1)).name
        silent = [streams.enter_context(SetStream(stubs)) for _ in range(MAX_KEY_STREAMS + SPARE_THREADS)]
        # All threads for streams wait for a first message now; they are cut off when it doesn't come.
        assert not stubs.get(vm).header.uses_storage_keys
        line = daemon.wait_for_line("rpc", method="/skeyd.v1.StorageKeyService/SetSkeys")
        assert (line["code"], line["stalled"]) == ("CANCELLED", True)
        assert check(stubs.channel, seconds=QUICKLY) == SERVING
        assert len(silent) == MAX_KEY_STREAMS + SPARE_THREADS


@pytest.mark.parametrize("method", ["VmService/GetVm"])
def test_calls_that_never_send_their_request_keep_nobody_waiting_for_long(daemon: DaemonProcess, method: str) -> None:
    with Stubs(daemon.target) as stubs:
        never: grpc.StreamStreamMultiCallable[bytes, bytes] = stubs.channel.stream_stream(f"/skeyd.v1.{method}")
        sent = threading.Event()

        def requests() -> Iterator[bytes]:
            sent.wait()
            yield from ()

        calls = [never(requests()) for _ in range(2 * CALL_THREADS)]
        try:
            assert check(stubs.channel, seconds=QUICKLY) == SERVING  # it has threads of its own
            assert stubs.names() == []  # waits for some of them to be cut off
            line = daemon.wait_for_line("rpc", method=f"/skeyd.v1.{method}", code="CANCELLED")
            assert line["stalled"]
        finally:
            sent.set()
            for call in calls:
                call.cancel()


@pytest.mark.parametrize("method", ["StorageKeyService/GetSkeys", "StorageKeyService/GetSkey"])
def test_more_calls_without_a_request_than_a_kind_may_have_are_refused_and_keep_no_other_kind_out(
    daemon: DaemonProcess, method: str
) -> None:
    streams = method.endswith("s")
    most = MAX_WAITING + (MAX_KEY_STREAMS + SPARE_THREADS if streams else CALL_THREADS)
    more, enough = 300, 30
    with Stubs(daemon.target) as stubs, Stubs(daemon.target) as another:
        vm = another.create("guest", (0, 1)).name
        another.set(vm, [(0, b"\x10")])
        never: grpc.StreamStreamMultiCallable[bytes, bytes] = stubs.channel.stream_stream(f"/skeyd.v1.{method}")
        sent = threading.Event()

        def requests() -> Iterator[bytes]:
            sent.wait()
            yield from ()

        done: queue.SimpleQueue[grpc.RpcError] = queue.SimpleQueue()
        calls = [never(requests()) for _ in range(most + more)]
        try:
            for call in calls:
                call.add_done_callback(done.put)  # type: ignore[attr-defined]
            # On a busy machine the first of them are cut off before the last is made.
            while (error := done.get(timeout=QUICKLY)).code() is grpc.StatusCode.CANCELLED:
                pass
            for _ in range(enough):
                found = refusal(error)
                assert found.code is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert found.reason == ("TOO_MANY_STREAMS" if streams else "TOO_MANY_CALLS")
                assert str(most) in found.message
                assert found.retry_seconds == 1
                error = done.get(timeout=QUICKLY)
                if error.code() is grpc.StatusCode.CANCELLED:
                    break
            # Other kinds wait for none of them, however long these may take.
            assert check(another.channel, seconds=REQUEST_SECONDS - 1) == SERVING
            if streams:
                key = another.keys.GetSkey(pb.GetSkeyRequest(vm=vm), timeout=REQUEST_SECONDS - 1).key
                assert key == 0x10
            else:
                parts = another.keys.GetSkeys(pb.GetSkeysRequest(vm=vm), timeout=REQUEST_SECONDS - 1)
                assert [one.WhichOneof("part") for one in parts] == ["header", "chunk", "trailer"]
        finally:
            sent.set()
            for call in calls:
                call.cancel()


def test_more_calls_without_a_request_than_threads_delay_no_health_check_until_they_are_cut_off(
    daemon: DaemonProcess,
) -> None:
    with Stubs(daemon.target) as stubs, Stubs(daemon.target) as another:
        never: grpc.StreamStreamMultiCallable[bytes, bytes] = stubs.channel.stream_stream(f"/{HEALTH}/Check")
        sent = threading.Event()

        def requests() -> Iterator[bytes]:
            sent.wait()
            yield from ()

        calls = [never(requests()) for _ in range(CHECK_THREADS + SPARE_THREADS)]
        try:
            # While nobody waits for a thread they have REQUEST_SECONDS, and CROWDED_REQUEST_SECONDS once somebody does.
            assert check(another.channel, seconds=REQUEST_SECONDS - 1) == SERVING
        finally:
            sent.set()
            for call in calls:
                call.cancel()
