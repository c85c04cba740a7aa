"""An unmodified QEMU whose guest runs: a thread of it is in KVM_RUN all the time. On s390x with KVM only.

An emulated host has no interpretive execution (SIE), so the guest gets nowhere there: its CPU's thread goes round in
the kernel's KVM_RUN (seen on 6.1). For who traces and holds that thread it is where a guest's CPU is. On 7.2 KVM_RUN
ends there ("Unexpected program interrupt 0x1" in the kernel's log), and QEMU with it (seen).
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from skeyd.client.reading import Keys
from skeyd.limits import MAX_FREEZE_SECONDS
from tests.adoption.guest import write_guest
from tests.adoption.qemu_vm import NAME, acc_and_f, adopt, buffers_in, some_keys
from tests.daemon import DaemonProcess
from tests.injection.qemu import FRAMES, Qemu, require_qemu
from tests.injection.victims import wait_for
from tests.rpc.stubs import Stubs

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def running(runtime_dir: Path) -> Iterator[Qemu]:
    """Run one with a guest that is not paused."""
    require_qemu()
    if int(platform.release().split(".")[0]) >= 7 and "sie" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("no guest runs on this machine, which has no SIE; Linux 7.x ends its QEMU")
    qemu = Qemu(runtime_dir, "-kernel", str(write_guest(runtime_dir / "kernel")), paused=False)
    yield qemu
    qemu.close()


def goes_on(qemu: Qemu) -> None:
    """See that the guest's CPU runs: its thread spends time in the kernel."""
    (cpu,) = qemu.execute("query-cpus-fast")
    stat = Path(f"/proc/{qemu.pid}/task/{cpu['thread-id']}/stat")

    def ticks() -> int:
        return int(stat.read_text().rpartition(")")[2].split()[12])

    before = ticks()
    wait_for(lambda: ticks() > before)
    assert qemu.execute("query-status")["status"] == "running"


def test_a_guest_that_runs_is_adopted_frozen_and_let_go_and_runs_on(daemon: DaemonProcess, running: Qemu) -> None:
    with Stubs(daemon.target) as stubs, daemon.connect() as client:
        goes_on(running)
        vm = adopt(client, running)
        assert vm.uses_storage_keys is False
        for seed in range(3):
            keys = some_keys(seed, FRAMES)
            stubs.set(NAME, [(0, keys)])
            goes_on(running)
            assert acc_and_f(stubs.get(NAME).keys) == keys
            assert acc_and_f(running.dumped()) == keys
            with client.get_skeys(NAME, frozen=True, freeze_seconds=MAX_FREEZE_SECONDS) as stream:
                found = b"".join(part.keys for part in stream if isinstance(part, Keys))
            assert stream.frozen
            assert acc_and_f(found) == keys
            goes_on(running)
        client.delete_vm(NAME)
        assert buffers_in(running.pid) == []
        goes_on(running)
