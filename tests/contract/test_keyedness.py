"""Whether a guest uses storage keys: whose property that is, and for how long."""

from __future__ import annotations

from tests.contract.kernels import every_kernel, since_7_0, up_to_6_19
from tests.contract.operations import DONE, Delete
from tests.contract.subject import SEGMENT, Process, Subject, new_vm


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
