"""The daemon as a process: what outlives it, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from skeyd import limits
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2, vm_service_pb2
from tests.daemon import DaemonProcess
from tests.processes import wait_for_end
from tests.rpc.standard_services import NOT_SERVING, SERVING, check, watch
from tests.rpc.stubs import KEEP, SECONDS, SetStream, Stubs, chunk, commit, header, refusal, refused, some_keys, whole

LARGE = 4 << 20
"""MiB of a guest whose keys no buffers hold: a stream of them ends when its reader lets it."""


def outcome_of(call: Callable[[], object]) -> grpc.StatusCode | None:
    """Make a call: its status, or None where it went well."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return None


def test_strangers_beside_the_vms_are_reported_and_left_alone(runtime_dir: Path) -> None:
    (runtime_dir / "vms" / "Not-A-Vm").mkdir(mode=0o700, parents=True)
    runtime_dir.joinpath("vms").chmod(0o700)
    daemon = DaemonProcess(runtime_dir)
    try:
        daemon.start()
        assert daemon.wait_for_line("stranger")["name"] == "Not-A-Vm"
        with Stubs(daemon.target) as stubs:
            assert stubs.names() == []
        assert (runtime_dir / "vms" / "Not-A-Vm").is_dir()
    finally:
        daemon.end_everything()


# Dying, and coming back


def test_a_daemon_that_is_killed_in_the_middle_of_everything_finds_the_same_vms_again(daemon: DaemonProcess) -> None:
    keys = some_keys(1024, 1)
    with Stubs(daemon.target) as stubs:
        for number, kernel in enumerate(("web", "db", "idle"), 1):
            stubs.create(kernel, (0, 2), (8, 2), kernel=vm_pb2.SimulatedKernel.ValueType(number))
        stubs.set("vms/web", [(0, keys[:512]), (2048, keys[512:])])
        stubs.set("vms/db", [(0, b"\x10" * 512)])
        before = stubs.vms.ListVms(vm_service_pb2.ListVmsRequest(), timeout=SECONDS).vms
        with SetStream(stubs) as writing, SetStream(stubs) as keeping:
            writing.begin("vms/db", (0, 16), request_id="rolled-back")
            writing.ask(chunk(0, b"\xf8" * 8))
            keeping.begin("vms/web", (0, 16), on_interrupt=KEEP, request_id="kept")
            keeping.ask(chunk(0, b"\xf8" * 8))
            daemon.kill()
            with pytest.raises(grpc.RpcError) as caught:
                next(writing.call)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE

    assert (daemon.runtime_dir / "skeyd.sock").exists(), "a stale socket is in the way of the next one"
    daemon.start()
    with Stubs(daemon.target) as stubs:
        # The workers have taken back by themselves what was not to be kept, and say so to a daemon that knew nothing.
        last = stubs.settled("vms/db")
        assert (last.outcome, last.request_id, last.keys_set) == (vm_pb2.WRITE_OUTCOME_ROLLED_BACK, "rolled-back", 8)
        last = stubs.settled("vms/web")
        assert (last.outcome, last.request_id, last.next_gfn) == (vm_pb2.WRITE_OUTCOME_KEPT, "kept", 8)
        after = stubs.vms.ListVms(vm_service_pb2.ListVmsRequest(), timeout=SECONDS).vms
        assert [without_last_write(vm) for vm in after] == [without_last_write(vm) for vm in before], "uid, pid and all"
        assert [vm.state for vm in after] == [vm_pb2.VM_STATE_READY] * 3
        # What the broken streams locked is free.
        assert stubs.get("vms/db", (0, 512)).keys == b"\x10" * 512
        assert stubs.set("vms/db", [(0, b"\x20" * 16)]).keys_set == 16
        assert stubs.get("vms/web").keys == b"\xf8" * 8 + keys[8:]
        resumed, error = stubs.send(
            header("vms/web", (0, 16), on_interrupt=KEEP, request_id="kept", resume=True),
            chunk(8, keys[8:16]),
            commit(),
        )
        assert error is None
        assert (resumed[0].begun.next_gfn, resumed[-1].result.keys_set) == (8, 16)
        assert stubs.get("vms/web").keys == b"\xf8" * 8 + keys[8:]
        assert not stubs.get("vms/idle").header.uses_storage_keys
        for vm in after:
            stubs.delete(vm.name)
        assert stubs.names() == []
    for vm in before:  # orphans by now, and so this process's to wait for
        _, status = os.waitpid(vm.worker_pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0


def test_a_worker_that_dies_takes_its_own_vm_with_it_and_no_other(daemon: DaemonProcess) -> None:
    with Stubs(daemon.target) as stubs:
        doomed, other = stubs.create("doomed", (0, LARGE)), stubs.create("other", (0, 1))
        stubs.set(doomed.name, [(0, b"\x10")])
        stubs.set(other.name, [(0, b"\x38" * 256)])
        reading = stubs.keys.GetSkeys(pb.GetSkeysRequest(vm=doomed.name), timeout=SECONDS)
        assert next(reading).header.uses_storage_keys
        with SetStream(stubs) as writing:
            writing.begin(doomed.name, (0, 16))
            writing.ask(chunk(0, b"\x20" * 8))
            pidfd = os.pidfd_open(doomed.worker_pid)
            try:
                os.kill(doomed.worker_pid, signal.SIGKILL)
                wait_for_end(pidfd)
            finally:
                os.close(pidfd)
            lost = refused(lambda: writing.ask(chunk(8, b"\x20" * 8)))
        assert (lost.code, lost.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
        assert lost.metadata == {"vm": doomed.name, "outcome": "UNKNOWN"}
        assert lost.retry_seconds == 1

        with pytest.raises(grpc.RpcError) as caught:
            list(reading)
        cut = refusal(caught.value)
        assert (cut.code, cut.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")

        found = stubs.look_at(doomed.name)
        assert (found.state, found.uid) == (vm_pb2.VM_STATE_DEAD, doomed.uid)
        assert found.state_reason
        assert (found.incarnation, found.worker_pid, len(found.memory_slots)) == ("", 0, 0)
        _, write = stubs.send(header(doomed.name, (0, 1)))
        assert write is not None
        for refusing in (write, refused(lambda: stubs.get(doomed.name))):
            assert (refusing.code, refusing.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "VM_DEAD")
        assert refused(lambda: stubs.create("doomed", (0, 1))).reason == "VM_EXISTS"

        assert stubs.names() == [doomed.name, other.name]
        assert without_last_write(stubs.look_at(other.name)) == vm_with_keys(other)
        assert stubs.get(other.name).keys == b"\x38" * 256

        stubs.delete(doomed.name)
        assert stubs.names() == [other.name]
        assert stubs.create("doomed", (0, 1)).uid != doomed.uid


def without_last_write(vm: vm_pb2.Vm) -> vm_pb2.Vm:
    """Return what else is known of a VM."""
    bare = vm_pb2.Vm()
    bare.CopyFrom(vm)
    bare.ClearField("last_write")
    return bare


def vm_with_keys(vm: vm_pb2.Vm) -> vm_pb2.Vm:
    """Say what a VM looks like when its guest has come to use keys and nothing else has changed."""
    changed = vm_pb2.Vm()
    changed.CopyFrom(vm)
    changed.uses_storage_keys = True
    return changed


def test_a_worker_that_stands_still_is_quarantined_and_neither_ended_nor_waited_for(daemon: DaemonProcess) -> None:
    with Stubs(daemon.target) as stubs:
        stuck, other = stubs.create("stuck", (0, 1)), stubs.create("other", (0, 1))
        os.kill(stuck.worker_pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            looking = stubs.vms.GetVm.future(vm_service_pb2.GetVmRequest(name=stuck.name), timeout=SECONDS)
            deleting = stubs.vms.DeleteVm.future(vm_service_pb2.DeleteVmRequest(name=stuck.name), timeout=SECONDS)
            listing = stubs.vms.ListVms.future(vm_service_pb2.ListVmsRequest(), timeout=SECONDS)

            assert stubs.look_at(other.name) == other
            assert stubs.set(other.name, [(0, b"\x10")]).enabled
            assert check(stubs.channel) == SERVING
            assert time.monotonic() - began < limits.WORKER_HELLO_SECONDS, "none of these has waited"

            found = looking.result().vm
            assert (found.state, found.uid) == (vm_pb2.VM_STATE_QUARANTINED, stuck.uid)
            assert "did not answer" in found.state_reason
            states = {vm.name: vm.state for vm in listing.result().vms}
            assert states == {stuck.name: vm_pb2.VM_STATE_QUARANTINED, other.name: vm_pb2.VM_STATE_READY}
            error = deleting.exception()
            assert isinstance(error, grpc.RpcError)
            refusing = refusal(error)
            assert (refusing.code, refusing.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "VM_QUARANTINED")
        finally:
            os.kill(stuck.worker_pid, signal.SIGCONT)
        assert stubs.look_at(stuck.name) == stuck, "it was only slow"
        stubs.delete(stuck.name)


# Ending in order


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_the_daemon_with_status_0_and_no_vm_with_it(
    daemon: DaemonProcess, number: signal.Signals
) -> None:
    with Stubs(daemon.target) as stubs:
        vm = stubs.create("web", (0, 1))
        os.kill(daemon.pid, number)
        assert daemon.wait() == 0
    assert [line["event"] for line in daemon.log][-2:] == ["draining", "stopped"]
    assert not (daemon.runtime_dir / "skeyd.sock").exists()
    assert daemon.worker_pid("web") == vm.worker_pid
    daemon.start()
    with Stubs(daemon.target) as stubs:
        assert stubs.look_at(vm.name) == vm


def test_running_streams_may_end_after_sigterm_and_new_calls_are_refused(daemon: DaemonProcess) -> None:
    with Stubs(daemon.target) as stubs:
        # 32 Mi keys: more than is on its way unread, and read in no time.
        vm = stubs.create("web", (0, 128 * 1024))
        stubs.set(vm.name, [(0, some_keys(1 << 20))])
        responses = stubs.keys.GetSkeys(pb.GetSkeysRequest(vm=vm.name), timeout=SECONDS)
        first = next(responses)
        with SetStream(stubs) as writing:
            writing.begin(vm.name, (0, 16))
            writing.ask(chunk(0, b"\x20" * 8))

            daemon.terminate()
            daemon.wait_for_line("draining")
            code = None
            while code != grpc.StatusCode.UNAVAILABLE:
                # One that comes in the very instant may be answered yet, or be cancelled by grpc.
                with Stubs(daemon.target) as late:
                    code = outcome_of(lambda: late.look_at(vm.name))
                assert code in (None, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)

            assert writing.ask(chunk(8, b"\x20" * 8)).progress.keys_set == 16
            assert writing.ask(commit()).result.keys_set == 16
            writing.finish()
            assert list(writing.call) == []
        read = whole([first, *responses])
        assert len(read.keys) == 32 << 20
    assert daemon.wait(limits.DRAIN_SECONDS) == 0
    ended = [line.get("method", line["event"]).rpartition("/")[2] for line in daemon.log]
    assert sorted(ended[ended.index("draining") :]) == ["GetSkeys", "SetSkeys", "draining", "stopped"]
    assert daemon.worker_pid("web") == vm.worker_pid


def test_streams_that_nobody_reads_are_cut_when_the_time_is_up(daemon: DaemonProcess) -> None:
    with Stubs(daemon.target) as stubs:
        vm = stubs.create("web", (0, LARGE))
        stubs.set(vm.name, [(0, b"\x10" * 16)])
        stalled = stubs.keys.GetSkeys(pb.GetSkeysRequest(vm=vm.name), timeout=SECONDS)
        next(stalled)
        watching = watch(stubs.channel)
        assert next(watching).status == SERVING
        with SetStream(stubs) as silent:
            silent.begin(vm.name, (0, 16))
            silent.ask(chunk(0, b"\x20" * 8))

            began = time.monotonic()
            daemon.terminate()
            assert next(watching).status == NOT_SERVING
            daemon.terminate()  # being asked twice makes no difference
            assert daemon.wait(limits.DRAIN_SECONDS + 10) == 0
            took = time.monotonic() - began
        assert limits.DRAIN_SECONDS - 1 < took < limits.DRAIN_SECONDS + 5
    assert daemon.worker_pid("web") == vm.worker_pid
    daemon.start()
    with Stubs(daemon.target) as stubs:
        assert stubs.settled(vm.name).outcome == vm_pb2.WRITE_OUTCOME_ROLLED_BACK
        assert stubs.get(vm.name, (0, 16)).keys == b"\x10" * 16


def test_sigterm_is_heeded_at_whatever_moment_it_comes(runtime_dir: Path) -> None:
    """The handler runs in the main thread, which is about to wait: a lock that both take would be the end of it."""
    # As main() does it, with the signal at every line of it and of what it calls in the standard library.
    program = """
import os, signal, sys, threading
from skeyd import server

seen = set()

def at_each_line(frame, event, argument):
    code = frame.f_code
    where = (code.co_filename, frame.f_lineno)
    if code.co_filename.endswith(("threading.py", "queue.py")) or code is server.main.__code__:
        if event == "line" and drained == [] and serving and where not in seen:
            seen.add(where)
            os.kill(os.getpid(), signal.SIGTERM)
        return at_each_line
    return None

serving, drained = [], []
real_serve, real_drain = server.Daemon.serve, server.Daemon.drain

def serve(self):
    real_serve(self)
    serving.append(True)

def drain(self):
    drained.append(True)
    real_drain(self)

server.Daemon.serve, server.Daemon.drain = serve, drain
sys.settrace(at_each_line)
server.main(["--runtime-dir", sys.argv[1]])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(runtime_dir)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"stopped" in done.stderr
