"""Calls that read keys, and what is killed or stopped in the middle of them: nobody is told keys that aren't there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any, Final

import grpc
import pytest

from skeyd.client.errors import ClientError
from skeyd.client.reading import Keys
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2
from tests.daemon import DaemonProcess
from tests.injection.victims import wait_for
from tests.rpc.standard_services import SERVING, check
from tests.rpc.stubs import SECONDS, Stubs, chunk, commit, header, refusal, some_keys

FRAMES: Final = 16 << 20 >> 12
LARGE: Final = 4 << 20
"""MiB of a guest whose 1 Gi keys take longer to read than any test waits."""

CLIENT: Final = """
import sys
import grpc
from tests.rpc.stubs import SetStream, Stubs, chunk
from skeyd.v1 import storage_key_service_pb2 as pb
target, vm, method = sys.argv[1:]
with Stubs(target) as stubs:
    if method == "GetSkeys":
        stream = stubs.keys.GetSkeys(pb.GetSkeysRequest(vm=vm))
        next(stream)
        print("in the middle", flush=True)
        for _ in stream:
            pass
    else:
        with SetStream(stubs, 1000.0) as stream:
            stream.begin(vm, (0, 1 << 20))
            stream.ask(chunk(0, b"\\x40" * 256))
            print("in the middle", flush=True)
            next(stream.call)
"""
"""A client in the middle of a call."""


@pytest.mark.parametrize("parts", [1, 2, 7, 15])
@pytest.mark.parametrize("how", ["killed", "told"])
def test_what_a_front_that_ended_did_not_send_its_next_sends_exactly(
    daemon: DaemonProcess, parts: int, how: str
) -> None:
    keys = some_keys(FRAMES)
    with Stubs(daemon.target) as stubs:
        vm = stubs.create("web", (0, 8), (64, 8)).name
        stubs.set(vm, [(0, keys[: FRAMES // 2]), (64 << 8, keys[FRAMES // 2 :])])
    found: list[Keys] = []
    with daemon.connect() as client:
        with client.get_skeys(vm, max_chunk_keys=256) as whole:
            expected = [part for part in whole if isinstance(part, Keys)]
        with client.get_skeys(vm, max_chunk_keys=256) as cut:
            try:
                for part in cut:
                    found += [part] if isinstance(part, Keys) else []
                    if len(found) == parts:
                        if how == "killed":
                            daemon.kill()
                        else:
                            daemon.terminate()
                            daemon.wait()
            except ClientError as error:
                # Or all of it was on its way already.
                assert error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)  # noqa: PT017
            position = cut.position
    daemon.start()
    with daemon.connect() as client, client.get_skeys(vm, max_chunk_keys=256, resume=position) as rest:
        found += [part for part in rest if isinstance(part, Keys)]
    assert b"".join(bytes(part.keys) for part in found) == b"".join(bytes(part.keys) for part in expected) == keys
    assert [part.frames for part in found] == [part.frames for part in expected]


@pytest.mark.parametrize("method", ["GetSkeys", "DigestSkeys", "SummarizeSkeys"])
def test_a_worker_that_is_killed_is_told_and_no_keys_are_made_up(daemon: DaemonProcess, method: str) -> None:
    with Stubs(daemon.target) as stubs:
        large, other = stubs.create("large", (0, LARGE)).name, stubs.create("other", (0, 4)).name
        for vm in (large, other):
            stubs.set(vm, [(0, b"\x10")])
        call = _begin(stubs, method, large)
        os.kill(daemon.worker_pid("large"), signal.SIGKILL)
        with pytest.raises(grpc.RpcError) as caught:
            _end(call, method)
        found = refusal(caught.value)
        assert found.reason in ("WORKER_LOST", "VM_DEAD")
        assert stubs.look_at(large).state == vm_pb2.VM_STATE_DEAD
        assert len(stubs.get(other).keys) == 4 << 8
        assert _end(_begin(stubs, method, other), method)


@pytest.mark.parametrize("method", ["GetSkeys", "DigestSkeys", "SummarizeSkeys"])
def test_a_front_that_is_killed_harms_no_vm_that_it_reads(daemon: DaemonProcess, method: str) -> None:
    with Stubs(daemon.target) as stubs:
        vm = stubs.create("large", (0, LARGE)).name
        stubs.set(vm, [(0, some_keys(512))])
        incarnation = stubs.look_at(vm).incarnation
        call = _begin(stubs, method, vm)
        daemon.kill()
        with pytest.raises(grpc.RpcError) as caught:
            _end(call, method)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    daemon.start()
    with Stubs(daemon.target) as stubs:
        found = stubs.look_at(vm)
        assert (found.incarnation, found.state) == (incarnation, vm_pb2.VM_STATE_READY)
        assert stubs.get(vm, (0, 512)).keys == some_keys(512)


@pytest.mark.parametrize("method", ["GetSkeys", "SetSkeys"])
def test_a_client_that_is_stopped_is_no_matter_to_other_vms_and_its_call_ends_with_it(
    daemon: DaemonProcess, method: str
) -> None:
    with Stubs(daemon.target) as stubs:
        vm, other = stubs.create("large", (0, LARGE)).name, stubs.create("other", (0, 4)).name
        for one in (vm, other):
            stubs.set(one, [(0, b"\x10")])
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, daemon.target, vm, method], stdout=subprocess.PIPE, text=True
        )
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == "in the middle\n"
            client.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, client.pid, os.WSTOPPED | os.WNOWAIT)
            for _ in range(3):
                stubs.set(other, [(0, some_keys(1024))])
                assert stubs.get(other).keys == some_keys(1024)
                assert check(stubs.channel) == SERVING
        finally:
            client.kill()
            client.wait(SECONDS)
            client.stdout.close()  # type: ignore[union-attr]
        wait_for(lambda: not _is_busy(stubs, vm))
        assert stubs.get(vm, (0, 1)).keys == b"\x10"


def _is_busy(stubs: Stubs, vm: str) -> bool:
    _, error = stubs.send(header(vm, (1, 1)), chunk(1, b"\x20"), commit())
    assert error is None or error.reason == "VM_BUSY"
    return error is not None


def _begin(stubs: Stubs, method: str, vm: str) -> Any:
    request = getattr(pb, f"{method}Request")(vm=vm)
    if method == "GetSkeys":
        stream = stubs.keys.GetSkeys(request, timeout=SECONDS)
        assert next(stream).HasField("header")
        return stream
    return getattr(stubs.keys, method).future(request, timeout=SECONDS)


def _end(call: Any, method: str) -> Any:
    return list(call) if method == "GetSkeys" else call.result()
