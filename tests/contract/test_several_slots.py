"""What holds in a VM's first memory slot holds in each of the others, and across them."""

from __future__ import annotations

import errno

import pytest

from skeyd.kvm import abi
from skeyd.storage_key import FRAME_SIZE
from tests.contract.conftest import MakeVm
from tests.contract.kernels import every_kernel, over, since_7_0, up_to_6_19
from tests.contract.operations import DONE, Answer, KeyOp
from tests.contract.subject import MAX, MIB, SEGMENT, Process, Vm, hole, new_vm

ISKE, RRBE, SSKE = abi.KVM_S390_KEYOP_ISKE, abi.KVM_S390_KEYOP_RRBE, abi.KVM_S390_KEYOP_SSKE
R, RC = 0x04, 0x06
SECOND = 3 * SEGMENT
"""First frame of the second slot where there is a hole between the two."""


def keyop(vm: Vm, operation: int, gfn: int, key: int = 0) -> Answer:
    (answer,) = vm.process.play(KeyOp(operation, gfn * FRAME_SIZE, key, vm.number))
    return answer


@every_kernel
def test_the_keys_before_a_hole_stay_set_in_each_slot(make_vm: MakeVm, generation: str) -> None:
    vm = make_vm((0, 1), (1, 1))
    keys = bytes(range(0x10, 0x100, 2)) * 5
    for _ in range(2):  # what a kernel loses the first time it keeps the second
        assert vm.set(0, keys) == hole(generation)
    assert vm.keys(0, 2 * SEGMENT) == keys[: 2 * SEGMENT]


@every_kernel
def test_a_reserved_bit_in_the_second_slot_is_told_before_a_hole_behind_it(make_vm: MakeVm) -> None:
    vm = make_vm((0, 1), (1, 1))
    assert vm.set(0, b"\x30" * 300 + b"\x31" + b"\x30" * 300) == Answer.refused(errno.EINVAL)


@up_to_6_19
def test_up_to_6_19_each_slot_of_a_call_loses_its_keys(make_vm: MakeVm) -> None:
    vm = make_vm((0, 1), (1, 2))
    vm.accept(0, b"\x30" * 3 * SEGMENT)
    assert vm.keys(0, 3 * SEGMENT) == (b"\0" + b"\x30" * (SEGMENT - 1)) * 3


@up_to_6_19
def test_up_to_6_19_an_access_changes_the_key_of_its_own_frame_in_its_own_slot(make_vm: MakeVm) -> None:
    vm = make_vm((0, 1), (3, 2))
    vm.touch(SECOND + SEGMENT + 1, write=True)
    vm.touch(SECOND + SEGMENT + 2, write=False)
    assert vm.keys(0, SEGMENT) == bytes(SEGMENT)
    assert vm.keys(SECOND, 2 * SEGMENT) == bytes(SEGMENT + 1) + bytes([RC, R]) + bytes(SEGMENT - 3)


@up_to_6_19
def test_up_to_6_19_a_touch_saves_the_key_of_its_own_segment_in_its_own_slot(make_vm: MakeVm) -> None:
    vm = make_vm((0, 1), (3, 2))
    vm.touch(SECOND + SEGMENT + 9, write=True)
    for first in (0, SECOND, SECOND + SEGMENT):
        vm.accept(first, b"\x30\x30")
    assert [vm.keys(first, 2) for first in (0, SECOND, SECOND + SEGMENT)] == [b"\0\x30", b"\0\x30", b"\x30\x30"]


@up_to_6_19
def test_up_to_6_19_enabling_gives_r_and_c_to_touched_segments_of_all_slots_of_all_vms(process: Process) -> None:
    vms = [new_vm(process, (0, 1), (3, 1), number=number) for number in range(2)]
    for vm in vms:
        for first in (0, SECOND):
            vm.touch(first, write=False)
    vms[0].accept(0, b"\0")
    for vm, first in ((vms[0], SECOND), (vms[1], 0), (vms[1], SECOND)):
        assert vm.keys(first, SEGMENT) == bytes([RC]) * SEGMENT


@since_7_0
def test_since_7_0_keyop_finds_the_slot_of_its_frame(make_vm: MakeVm) -> None:
    vm = make_vm((0, 1), (3, 1))
    assert keyop(vm, SSKE, SECOND + 2, 0x36) == Answer(keys=b"\0")
    assert [keyop(vm, ISKE, gfn) for gfn in (2, SECOND + 2)] == [Answer(keys=b"\0"), Answer(keys=b"\x36")]
    assert keyop(vm, RRBE, SECOND + 2) == Answer(keys=b"\x06")
    assert vm.keys(0, SEGMENT) == bytes(SEGMENT)
    assert vm.keys(SECOND, 4) == b"\0\0\x32\0"


@over("7.2")
@pytest.mark.parametrize("gfn", [0, 2 * SEGMENT - 1, 3 * SEGMENT, 4 * SEGMENT - 1, 5 * SEGMENT])
@pytest.mark.parametrize("operation", [ISKE, RRBE, SSKE])
def test_since_7_2_a_frame_before_between_or_behind_slots_has_no_key(make_vm: MakeVm, gfn: int, operation: int) -> None:
    assert keyop(make_vm((2, 1), (4, 1)), operation, gfn, 0x30) == Answer.refused(errno.EFAULT)


@since_7_0
@pytest.mark.parametrize("gfn", [1, SECOND + 1])
def test_since_7_0_keyop_keeps_keys_of_a_keyless_guest_until_they_are_enabled(process: Process, gfn: int) -> None:
    vm = new_vm(process, (0, 1), (3, 1))
    assert keyop(vm, SSKE, gfn, 0x36) == Answer(keys=b"\0")
    assert keyop(vm, SSKE, gfn, 0x56) == Answer(keys=b"\x36")
    assert keyop(vm, RRBE, gfn) == Answer(keys=b"\x06")
    assert keyop(vm, RRBE, gfn) == Answer(keys=b"\x02")
    assert keyop(vm, ISKE, gfn) == Answer(keys=b"\x52")
    assert vm.is_keyless()
    vm.accept(0, b"\0")
    assert keyop(vm, ISKE, gfn) == Answer(keys=b"\0")


@up_to_6_19
@pytest.mark.parametrize("operation", [0, ISKE, RRBE, SSKE, 4, 255])
@pytest.mark.parametrize("address", [0, 2 * MIB])
def test_up_to_6_19_there_is_no_keyop_whatever_it_is_asked(make_vm: MakeVm, operation: int, address: int) -> None:
    assert keyop(make_vm((0, 1)), operation, address // FRAME_SIZE) == Answer.refused(errno.ENOTTY)


FAR_APART = [(0, 250), (250, 6), (256, 1), (257, 767), (1024, 1024), (2048, 2048)]
"""MiB; together they are MAX frames, and some begin 64 Ki frames and more into a call."""


@every_kernel
def test_one_call_reads_the_keys_of_all_slots_however_far_from_its_first_frame_they_begin(make_vm: MakeVm) -> None:
    vm = make_vm(*FAR_APART)
    wanted = bytearray(MAX)
    for start, size in FAR_APART:
        for gfn in (start * SEGMENT, (start + size) * SEGMENT - 1):
            wanted[gfn] = 0x38
            vm.store(gfn, b"\x38")
    vm.require_keys(0, wanted)


@every_kernel
def test_one_call_sets_the_keys_of_all_slots_however_far_from_its_first_frame_they_begin(make_vm: MakeVm) -> None:
    vm = make_vm(*FAR_APART)
    wanted = bytearray(MAX)
    for start, size in FAR_APART:
        wanted[start * SEGMENT] = wanted[(start + size) * SEGMENT - 1] = 0x38
    vm.store(0, bytes(wanted))
    for start, size in FAR_APART:
        for gfn in (start * SEGMENT, (start + size) * SEGMENT - 1):
            assert vm.keys(gfn, 1) == b"\x38"
    vm.require_keys(0, wanted)


@every_kernel
def test_each_of_32_slots_has_keys_of_its_own(make_vm: MakeVm) -> None:
    vm = make_vm(*((2 * number, 1) for number in range(32)))
    for number in range(32):
        vm.store(2 * number * SEGMENT + number, bytes([0x80 + 2 * number]))
    for number in range(32):
        wanted = bytes(number) + bytes([0x80 + 2 * number]) + bytes(SEGMENT - number - 1)
        assert vm.keys(2 * number * SEGMENT, SEGMENT) == wanted


@since_7_0
@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(b"\x30\x31", id="a bad key"),
        pytest.param(b"\x30" * (SEGMENT + 1), id="a hole"),
        pytest.param(b"\x31" * (SEGMENT + 1), id="both"),
    ],
)
def test_since_7_0_a_set_that_fails_wipes_what_keyop_has_set_all_the_same(process: Process, keys: bytes) -> None:
    vm = new_vm(process, (0, 1), (3, 2))
    frames = (1, SEGMENT - 1, SECOND, SECOND + SEGMENT + 7)
    for gfn in frames:
        assert keyop(vm, SSKE, gfn, 0x36) == Answer(keys=b"\0")
    # It begins beside the frames that KEYOP was used on: what fails with a bad key sets none.
    assert vm.set(SECOND + SEGMENT, keys) != DONE
    first, second = vm.keys(0, SEGMENT), vm.keys(SECOND, SEGMENT)
    assert (first, second) == (bytes(SEGMENT), bytes(SEGMENT))
    assert vm.keys(SECOND + SEGMENT + 7, 1) == (b"\x30" if keys == b"\x30" * (SEGMENT + 1) else b"\0")


@since_7_0
def test_since_7_0_enabling_wipes_what_keyop_has_set_in_all_slots_of_its_own_vm_only(process: Process) -> None:
    one, other = (new_vm(process, (0, 1), (3, 1), number=number) for number in range(2))
    for vm in (one, other):
        for gfn in (1, SECOND + 1):
            assert keyop(vm, SSKE, gfn, 0x36) == Answer(keys=b"\0")
    one.accept(0, b"\0")
    assert [keyop(one, ISKE, gfn) for gfn in (1, SECOND + 1)] == [Answer(keys=b"\0")] * 2
    assert [keyop(other, ISKE, gfn) for gfn in (1, SECOND + 1)] == [Answer(keys=b"\x36")] * 2


SCATTERED = [(2 * number, 1) for number in range(32)]


@up_to_6_19
def test_up_to_6_19_an_access_is_seen_in_each_of_32_slots(make_vm: MakeVm) -> None:
    vm = make_vm(*SCATTERED)
    for start, _ in SCATTERED:
        vm.touch(start * SEGMENT + 9, write=True)
        assert vm.keys(start * SEGMENT, SEGMENT) == bytes(9) + bytes([RC]) + bytes(SEGMENT - 10)
        vm.accept(start * SEGMENT, b"\x30")
        assert vm.keys(start * SEGMENT, 2) == b"\x30\0"


@since_7_0
def test_since_7_0_keyop_works_in_each_of_32_slots(make_vm: MakeVm) -> None:
    vm = make_vm(*SCATTERED)
    for start, _ in SCATTERED:
        gfn = start * SEGMENT + 9
        assert keyop(vm, SSKE, gfn, 0x80 + start) == Answer(keys=b"\0")
        assert keyop(vm, ISKE, gfn) == Answer(keys=bytes([0x80 + start]))
        assert vm.keys(gfn - 1, 3) == bytes([0, 0x80 + start, 0])


@up_to_6_19
def test_up_to_6_19_enabling_gives_r_and_c_to_the_touched_segments_of_9_vms(process: Process) -> None:
    vms = [new_vm(process, (0, 1), (3, 1), number=number) for number in range(9)]
    for vm in vms:
        vm.touch(SECOND, write=False)
    vms[4].accept(0, b"\0")
    for vm in vms:
        assert vm.keys(SECOND, SEGMENT) == bytes([RC]) * SEGMENT


@every_kernel
@pytest.mark.parametrize("slots", [2, 3, 12])
def test_a_call_reaches_over_as_many_slots_as_lie_end_to_end(make_vm: MakeVm, generation: str, slots: int) -> None:
    vm = make_vm(*((slot, 1) for slot in range(slots)), (slots + 1, 1))
    keys = bytes(range(2, 256, 2)) * (slots * SEGMENT // 127 + 1)
    keys = keys[: slots * SEGMENT]
    vm.store(0, keys)
    vm.require_keys(0, keys)
    # And no farther.
    assert vm.get(0, slots * SEGMENT + 1) == hole(generation)
    assert vm.set(0, b"\x30" * (slots * SEGMENT + 1)) == hole(generation)
    vm.require_keys(0, b"\x30" * slots * SEGMENT)
    assert vm.keys((slots + 1) * SEGMENT, 2) == b"\0\0"
