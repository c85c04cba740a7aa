"""What the calls have to do with the memory behind the slots: real kernels only, for a simulation has none."""

from __future__ import annotations

import errno

from tests.contract.conftest import MakeVm
from tests.contract.kernels import every_real_kernel, real_since_7_0, real_up_to_6_19
from tests.contract.operations import DONE, Answer, Resident, Unmap
from tests.contract.subject import SEGMENT, Subject

EFAULT = Answer.refused(errno.EFAULT)


@every_real_kernel
def test_get_brings_in_no_page(make_vm: MakeVm, subject: Subject) -> None:
    vm = make_vm((0, 4))
    vm.keys(0, 4 * SEGMENT)
    assert subject.shared.play(Resident(vm.number)) == [Answer(0)]


@real_up_to_6_19
def test_up_to_6_19_set_brings_in_a_page_for_each_key_that_it_loses(make_vm: MakeVm, subject: Subject) -> None:
    vm = make_vm((0, 4))
    vm.accept(0, b"\x10" * 2 * SEGMENT)
    assert subject.shared.play(Resident(vm.number)) == [Answer(2)]
    vm.accept(0, b"\x10" * 2 * SEGMENT)
    assert subject.shared.play(Resident(vm.number)) == [Answer(2)]


@real_up_to_6_19
def test_up_to_6_19_set_brings_in_no_page_where_one_was_read_before(make_vm: MakeVm, subject: Subject) -> None:
    vm = make_vm((0, 4))
    for segment in range(2):
        vm.touch(segment * SEGMENT, write=False)
    assert subject.shared.play(Resident(vm.number)) == [Answer(2)]
    vm.accept(0, b"\x10" * 2 * SEGMENT)
    assert subject.shared.play(Resident(vm.number)) == [Answer(2)]


@real_since_7_0
def test_since_7_0_set_brings_in_no_page(make_vm: MakeVm, subject: Subject) -> None:
    vm = make_vm((0, 4))
    vm.accept(0, b"\x10" * 4 * SEGMENT)
    assert subject.shared.play(Resident(vm.number)) == [Answer(0)]


@real_up_to_6_19
def test_up_to_6_19_a_frame_whose_memory_is_unmapped_is_efault(make_vm: MakeVm, subject: Subject) -> None:
    vm = make_vm((0, 1))
    vm.store(0, b"\x10\x20")
    assert subject.shared.play(Unmap(vm.number)) == [DONE]
    assert vm.get(0, 2) == EFAULT
    assert vm.set(0, b"\x30") == EFAULT
    assert vm.set(0, b"\0") == EFAULT


@real_since_7_0
def test_since_7_0_keys_stay_and_can_be_set_when_the_memory_is_unmapped(make_vm: MakeVm, subject: Subject) -> None:
    vm = make_vm((0, 1))
    vm.accept(0, b"\x10\x20")
    assert subject.shared.play(Unmap(vm.number)) == [DONE]
    assert vm.keys(0, 2) == b"\x10\x20"
    vm.accept(1, b"\x30\x40")
    assert vm.keys(0, 4) == b"\x10\x30\x40\0"
