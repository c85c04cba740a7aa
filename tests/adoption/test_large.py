"""A QEMU whose guest has a GiB, adopted: every key that skeyd sets QEMU dumps, and skeyd reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from skeyd.v1 import vm_pb2, vm_service_pb2
from tests.adoption.qemu_vm import LONG, NAME, acc_and_f, adopt, buffers_in, look, some_keys
from tests.daemon import DaemonProcess
from tests.injection.qemu import Qemu, require_qemu
from tests.injection.victims import differences
from tests.rpc.stubs import Stubs

pytestmark = pytest.mark.timeout(1800)

MIB_OF_IT: Final = 1024
CHUNK: Final = 65_536
MEMORY: Final = {
    "anonymous": (),
    "memfd": ("-object", f"memory-backend-memfd,id=ram,size={MIB_OF_IT}M", "-machine", "memory-backend=ram"),
}


@pytest.fixture(params=MEMORY)
def large(request: pytest.FixtureRequest, runtime_dir: Path) -> Iterator[Qemu]:
    """Run one that is paused, and whose memory nobody has touched."""
    require_qemu()
    qemu = Qemu(runtime_dir, *MEMORY[request.param], memory_mib=MIB_OF_IT)
    yield qemu
    qemu.close()


def test_what_skeyd_sets_qemu_dumps(daemon: DaemonProcess, large: Qemu) -> None:
    keys = some_keys(21, large.frames)
    with Stubs(daemon.target) as stubs, daemon.connect() as client:
        before = look(large.pid)
        adopt(client, large, MIB_OF_IT)
        for at in range(0, large.frames, CHUNK):
            stubs.set(NAME, [(at, keys[at : at + CHUNK])])
        assert acc_and_f(large.dumped()) == keys
        for at in range(0, large.frames, CHUNK):
            assert acc_and_f(stubs.get(NAME, (at, CHUNK)).keys) == keys[at : at + CHUNK]
        client.delete_vm(NAME)
        # Not found by GET: on an emulated host that takes longer than a worker may take to begin.
        request = vm_service_pb2.AdoptVmRequest(vm_id="guest", qmp_socket=str(large.monitor), max_hold_time=LONG)
        vm = client.adopt_vm(request)
        assert (vm.vmm.memory_source, vm.memory_slots[0].count) == (vm_pb2.MEMORY_SOURCE_QMP, large.frames)
        assert acc_and_f(stubs.get(NAME, (large.frames - 1000, 1000)).keys) == keys[-1000:]
        client.delete_vm(NAME)
        assert differences(before, look(large.pid)) == {}
    assert buffers_in(large.pid) == []
    large.answers()
