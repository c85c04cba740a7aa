"""A guest's keys read over QMP, from an unmodified QEMU that emulates a whole s390x: on any machine, without KVM."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from skeyd.capabilities import CAP_SYS_PTRACE
from skeyd.gfn import MemoryMap
from skeyd.injection import proc
from skeyd.qmp.monitor import Monitor
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2, vm_service_pb2
from skeyd.worker.dump import DumpParser
from skeyd.worker.dump_capture import DumpCapture, DumpPipe
from tests.adoption.guest import key_of, write_guest
from tests.daemon import DaemonProcess
from tests.injection.qemu import FRAMES, PROGRAM, Qemu, require_program
from tests.injection.tracers import fork
from tests.injection.victims import wait_for
from tests.qmp.monitors import Conversation, FakeMonitor
from tests.rpc.stubs import Refusal, Stubs, chunk, commit, header, refusal

pytestmark = pytest.mark.timeout(900)

MIB: Final = 1 << 20
NAME: Final = "vms/guest"


@pytest.fixture
def qemu(runtime_dir: Path) -> Iterator[Qemu]:
    """Run a guest that sets its keys."""
    yield from _qemu(runtime_dir, paused=False)


@pytest.fixture
def paused_qemu(runtime_dir: Path) -> Iterator[Qemu]:
    """Have a guest that hasn't run yet, and so uses no keys."""
    yield from _qemu(runtime_dir, paused=True)


def _qemu(directory: Path, *arguments: str, paused: bool) -> Iterator[Qemu]:
    require_program()
    kernel = str(write_guest(directory / "kernel"))
    qemu = Qemu(directory, "-kernel", kernel, *arguments, accel="tcg", paused=paused)
    try:
        if not paused:
            wait_for(lambda: has_set_all(qemu))
        yield qemu
    finally:
        qemu.close()


def one_key(qemu: Qemu, gfn: int) -> str:
    """Return what QEMU's monitor for people says of a key."""
    return str(qemu.execute("human-monitor-command", **{"command-line": f"info skeys {gfn << 12:#x}"}))


def has_set_all(qemu: Qemu) -> bool:
    """Whether a guest has been through all frames once; the last one's first key is not 0."""
    said = one_key(qemu, FRAMES - 1)
    return "key: 0x" in said and "key: 0x0" not in said


def adopt(stubs: Stubs, qemu: Qemu, **fields: Any) -> vm_pb2.Vm:
    request = {"vm_id": "guest", "qmp_socket": str(qemu.monitor), "access": vm_pb2.ACCESS_QMP, **fields}
    return stubs.vms.AdoptVm(vm_service_pb2.AdoptVmRequest(**request)).vm


def capabilities(pid: int) -> dict[str, int]:
    found = dict(line.split()[:2] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "Cap" in line)
    return {name.rstrip(":"): int(value, 16) >> CAP_SYS_PTRACE & 1 for name, value in found.items()}


def test_who_reads_what_a_monitor_says_may_trace_nobody(stubs: Stubs, daemon: DaemonProcess, paused_qemu: Qemu) -> None:
    adopt(stubs, paused_qemu)
    (worker,) = daemon.worker_pids()
    assert set(capabilities(worker).values()) == {0}
    stubs.delete(NAME)


def fds(qemu: Qemu) -> list[str]:
    return sorted(path.name for path in Path(f"/proc/{qemu.pid}/fd").iterdir())


def refused(call: Callable[[], Any]) -> Refusal:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return refusal(caught.value)


def next_round(qemu: Qemu) -> None:
    """Let a stopped guest go on until it has set other keys, and stop it."""
    before = one_key(qemu, FRAMES // 2)
    qemu.execute("cont")
    wait_for(lambda: one_key(qemu, FRAMES // 2) != before)
    qemu.execute("stop")


def test_the_keys_that_a_guest_has_set_are_read_and_are_those_that_qemu_prints(qemu: Qemu, stubs: Stubs) -> None:
    vm = adopt(stubs, qemu)
    assert (vm.kind, vm.state, vm.state_reason) == (vm_pb2.VM_KIND_ADOPTED, vm_pb2.VM_STATE_READY, "")
    assert vm.uses_storage_keys
    assert [(one.start_gfn, one.count, one.backing) for one in vm.memory_slots] == [
        (0, FRAMES, vm_pb2.MEMORY_BACKING_VMM)
    ]
    assert (vm.vmm.pid, vm.vmm.start_time, vm.vmm.uid) == (qemu.pid, proc.start_time(qemu.pid), os.getuid())
    assert Path(vm.vmm.executable).name == PROGRAM
    assert not vm.vmm.HasField("vm_fd")
    assert (vm.vmm.access, vm.vmm.memory_source) == (vm_pb2.ACCESS_QMP, vm_pb2.MEMORY_SOURCE_QMP)
    assert vm.kernel.startswith("QEMU ")
    assert vm.kernel.endswith(", without KVM")

    qemu.execute("stop")
    keys = qemu.dumped()
    found = stubs.get(NAME)
    assert found.keys == keys
    assert found.header.uses_storage_keys
    now = (keys[0] >> 4) - (key_of(0, 0) >> 4)
    for gfn, key in enumerate(keys):
        assert key & 0xF8 in (key_of(gfn, now), key_of(gfn, now - 1)), hex(gfn)
    assert stubs.get(NAME, (5, 1), (4096, 5000), chunk_keys=777).keys == keys[5:6] + keys[4096:9096]
    for gfn in (0, 16, FRAMES - 1):
        assert stubs.keys.GetSkey(pb.GetSkeyRequest(vm=NAME, gfn=gfn)).key == keys[gfn]
    counted = stubs.keys.SummarizeSkeys(pb.SummarizeSkeysRequest(vm=NAME))
    assert {one.key: one.count for one in counted.counts} == {key: keys.count(key) for key in set(keys)}
    assert stubs.keys.DigestSkeys(pb.DigestSkeysRequest(vm=NAME)).node.keys == FRAMES


def test_each_stream_is_of_one_moment_and_each_of_its_own(qemu: Qemu, stubs: Stubs) -> None:
    adopt(stubs, qemu)
    qemu.execute("stop")
    first = qemu.dumped()
    stream = stubs.keys.GetSkeys(pb.GetSkeysRequest(vm=NAME, max_chunk_keys=1000))
    got = bytearray()
    while not got:
        got += next(stream).chunk.data
    next_round(qemu)
    second = qemu.dumped()
    assert second != first
    for message in stream:
        got += message.chunk.data
    assert bytes(got) == first
    assert stubs.get(NAME).keys == second
    assert stubs.keys.GetSkey(pb.GetSkeyRequest(vm=NAME, gfn=5000)).key == second[5000]
    next_round(qemu)
    assert stubs.keys.GetSkey(pb.GetSkeyRequest(vm=NAME, gfn=5000)).key == qemu.dumped()[5000] != second[5000]


def test_no_key_can_be_set(qemu: Qemu, stubs: Stubs) -> None:
    adopt(stubs, qemu)
    qemu.execute("stop")
    before = qemu.dumped()
    for validate_only in (False, True):
        opening = header(NAME, (0, 1), allow_enable=True, validate_only=validate_only)
        _, error = stubs.send(opening, chunk(0, b"\x70"), commit())
        assert error is not None
        assert (error.code, error.reason) == (grpc.StatusCode.UNIMPLEMENTED, "BACKEND_READ_ONLY")
        assert (error.metadata["outcome"], error.metadata["vm"]) == ("UNCHANGED", NAME)
    for call in (
        lambda: stubs.keys.SetSkey(pb.SetSkeyRequest(vm=NAME, gfn=0, key=0x70)),
        lambda: stubs.keys.ResetReferenced(pb.ResetReferencedRequest(vm=NAME, gfn=0)),
    ):
        found = refused(call)
        assert (found.code, found.reason) == (grpc.StatusCode.UNIMPLEMENTED, "BACKEND_READ_ONLY")
    assert qemu.dumped() == before


def test_a_guest_that_uses_no_keys_is_said_to(paused_qemu: Qemu, stubs: Stubs) -> None:
    assert not adopt(stubs, paused_qemu).uses_storage_keys
    found = stubs.get(NAME)
    assert (found.header.uses_storage_keys, found.keys) == (False, b"")
    assert not stubs.keys.GetSkey(pb.GetSkeyRequest(vm=NAME, gfn=0)).HasField("key")
    paused_qemu.execute("cont")
    wait_for(lambda: has_set_all(paused_qemu))
    assert stubs.look_at(NAME).uses_storage_keys


def test_qemu_has_the_descriptors_that_it_had(qemu: Qemu, stubs: Stubs) -> None:
    before = fds(qemu)
    adopt(stubs, qemu)
    for _ in range(10):
        assert len(stubs.get(NAME).keys) == FRAMES
    stubs.vms.DeleteVm(vm_service_pb2.DeleteVmRequest(name=NAME))
    wait_for(lambda: fds(qemu) == before)
    assert qemu.execute("query-fdsets") == []
    qemu.answers()


def test_a_qemu_that_keeps_what_it_is_given_is_given_it_once(qemu: Qemu, stubs: Stubs) -> None:
    # QEMU up to 9.0, while its guest is paused.
    qemu.execute("stop")
    before = len(fds(qemu))
    adopt(stubs, qemu)
    for _ in range(10):
        assert stubs.get(NAME).keys == qemu.dumped()
    stubs.vms.DeleteVm(vm_service_pb2.DeleteVmRequest(name=NAME))
    assert len(fds(qemu)) - before in (0, 1)
    qemu.answers()


def test_who_is_killed_in_the_middle_of_a_dump_leaves_a_qemu_that_lives_and_nothing_for_long(
    stubs: Stubs, runtime_dir: Path
) -> None:
    # More than a pipe holds.
    require_program()
    qemu = Qemu(
        runtime_dir, "-kernel", str(write_guest(runtime_dir / "kernel")), memory_mib=512, accel="tcg", paused=False
    )
    try:
        wait_for(lambda: has_set_all(qemu))

        def begin() -> None:
            pipes: list[DumpPipe] = []

            def pipe_in(monitor: Monitor) -> DumpPipe:
                pipes.append(DumpPipe(monitor))
                return pipes[0]

            DumpCapture(partial(Monitor, str(qemu.monitor), 30), pipe_in, lambda: None, DumpParser(MemoryMap([])), 30)
            os.kill(os.getpid(), signal.SIGKILL)

        for _ in range(3):
            pid = fork(begin)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
            qemu.answers()
        # Another client is connected, so QEMU keeps what it was given; each had it forget the one before.
        assert len(qemu.execute("query-fdsets")) == 1
        wait_for(lambda: _adopts(stubs, qemu))
        assert len(stubs.get(NAME).keys) == qemu.frames
        assert qemu.execute("query-fdsets") == []
    finally:
        qemu.close()


def test_another_client_of_the_monitor_is_told_of_and_waited_out(qemu: Qemu, stubs: Stubs) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(qemu.monitor))
        assert other.recv(10).startswith(b'{"QMP"')
        found = refused(lambda: adopt(stubs, qemu))
        assert (found.code, found.reason, found.retry_seconds) == (grpc.StatusCode.UNAVAILABLE, "QMP_BUSY", 1)
        assert "no greeting" in found.message
        assert "libvirt" in found.message
        assert stubs.names() == []
    wait_for(lambda: _adopts(stubs, qemu))
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(qemu.monitor))
        assert other.recv(10).startswith(b'{"QMP"')
        vm = stubs.look_at(NAME)
        assert vm.state == vm_pb2.VM_STATE_READY
        assert "no greeting" in vm.state_reason
        assert not vm.HasField("uses_storage_keys")
        assert refused(lambda: stubs.get(NAME)).reason == "QMP_BUSY"
    wait_for(lambda: stubs.look_at(NAME).state_reason == "")
    assert len(stubs.get(NAME).keys) == FRAMES


def _adopts(stubs: Stubs, qemu: Qemu) -> bool:
    # QEMU takes its next client when it has seen that the last has gone.
    try:
        adopt(stubs, qemu)
    except grpc.RpcError as error:
        if refusal(error).reason != "QMP_BUSY":
            raise
        return False
    return True


def test_a_vm_whose_qemu_ends_is_dead(qemu: Qemu, stubs: Stubs) -> None:
    adopt(stubs, qemu)
    qemu.process.send_signal(signal.SIGKILL)
    qemu.process.wait()
    wait_for(lambda: stubs.look_at(NAME).state == vm_pb2.VM_STATE_DEAD)
    stubs.vms.DeleteVm(vm_service_pb2.DeleteVmRequest(name=NAME))
    assert stubs.names() == []


def test_a_guest_without_kvm_can_only_be_read(qemu: Qemu, stubs: Stubs) -> None:
    for access in (vm_pb2.ACCESS_UNSPECIFIED, vm_pb2.ACCESS_INJECTION):
        found = refused(partial(adopt, stubs, qemu, access=access))
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "VMM_NOT_FOUND")
        assert "access qmp" in found.message


def test_the_process_is_the_one_that_was_named(qemu: Qemu, stubs: Stubs) -> None:
    started = proc.start_time(qemu.pid)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"pid": os.getpid()}, f"are not of process {os.getpid()}"),
        ({"pid": 1 << 22}, "there is no process"),
        ({"start_time": started + 1}, f"was started at {started}, and not at {started + 1}"),
    )
    for fields, said in cases:
        found = refused(partial(adopt, stubs, qemu, **fields))
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "VMM_NOT_FOUND"), found
        assert said in found.message
    vm = adopt(stubs, qemu, pid=qemu.pid, start_time=started)
    assert (vm.vmm.pid, vm.vmm.start_time) == (qemu.pid, started)


def test_a_socket_that_was_made_for_qemu_is_its_own(stubs: Stubs, runtime_dir: Path) -> None:
    # As libvirt does it. QEMU calls listen again, and so is who the kernel names.
    made = runtime_dir / "made"
    require_program()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(made))
        listener.listen(1)
        qemu = Qemu(
            runtime_dir,
            *("-chardev", f"socket,id=made,fd={listener.fileno()},server=on,wait=off", "-mon", "made,mode=control"),
            accel="tcg",
            pass_fds=(listener.fileno(),),
        )
    try:
        assert adopt(stubs, qemu, qmp_socket=str(made)).vmm.pid == qemu.pid
        assert stubs.look_at(NAME).state_reason == ""
        stubs.vms.DeleteVm(vm_service_pb2.DeleteVmRequest(name=NAME))
    finally:
        qemu.close()


def test_who_listens_for_another_is_not_taken_for_it(paused_qemu: Qemu, stubs: Stubs, runtime_dir: Path) -> None:
    def converse(one: Conversation) -> None:
        one.greet()
        one.answer(paused_qemu.execute("query-cpus-fast"), "query-cpus-fast")
        one.wait_for_end()

    with FakeMonitor(runtime_dir / "between", converse) as between:
        found = refused(lambda: adopt(stubs, paused_qemu, qmp_socket=between.path))
    assert (found.reason, found.metadata["vmm_pid"]) == ("VMM_NOT_FOUND", str(os.getpid()))
    assert "name that one's pid too" in found.message


def test_memory_that_is_given_is_not_asked_for(qemu: Qemu, stubs: Stubs) -> None:
    slots = [vm_service_pb2.MemorySlotSpec(guest_phys_addr=63 * MIB, memory_size=2 * MIB)]
    vm = adopt(stubs, qemu, memory_slots=slots)
    assert vm.vmm.memory_source == vm_pb2.MEMORY_SOURCE_NAMED
    qemu.execute("stop")
    assert stubs.get(NAME, (FRAMES - 256, 256)).keys == qemu.dumped()[-256:]
    assert refused(lambda: stubs.get(NAME, (FRAMES - 1, 2))).reason == "GFN_NOT_MAPPED"
    assert refused(lambda: stubs.keys.GetSkey(pb.GetSkeyRequest(vm=NAME, gfn=FRAMES))).reason == "GFN_NOT_MAPPED"
    assert refused(lambda: stubs.get(NAME, (0, 1))).reason == "GFN_NOT_MAPPED"


def test_more_streams_at_once_than_memory_is_for_are_refused(qemu: Qemu, stubs: Stubs) -> None:
    adopt(stubs, qemu)
    streams = [stubs.keys.GetSkeys(pb.GetSkeysRequest(vm=NAME, max_chunk_keys=16)) for _ in range(4)]
    for stream in streams:
        while not next(stream).HasField("chunk"):
            pass
    found = refused(lambda: stubs.get(NAME))
    assert (found.reason, found.retry_seconds) == ("TOO_MANY_CALLS_ON_VM", 1)
    streams.pop().cancel()
    wait_for(lambda: _reads(stubs))
    for stream in streams:
        stream.cancel()


def _reads(stubs: Stubs) -> bool:
    try:
        return len(stubs.get(NAME).keys) == FRAMES
    except grpc.RpcError as error:
        if refusal(error).reason != "TOO_MANY_CALLS_ON_VM":
            raise
        return False


@pytest.mark.parametrize("state", ["nothing", "file", "stranger"])
def test_what_is_no_monitor_is_told_from_one(stubs: Stubs, runtime_dir: Path, state: str) -> None:
    path = runtime_dir / "there"
    with socket.socket(socket.AF_UNIX) as listener:
        if state == "file":
            path.touch()
        elif state == "stranger":
            listener.bind(str(path))
            listener.listen()
        request = vm_service_pb2.AdoptVmRequest(vm_id="guest", qmp_socket=str(path))
        call = stubs.vms.AdoptVm.future(request)
        if state == "stranger":
            with listener.accept()[0] as one:
                one.sendall(b"220 smtp.example ESMTP\r\n")
                assert one.recv(100) == b""  # nothing was sent to it
        with pytest.raises(grpc.RpcError) as caught:
            call.result()
    found = refusal(caught.value)
    assert found.code == grpc.StatusCode.FAILED_PRECONDITION
    assert found.reason == ("QMP_FAILED" if state == "stranger" else "QMP_UNREACHABLE")
    assert str(path) in found.message
    assert stubs.names() == []
