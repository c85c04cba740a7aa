"""Keys of one moment of an unmodified QEMU's VM: it stands still for as long as they are read, and no longer."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from skeyd.client.reading import Keys
from skeyd.injection import proc
from skeyd.limits import MAX_FREEZE_SECONDS
from skeyd.v1 import storage_key_service_pb2 as pb
from tests.adoption.qemu_vm import NAME, acc_and_f, adopt, look, some_keys
from tests.daemon import DaemonProcess
from tests.injection.qemu import FRAMES, Qemu
from tests.injection.victims import SECONDS, differences, wait_for
from tests.rpc.stubs import Stubs, refusal

pytestmark = pytest.mark.timeout(300)

BUDGET: Final = int(MAX_FREEZE_SECONDS)
"""Seconds: an emulated host takes long for everything."""

Read = TypeVar("Read")


def states(pid: int) -> set[str]:
    """Return how its threads are."""
    return {proc.status(pid, tid)["State"][0] for tid in proc.threads(pid)}


def holder_of(worker: int) -> int | None:
    """Return the process that reads for a worker."""
    children = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    return int(children[0]) if children else None


def begin_and_stop(executor: ThreadPoolExecutor, read: Callable[[], Read], worker: int, vmm: int) -> Future[Read]:
    """Have frozen keys read, until one time the process that reads is stopped while it holds the VMM; return that."""
    for _ in range(100):
        reading = executor.submit(read)
        if stopped_while_it_holds(worker, vmm, reading):
            return reading
        reading.result()
    raise AssertionError("it was never met while it held the VMM")


def stopped_while_it_holds(worker: int, vmm: int, reading: Future[Any]) -> bool:
    """Stop the process that reads for a worker, at a moment when it holds a VMM; tell whether there was one.

    It goes on by some steps at a time, so that even one who seldom runs, on a busy machine, meets such a moment.
    """
    while not reading.done():
        holder = holder_of(worker)
        if holder is None:
            continue
        with suppress(ProcessLookupError):
            os.kill(holder, signal.SIGSTOP)
            while (state := proc.status(holder, holder).get("State", "Z")[0]) not in "TZ":
                pass
            if state == "T" and states(vmm) == {"t"}:
                return True
            os.kill(holder, signal.SIGCONT)
    return False


def test_keys_of_one_moment_are_what_qemu_dumps_and_qemu_goes_on(daemon: DaemonProcess, qemu: Qemu) -> None:
    with Stubs(daemon.target) as stubs, daemon.connect() as client:
        adopt(client, qemu)
        with client.get_skeys(NAME, frozen=True) as stream:
            assert (stream.frozen, stream.uses_storage_keys, list(stream)) == (True, False, [])
        keys = some_keys(3, FRAMES)
        stubs.set(NAME, [(0, keys)])
        qemu.answers()
        before = look(qemu.pid)
        for _ in range(3):
            with client.get_skeys(NAME, max_chunk_keys=5000, frozen=True, freeze_seconds=BUDGET) as stream:
                found = b"".join(part.keys for part in stream if isinstance(part, Keys))
            assert acc_and_f(found) == keys
            assert stream.frozen
            assert 0 < (stream.frozen_seconds or 0) < BUDGET
        assert client.digest_skeys(NAME, frozen=True, freeze_seconds=BUDGET).node == client.digest_skeys(NAME).node
        assert client.summarize_skeys(NAME, frozen=True, freeze_seconds=BUDGET).summary.keys == FRAMES
        assert differences(before, look(qemu.pid)) == {}
        assert acc_and_f(qemu.dumped()) == keys
        client.delete_vm(NAME)
    qemu.answers()


def test_qemu_stands_still_while_it_is_frozen_and_goes_on_when_the_budget_has_passed(
    daemon: DaemonProcess, qemu: Qemu
) -> None:
    with Stubs(daemon.target) as stubs, daemon.connect() as client, ThreadPoolExecutor(1) as client_that_reads:
        vm = adopt(client, qemu)
        stubs.set(NAME, [(0, some_keys(4, FRAMES))])
        request = pb.GetSkeysRequest(vm=NAME, consistency=pb.CONSISTENCY_FROZEN, freeze_budget=Duration(seconds=BUDGET))
        reading = begin_and_stop(client_that_reads, lambda: list(stubs.keys.GetSkeys(request)), vm.worker_pid, qemu.pid)
        # What holds it does nothing more by itself, and is watched by the worker.
        assert states(qemu.pid) == {"t"}
        qemu.ask("query-status")
        assert not qemu.has_answer(0.5)
        assert states(qemu.pid) == {"t"}
        assert client.get_vm(NAME).uses_storage_keys
        with pytest.raises(grpc.RpcError) as caught:
            reading.result()
        assert refusal(caught.value).reason == "FREEZE_EXPIRED"
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert qemu.answer()["status"] in ("prelaunch", "paused")
        assert "t" not in states(qemu.pid)
        qemu.answers()
        stubs.get(NAME)
        client.delete_vm(NAME)
    qemu.answers()


@pytest.mark.parametrize("end", ["front-killed", "client-gone"])
def test_qemu_goes_on_at_once_when_nobody_wants_its_keys_any_more(daemon: DaemonProcess, qemu: Qemu, end: str) -> None:
    keys = some_keys(5, FRAMES)
    calls: list[grpc.Call] = []
    begun = 0.0
    with ThreadPoolExecutor(1) as client_that_reads:
        with Stubs(daemon.target) as stubs, daemon.connect() as client:
            vm = adopt(client, qemu)
            stubs.set(NAME, [(0, keys)])

            def read() -> str:
                nonlocal begun
                begun = time.monotonic()
                request = pb.GetSkeysRequest(
                    vm=NAME, consistency=pb.CONSISTENCY_FROZEN, freeze_budget=Duration(seconds=BUDGET)
                )
                call = stubs.keys.GetSkeys(request)
                calls.append(call)
                try:
                    return str(len(list(call)))
                except grpc.RpcError as error:
                    return str(error.code().name)

            reading = begin_and_stop(client_that_reads, read, vm.worker_pid, qemu.pid)
            assert states(qemu.pid) == {"t"}
            if end == "front-killed":
                daemon.kill()
            else:
                calls[-1].cancel()
            wait_for(lambda: "t" not in states(qemu.pid))
            assert time.monotonic() < begun + BUDGET, "that it goes on may be for the budget's end"
            qemu.answers()
            assert reading.result(SECONDS) == ("UNAVAILABLE" if end == "front-killed" else "CANCELLED")
        if end == "front-killed":
            daemon.start("--allow-adoption")
    with Stubs(daemon.target) as stubs, daemon.connect() as client:
        assert acc_and_f(stubs.get(NAME).keys) == keys
        with client.get_skeys(NAME, frozen=True, freeze_seconds=BUDGET) as stream:
            assert acc_and_f(b"".join(part.keys for part in stream if isinstance(part, Keys))) == keys
        assert holder_of(vm.worker_pid) is None
        client.delete_vm(NAME)
    qemu.answers()


def test_qemu_goes_on_while_its_frozen_keys_wait_for_a_client(daemon: DaemonProcess, qemu: Qemu) -> None:
    keys = some_keys(6, FRAMES)
    with Stubs(daemon.target) as stubs, daemon.connect() as client:
        adopt(client, qemu)
        stubs.set(NAME, [(0, keys)])
        request = pb.GetSkeysRequest(
            vm=NAME, consistency=pb.CONSISTENCY_FROZEN, freeze_budget=Duration(seconds=BUDGET), max_chunk_keys=256
        )
        call = stubs.keys.GetSkeys(request)
        assert next(call).HasField("header")
        assert "t" not in states(qemu.pid)
        qemu.answers()
        # What is set meanwhile is not in it: it is of the moment before.
        stubs.set(NAME, [(0, some_keys(7, FRAMES))])
        rest = b"".join(part.chunk.data for part in call if part.HasField("chunk"))
        assert acc_and_f(rest) == keys
        client.delete_vm(NAME)
    qemu.answers()
