"""KVM_S390_SET_SKEYS: what it sets, and where it stops. Keys that it loses are test_lost_keys.py's."""

from __future__ import annotations

import errno

import pytest

from tests.contract.conftest import MakeVm
from tests.contract.kernels import every_kernel, since_7_0, up_to_6_19
from tests.contract.operations import Answer
from tests.contract.subject import MAX, SEGMENT, hole
from tests.contract.test_get import HOLES

EINVAL = Answer.refused(errno.EINVAL)
EVERY_KEY = bytes(range(0, 256, 2))


@every_kernel
def test_each_of_the_128_keys_is_kept_as_it_was_set(make_vm: MakeVm) -> None:
    vm = make_vm()
    vm.store(100, EVERY_KEY)
    assert vm.keys(99, 130) == b"\0" + EVERY_KEY + b"\0"


@every_kernel
def test_a_key_replaces_the_one_before_it_in_all_its_bits(make_vm: MakeVm) -> None:
    vm = make_vm()
    for key in (b"\xfe", b"\x10", b"\x00", b"\x06", b"\x08"):
        vm.store(7, key)
        assert vm.keys(6, 3) == b"\0" + key + b"\0"


@every_kernel
def test_as_many_keys_as_max_are_set_in_one_call(make_vm: MakeVm) -> None:
    vm = make_vm((0, MAX // SEGMENT))
    keys = b"\x08\x10" * (MAX // 2)
    vm.store(0, keys)
    vm.require_keys(0, keys)


@every_kernel
@pytest.mark.parametrize("count", [0, MAX + 1])
def test_a_count_outside_1_to_max_is_einval_and_enables_nothing(keyless_vm: MakeVm, count: int) -> None:
    vm = keyless_vm()
    assert vm.set(0, bytes(count)) == EINVAL
    assert vm.is_keyless()


@every_kernel
@pytest.mark.parametrize(("start", "keys"), [(0, b"\x01"), (1 << 20, b"\0"), ((1 << 64) - 1, b"\x01")])
def test_a_set_that_fails_on_a_hole_or_on_a_reserved_bit_enables_keys_all_the_same(
    keyless_vm: MakeVm, start: int, keys: bytes
) -> None:
    vm = keyless_vm()
    vm.set(start, keys)
    assert not vm.is_keyless()
    assert vm.keys(0, 4) == bytes(4)


# --- holes ---------------------------------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize(("start", "count"), HOLES)
def test_a_frame_in_no_slot_fails_the_call(make_vm: MakeVm, generation: str, start: int, count: int) -> None:
    vm = make_vm((0, 1), (3, 1))
    assert vm.set(start, bytes(count)) == hole(generation)


@every_kernel
def test_the_keys_before_a_hole_stay_set_and_those_after_it_are_not(make_vm: MakeVm, generation: str) -> None:
    vm = make_vm((0, 1), (2, 1))
    vm.store(SEGMENT - 2, b"\x10\x10")
    vm.store(2 * SEGMENT, b"\x10\x10")
    assert vm.set(SEGMENT - 2, b"\x20\x30" + b"\x40" * SEGMENT + b"\x50\x60") == hole(generation)
    assert vm.keys(SEGMENT - 2, 2) == b"\x20\x30"
    assert vm.keys(2 * SEGMENT, 2) == b"\x10\x10"


@every_kernel
def test_a_range_that_begins_in_a_hole_sets_nothing(make_vm: MakeVm, generation: str) -> None:
    vm = make_vm((1, 1))
    vm.store(SEGMENT, b"\x10")
    assert vm.set(SEGMENT - 1, b"\x20\x20") == hole(generation)
    assert vm.keys(SEGMENT, 1) == b"\x10"


# --- reserved bits -------------------------------------------------------------------------------------------------


@up_to_6_19
def test_up_to_6_19_the_keys_before_a_reserved_bit_stay_set(make_vm: MakeVm) -> None:
    vm = make_vm()
    vm.store(0, b"\x10" * 4)
    assert vm.set(0, b"\x20\x30\x41\x50") == EINVAL
    assert vm.keys(0, 4) == b"\x20\x30\x10\x10"


@since_7_0
@pytest.mark.parametrize("keys", [b"\x21\x30\x40\x50", b"\x20\x30\x41\x50", b"\x20\x30\x40\xff"])
def test_since_7_0_a_reserved_bit_anywhere_sets_nothing(make_vm: MakeVm, keys: bytes) -> None:
    vm = make_vm()
    vm.store(0, b"\x10" * 4)
    assert vm.set(0, keys) == EINVAL
    assert vm.keys(0, 4) == b"\x10" * 4


@up_to_6_19
@pytest.mark.parametrize(
    ("keys", "answer", "left"),
    [
        pytest.param(b"\x20\x30\x41", hole("4.19"), b"\x20\x30", id="both at one frame: the frame is looked up first"),
        pytest.param(b"\x20\x31\x40", EINVAL, b"\x20\x10", id="the reserved bit first"),
        pytest.param(b"\x20\x30\x40\x51", hole("4.19"), b"\x20\x30", id="the hole first"),
    ],
)
def test_up_to_6_19_what_comes_first_stops_it(make_vm: MakeVm, keys: bytes, answer: Answer, left: bytes) -> None:
    vm = make_vm((0, 1))
    vm.store(SEGMENT - 2, b"\x10\x10")
    assert vm.set(SEGMENT - 2, keys) == answer
    assert vm.keys(SEGMENT - 2, 2) == left


@since_7_0
@pytest.mark.parametrize("start", [SEGMENT - 2, SEGMENT, 1 << 52, (1 << 64) - 1])
def test_since_7_0_a_reserved_bit_is_told_before_a_hole(make_vm: MakeVm, start: int) -> None:
    vm = make_vm((0, 1))
    vm.store(SEGMENT - 2, b"\x10\x10")
    assert vm.set(start, b"\x20\x30\x40\x51") == EINVAL
    assert vm.keys(SEGMENT - 2, 2) == b"\x10\x10"


LATE = [1, SEGMENT - 1, SEGMENT, 999, 1000, 4096, 65_535, 65_536, MAX // 2, MAX - 1]
"""Indexes in a call, up to the last there can be."""


@every_kernel
@pytest.mark.parametrize("index", LATE)
def test_a_reserved_bit_is_einval_however_late_in_the_call(make_vm: MakeVm, index: int) -> None:
    vm = make_vm((0, MAX // SEGMENT))
    keys = bytearray(index + 1)
    keys[index] = 0x01
    assert vm.set(0, bytes(keys)) == EINVAL
    assert vm.keys(index, 1) == b"\0"


@since_7_0
@pytest.mark.parametrize("index", LATE)
def test_since_7_0_a_reserved_bit_however_late_sets_nothing(make_vm: MakeVm, index: int) -> None:
    vm = make_vm((0, MAX // SEGMENT))
    assert vm.set(0, b"\x30" * index + b"\x31") == EINVAL
    vm.require_keys(0, bytes(index + 1))


@up_to_6_19
@pytest.mark.parametrize("index", [SEGMENT, 1000, 65_536])
def test_up_to_6_19_all_keys_before_a_late_reserved_bit_stay_set(make_vm: MakeVm, index: int) -> None:
    vm = make_vm((0, MAX // SEGMENT))
    for _ in range(2):  # what the kernel loses the first time it keeps the second
        assert vm.set(0, b"\x30" * index + b"\x31") == EINVAL
    vm.require_keys(0, b"\x30" * index + b"\0")


@every_kernel
def test_none_of_the_128_bytes_with_the_reserved_bit_is_a_key(make_vm: MakeVm) -> None:
    vm = make_vm((0, 1))
    for byte in range(1, 256, 2):
        assert vm.set(0, bytes([byte])) == EINVAL, byte
    assert vm.keys(0, SEGMENT) == bytes(SEGMENT)


@every_kernel
def test_a_set_changes_the_keys_of_its_own_frames_and_no_others(make_vm: MakeVm) -> None:
    vm, other = make_vm((0, 3), (4, 2), (6, 1)), make_vm((0, 3), (4, 2), (6, 1))
    # No key is 0, and no two segments have the same.
    before = (EVERY_KEY[1:] * 15)[: 7 * SEGMENT]
    areas = [slice(0, 3 * SEGMENT), slice(4 * SEGMENT, 7 * SEGMENT)]
    for area in areas:
        for one in (vm, other):
            one.store(area.start, before[area])
    vm.accept(SEGMENT - 3, b"\x42" * 9)
    vm.accept(6 * SEGMENT - 2, b"\x52" * 4)
    after = bytearray(before)
    after[SEGMENT - 3 : SEGMENT + 6] = b"\x42" * 9
    after[6 * SEGMENT - 2 : 6 * SEGMENT + 2] = b"\x52" * 4
    for area in areas:
        assert vm.keys(area.start, 3 * SEGMENT) == after[area]
        assert other.keys(area.start, 3 * SEGMENT) == before[area]


@every_kernel
@pytest.mark.parametrize("before", [SEGMENT, 7 * SEGMENT, MAX - SEGMENT])
def test_a_hole_fails_a_set_however_late_in_it(make_vm: MakeVm, generation: str, before: int) -> None:
    vm = make_vm((0, before // SEGMENT))
    for _ in range(2):  # what a kernel loses the first time it keeps the second
        assert vm.set(0, b"\x30" * (before + 1)) == hole(generation)
    vm.require_keys(0, b"\x30" * before)
