"""A QEMU whose guest has memory of several backends: RAM, and a memory device further up. On s390x with KVM only."""

from __future__ import annotations

import random
import re
import subprocess
from pathlib import Path
from typing import Final

import pytest

from skeyd.client.errors import ClientError
from skeyd.v1 import vm_pb2, vm_service_pb2
from tests.adoption.qemu_vm import LONG, MIB, NAME, acc_and_f, adopt, buffers_in, look, some_keys
from tests.daemon import DaemonProcess
from tests.injection.qemu import FRAMES, PROGRAM, Qemu, require_qemu
from tests.injection.victims import differences
from tests.rpc.stubs import Stubs

DEVICE: Final = "virtio-mem-ccw"
MORE: Final = 32 * MIB
"""What is behind the memory device."""

pytestmark = pytest.mark.timeout(300)


def key_of(qemu: Qemu, gfn: int) -> int:
    """Return a key as QEMU reads it itself. dump-skeys has no frame of a memory device that isn't plugged in."""
    said = qemu.execute("human-monitor-command", **{"command-line": f"info skeys 0x{gfn << 12:x}"})
    found = re.fullmatch(r"\s*key: 0x([0-9A-F]{1,2})\s*", said)
    assert found is not None, said
    return int(found[1], 16) & 0xF8


@pytest.mark.parametrize("backend", ["ram", "memfd"])
def test_keys_of_all_backends_are_set_read_and_found(daemon: DaemonProcess, runtime_dir: Path, backend: str) -> None:
    require_qemu()
    if DEVICE not in subprocess.run([PROGRAM, "-device", "help"], capture_output=True, text=True, check=True).stdout:
        pytest.skip(f"this QEMU has no {DEVICE}, and so never two backends; 10.0 has")
    more = f"memory-backend-{backend},id=more,size={MORE}"
    qemu = Qemu(runtime_dir, "-m", "64M,maxmem=256M", "-object", more, "-device", f"{DEVICE},memdev=more")
    try:
        (device,) = qemu.execute("query-memory-devices")
        start, count = device["data"]["memaddr"] >> 12, MORE >> 12
        assert start > FRAMES
        ram = vm_service_pb2.MemorySlotSpec(guest_phys_addr=0, memory_size=64 * MIB)
        further_up = vm_service_pb2.MemorySlotSpec(guest_phys_addr=start << 12, memory_size=MORE)
        keys = some_keys(21, FRAMES + count)
        with Stubs(daemon.target) as stubs, daemon.connect() as client:
            request = vm_service_pb2.AdoptVmRequest(vm_id="guest", qmp_socket=str(qemu.monitor), max_hold_time=LONG)
            with pytest.raises(ClientError, match="VMM_UNSUITABLE"):
                client.adopt_vm(request)
            before = look(qemu.pid)
            vm = client.adopt_vm(
                vm_service_pb2.AdoptVmRequest(
                    vm_id="guest", pid=qemu.pid, memory_slots=[ram, further_up], max_hold_time=LONG
                )
            )
            assert [(slot.start_gfn, slot.count) for slot in vm.memory_slots] == [(0, FRAMES), (start, count)]
            stubs.set(NAME, [(0, keys[:FRAMES]), (start, keys[FRAMES:])])
            assert acc_and_f(stubs.get(NAME).keys) == keys
            assert acc_and_f(qemu.dumped()) == keys[:FRAMES]
            some = random.Random(22).sample(range(count), 64)  # noqa: S311  no secret
            for at in (0, count - 1, *some):
                assert key_of(qemu, start + at) == keys[FRAMES + at], at
            client.delete_vm(NAME)
            assert differences(before, look(qemu.pid)) == {}

            # Nobody says where it is, and both are found.
            vm = adopt(client, qemu, None)
            assert vm.vmm.memory_source == vm_pb2.MEMORY_SOURCE_PROBED
            assert [(slot.start_gfn, slot.count) for slot in vm.memory_slots] == [(0, FRAMES), (start, count)]
            assert acc_and_f(stubs.get(NAME).keys) == keys
            client.delete_vm(NAME)
        assert buffers_in(qemu.pid) == []
        qemu.answers()
    finally:
        qemu.close()
