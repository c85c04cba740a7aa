"""Linux 4.19 to 6.19 answer 0 to a SET and lose the first key other than 0 of each segment without a page table."""

from __future__ import annotations

import errno

import pytest

from tests.contract.conftest import MakeVm
from tests.contract.kernels import since_7_0, up_to_6_19
from tests.contract.operations import Answer
from tests.contract.subject import MAX, SEGMENT, hole

FRAMES = 8 * SEGMENT
KEYS = bytes(range(0, 256, 2)) * (FRAMES // 128)


@up_to_6_19
def test_up_to_6_19_one_key_of_each_untouched_segment_is_lost_and_the_answer_is_0(make_vm: MakeVm) -> None:
    vm = make_vm((0, 8))
    vm.accept(0, b"\x30" * FRAMES)
    vm.require_keys(0, (b"\0" + b"\x30" * (SEGMENT - 1)) * 8)


@up_to_6_19
def test_up_to_6_19_a_second_set_of_the_same_keys_loses_none(make_vm: MakeVm) -> None:
    vm = make_vm((0, 8))
    vm.accept(0, KEYS)
    # The first key of a segment is 0 here: lost is the second.
    assert [gfn for gfn, key in enumerate(vm.keys(0, FRAMES)) if key != KEYS[gfn]] == list(range(1, FRAMES, SEGMENT))
    vm.accept(0, KEYS)
    vm.require_keys(0, KEYS)


@up_to_6_19
def test_up_to_6_19_it_is_the_first_key_that_is_not_0_wherever_in_the_segment(make_vm: MakeVm) -> None:
    vm = make_vm()
    vm.accept(200, bytes(30) + b"\x02\x10" + bytes(30) + b"\x20\x30")
    assert vm.keys(200, 64) == bytes(31) + b"\x10" + bytes(30) + b"\0\x30"


@up_to_6_19
def test_up_to_6_19_a_zero_key_makes_no_page_table_and_so_saves_no_other(make_vm: MakeVm) -> None:
    vm = make_vm()
    vm.accept(0, bytes(SEGMENT))
    vm.accept(5, b"\x50\x60")
    assert vm.keys(5, 2) == b"\0\x60"


@up_to_6_19
def test_up_to_6_19_a_get_makes_no_page_table_and_so_saves_none(make_vm: MakeVm) -> None:
    vm = make_vm()
    assert vm.keys(0, 4 * SEGMENT) == bytes(4 * SEGMENT)
    vm.accept(5, b"\x50\x60")
    assert vm.keys(5, 2) == b"\0\x60"


@up_to_6_19
def test_up_to_6_19_a_segment_loses_one_key_once_however_many_calls_set_it(make_vm: MakeVm) -> None:
    vm = make_vm()
    for gfn, key in ((5, b"\x50"), (0, b"\x10"), (SEGMENT - 1, b"\x20"), (SEGMENT, b"\x30"), (SEGMENT + 1, b"\x40")):
        vm.accept(gfn, key)
    assert vm.keys(0, 6) == b"\x10\0\0\0\0\0"
    assert vm.keys(SEGMENT - 1, 3) == b"\x20\0\x40"


@up_to_6_19
def test_up_to_6_19_segments_are_those_of_the_guest_and_not_of_the_call(make_vm: MakeVm) -> None:
    vm = make_vm((8, 2))
    vm.accept(8 * SEGMENT + 200, b"\x10" * 100)
    assert vm.keys(8 * SEGMENT + 200, 100) == b"\0" + b"\x10" * 55 + b"\0" + b"\x10" * 43


@up_to_6_19
@pytest.mark.parametrize("write", [True, False])
def test_up_to_6_19_a_segment_of_which_any_frame_was_touched_loses_none(make_vm: MakeVm, write: bool) -> None:
    vm = make_vm()
    vm.touch(77, write=write)
    vm.accept(0, b"\x10" * (SEGMENT + 1))
    assert vm.keys(0, SEGMENT + 1) == b"\x10" * SEGMENT + b"\0"


@up_to_6_19
def test_up_to_6_19_a_set_that_fails_has_lost_the_key_before_all_the_same(make_vm: MakeVm) -> None:
    vm = make_vm((0, 1), (2, 1))
    assert vm.set(0, b"\x10\x20\x31") == Answer.refused(errno.EINVAL)
    assert vm.keys(0, 3) == b"\0\x20\0"
    assert vm.set(3 * SEGMENT - 2, b"\x10\x20\x30") == hole("4.19")
    assert vm.keys(3 * SEGMENT - 2, 2) == b"\0\x20"


@up_to_6_19
def test_up_to_6_19_a_bad_key_makes_no_page_table(make_vm: MakeVm) -> None:
    vm = make_vm()
    assert vm.set(0, b"\x11") == Answer.refused(errno.EINVAL)
    vm.accept(0, b"\x10\x20")
    assert vm.keys(0, 2) == b"\0\x20"


@up_to_6_19
@pytest.mark.parametrize("first", [0, 1, SEGMENT - 1])
def test_up_to_6_19_a_segment_touched_before_keys_are_enabled_has_just_the_keys_that_are_set(
    keyless_vm: MakeVm, first: int
) -> None:
    vm = keyless_vm((0, 3))
    keys = (bytes(first) + b"\x38" * (SEGMENT - first)) * 2
    for segment in range(2):
        vm.touch(segment * SEGMENT + first, write=False)
    vm.accept(0, keys)
    assert vm.keys(0, 3 * SEGMENT) == keys + bytes(SEGMENT)


@up_to_6_19
def test_up_to_6_19_a_segment_touched_once_keys_are_enabled_has_just_the_keys_that_are_set(make_vm: MakeVm) -> None:
    vm = make_vm((0, 2))
    vm.touch(7, write=False)
    vm.accept(7, b"\x10" * SEGMENT)
    assert vm.keys(0, 2 * SEGMENT) == bytes(7) + b"\x10" * (SEGMENT - 7) + b"\0" + b"\x10" * 6 + bytes(SEGMENT - 7)


@since_7_0
def test_since_7_0_no_key_is_lost(make_vm: MakeVm) -> None:
    vm = make_vm((0, 8))
    vm.accept(0, KEYS)
    vm.require_keys(0, KEYS)


@up_to_6_19
def test_up_to_6_19_each_of_the_segments_of_the_longest_set_loses_its_key(make_vm: MakeVm) -> None:
    vm = make_vm((0, MAX // SEGMENT))
    vm.accept(0, b"\x30" * MAX)
    vm.require_keys(0, (b"\0" + b"\x30" * (SEGMENT - 1)) * (MAX // SEGMENT))


@up_to_6_19
@pytest.mark.parametrize("first", [0, 1, 127, 128, SEGMENT - 2, SEGMENT - 1])
def test_up_to_6_19_a_key_is_lost_however_many_0s_come_before_it(make_vm: MakeVm, first: int) -> None:
    vm = make_vm((0, 2))
    vm.accept(0, bytes(first) + b"\x30" * (SEGMENT - first) + b"\0\x30")
    assert vm.keys(0, SEGMENT + 2) == bytes(first + 1) + b"\x30" * (SEGMENT - first - 1) + b"\0\0"


@up_to_6_19
@pytest.mark.parametrize("key", [0x02, 0x04, 0x06, 0x08, 0x10, 0x80, 0xFE])
def test_up_to_6_19_a_key_is_lost_whichever_of_its_bits_are_set(make_vm: MakeVm, key: int) -> None:
    vm = make_vm((0, 1))
    vm.accept(3, bytes([key, key]))
    assert vm.keys(3, 2) == bytes([0, key])


@up_to_6_19
def test_up_to_6_19_the_first_set_of_a_process_loses_keys_too(keyless_vm: MakeVm) -> None:
    vm = keyless_vm((0, 2))
    vm.accept(0, b"\x30" * 2 * SEGMENT)
    assert vm.keys(0, 2 * SEGMENT) == (b"\0" + b"\x30" * (SEGMENT - 1)) * 2


@up_to_6_19
def test_up_to_6_19_a_page_table_saves_no_key_of_another_vm(make_vm: MakeVm) -> None:
    one, other = make_vm((0, 1)), make_vm((0, 1))
    one.store(0, b"\x30")
    one.touch(9, write=True)
    other.accept(0, b"\x30\x30")
    assert other.keys(0, 2) == b"\0\x30"


@since_7_0
def test_since_7_0_no_key_of_the_longest_set_is_lost(make_vm: MakeVm) -> None:
    vm = make_vm((0, MAX // SEGMENT))
    vm.accept(0, b"\x30" * MAX)
    vm.require_keys(0, b"\x30" * MAX)


@up_to_6_19
def test_up_to_6_19_of_64_segments_those_that_were_touched_lose_none(make_vm: MakeVm) -> None:
    vm = make_vm((0, 64))
    touched = [segment for segment in range(64) if segment % 5]
    for segment in touched:
        vm.touch(segment * SEGMENT + 3 * segment, write=False)
    vm.accept(0, b"\x30" * 64 * SEGMENT)
    first = b"".join(b"\x30" if segment in touched else b"\0" for segment in range(64))
    vm.require_keys(0, b"".join(bytes([key]) + b"\x30" * (SEGMENT - 1) for key in first))


@up_to_6_19
@pytest.mark.parametrize("far", [1 << 32, 1 << 34])
def test_up_to_6_19_far_up_too_a_key_is_lost_where_nothing_was_touched(make_vm: MakeVm, far: int) -> None:
    vm = make_vm((0, 1), (far // SEGMENT, 3))
    vm.touch(far + SEGMENT + 9, write=False)
    keys = b"\x30" * 3 * SEGMENT
    vm.accept(far, keys)
    losing = b"\0" + b"\x30" * (SEGMENT - 1)
    vm.require_keys(far, losing + b"\x30" * SEGMENT + losing)
    vm.accept(far, keys)
    vm.require_keys(far, keys)
    assert vm.keys(0, SEGMENT) == bytes(SEGMENT)
