"""A worker's whole life over an unmodified QEMU (-accel kvm), killed at each of its steps. On s390x with KVM only."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from skeyd.injection import proc
from skeyd.kvm import abi
from skeyd.worker.adopted import AdoptedVm
from skeyd.worker.adoption import HOLD_MAX_MS, Adoption
from skeyd.worker.protocol import SlotSpec, Spec
from tests.injection.qemu import FRAMES, Qemu, require_qemu
from tests.injection.test_qemu import acc_and_f, get_keys, set_keys, some_keys
from tests.injection.tracers import Steps, count_steps_of, fork, run
from tests.injection.victims import SECONDS, differences, look_at_process

pytestmark = pytest.mark.timeout(1800)

UID = "0c54ab32-5d11-4a3c-9b3e-6d1b2f0c9a77"
SOME = 256


@pytest.fixture
def qemu(runtime_dir: Path, open_fds: None) -> Iterator[Qemu]:
    """Start a QEMU; skipped where there is none, or no KVM for it."""
    require_qemu()
    qemu = Qemu(runtime_dir)
    yield qemu
    qemu.close()


def live(use: Callable[[AdoptedVm], None], pid: int, *slots: SlotSpec) -> None:
    """Adopt its VM, use it, and let it go."""
    vm = AdoptedVm(Spec("guest", UID, "adopted", slots, 0, adoption=Adoption(pid, 0, -1, HOLD_MAX_MS)))
    try:
        use(vm)
        vm.release()
    finally:
        vm.close()


def use_keys(keys: bytes, vm: AdoptedVm) -> None:
    """Read some keys, set them, read them again, and one by itself."""
    found = memoryview(bytearray(SOME))
    assert vm.get_skeys(0, found)
    for _ in range(2):
        vm.set_skeys(0, memoryview(bytearray(keys[:SOME])))
    assert vm.get_skeys(0, found)
    assert acc_and_f(bytes(found)) == keys[:SOME]
    if vm.has_keyop:
        assert vm.keyop(abi.KVM_S390_KEYOP_ISKE, 5) & 0xF8 == keys[5]


def freeze(keys: bytes, vm: AdoptedVm) -> None:
    """Read all keys while every thread is held; in this process, where the worker has one of its own for it."""
    found = memoryview(bytearray(FRAMES))
    assert vm._vm.read_frozen([(0, FRAMES)], found, SECONDS, 0.01)
    assert acc_and_f(bytes(found)) == keys


LIVES = {
    "keys": (use_keys, (SlotSpec(0, FRAMES << 12, "vmm"),)),
    "frozen": (freeze, (SlotSpec(0, FRAMES << 12, "vmm"),)),
    "found": (use_keys, ()),
}


@pytest.mark.parametrize("life", LIVES)
def test_a_worker_that_is_killed_at_any_step_of_its_life_leaves_qemu_answering(qemu: Qemu, life: str) -> None:
    keys = some_keys(5)
    set_keys(qemu.pid, keys)
    use, slots = LIVES[life]
    action = partial(live, partial(use, keys), qemu.pid, *slots)
    run(action)
    before = look_at_process(qemu.pid)
    kills = 0
    for after in (False, True):
        for step in range(count_steps_of(action)):

            def killed(step: int = step, after: bool = after) -> None:
                Steps(step, after).install()
                action()

            # With what the one before has left it may have fewer steps.
            status = os.waitstatus_to_exitcode(os.waitpid(fork(killed), 0)[1])
            assert status in (0, -signal.SIGKILL)
            kills += status != 0
            qemu.answers()
            assert "t" not in {proc.status(qemu.pid, tid)["State"][0] for tid in proc.threads(qemu.pid)}
            if step % 16 == 0:
                run(action)
        assert kills > 100
    run(action)
    assert differences(before, look_at_process(qemu.pid)) == {}
    assert acc_and_f(get_keys(qemu.pid)) == keys
    assert acc_and_f(qemu.dumped()) == keys
