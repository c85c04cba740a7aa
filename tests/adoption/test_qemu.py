"""An unmodified QEMU's VM, adopted: what skeyd sets QEMU dumps, and QEMU goes on. On s390x with KVM only."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import grpc
import pytest

from skeyd.client.connection import Client
from skeyd.client.errors import ClientError
from skeyd.v1 import vm_pb2, vm_service_pb2
from tests.adoption.qemu_vm import LONG, MIB, NAME, acc_and_f, adopt, buffers_in, look, some_keys
from tests.adoption.untraceable import WITHOUT_RIGHT, require_rights
from tests.daemon import DaemonProcess
from tests.injection.qemu import FRAMES, PROGRAM, Qemu, require_qemu
from tests.injection.victims import differences, wait_for
from tests.rpc.stubs import SetStream, Stubs, chunk, commit, header, refusal

pytestmark = pytest.mark.timeout(300)


def test_what_skeyd_sets_qemu_dumps_and_qemu_is_as_before(daemon: DaemonProcess, qemu: Qemu) -> None:
    with Stubs(daemon.target) as stubs, daemon.connect() as client:
        before = look(qemu.pid)
        vm = adopt(client, qemu)
        assert len(buffers_in(qemu.pid)) == 1
        assert (vm.kind, vm.state, vm.uses_storage_keys) == (vm_pb2.VM_KIND_ADOPTED, vm_pb2.VM_STATE_READY, False)
        assert (vm.vmm.pid, Path(vm.vmm.executable).name) == (qemu.pid, PROGRAM)
        for seed in range(2):
            keys = some_keys(seed, FRAMES)
            stubs.set(NAME, [(0, keys)])
            assert acc_and_f(qemu.dumped()) == keys
            assert acc_and_f(stubs.get(NAME).keys) == keys
        stubs.set(NAME, [(4096, b"\x30" * 512)])
        assert acc_and_f(qemu.dumped()[4096 : 4096 + 512]) == b"\x30" * 512
        assert acc_and_f(bytes([client.get_skey(NAME, 4100).key or 0])) == b"\x30"
        client.delete_vm(NAME)

        qemu.answers()
        assert buffers_in(qemu.pid) == []
        assert differences(before, look(qemu.pid)) == {}
        assert acc_and_f(qemu.dumped()[:4096]) == keys[:4096]


def test_what_is_not_committed_is_rolled_back_in_qemu_too(daemon: DaemonProcess, qemu: Qemu) -> None:
    keys = some_keys(7, FRAMES)
    with Stubs(daemon.target) as stubs, daemon.connect() as client:
        adopt(client, qemu)
        stubs.set(NAME, [(0, keys)])
        _, error = stubs.send(
            header(NAME, (0, 4096), (8192, 2)), chunk(0, b"\x70" * 4096), chunk(8192, b"\x70\x71"), commit()
        )
        assert error is not None
        assert (error.reason, error.metadata["outcome"]) == ("KEY_RESERVED_BIT", "ROLLED_BACK")
        assert acc_and_f(qemu.dumped()) == keys
        client.delete_vm(NAME)
    qemu.answers()


def test_a_worker_that_is_told_to_end_in_the_middle_leaves_qemu_with_whole_keys(
    daemon: DaemonProcess, qemu: Qemu
) -> None:
    keys = some_keys(8, FRAMES)
    with Stubs(daemon.target) as stubs, daemon.connect() as client:
        vm = adopt(client, qemu)
        stubs.set(NAME, [(0, keys)])
        with SetStream(stubs) as stream:
            stream.begin(NAME, (0, FRAMES))
            assert stream.ask(chunk(0, b"\x70" * 8192)).WhichOneof("part") == "progress"
            os.kill(vm.worker_pid, signal.SIGTERM)
            wait_for(lambda: client.get_vm(NAME).state == vm_pb2.VM_STATE_DEAD)
        assert acc_and_f(qemu.dumped()) == keys
        assert buffers_in(qemu.pid) == []
        client.delete_vm(NAME)
    qemu.answers()


def test_memory_that_nobody_names_is_found_once_the_guest_uses_keys(daemon: DaemonProcess, qemu: Qemu) -> None:
    with Stubs(daemon.target) as stubs, daemon.connect() as client:
        with pytest.raises(ClientError, match="VMM_MEMORY_UNKNOWN"):
            adopt(client, qemu, None)
        assert adopt(client, qemu).vmm.memory_source == vm_pb2.MEMORY_SOURCE_NAMED
        keys = some_keys(9, FRAMES)
        stubs.set(NAME, [(0, keys)])
        client.delete_vm(NAME)

        with pytest.raises(ClientError, match="MEMORY_INVALID"):
            adopt(client, qemu, 65)
        assert buffers_in(qemu.pid) == []
        vm = adopt(client, qemu, None)
        assert [(slot.start_gfn, slot.count) for slot in vm.memory_slots] == [(0, FRAMES)]
        assert vm.vmm.memory_source == vm_pb2.MEMORY_SOURCE_PROBED
        assert acc_and_f(stubs.get(NAME).keys) == keys
        client.delete_vm(NAME)
    qemu.answers()


def test_over_its_monitor_it_says_where_it_has_memory_and_prints_what_was_set(
    daemon: DaemonProcess, qemu: Qemu
) -> None:
    keys = some_keys(10, FRAMES)
    with Stubs(daemon.target) as stubs, daemon.connect() as client:
        request = vm_service_pb2.AdoptVmRequest(vm_id="guest", qmp_socket=str(qemu.monitor), max_hold_time=LONG)
        vm = client.adopt_vm(request)
        assert (vm.vmm.pid, vm.vmm.access) == (qemu.pid, vm_pb2.ACCESS_INJECTION)
        # Though its guest uses no keys yet.
        assert (vm.uses_storage_keys, vm.vmm.memory_source) == (False, vm_pb2.MEMORY_SOURCE_QMP)
        assert [(slot.start_gfn, slot.count) for slot in vm.memory_slots] == [(0, FRAMES)]
        stubs.set(NAME, [(0, keys)])
        printed = vm_service_pb2.AdoptVmRequest(vm_id="printed", qmp_socket=str(qemu.monitor), access=vm_pb2.ACCESS_QMP)
        wait_for(lambda: _adopts(client, printed))
        assert acc_and_f(stubs.get("vms/printed").keys) == keys
        assert acc_and_f(bytes([client.get_skey("vms/printed", 4711).key or 0])) == keys[4711:4712]
        with pytest.raises(ClientError, match="BACKEND_READ_ONLY"):
            client.set_skey("vms/printed", 0, 0x10)
        # What is set by the one is read by the other.
        stubs.set(NAME, [(8000, b"\x70" * 200)])
        assert acc_and_f(stubs.get("vms/printed", (8000, 200)).keys) == b"\x70" * 200
        for name in ("vms/printed", NAME):
            client.delete_vm(name)
    qemu.answers()


def test_where_it_may_not_be_traced_its_keys_are_read_over_its_monitor(
    daemon: DaemonProcess, qemu: Qemu, runtime_dir: Path
) -> None:
    require_rights()
    keys = some_keys(11, FRAMES)
    with Stubs(daemon.target) as stubs, daemon.connect() as client:
        adopt(client, qemu)
        stubs.set(NAME, [(0, keys)])
        client.delete_vm(NAME)
    weak = DaemonProcess(runtime_dir / "weak", WITHOUT_RIGHT)
    try:
        weak.start("--allow-adoption")
        with Stubs(weak.target) as stubs, weak.connect() as client:
            with pytest.raises(ClientError, match="VMM_NOT_TRACEABLE"):
                adopt(client, qemu)
            vm = client.adopt_vm(vm_service_pb2.AdoptVmRequest(vm_id="guest", qmp_socket=str(qemu.monitor)))
            assert (vm.vmm.access, vm.vmm.memory_source) == (vm_pb2.ACCESS_QMP, vm_pb2.MEMORY_SOURCE_QMP)
            assert acc_and_f(stubs.get(NAME).keys) == keys
            client.delete_vm(NAME)
    finally:
        weak.end_everything()
    qemu.answers()


def _adopts(client: Client, request: vm_service_pb2.AdoptVmRequest) -> bool:
    # QEMU takes its next client when it has seen that the last has gone.
    try:
        client.adopt_vm(request)
    except ClientError as error:
        if error.reason != "QMP_BUSY":
            raise
        return False
    return True


def test_a_frame_that_qemu_has_no_memory_for_is_told_by_the_kernel(daemon: DaemonProcess, qemu: Qemu) -> None:
    with Stubs(daemon.target) as stubs, daemon.connect() as client:
        adopt(client, qemu, 65)
        stubs.set(NAME, [(0, b"\x10" * 256)])
        with pytest.raises(grpc.RpcError) as caught:
            stubs.get(NAME, (FRAMES - 1, 2))
        assert refusal(caught.value).reason == "GFN_NOT_MAPPED"
        client.delete_vm(NAME)
    qemu.answers()


def test_a_vm_whose_qemu_ends_is_dead_and_its_name_can_be_freed(daemon: DaemonProcess, qemu: Qemu) -> None:
    with daemon.connect() as client:
        adopt(client, qemu)
        qemu.process.send_signal(signal.SIGKILL)
        qemu.process.wait()
        wait_for(lambda: client.get_vm(NAME).state == vm_pb2.VM_STATE_DEAD)
        client.delete_vm(NAME)
        assert not client.list_vms()


def test_a_qemu_is_a_candidate_and_is_adopted_by_its_name_and_the_log_says_whose_it_is(
    daemon: DaemonProcess, runtime_dir: Path
) -> None:
    require_qemu()
    qemu = Qemu(runtime_dir, "-name", "guest=the web,,1,debug-threads=on", "-smp", "2")
    try:
        with Stubs(daemon.target) as stubs, daemon.connect() as client:
            before = look(qemu.pid)
            (found,) = [one for one in client.list_vm_candidates().candidates if one.pid == qemu.pid]
            assert (found.name, len(found.vm_fds), found.vcpu_fds) == ("the web,1", 1, 2)
            assert (found.adopted_as, found.refusal) == ("", "")
            assert found.mapped_bytes > 64 * MIB
            assert differences(before, look(qemu.pid)) == {}

            slot = vm_service_pb2.MemorySlotSpec(memory_size=64 * MIB)
            request = vm_service_pb2.AdoptVmRequest(
                vm_id="guest", name="the web,1", start_time=found.start_time, memory_slots=[slot], max_hold_time=LONG
            )
            vm = client.adopt_vm(request)
            assert (vm.vmm.pid, vm.vmm.name, vm.vmm.vm_fd) == (qemu.pid, "the web,1", found.vm_fds[0])
            (found,) = [one for one in client.list_vm_candidates().candidates if one.pid == qemu.pid]
            assert found.adopted_as == NAME
            stubs.set(NAME, [(0, b"\x30" * 256)])
            client.set_skey(NAME, 1, 0x40)
            client.delete_vm(NAME)
        for method in ("VmService/AdoptVm", "StorageKeyService/SetSkeys", "StorageKeyService/SetSkey"):
            line = daemon.wait_for_line("rpc", method=f"/skeyd.v1.{method}")
            assert (line["code"], line["vm"], line["vmm_pid"]) == ("OK", NAME, qemu.pid)
            assert (line["vmm_start_time"], line["vmm_uid"]) == (found.start_time, found.uid)
            assert (line["vmm_executable"], line["vmm_name"]) == (found.executable, "the web,1")
        assert daemon.wait_for_line("rpc", method="/skeyd.v1.VmService/DeleteVm")["vmm_pid"] == qemu.pid
        qemu.answers()
    finally:
        qemu.close()
