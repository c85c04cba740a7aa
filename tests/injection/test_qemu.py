"""Keys of an unmodified QEMU (-accel kvm), set and read by calls that its main thread makes; QEMU's own dump agrees.

On s390x with KVM only. tests/emulated/test_injection.py runs it on the emulated hosts.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from skeyd.injection.buffer import Buffer
from skeyd.injection.injection import Injection
from skeyd.injection.target import Target
from skeyd.injection.vm import ForeignVm
from skeyd.kvm import abi
from skeyd.kvm.errors import KvmError
from tests.injection.qemu import FRAMES, PROGRAM, SANDBOX, Qemu, require_qemu
from tests.injection.tracers import Steps, count_steps_of, fork, kill_after, run
from tests.injection.victims import SECONDS, differences, look_at_process

pytestmark = pytest.mark.timeout(900)

KILLS: Final = int(os.environ.get("SKEYD_KILLS_QEMU", "50"))
SLICES: Final = int(os.environ.get("SKEYD_SLICES", "1000"))
HEAD: Final = 64


@pytest.fixture(params=["plain", "sandboxed"])
def qemu(request: pytest.FixtureRequest, runtime_dir: Path, open_fds: None) -> Iterator[Qemu]:
    """Start a QEMU; skipped where there is none, or no KVM for it."""
    require_qemu()
    qemu = Qemu(runtime_dir, *(("-sandbox", SANDBOX) if request.param == "sandboxed" else ()))
    yield qemu
    qemu.close()


def some_keys(seed: int) -> bytes:
    """Make keys whose ACC and F differ from frame to frame; R and C may be given by the kernel to any."""
    rng = random.Random(seed)  # noqa: S311  no secret
    return bytes(rng.randrange(32) << 3 for _ in range(FRAMES))


def acc_and_f(keys: bytes) -> bytes:
    return bytes(key & 0xF8 for key in keys)


def skeys(injection: Injection, buffer: Buffer, request: int) -> int:
    vm = injection.target.vm_fds()[0]
    buffer.write(0, abi.kvm_s390_skeys.pack(0, FRAMES, buffer.address + HEAD, 0))
    return injection.ioctl(vm, request, buffer.address)


def set_keys(pid: int, keys: bytes) -> None:
    """Set all keys, twice: Linux up to 6.19 loses some the first time."""
    with Target(pid) as target:
        target.stub_is_ours = True  # as in tests.injection.tracers
        with Injection(target, seconds=SECONDS) as injection:
            buffer = Buffer.open(injection, HEAD + FRAMES)
            buffer.write(HEAD, keys)
            for _ in range(2):
                assert skeys(injection, buffer, abi.KVM_S390_SET_SKEYS) == 0
        with Injection(target, seconds=SECONDS) as injection:
            buffer.close(injection)


def get_keys(pid: int) -> bytes:
    with Target(pid) as target, Injection(target, seconds=SECONDS) as injection:
        buffer = Buffer.open(injection, HEAD + FRAMES)
        assert skeys(injection, buffer, abi.KVM_S390_GET_SKEYS) == 0
        keys = buffer.read(HEAD, FRAMES)
        buffer.close(injection)
        return keys


def test_keys_that_are_set_are_read_back_and_are_what_qemu_dumps(qemu: Qemu) -> None:
    for seed in range(3):
        keys = some_keys(seed)
        set_keys(qemu.pid, keys)
        assert acc_and_f(get_keys(qemu.pid)) == keys
        assert acc_and_f(qemu.dumped()) == keys
    qemu.answers()


def test_a_foreign_vm_answers_as_its_owner_would(qemu: Qemu) -> None:
    keys = memoryview(bytearray(some_keys(3)))
    found = memoryview(bytearray(FRAMES))
    with Target(qemu.pid) as target, ForeignVm(target, target.vm_fds()[0], FRAMES, SECONDS) as vm:
        assert vm.check_extension(abi.KVM_CAP_S390_SKEYS) == 1
        assert not vm.get_skeys(0, found)
        for _ in range(2):
            vm.set_skeys(0, keys)
        assert vm.get_skeys(0, found)
        assert acc_and_f(bytes(found)) == keys
        for call in (vm.get_skeys, vm.set_skeys):
            with pytest.raises(KvmError, match="EFAULT"):
                call(FRAMES - 1, memoryview(bytearray(2)))
        with pytest.raises(KvmError, match="EINVAL"):
            vm.set_skeys(0, memoryview(bytearray(b"\x01")))
        if vm.check_extension(abi.KVM_CAP_S390_KEYOP):
            assert vm.keyop(abi.KVM_S390_KEYOP_ISKE, 5) & 0xF8 == keys[5]
            assert vm.keyop(abi.KVM_S390_KEYOP_SSKE, 5, 0x70) & 0xF8 == keys[5]
            keys[5] = 0x70
    assert acc_and_f(qemu.dumped())[: FRAMES - 1] == keys[: FRAMES - 1]
    qemu.answers()


def test_a_keyless_guest_says_so(qemu: Qemu) -> None:
    with Target(qemu.pid) as target, Injection(target, seconds=SECONDS) as injection:
        buffer = Buffer.open(injection, HEAD + FRAMES)
        assert skeys(injection, buffer, abi.KVM_S390_GET_SKEYS) == abi.KVM_S390_GET_SKEYS_NONE
        buffer.close(injection)
    qemu.answers()


def test_the_thread_that_is_chosen_is_the_main_one_and_there_is_one_vm(qemu: Qemu) -> None:
    with Target(qemu.pid) as target:
        assert target.choose_thread() == qemu.pid
        assert len(target.vm_fds()) == 1
        assert target.executable == shutil.which(PROGRAM)


def test_slices_leave_qemu_as_it_was(qemu: Qemu) -> None:
    set_keys(qemu.pid, some_keys(0))
    qemu.answers()
    before = look_at_process(qemu.pid)
    for _ in range(SLICES):
        with Target(qemu.pid) as target, Injection(target, seconds=SECONDS) as injection:
            buffer = Buffer.open(injection, HEAD + FRAMES)
            assert skeys(injection, buffer, abi.KVM_S390_GET_SKEYS) == 0
            buffer.close(injection)
    qemu.answers()
    assert differences(before, look_at_process(qemu.pid)) == {}


def test_a_tracer_that_is_killed_at_any_step_leaves_qemu_answering(qemu: Qemu) -> None:
    keys = some_keys(1)
    set_keys(qemu.pid, keys)
    for after in (False, True):
        for step in range(count_steps_of(lambda: set_keys(qemu.pid, keys))):

            def killed(step: int = step, after: bool = after) -> None:
                Steps(step, after).install()
                set_keys(qemu.pid, keys)

            assert os.waitpid(fork(killed), 0)[1] == 9
            qemu.answers()
            # The next finds what that one left, and takes it away.
            run(lambda: set_keys(qemu.pid, keys))
    assert acc_and_f(get_keys(qemu.pid)) == keys
    assert acc_and_f(qemu.dumped()) == keys


def test_a_tracer_that_is_killed_at_any_moment_leaves_qemu_answering(qemu: Qemu) -> None:
    rng = random.Random(6)  # noqa: S311  no secret
    keys = some_keys(2)
    set_keys(qemu.pid, keys)
    for _ in range(KILLS):
        kill_after(lambda: set_keys(qemu.pid, keys), rng.random() * 0.3)
        qemu.answers()
    assert acc_and_f(get_keys(qemu.pid)) == keys
    assert acc_and_f(qemu.dumped()) == keys
