"""The calls' structure, with what skeyd never puts into it: real kernels only."""

from __future__ import annotations

import errno

import pytest

from tests.contract.conftest import MakeVm
from tests.contract.kernels import every_real_kernel
from tests.contract.operations import DONE, KEYLESS, Answer, Get, Raw
from tests.contract.subject import MAX, SEGMENT, Process, Subject, new_vm

EINVAL, EFAULT = Answer.refused(errno.EINVAL), Answer.refused(errno.EFAULT)
BUFFER = b"\xef" * 4


@every_real_kernel
def test_get_looks_at_flags_before_it_looks_whether_keys_are_used(process: Process) -> None:
    vm = new_vm(process)
    asked = [Raw("get", 0, 4, BUFFER, flags=flags) for flags in (1, 1 << 31)]
    assert process.play(*asked) == [EINVAL, EINVAL]
    vm.accept(0, b"\0")
    assert process.play(*asked) == [EINVAL, EINVAL]


@every_real_kernel
def test_get_of_a_keyless_guest_never_looks_at_count_or_pointer(process: Process) -> None:
    new_vm(process)
    counts = [4, 0, MAX + 1, 1 << 63, (1 << 64) - 1]
    asked = [Raw("get", 0, count, BUFFER, pointer=pointer) for count in counts for pointer in ("none", "inaccessible")]
    assert process.play(*asked) == [KEYLESS] * len(asked)


@every_real_kernel
def test_a_set_with_a_bad_flag_count_or_pointer_enables_nothing(process: Process) -> None:
    new_vm(process)
    for count, flags, pointer, answer in (
        (4, 1, "good", EINVAL),
        (4, 1 << 31, "none", EINVAL),  # flags are looked at before the pointer
        (0, 1, "none", EINVAL),
        (0, 0, "good", EINVAL),
        (MAX + 1, 0, "none", EINVAL),  # and so is the count
        (1 << 63, 0, "good", EINVAL),
        ((1 << 64) - 1, 0, "good", EINVAL),
        (4, 0, "none", EFAULT),
        (4, 0, "inaccessible", EFAULT),
        (4, 0, "short", EFAULT),
    ):
        raw = Raw("set", 0, count, b"\x10" * 4, flags=flags, pointer=pointer)
        assert process.play(raw, Get(0, 4)) == [answer, KEYLESS], raw


@every_real_kernel
@pytest.mark.parametrize("pointer", ["none", "inaccessible", "short"])
def test_a_set_in_a_hole_looks_at_its_pointer_before_it_enables_keys(process: Process, pointer: str) -> None:
    new_vm(process, (0, 1))
    bad, good = (Raw("set", SEGMENT, 4, b"\x10" * 4, pointer=one) for one in (pointer, "good"))
    assert process.play(bad, Get(0, 4)) == [EFAULT, KEYLESS]
    assert process.play(good, Get(0, 4)) == [EFAULT, Answer(keys=bytes(4))]


@every_real_kernel
@pytest.mark.parametrize("count", [0, MAX + 1, 1 << 63, (1 << 64) - 1])
def test_get_looks_at_the_count_before_the_pointer(make_vm: MakeVm, subject: Subject, count: int) -> None:
    make_vm()
    assert subject.shared.play(Raw("get", 0, count, BUFFER, pointer="none")) == [EINVAL]


@every_real_kernel
@pytest.mark.parametrize("pointer", ["none", "inaccessible"])
def test_get_into_nothing_is_efault(make_vm: MakeVm, subject: Subject, pointer: str) -> None:
    make_vm()
    assert subject.shared.play(Raw("get", 0, 4, BUFFER, pointer=pointer)) == [EFAULT]


@every_real_kernel
def test_get_into_a_buffer_that_ends_early_fills_it_and_is_efault(make_vm: MakeVm, subject: Subject) -> None:
    make_vm()
    answers = subject.shared.play(Raw("get", 0, 4, BUFFER, pointer="short"))
    # The first byte is the one before the pointer. It is the one error after which the buffer is not as it was.
    assert answers == [Answer(-1, errno.EFAULT, b"\xef\0\0\0")]


@every_real_kernel
@pytest.mark.parametrize("pointer", ["good", "short"])
def test_get_of_a_hole_leaves_the_buffer_alone(make_vm: MakeVm, subject: Subject, pointer: str) -> None:
    make_vm((0, 1))
    assert subject.shared.play(Raw("get", SEGMENT - 2, 4, BUFFER, pointer=pointer)) == [EFAULT]


@every_real_kernel
def test_a_set_whose_pointer_is_bad_sets_nothing(make_vm: MakeVm, subject: Subject) -> None:
    vm = make_vm()
    vm.store(0, b"\x10" * 4)
    assert subject.shared.play(Raw("set", 0, 4, b"\x20" * 4, pointer="short")) == [EFAULT]
    assert vm.keys(0, 4) == b"\x10" * 4


@every_real_kernel
def test_the_reserved_field_is_never_looked_at(make_vm: MakeVm, subject: Subject) -> None:
    vm = make_vm()
    for _ in range(2):
        assert subject.shared.play(Raw("set", 0, 4, b"\x10" * 4, reserved=0xFF)) == [DONE]
    assert subject.shared.play(Raw("get", 0, 4, BUFFER, reserved=0xFF)) == [Answer(keys=vm.keys(0, 4))]
    assert vm.keys(0, 4) == b"\x10" * 4
