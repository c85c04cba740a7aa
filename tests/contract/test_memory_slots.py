"""Which memory a slot may have: real kernels only, since a simulation has skeyd's rules, the strictest of them all."""

from __future__ import annotations

import errno

import pytest

from skeyd.kvm import abi
from tests.contract.conftest import MakeVm
from tests.contract.kernels import every_real_kernel, real_since_7_0, real_up_to_6_19
from tests.contract.operations import DONE, AddSlot, Answer, Capability
from tests.contract.subject import MIB, Subject

PAGE = 4096
EINVAL = Answer.refused(errno.EINVAL)
AT = 64 * MIB
GFN = AT // PAGE

ODD = [
    pytest.param(AddSlot(5, AT, PAGE), id="a size of a page"),
    pytest.param(AddSlot(5, AT, MIB - PAGE), id="a size of a page less"),
    pytest.param(AddSlot(5, AT, MIB, offset=PAGE), id="an address in the process"),
]


@every_real_kernel
@pytest.mark.parametrize(
    "slot",
    [
        pytest.param(AddSlot(5, AT, 100), id="a size in bytes"),
        pytest.param(AddSlot(5, AT, MIB, offset=100), id="an address in the process in bytes"),
        pytest.param(AddSlot(5, AT + 100, MIB), id="a guest address in bytes"),
        pytest.param(AddSlot(5, 1 << 52, MIB), id="a guest address beyond the host's limit"),
        pytest.param(AddSlot(5, (1 << 64) - MIB, MIB), id="a guest address up to 2^64"),
    ],
)
def test_less_than_pages_and_addresses_beyond_the_limit_are_einval(
    make_vm: MakeVm, subject: Subject, slot: AddSlot
) -> None:
    make_vm()
    assert subject.shared.play(slot) == [EINVAL]


@real_up_to_6_19
@pytest.mark.parametrize("slot", ODD)
def test_up_to_6_19_what_is_no_whole_mib_is_einval(make_vm: MakeVm, subject: Subject, slot: AddSlot) -> None:
    make_vm()
    assert subject.shared.play(slot) == [EINVAL]


@real_since_7_0
@pytest.mark.parametrize("slot", ODD)
def test_since_7_0_whole_pages_will_do(make_vm: MakeVm, subject: Subject, slot: AddSlot) -> None:
    vm = make_vm()
    assert subject.shared.play(slot) == [DONE]
    last = GFN + slot.size // PAGE - 1
    vm.accept(last, b"\x30")
    assert vm.keys(last, 1) == b"\x30"
    assert vm.get(last + 1, 1) == Answer.refused(errno.EFAULT)


@every_real_kernel
def test_a_guest_address_that_is_no_whole_mib_is_accepted_and_its_keys_work(make_vm: MakeVm, subject: Subject) -> None:
    # Up to 6.19 the guest couldn't use such memory (gmap_map_segment refuses it, and only the log says so).
    vm = make_vm()
    assert subject.shared.play(AddSlot(5, AT + PAGE, MIB)) == [DONE]
    assert vm.get(GFN, 1) == Answer.refused(errno.EFAULT)
    vm.store(GFN + 1, b"\x30\x40")
    assert vm.keys(GFN + 1, 3) == b"\x30\x40\0"


@every_real_kernel
def test_a_slot_over_another_is_eexist(make_vm: MakeVm, subject: Subject) -> None:
    make_vm((64, 1))
    assert subject.shared.play(AddSlot(5, AT, MIB)) == [Answer.refused(errno.EEXIST)]


@every_real_kernel
def test_memory_may_end_at_2_to_the_47_and_not_begin_there(make_vm: MakeVm, subject: Subject) -> None:
    make_vm()
    limit = 1 << 47
    assert subject.shared.play(AddSlot(5, limit - MIB, MIB), AddSlot(6, limit, MIB)) == [DONE, EINVAL]


@real_up_to_6_19
def test_up_to_6_19_there_may_be_32767_slots(make_vm: MakeVm, subject: Subject) -> None:
    make_vm()
    assert subject.shared.play(Capability(abi.KVM_CAP_NR_MEMSLOTS)) == [Answer(32767)]


@real_since_7_0
def test_since_7_0_there_may_be_32766_slots(make_vm: MakeVm, subject: Subject) -> None:
    make_vm()
    assert subject.shared.play(Capability(abi.KVM_CAP_NR_MEMSLOTS)) == [Answer(32766)]
