"""A call that fails sets what it says and no more: every key is read afterwards."""

from __future__ import annotations

import errno

import pytest

from skeyd.kvm import abi
from skeyd.storage_key import FRAME_SIZE
from tests.contract.conftest import MakeVm
from tests.contract.kernels import every_kernel, over, since_7_0
from tests.contract.operations import Answer, KeyOp
from tests.contract.subject import MAX, SEGMENT, Vm, hole
from tests.contract.test_get import HOLES

EINVAL = Answer.refused(errno.EINVAL)
SLOTS = ((0, 1), (3, 1))
FRAMES = (*range(SEGMENT), *range(3 * SEGMENT, 4 * SEGMENT))
KEYS = bytes(range(2, 256, 2)) + b"\xfe"
"""No key is 0, and most have R and C."""


def filled(make_vm: MakeVm, *slots: tuple[int, int]) -> tuple[Vm, dict[int, int]]:
    """Make a VM of which every key is set, twice: whatever a kernel loses the first time, it keeps the second."""
    vm = make_vm(*slots)
    keys: dict[int, int] = {}
    for start, size in slots:
        frames = range(start * SEGMENT, (start + size) * SEGMENT)
        keys |= {gfn: KEYS[gfn % len(KEYS)] for gfn in frames}
        vm.store(frames.start, bytes(keys[gfn] for gfn in frames))
    return vm, keys


def require(vm: Vm, keys: dict[int, int], *slots: tuple[int, int]) -> None:
    """Fail the test where any of the keys is another."""
    for start, size in slots:
        vm.require_keys(start * SEGMENT, bytes(keys[gfn] for gfn in range(start * SEGMENT, (start + size) * SEGMENT)))


@every_kernel
@pytest.mark.parametrize("count", [0, MAX + 1])
@pytest.mark.parametrize("start", [0, 2, 1 << 20, (1 << 64) - 1])
def test_a_set_with_a_count_outside_1_to_max_sets_nothing_wherever_it_begins(
    make_vm: MakeVm, start: int, count: int
) -> None:
    vm = make_vm((0, MAX // SEGMENT + 1))
    vm.store(0, b"\x10" * 4)
    vm.store(MAX - 1, b"\x10\x10\x10\x10")
    assert vm.set(start, b"\x30" * count) == EINVAL
    assert vm.keys(0, 5) == b"\x10\x10\x10\x10\0"
    assert vm.keys(MAX - 2, 6) == b"\0\x10\x10\x10\x10\0"


@every_kernel
@pytest.mark.parametrize("key", [0x00, 0x30])
@pytest.mark.parametrize(("start", "count"), HOLES)
def test_a_set_that_meets_a_hole_sets_the_keys_before_it_and_no_others(
    make_vm: MakeVm, generation: str, start: int, count: int, key: int
) -> None:
    vm, keys = filled(make_vm, *SLOTS)
    assert vm.set(start, bytes([key]) * count) == hole(generation)
    for gfn in range(start, start + count):
        if gfn not in keys:
            break
        keys[gfn] = key
    require(vm, keys, *SLOTS)


@every_kernel
@pytest.mark.parametrize("far", range(20, 64))
def test_no_bit_of_a_gfn_is_lost_on_its_way(make_vm: MakeVm, generation: str, far: int) -> None:
    vm, keys = filled(make_vm, (0, 1))
    assert vm.get(1 << far | 1, 1) == hole(generation)
    assert vm.set(1 << far | 1, b"\x30") == hole(generation)
    require(vm, keys, (0, 1))


@every_kernel
@pytest.mark.parametrize("bad", [b"\x01", b"\x31", b"\xff"])
@pytest.mark.parametrize("gfn", [0, 1, SEGMENT - 1])
def test_a_bad_key_leaves_its_frame_the_key_it_has_in_all_bits(make_vm: MakeVm, gfn: int, bad: bytes) -> None:
    vm, keys = filled(make_vm, (0, 1))
    assert vm.set(gfn, bad) == EINVAL
    require(vm, keys, (0, 1))


@over("4.19")
@pytest.mark.parametrize("start", [SEGMENT, 2 * SEGMENT, 1 << 32])
def test_up_to_6_19_a_hole_is_told_before_a_bad_key_behind_it(make_vm: MakeVm, start: int) -> None:
    vm, keys = filled(make_vm, *SLOTS)
    assert vm.set(start, b"\x30\x31") == hole("4.19")
    require(vm, keys, *SLOTS)


KEYOPS = {"ISKE": abi.KVM_S390_KEYOP_ISKE, "RRBE": abi.KVM_S390_KEYOP_RRBE, "SSKE": abi.KVM_S390_KEYOP_SSKE}
KEYOP_HOLES = [0, SEGMENT - 1, 2 * SEGMENT, 3 * SEGMENT - 1, 4 * SEGMENT, 1 << 20, 1 << 32, 1 << 40, (1 << 52) - 1]
"""Of slots at 1 and 3 MiB."""


@since_7_0
@pytest.mark.parametrize("given", [0x30, 0x31])
@pytest.mark.parametrize("gfn", KEYOP_HOLES)
@pytest.mark.parametrize("operation", KEYOPS)
def test_keyop_in_a_hole_changes_no_key(make_vm: MakeVm, generation: str, operation: str, gfn: int, given: int) -> None:
    vm, keys = filled(make_vm, (1, 1), (3, 1))
    # Linux 7.0 and 7.1 take the number of the interruption, 5, for what they found: read in their source.
    made_up = {"ISKE": 0x05, "RRBE": 0x0A, "SSKE": given}[operation]
    (answer,) = vm.process.play(KeyOp(KEYOPS[operation], gfn * FRAME_SIZE, given, vm.number))
    wanted = Answer(keys=bytes([made_up])) if generation == "7.0" else Answer.refused(errno.EFAULT)
    assert answer == wanted
    require(vm, keys, (1, 1), (3, 1))


@since_7_0
@pytest.mark.parametrize("operation", [0, 4, 255])
@pytest.mark.parametrize("gfn", [SEGMENT, 0])
def test_an_operation_of_keyop_that_is_none_changes_no_key(make_vm: MakeVm, operation: int, gfn: int) -> None:
    vm, keys = filled(make_vm, (1, 1))
    assert vm.process.play(KeyOp(operation, gfn * FRAME_SIZE, 0x30, vm.number)) == [EINVAL]
    require(vm, keys, (1, 1))
