"""Up to Linux 6.19: what makes the page table that saves a segment's first key, and that nothing takes it away."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from tests.contract.conftest import MakeVm
from tests.contract.kernels import up_to_6_19
from tests.contract.operations import DONE, Answer, Delete
from tests.contract.subject import SEGMENT, Process, Vm, hole, new_vm

EINVAL = Answer.refused(errno.EINVAL)
LOST, KEPT = b"\0\x30", b"\x30\x30"


def tried(vm: Vm, gfn: int) -> bytes:
    """Set two keys, and return what became of them."""
    vm.accept(gfn, b"\x30\x30")
    return vm.keys(gfn, 2)


def a_vm_is_made(process: Process) -> None:
    new_vm(process, (0, 2), number=7)


def the_vm_before_is_closed(process: Process) -> None:
    assert process.play(Delete(0)) == [DONE]


def the_vm_behind_is_closed(process: Process) -> None:
    assert process.play(Delete(2)) == [DONE]


def another_sets_a_key(process: Process) -> None:
    Vm(process, 2).accept(0, b"\x10")


def another_fails_on_a_hole(process: Process) -> None:
    assert Vm(process, 2).set(1 << 20, b"\x10") == hole("4.19")


def another_fails_on_a_bad_key(process: Process) -> None:
    assert Vm(process, 2).set(0, b"\x11") == EINVAL


def it_fails_on_a_hole(process: Process) -> None:
    assert Vm(process, 1).set(1 << 20, b"\x10") == hole("4.19")


def it_fails_on_a_bad_key(process: Process) -> None:
    assert Vm(process, 1).set(0, b"\x11") == EINVAL


def it_is_read(process: Process) -> None:
    Vm(process, 1).get(0, 2 * SEGMENT)


def it_gets_zeros(process: Process) -> None:
    Vm(process, 1).accept(0, bytes(2 * SEGMENT))


MEANWHILE = [
    a_vm_is_made,
    the_vm_before_is_closed,
    the_vm_behind_is_closed,
    another_sets_a_key,
    another_fails_on_a_hole,
    another_fails_on_a_bad_key,
    it_fails_on_a_hole,
    it_fails_on_a_bad_key,
    it_is_read,
    it_gets_zeros,
]


@up_to_6_19
@pytest.mark.parametrize("meanwhile", MEANWHILE, ids=lambda happens: happens.__name__)
def test_up_to_6_19_a_page_table_made_before_keys_were_enabled_stays(
    process: Process, meanwhile: Callable[[Process], None]
) -> None:
    vm = [new_vm(process, (0, 2), number=number) for number in range(3)][1]
    vm.touch(SEGMENT + 9, write=False)
    meanwhile(process)
    assert tried(vm, SEGMENT + 100) == KEPT
    assert tried(vm, 100) == LOST


@up_to_6_19
@pytest.mark.parametrize("by", ["a touch", "a key"])
@pytest.mark.parametrize("meanwhile", MEANWHILE, ids=lambda happens: happens.__name__)
def test_up_to_6_19_a_page_table_made_once_keys_were_enabled_stays(
    process: Process, meanwhile: Callable[[Process], None], by: str
) -> None:
    vm = [new_vm(process, (0, 2), number=number) for number in range(3)][1]
    vm.accept(0, b"\0")
    if by == "a touch":
        vm.touch(SEGMENT + 9, write=False)
    else:
        vm.accept(SEGMENT + 9, b"\x10")
    meanwhile(process)
    assert tried(vm, SEGMENT + 100) == KEPT
    assert tried(vm, 100) == LOST


@up_to_6_19
@pytest.mark.parametrize("start", [0, 9, SEGMENT - 1])
@pytest.mark.parametrize("before", [0, 1, SEGMENT])
def test_up_to_6_19_a_bad_key_makes_no_page_table_wherever_in_its_call(
    make_vm: MakeVm, start: int, before: int
) -> None:
    vm = make_vm((0, 3))
    assert vm.set(start, bytes(before) + b"\x11") == EINVAL
    for segment in range(3):
        assert tried(vm, segment * SEGMENT) == LOST


@up_to_6_19
@pytest.mark.parametrize("start", [2 * SEGMENT, 4 * SEGMENT, 1 << 20])
def test_up_to_6_19_a_key_in_a_hole_makes_no_page_table(make_vm: MakeVm, start: int) -> None:
    vm = make_vm((0, 2), (3, 1))
    assert vm.set(start, b"\x30\x30") == hole("4.19")
    for gfn in (0, 2 * SEGMENT - 2, 3 * SEGMENT, 3 * SEGMENT + 5):
        assert tried(vm, gfn) == (LOST if gfn != 3 * SEGMENT + 5 else KEPT)


@up_to_6_19
@pytest.mark.parametrize("gfn", [SEGMENT - 1, 3 * SEGMENT - 1, 5 * SEGMENT - 1])
def test_up_to_6_19_the_last_frame_of_each_slot_is_like_the_others(make_vm: MakeVm, gfn: int) -> None:
    vm, touched = make_vm((0, 1), (2, 1), (4, 1)), make_vm((0, 1), (2, 1), (4, 1))
    vm.accept(gfn, b"\x30")
    assert vm.keys(gfn, 1) == b"\0"
    vm.accept(gfn, b"\x30")
    assert vm.keys(gfn, 1) == b"\x30"
    touched.touch(gfn, write=True)
    assert touched.keys(gfn - 1, 2) == b"\0\x06"
    touched.accept(gfn, b"\x30")
    assert touched.keys(gfn, 1) == b"\x30"


@up_to_6_19
def test_up_to_6_19_a_key_is_lost_in_each_of_five_slots(make_vm: MakeVm) -> None:
    vm = make_vm(*((2 * slot, 1) for slot in range(5)))
    for slot in range(5):
        assert tried(vm, 2 * slot * SEGMENT) == LOST
