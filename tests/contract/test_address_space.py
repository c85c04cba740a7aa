"""A VM belongs to the address space that created it: real kernels only."""

from __future__ import annotations

import errno

import pytest

from skeyd.kvm import abi
from tests.contract.kernels import every_real_kernel
from tests.contract.operations import DONE, KEYLESS, AddSlot, Answer, Capability, Get, Operation, Raw, Set
from tests.contract.subject import MIB, Process, new_vm

EVERY_CALL: list[Operation] = [
    Get(0, 1),
    Set(0, b"\x10"),
    Raw("get", 0, 0, b"", flags=1),
    Capability(abi.KVM_CAP_S390_SKEYS),
    AddSlot(5, 64 * MIB, MIB),
]
EIO = Answer.refused(errno.EIO)


@every_real_kernel
@pytest.mark.parametrize(
    "where",
    [
        pytest.param("child", id="a forked child"),
        pytest.param("receiver", id="a process that was sent the descriptor"),
        pytest.param("taker", id="a process that took it with pidfd_getfd"),
    ],
)
def test_every_call_of_another_process_is_eio_and_changes_nothing(process: Process, where: str) -> None:
    vm = new_vm(process, (0, 1))
    assert process.play(*EVERY_CALL, where=where) == [EIO] * len(EVERY_CALL)
    assert vm.is_keyless()
    vm.store(0, b"\x30")
    assert process.play(*EVERY_CALL, where=where) == [EIO] * len(EVERY_CALL)
    assert vm.keys(0, 2) == b"\x30\0"


@every_real_kernel
def test_every_call_of_the_creator_itself_is_eio_after_an_exec(process: Process) -> None:
    new_vm(process, (0, 1)).store(0, b"\x30")
    assert process.play(*EVERY_CALL, where="exec") == [EIO] * len(EVERY_CALL)


@every_real_kernel
def test_a_thread_of_the_creator_may_do_all(process: Process) -> None:
    new_vm(process, (0, 1))
    assert process.play(Get(0, 1), Set(0, b"\0"), Get(0, 1), where="thread") == [KEYLESS, DONE, Answer(keys=b"\0")]
    assert process.play(Capability(abi.KVM_CAP_S390_SKEYS), where="thread") == [Answer(1)]
