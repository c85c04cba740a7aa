"""R and C: what the host's own accesses to guest memory do to keys."""

from __future__ import annotations

import errno

import pytest

from tests.contract.conftest import MakeVm
from tests.contract.kernels import every_kernel, since_7_0, up_to_6_19
from tests.contract.operations import DONE, KEYLESS, Answer, Create, Delete
from tests.contract.subject import SEGMENT, Subject, Vm, hole, slots

R, RC = 0x04, 0x06


@up_to_6_19
@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_up_to_6_19_a_read_sets_r_and_a_write_sets_r_and_c(subject: Subject, backing: str) -> None:
    assert subject.shared.play(Create(slots((0, 1), backing=backing))) == [DONE]
    vm = Vm(subject.shared)
    vm.touch(0, write=False)
    vm.touch(1, write=True)
    vm.touch(2, write=False)
    vm.touch(2, write=True)
    assert vm.keys(0, 4) == bytes([R, RC, RC, 0])
    assert subject.shared.play(Delete()) == [DONE]


@up_to_6_19
def test_up_to_6_19_an_access_leaves_acc_f_and_the_other_of_r_and_c_as_they_are(make_vm: MakeVm) -> None:
    vm = make_vm()
    vm.store(0, b"\x38\x38\x32\xf4\xfe")
    for gfn, write in enumerate([False, True, False, True, False]):
        vm.touch(gfn, write=write)
    assert vm.keys(0, 6) == b"\x3c\x3e\x36\xf6\xfe\0"


@up_to_6_19
def test_up_to_6_19_a_set_takes_r_and_c_away_again(make_vm: MakeVm) -> None:
    vm = make_vm()
    vm.touch(0, write=True)
    vm.touch(1, write=True)
    vm.accept(0, b"\x10\x12")
    assert vm.keys(0, 2) == b"\x10\x12"
    vm.touch(0, write=False)
    assert vm.keys(0, 2) == b"\x14\x12"


@up_to_6_19
def test_up_to_6_19_a_lost_key_leaves_r_and_c_as_they_are_too(make_vm: MakeVm) -> None:
    vm = make_vm()
    vm.accept(0, b"\x16")
    assert vm.keys(0, 1) == b"\0"


@up_to_6_19
@pytest.mark.parametrize("write", [True, False])
def test_up_to_6_19_enabling_gives_r_and_c_to_every_frame_of_a_touched_segment(keyless_vm: MakeVm, write: bool) -> None:
    vm = keyless_vm((0, 2))
    vm.touch(3, write=write)
    vm.accept(0, b"\x10")
    assert vm.keys(0, 2 * SEGMENT) == b"\x10" + bytes([RC]) * (SEGMENT - 1) + bytes(SEGMENT)


@every_kernel
def test_an_access_enables_nothing(keyless_vm: MakeVm) -> None:
    vm = keyless_vm()
    vm.touch(0, write=True)
    assert vm.is_keyless()


@since_7_0
@pytest.mark.parametrize("keys", [b"\0\0", b"\x38\x38", b"\xfe\xfe"])
def test_since_7_0_no_access_of_the_host_changes_a_key(make_vm: MakeVm, keys: bytes) -> None:
    vm = make_vm()
    vm.accept(0, keys)
    vm.touch(0, write=True)
    vm.touch(1, write=False)
    assert vm.keys(0, 2) == keys


@since_7_0
def test_since_7_0_enabling_gives_r_and_c_to_no_frame(keyless_vm: MakeVm) -> None:
    vm = keyless_vm()
    vm.touch(3, write=True)
    vm.accept(0, b"\x10")
    assert vm.keys(0, 8) == b"\x10" + bytes(7)


@every_kernel
def test_reading_keys_sets_neither_r_nor_c(make_vm: MakeVm) -> None:
    vm = make_vm()
    vm.store(0, b"\x10\0\x08")
    for _ in range(2):
        assert vm.keys(0, 4) == b"\x10\0\x08\0"


@up_to_6_19
def test_up_to_6_19_enabling_gives_r_and_c_to_every_touched_segment_of_a_slot(keyless_vm: MakeVm) -> None:
    vm = keyless_vm((0, 12))
    touched = (0, 1, 5, 9, 11)
    for segment in touched:
        vm.touch(segment * SEGMENT + 7, write=False)
    vm.accept(2 * SEGMENT, b"\0")
    found = vm.keys(0, 12 * SEGMENT)
    keys = [bytes([RC]) * SEGMENT if segment in touched else bytes(SEGMENT) for segment in range(12)]
    assert found == b"".join(keys)


@up_to_6_19
@pytest.mark.parametrize(
    ("start", "keys", "answer"),
    [
        pytest.param(2 * SEGMENT, b"\0", hole("4.19"), id="a hole"),
        pytest.param(SEGMENT, b"\x01", Answer.refused(errno.EINVAL), id="a bad key"),
    ],
)
def test_up_to_6_19_a_set_that_fails_gives_r_and_c_to_touched_segments_all_the_same(
    keyless_vm: MakeVm, start: int, keys: bytes, answer: Answer
) -> None:
    vm = keyless_vm((0, 2))
    vm.touch(3, write=False)
    assert vm.set(start, keys) == answer
    assert vm.keys(0, 2 * SEGMENT) == bytes([RC]) * SEGMENT + bytes(SEGMENT)


@up_to_6_19
def test_up_to_6_19_what_was_touched_before_keys_are_enabled_gets_r_and_c_once(keyless_vm: MakeVm) -> None:
    vm = keyless_vm((0, 2))
    vm.touch(3, write=True)
    vm.accept(0, bytes(SEGMENT))
    vm.accept(SEGMENT, b"\0")
    assert vm.keys(0, 2 * SEGMENT) == bytes(2 * SEGMENT)


@up_to_6_19
@pytest.mark.parametrize("far", [1 << 32, 1 << 34])
@pytest.mark.parametrize("write", [True, False])
def test_up_to_6_19_an_access_far_up_changes_the_key_of_its_frame_and_no_other(
    make_vm: MakeVm, write: bool, far: int
) -> None:
    vm = make_vm((0, 1), (far // SEGMENT, 2))
    vm.touch(far + SEGMENT + 1, write=write)
    assert vm.keys(far, 2 * SEGMENT) == bytes(SEGMENT + 1) + bytes([RC if write else R]) + bytes(SEGMENT - 2)
    assert vm.keys(0, SEGMENT) == bytes(SEGMENT)


@up_to_6_19
def test_up_to_6_19_enabling_gives_r_and_c_to_each_of_60_touched_segments(keyless_vm: MakeVm) -> None:
    vm = keyless_vm((0, 64))
    for segment in range(60):
        vm.touch(segment * SEGMENT + segment, write=False)
    vm.accept(63 * SEGMENT, b"\0")
    vm.require_keys(0, bytes([RC]) * 60 * SEGMENT + bytes(4 * SEGMENT))


@up_to_6_19
@pytest.mark.parametrize(("write", "bits"), [(True, RC), (False, R)])
def test_up_to_6_19_an_access_changes_each_of_the_128_keys_in_r_and_c_alone(
    make_vm: MakeVm, write: bool, bits: int
) -> None:
    vm = make_vm((0, 1))
    every_key = bytes(range(0, 256, 2))
    vm.store(0, every_key)
    for gfn in range(len(every_key)):
        vm.touch(gfn, write=write)
    assert vm.keys(0, 128) == bytes(key | bits for key in every_key)


@every_kernel
def test_a_long_get_sets_neither_r_nor_c_and_enables_nothing(keyless_vm: MakeVm) -> None:
    vm = keyless_vm((0, 64))
    for count in (1, 2 * SEGMENT, 1000, 64 * SEGMENT):
        assert vm.get(0, count) == KEYLESS
    assert vm.is_keyless()
    vm.store(0, b"\x30" * 64 * SEGMENT)
    for _ in range(2):
        vm.require_keys(0, b"\x30" * 64 * SEGMENT)


@up_to_6_19
@pytest.mark.parametrize("far", [1 << 32, 1 << 34])
def test_up_to_6_19_enabling_gives_r_and_c_to_a_touched_segment_far_up(keyless_vm: MakeVm, far: int) -> None:
    vm = keyless_vm((0, 1), (far // SEGMENT, 3))
    vm.touch(far + SEGMENT + 1, write=False)
    vm.accept(0, b"\0")
    assert vm.keys(far, 3 * SEGMENT) == bytes(SEGMENT) + bytes([RC]) * SEGMENT + bytes(SEGMENT)
    assert vm.keys(0, SEGMENT) == bytes(SEGMENT)


@up_to_6_19
@pytest.mark.parametrize("at", [SEGMENT, SEGMENT + 9, 2 * SEGMENT - 1])
def test_up_to_6_19_a_zero_key_too_gives_the_rest_of_its_touched_segment_r_and_c(keyless_vm: MakeVm, at: int) -> None:
    vm = keyless_vm((0, 2))
    vm.touch(SEGMENT + 9, write=False)
    vm.accept(at, b"\0")
    keys = bytearray(bytes(SEGMENT) + bytes([RC]) * SEGMENT)
    keys[at] = 0
    assert vm.keys(0, 2 * SEGMENT) == keys


@every_kernel
def test_reading_leaves_r_and_c_of_every_key_as_they_are(make_vm: MakeVm) -> None:
    vm = make_vm((0, 1))
    every_key = bytes(range(0, 256, 2))
    vm.store(0, every_key)
    for start, count in ((0, SEGMENT), (64, 1), (SEGMENT - 1, 2)):
        vm.get(start, count)
    assert vm.keys(0, SEGMENT) == every_key + bytes(SEGMENT - 128)
