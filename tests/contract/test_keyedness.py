"""Whether a guest uses storage keys: whose property that is, and for how long."""

from __future__ import annotations

import errno

import pytest

from tests.contract.kernels import every_kernel, since_7_0, up_to_6_19
from tests.contract.operations import DONE, Answer, Delete
from tests.contract.subject import MAX, SEGMENT, Process, Subject, hole, new_vm


@every_kernel
def test_a_new_vm_in_a_new_process_is_keyless_and_the_first_set_ends_that(process: Process) -> None:
    vm = new_vm(process)
    assert vm.is_keyless()
    vm.accept(0, b"\0")
    assert vm.keys(0, 1) == b"\0"


@every_kernel
def test_setting_all_keys_to_0_does_not_make_it_keyless_again(process: Process) -> None:
    vm = new_vm(process, (0, 1))
    vm.store(0, b"\x10" * SEGMENT)
    vm.store(0, bytes(SEGMENT))
    assert vm.keys(0, SEGMENT) == bytes(SEGMENT)


@up_to_6_19
def test_up_to_6_19_one_set_enables_keys_for_all_vms_of_the_process(process: Process) -> None:
    one, other = new_vm(process), new_vm(process, number=1)
    assert one.is_keyless()
    assert other.is_keyless()
    one.accept(0, b"\0")
    assert other.keys(0, 4) == bytes(4)


@up_to_6_19
def test_up_to_6_19_a_vm_made_later_uses_keys_from_its_beginning_even_when_the_first_is_gone(process: Process) -> None:
    new_vm(process).accept(0, b"\0")
    assert process.play(Delete()) == [DONE]
    assert new_vm(process, number=1).keys(0, 4) == bytes(4)


@up_to_6_19
def test_up_to_6_19_enabling_gives_r_and_c_to_touched_segments_of_other_vms_too(process: Process) -> None:
    one, other = new_vm(process), new_vm(process, (0, 2), number=1)
    other.touch(SEGMENT, write=False)
    one.accept(0, b"\0")
    assert other.keys(0, 2 * SEGMENT) == bytes(SEGMENT) + b"\x06" * SEGMENT


@since_7_0
def test_since_7_0_a_set_enables_keys_for_its_own_vm_only(process: Process) -> None:
    one, other = new_vm(process), new_vm(process, number=1)
    one.accept(0, b"\0")
    assert other.is_keyless()
    assert process.play(Delete()) == [DONE]
    assert new_vm(process, number=2).is_keyless()


@every_kernel
def test_vms_of_one_process_have_keys_of_their_own(process: Process) -> None:
    one, other = new_vm(process), new_vm(process, number=1)
    one.store(0, b"\x10\x20")
    other.store(0, b"\x30\x40")
    assert one.keys(0, 3) == b"\x10\x20\0"
    assert other.keys(0, 3) == b"\x30\x40\0"


@every_kernel
def test_processes_know_nothing_of_each_other(subject: Subject) -> None:
    with subject.process() as one, subject.process() as other:
        new_vm(one).store(0, b"\x10")
        vm = new_vm(other)
        assert vm.is_keyless()
        vm.accept(0, b"\0")
        assert vm.keys(0, 1) == b"\0"


@up_to_6_19
def test_up_to_6_19_one_set_enables_keys_for_many_vms(process: Process) -> None:
    vms = [new_vm(process, (0, 1), number=number) for number in range(9)]
    vms[4].accept(0, b"\0")
    assert [vm.keys(0, 2) for vm in vms] == [bytes(2)] * 9


@every_kernel
@pytest.mark.parametrize("uses_keys", [True, False])
def test_a_vm_made_later_leaves_the_keys_of_the_others_alone(process: Process, uses_keys: bool) -> None:
    one, other = new_vm(process, (0, 2), (3, 1)), new_vm(process, number=1)
    for vm in (one, other):
        vm.store(SEGMENT + 1, b"\x10\x20")
    one.store(3 * SEGMENT, b"\x30")
    later = new_vm(process, (0, 2), (3, 1), number=2)
    if uses_keys:
        later.store(0, b"\x50" * 2 * SEGMENT)
    assert one.keys(0, 2 * SEGMENT) == bytes(SEGMENT + 1) + b"\x10\x20" + bytes(SEGMENT - 3)
    assert one.keys(3 * SEGMENT, 2) == b"\x30\0"
    assert other.keys(SEGMENT, 4) == b"\0\x10\x20\0"


@every_kernel
@pytest.mark.parametrize("gone", [0, 1, 2])
def test_closing_a_vm_leaves_the_keys_of_the_others_alone(process: Process, gone: int) -> None:
    vms = [new_vm(process, (0, 1), (3, 1), number=number) for number in range(3)]
    for vm in vms:
        for gfn in (5, 3 * SEGMENT):
            vm.store(gfn, bytes([0x1E + 0x10 * vm.number]))
    assert process.play(Delete(gone)) == [DONE]
    for vm in vms:
        if vm.number != gone:
            key = bytes([0x1E + 0x10 * vm.number])
            assert (vm.keys(4, 3), vm.keys(3 * SEGMENT, 2)) == (b"\0" + key + b"\0", key + b"\0")
            assert vm.set(6, key) == DONE


@every_kernel
def test_keys_are_enabled_as_ever_when_a_vm_whose_memory_was_touched_is_gone(process: Process) -> None:
    gone, stays = new_vm(process, (0, 1), (3, 1)), new_vm(process, (0, 1), number=1)
    gone.touch(0, write=True)
    gone.touch(3 * SEGMENT, write=False)
    assert process.play(Delete()) == [DONE]
    assert stays.is_keyless()
    stays.accept(0, b"\0")
    assert stays.keys(0, SEGMENT) == bytes(SEGMENT)


@every_kernel
def test_a_vm_in_the_place_of_one_that_is_gone_has_keys_0(process: Process) -> None:
    new_vm(process, (0, 2)).store(0, b"\x30" * 2 * SEGMENT)
    assert process.play(Delete()) == [DONE]
    vm = new_vm(process, (0, 2))
    vm.accept(0, b"\0")
    assert vm.keys(0, 2 * SEGMENT) == bytes(2 * SEGMENT)


@up_to_6_19
def test_up_to_6_19_a_vm_in_the_place_of_one_that_is_gone_has_none_of_its_page_tables(process: Process) -> None:
    new_vm(process, (0, 2)).store(0, b"\x30" * 2 * SEGMENT)
    assert process.play(Delete()) == [DONE]
    vm = new_vm(process, (0, 2))
    vm.accept(0, b"\x30" * 2 * SEGMENT)
    assert vm.keys(0, 2 * SEGMENT) == (b"\0" + b"\x30" * (SEGMENT - 1)) * 2


@up_to_6_19
def test_up_to_6_19_an_access_to_a_vm_made_later_changes_its_key_at_once(process: Process) -> None:
    new_vm(process).accept(0, b"\0")
    vm = new_vm(process, (0, 1), number=1)
    vm.touch(3, write=True)
    assert vm.keys(0, SEGMENT) == bytes(3) + b"\x06" + bytes(SEGMENT - 4)


FAILING = [
    pytest.param(0, b"\x11", Answer.refused(errno.EINVAL), id="a bad key"),
    pytest.param(SEGMENT - 1, b"\0\0\x11", Answer.refused(errno.EINVAL), id="a late bad key"),
    pytest.param(1 << 20, b"\x30", hole("4.19"), id="a hole"),
    pytest.param(4 * SEGMENT - 1, b"\0\0", hole("4.19"), id="into a hole"),
    pytest.param(1 << 20, b"\x31\x31", hole("4.19"), id="bad keys in a hole"),
]


@up_to_6_19
@pytest.mark.parametrize(("start", "keys", "answer"), FAILING)
def test_up_to_6_19_a_set_that_fails_in_one_vm_enables_keys_for_the_others_too(
    process: Process, start: int, keys: bytes, answer: Answer
) -> None:
    one, other = new_vm(process), new_vm(process, number=1)
    assert one.set(start, keys) == answer
    assert other.keys(0, 4) == bytes(4)


@up_to_6_19
@pytest.mark.parametrize(("start", "keys", "answer"), FAILING)
def test_up_to_6_19_a_set_that_fails_in_one_vm_gives_r_and_c_to_touched_segments_of_the_others_too(
    process: Process, start: int, keys: bytes, answer: Answer
) -> None:
    one, other = new_vm(process), new_vm(process, (0, 3), number=1)
    other.touch(SEGMENT + 7, write=False)
    assert one.set(start, keys) == answer
    assert other.keys(0, 3 * SEGMENT) == bytes(SEGMENT) + b"\x06" * SEGMENT + bytes(SEGMENT)


@up_to_6_19
@pytest.mark.parametrize(("start", "keys", "answer"), FAILING)
def test_up_to_6_19_what_a_set_that_failed_has_enabled_outlives_its_vm(
    process: Process, start: int, keys: bytes, answer: Answer
) -> None:
    one, other = new_vm(process), new_vm(process, number=1)
    assert one.set(start, keys) == answer
    assert process.play(Delete(0)) == [DONE]
    assert other.keys(0, 4) == bytes(4)
    assert new_vm(process, number=2).keys(0, 4) == bytes(4)


@every_kernel
@pytest.mark.parametrize("keys", [b"\x30", b"\x30\x30\x30", b"\0\0", b"\x31\x30"])
@pytest.mark.parametrize("start", [4 * SEGMENT, 1 << 20, (1 << 52) - 2, 1 << 63])
def test_a_set_that_lies_in_a_hole_altogether_enables_keys_however_long_it_is(
    process: Process, start: int, keys: bytes
) -> None:
    vm = new_vm(process)
    assert vm.set(start, keys) != DONE
    assert vm.keys(0, 4) == bytes(4)


@every_kernel
@pytest.mark.parametrize("count", [0, MAX + 1])
def test_a_set_with_a_bad_count_leaves_all_vms_of_the_process_keyless(process: Process, count: int) -> None:
    one, other = new_vm(process), new_vm(process, number=1)
    assert one.set(0, bytes(count)) == Answer.refused(errno.EINVAL)
    assert one.is_keyless()
    assert other.is_keyless()


@up_to_6_19
@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("made", [True, False])
def test_up_to_6_19_touched_segments_get_r_and_c_though_other_vms_come_and_go(
    process: Process, closed: bool, made: bool
) -> None:
    stays, other = new_vm(process, (0, 3)), new_vm(process, (0, 3), number=1)
    stays.touch(SEGMENT + 1, write=False)
    other.touch(0, write=False)
    if closed:
        assert process.play(Delete(1)) == [DONE]
    if made:
        new_vm(process, (0, 3), number=2)
    assert stays.is_keyless()
    stays.accept(0, b"\0")
    assert stays.keys(0, 3 * SEGMENT) == bytes(SEGMENT) + b"\x06" * SEGMENT + bytes(SEGMENT)


@up_to_6_19
@pytest.mark.parametrize("gone", [0, 1, 2])
@pytest.mark.parametrize("touched", [(0,), (1,), (2,), (0, 1, 2)])
def test_up_to_6_19_whichever_vm_is_closed_the_touched_segments_of_the_others_get_r_and_c(
    process: Process, gone: int, touched: tuple[int, ...]
) -> None:
    vms = [new_vm(process, (0, 2), number=number) for number in range(3)]
    for number in touched:
        vms[number].touch(SEGMENT + 1, write=True)
    assert process.play(Delete(gone)) == [DONE]
    left = [vm for vm in vms if vm.number != gone]
    left[0].accept(0, b"\0")
    for vm in left:
        key = b"\x06" if vm.number in touched else b"\0"
        assert vm.keys(0, 2 * SEGMENT) == bytes(SEGMENT) + key * SEGMENT
