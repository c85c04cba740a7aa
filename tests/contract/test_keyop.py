"""KVM_S390_KEYOP, which Linux 7.0 brought."""

from __future__ import annotations

import errno

import pytest

from skeyd.kvm import abi
from tests.contract.conftest import MakeVm
from tests.contract.kernels import over, since_7_0, up_to_6_19
from tests.contract.operations import KEYLESS, Answer, Capability, KeyOp
from tests.contract.subject import MAX, MIB, SEGMENT, Process, Subject, Vm, new_vm

ISKE, RRBE, SSKE = abi.KVM_S390_KEYOP_ISKE, abi.KVM_S390_KEYOP_RRBE, abi.KVM_S390_KEYOP_SSKE
PAGE = 4096
EINVAL, EFAULT = Answer.refused(errno.EINVAL), Answer.refused(errno.EFAULT)


def keyop(vm: Vm, operation: int, address: int, key: int = 0) -> Answer:
    (answer,) = vm.process.play(KeyOp(operation, address, key, vm.number))
    return answer


def gives(key: int) -> Answer:
    return Answer(keys=bytes([key]))


@up_to_6_19
@pytest.mark.parametrize("operation", [ISKE, RRBE, SSKE, 0, 255])
def test_up_to_6_19_it_is_enotty_for_a_keyless_guest_too_whatever_is_asked(process: Process, operation: int) -> None:
    vm = new_vm(process)
    assert [keyop(vm, operation, address, 0x30) for address in (0, 4 * MIB)] == [Answer.refused(errno.ENOTTY)] * 2
    assert vm.is_keyless()


@up_to_6_19
def test_up_to_6_19_it_is_not_there_and_the_capability_says_so(make_vm: MakeVm, subject: Subject) -> None:
    assert keyop(make_vm(), ISKE, 0) == Answer.refused(errno.ENOTTY)
    assert subject.shared.play(Capability(abi.KVM_CAP_S390_KEYOP)) == [Answer(0)]


@since_7_0
def test_since_7_0_the_capability_says_that_it_is_there(make_vm: MakeVm, subject: Subject) -> None:
    make_vm()
    assert subject.shared.play(Capability(abi.KVM_CAP_S390_KEYOP)) == [Answer(1)]


@since_7_0
def test_iske_gives_the_key_that_set_has_set(make_vm: MakeVm) -> None:
    vm = make_vm()
    vm.accept(1, b"\xfe\x36")
    assert [keyop(vm, ISKE, gfn * PAGE) for gfn in range(4)] == [gives(0), gives(0xFE), gives(0x36), gives(0)]


@since_7_0
def test_sske_sets_the_key_that_get_finds_and_gives_the_old_one(make_vm: MakeVm) -> None:
    vm = make_vm()
    vm.accept(1, b"\x36")
    assert keyop(vm, SSKE, PAGE, 0x40) == gives(0x36)
    assert vm.keys(0, 3) == b"\0\x40\0"


@since_7_0
def test_rrbe_gives_the_old_r_and_c_of_each_of_the_128_keys_and_takes_r_away(make_vm: MakeVm) -> None:
    vm = make_vm()
    every_key = range(0, 256, 2)
    vm.accept(0, bytes(every_key) * 2)
    assert [keyop(vm, RRBE, gfn * PAGE) for gfn in range(128)] == [gives(key & 0x06) for key in every_key]
    assert vm.keys(0, SEGMENT) == bytes(key & ~0x04 for key in every_key) + bytes(every_key)


@since_7_0
def test_the_address_is_in_bytes_and_any_byte_of_a_frame_will_do(make_vm: MakeVm) -> None:
    vm = make_vm()
    assert keyop(vm, SSKE, PAGE + 1, 0x30) == gives(0)
    assert keyop(vm, ISKE, 2 * PAGE - 1) == gives(0x30)
    assert vm.keys(0, 3) == b"\0\x30\0"


@since_7_0
@pytest.mark.parametrize(("given", "kept"), [(0x01, 0x00), (0x31, 0x30), (0xFF, 0xFE)])
def test_sske_drops_the_reserved_bit_where_set_refuses_it(make_vm: MakeVm, given: int, kept: int) -> None:
    vm = make_vm()
    assert keyop(vm, SSKE, 0, given) == gives(0)
    assert vm.keys(0, 1) == bytes([kept])


@over("7.0")
@pytest.mark.parametrize(("operation", "given"), [(ISKE, 0x05), (RRBE, 0x0A), (SSKE, 0x30)])
def test_7_0_takes_the_number_of_an_interruption_for_the_key_of_a_frame_in_no_slot(
    make_vm: MakeVm, operation: int, given: int
) -> None:
    assert keyop(make_vm((0, 1), (3, 1)), operation, MIB, 0x30) == gives(given)


@over("7.2")
@pytest.mark.parametrize("operation", [ISKE, RRBE, SSKE])
@pytest.mark.parametrize("address", [MIB, 3 * MIB - 1, 1 << 44, 1 << 63, (1 << 64) - 1])
def test_since_7_2_a_frame_in_no_slot_is_efault(make_vm: MakeVm, operation: int, address: int) -> None:
    assert keyop(make_vm((0, 1), (3, 1)), operation, address, 0x30) == EFAULT


@since_7_0
@pytest.mark.parametrize("operation", [0, 4, 255])
def test_an_operation_that_is_none_is_einval_in_a_keyless_guest_too(process: Process, operation: int) -> None:
    vm = new_vm(process, (0, 1))
    assert keyop(vm, SSKE, 0, 0x36) == gives(0)
    assert [keyop(vm, operation, address, 0x30) for address in (0, 2 * MIB)] == [EINVAL] * 2
    assert keyop(vm, ISKE, 0) == gives(0x36)
    assert vm.is_keyless()


@since_7_0
@pytest.mark.parametrize("operation", [0, 4, 255])
@pytest.mark.parametrize("address", [0, 2 * MIB])
def test_an_operation_that_is_none_is_einval_wherever(make_vm: MakeVm, operation: int, address: int) -> None:
    assert keyop(make_vm((0, 1)), operation, address) == EINVAL


@since_7_0
@pytest.mark.parametrize("operation", [ISKE, RRBE, SSKE])
def test_it_works_on_a_keyless_guest_and_enables_nothing(process: Process, operation: int) -> None:
    vm = new_vm(process)
    assert keyop(vm, operation, 0, 0x30) == gives(0)
    assert vm.is_keyless()


@since_7_0
def test_a_key_that_sske_gave_a_keyless_guest_is_gone_once_keys_are_enabled(process: Process) -> None:
    vm = new_vm(process)
    assert keyop(vm, SSKE, PAGE, 0x36) == gives(0)
    assert keyop(vm, SSKE, SEGMENT * PAGE, 0x42) == gives(0)
    assert keyop(vm, ISKE, PAGE) == gives(0x36)
    vm.accept(0, b"\0")
    assert vm.keys(0, 2) == b"\0\0"
    assert vm.keys(SEGMENT, 1) == b"\0"
    assert keyop(vm, ISKE, PAGE) == gives(0)


@since_7_0
def test_iske_changes_nothing(make_vm: MakeVm) -> None:
    vm = make_vm()
    vm.accept(0, b"\xfe\xfe")
    assert [keyop(vm, ISKE, 0) for _ in range(2)] == [gives(0xFE)] * 2
    assert vm.keys(0, 2) == b"\xfe\xfe"


@since_7_0
def test_each_of_the_128_keys_goes_through_keyop_as_it_is(make_vm: MakeVm) -> None:
    vm = make_vm()
    every_key = range(0, 256, 2)
    assert [keyop(vm, SSKE, key * PAGE, key) for key in every_key] == [gives(0)] * 128
    assert [keyop(vm, ISKE, key * PAGE) for key in every_key] == [gives(key) for key in every_key]
    assert vm.keys(0, SEGMENT) == bytes(0 if frame % 2 else frame for frame in range(SEGMENT))


@over("7.0")
@pytest.mark.parametrize(("operation", "given"), [(ISKE, 0x05), (RRBE, 0x0A), (SSKE, 0x30)])
def test_7_0_finds_that_number_in_a_keyless_guest_too(process: Process, operation: int, given: int) -> None:
    vm = new_vm(process, (0, 1))
    assert keyop(vm, operation, MIB, 0x30) == gives(given)
    assert vm.is_keyless()


@over("7.2")
@pytest.mark.parametrize("operation", [ISKE, RRBE, SSKE])
def test_since_7_2_a_frame_in_no_slot_is_efault_in_a_keyless_guest_too(process: Process, operation: int) -> None:
    vm = new_vm(process, (0, 1))
    assert keyop(vm, operation, MIB, 0x30) == EFAULT
    assert vm.is_keyless()


@since_7_0
def test_all_keys_that_sske_gave_a_keyless_guest_are_gone_once_keys_are_enabled(process: Process) -> None:
    vm = new_vm(process)
    for gfn in range(0, 4 * SEGMENT, 5):
        assert keyop(vm, SSKE, gfn * PAGE, 0x36) == gives(0)
    vm.accept(0, b"\0")
    assert vm.keys(0, 4 * SEGMENT) == bytes(4 * SEGMENT)


@since_7_0
def test_a_get_of_a_keyless_guest_leaves_the_key_that_sske_gave_it(process: Process) -> None:
    vm = new_vm(process)
    assert keyop(vm, SSKE, PAGE, 0x36) == gives(0)
    assert vm.get(0, 4) == KEYLESS
    assert keyop(vm, ISKE, PAGE) == gives(0x36)


@since_7_0
@pytest.mark.parametrize("count", [0, MAX + 1])
def test_a_set_with_a_bad_count_leaves_the_key_that_sske_gave_a_keyless_guest(process: Process, count: int) -> None:
    vm = new_vm(process)
    assert keyop(vm, SSKE, PAGE, 0x36) == gives(0)
    assert vm.set(0, bytes(count)) == EINVAL
    assert keyop(vm, ISKE, PAGE) == gives(0x36)
    assert vm.is_keyless()


@since_7_0
def test_no_access_of_the_host_changes_what_iske_finds_in_a_keyless_guest(process: Process) -> None:
    vm = new_vm(process)
    assert keyop(vm, SSKE, PAGE, 0x30) == gives(0)
    for write in (True, False):
        vm.touch(1, write=write)
        vm.touch(2, write=write)
        assert [keyop(vm, ISKE, gfn * PAGE) for gfn in (1, 2)] == [gives(0x30), gives(0)]


@since_7_0
@pytest.mark.parametrize("far", [1 << 32, 1 << 34])
def test_keyop_works_far_up_on_its_frame_and_no_other(make_vm: MakeVm, far: int) -> None:
    vm = make_vm((0, 1), (far // SEGMENT, 1))
    assert keyop(vm, SSKE, (far + 2) * PAGE, 0x36) == gives(0)
    assert [keyop(vm, ISKE, gfn * PAGE) for gfn in (2, far, far + 2)] == [gives(0), gives(0), gives(0x36)]
    assert keyop(vm, RRBE, (far + 2) * PAGE) == gives(0x06)
    assert vm.keys(far, SEGMENT) == b"\0\0\x32" + bytes(SEGMENT - 3)
    assert vm.keys(0, SEGMENT) == bytes(SEGMENT)


@since_7_0
@pytest.mark.parametrize("uses_keys", [True, False])
def test_keyop_works_on_the_first_and_the_last_frame_of_each_slot(process: Process, uses_keys: bool) -> None:
    vm = new_vm(process, (1, 1), (3, 2), (6, 1))
    if uses_keys:
        vm.accept(SEGMENT, b"\0")
    ends = [SEGMENT, 2 * SEGMENT - 1, 3 * SEGMENT, 5 * SEGMENT - 1, 6 * SEGMENT, 7 * SEGMENT - 1]
    for gfn in ends:
        assert keyop(vm, SSKE, gfn * PAGE, 0x36) == gives(0)
        assert keyop(vm, ISKE, gfn * PAGE + PAGE - 1) == gives(0x36)
        assert keyop(vm, RRBE, gfn * PAGE) == gives(0x06)
        assert keyop(vm, ISKE, gfn * PAGE) == gives(0x32)


@since_7_0
@pytest.mark.parametrize("given", [*range(8), 0x37, 0xFF])
def test_sske_drops_the_reserved_bit_and_no_other_in_a_keyless_guest_too(process: Process, given: int) -> None:
    vm = new_vm(process, (0, 1))
    assert keyop(vm, SSKE, 3 * PAGE, given) == gives(0)
    assert keyop(vm, ISKE, 3 * PAGE) == gives(given & 0xFE)


@since_7_0
@pytest.mark.parametrize("key", [0x02, 0x04, 0x06, 0x08, 0x10, 0xFE])
def test_enabling_takes_away_whatever_key_sske_gave_a_keyless_guest_in_each_slot(process: Process, key: int) -> None:
    vm = new_vm(process, (0, 1), (2, 1), (4, 1), (6, 1))
    gfns = [9, 2 * SEGMENT, 4 * SEGMENT + 1, 7 * SEGMENT - 1]
    for gfn in gfns:
        assert keyop(vm, SSKE, gfn * PAGE, key) == gives(0)
    vm.accept(0, b"\0")
    assert [vm.keys(gfn, 1) for gfn in gfns] == [b"\0"] * len(gfns)


@since_7_0
def test_a_set_leaves_the_keys_that_sske_gave_a_guest_that_uses_keys(make_vm: MakeVm) -> None:
    vm = make_vm((0, 1), (2, 1))
    for gfn in (5, 2 * SEGMENT):
        assert keyop(vm, SSKE, gfn * PAGE, 0x36) == gives(0)
    vm.accept(0, b"\x10")
    vm.accept(2 * SEGMENT + 1, b"\x10")
    assert (vm.keys(4, 3), vm.keys(2 * SEGMENT, 2)) == (b"\0\x36\0", b"\x36\x10")
