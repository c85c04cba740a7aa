"""KVM_S390_GET_SKEYS."""

from __future__ import annotations

import errno

import pytest

from tests.contract.conftest import MakeVm
from tests.contract.kernels import every_kernel
from tests.contract.operations import KEYLESS, Answer, Get
from tests.contract.subject import MAX, SEGMENT, Process, hole, new_vm

TOP = 1 << 64

HOLES = [
    pytest.param(SEGMENT - 1, 2, id="into a hole"),
    pytest.param(SEGMENT, 1, id="in a hole"),
    pytest.param(SEGMENT - 1, 2 * SEGMENT + 2, id="across a hole"),
    pytest.param(3 * SEGMENT - 1, 2, id="out of a hole"),
    pytest.param(4 * SEGMENT - 1, 2, id="beyond the last slot"),
    pytest.param(0, MAX, id="as much as can be, from the first frame"),
    pytest.param(1 << 32, 1, id="at 2^32"),
    pytest.param((1 << 52) - 1, 1, id="at the last frame of 2^64 bytes"),
    pytest.param(1 << 52, 1, id="at 2^52, whose address wraps to 0"),
    pytest.param((1 << 52) - 1, 2, id="across 2^52"),
    pytest.param(1 << 63, 1, id="at 2^63"),
    pytest.param(TOP - 1, 1, id="at 2^64 - 1"),
    pytest.param(TOP - 2, 2, id="up to 2^64"),
    pytest.param(TOP - 1, 2, id="across 2^64"),
]


@every_kernel
def test_a_keyless_guest_answers_1_whatever_was_asked_for(process: Process) -> None:
    new_vm(process, (0, 1), (3, 1))
    asked = [(0, 1), (0, 0), (0, MAX + 1), (SEGMENT, 1), (SEGMENT - 1, 2), (1 << 52, 1), (TOP - 1, 2)]
    assert process.play(*(Get(start, count) for start, count in asked)) == [KEYLESS] * len(asked)


@every_kernel
@pytest.mark.parametrize("count", [0, MAX + 1])
@pytest.mark.parametrize("start", [0, SEGMENT * 4, TOP - 1])
def test_a_count_outside_1_to_max_is_einval_before_any_frame_is_looked_at(
    make_vm: MakeVm, start: int, count: int
) -> None:
    assert make_vm().get(start, count) == Answer.refused(errno.EINVAL)


@every_kernel
def test_as_many_keys_as_max_are_read_in_one_call(make_vm: MakeVm) -> None:
    vm = make_vm((0, MAX // SEGMENT))
    vm.store(MAX - 1, b"\x38")
    vm.require_keys(0, bytes(MAX - 1) + b"\x38")


@every_kernel
def test_the_first_and_the_last_frame_of_each_slot_have_keys(make_vm: MakeVm) -> None:
    vm = make_vm((1, 1), (3, 2))
    ends = [SEGMENT, 2 * SEGMENT - 1, 3 * SEGMENT, 5 * SEGMENT - 1]
    for gfn in ends:
        vm.store(gfn, b"\x58")
        assert vm.keys(gfn, 1) == b"\x58"
    assert vm.keys(SEGMENT, SEGMENT) == b"\x58" + bytes(SEGMENT - 2) + b"\x58"
    assert vm.keys(3 * SEGMENT, 2 * SEGMENT) == b"\x58" + bytes(2 * SEGMENT - 2) + b"\x58"


@every_kernel
def test_slots_that_touch_are_crossed(make_vm: MakeVm) -> None:
    vm = make_vm((1, 1), (0, 1))
    vm.store(SEGMENT - 2, b"\x10\x20\x30\x40")
    assert vm.keys(SEGMENT - 3, 6) == b"\0\x10\x20\x30\x40\0"


@every_kernel
def test_memory_from_gfn_2_to_the_32_on_has_keys_of_its_own(make_vm: MakeVm) -> None:
    far = 1 << 32
    vm = make_vm((0, 1), (far // SEGMENT, 1))
    vm.store(far, b"\x30")
    assert (vm.keys(0, 1), vm.keys(far, 1)) == (b"\0", b"\x30")


@every_kernel
@pytest.mark.parametrize(("start", "count"), HOLES)
def test_a_frame_in_no_slot_fails_the_whole_call_and_the_buffer_is_left_alone(
    make_vm: MakeVm, generation: str, start: int, count: int
) -> None:
    # An Answer without keys: the buffer is as it was.
    assert make_vm((0, 1), (3, 1)).get(start, count) == hole(generation)


@every_kernel
def test_memory_that_was_never_touched_has_key_0(make_vm: MakeVm) -> None:
    vm = make_vm((0, 2), (5, 1))
    assert vm.keys(0, 2 * SEGMENT) == bytes(2 * SEGMENT)
    assert vm.keys(5 * SEGMENT, SEGMENT) == bytes(SEGMENT)


@every_kernel
@pytest.mark.parametrize("before", [1, SEGMENT, 2000 // SEGMENT * SEGMENT, MAX - SEGMENT])
def test_a_hole_fails_the_call_however_late_in_it(make_vm: MakeVm, generation: str, before: int) -> None:
    vm = make_vm((0, max(1, before // SEGMENT)))
    start = 0 if before >= SEGMENT else SEGMENT - before
    assert vm.get(start, before + 1) == hole(generation)
    vm.require_keys(start, bytes(before))
