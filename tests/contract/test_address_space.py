"""A VM belongs to the address space that created it: real kernels only."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from skeyd.kvm import abi
from tests.contract.kernels import every_real_kernel, real_since_7_0
from tests.contract.operations import DONE, KEYLESS, AddSlot, Answer, Capability, Get, KeyOp, Operation, Raw, Set
from tests.contract.real import RealKernel
from tests.contract.subject import MIB, Process, new_vm

EVERY_CALL: list[Operation] = [
    Get(0, 1),
    Set(0, b"\x10"),
    Raw("get", 0, 0, b"", flags=1),
    Capability(abi.KVM_CAP_S390_SKEYS),
    AddSlot(5, 64 * MIB, MIB),
]
EIO = Answer.refused(errno.EIO)


def every_call(generation: str) -> list[Operation]:
    """Return each call that the kernel has."""
    keyop = KeyOp(abi.KVM_S390_KEYOP_SSKE, 0, 0x40)
    return EVERY_CALL if generation == "4.19" else [*EVERY_CALL, keyop]


@every_real_kernel
@pytest.mark.parametrize(
    "where",
    [
        pytest.param("child", id="a forked child"),
        pytest.param("receiver", id="a process that was sent the descriptor"),
        pytest.param("taker", id="a process that took it with pidfd_getfd"),
    ],
)
def test_every_call_of_another_process_is_eio_and_changes_nothing(
    process: Process, generation: str, where: str
) -> None:
    vm, calls = new_vm(process, (0, 1)), every_call(generation)
    assert process.play(*calls, where=where) == [EIO] * len(calls)
    assert vm.is_keyless()
    vm.store(0, b"\x30")
    assert process.play(*calls, where=where) == [EIO] * len(calls)
    assert vm.keys(0, 2) == b"\x30\0"


@every_real_kernel
def test_every_call_of_the_creator_itself_is_eio_after_an_exec(process: Process, generation: str) -> None:
    new_vm(process, (0, 1)).store(0, b"\x30")
    calls = every_call(generation)
    assert process.play(*calls, where="exec") == [EIO] * len(calls)


@every_real_kernel
def test_a_thread_of_the_creator_may_do_all(process: Process) -> None:
    new_vm(process, (0, 1))
    assert process.play(Get(0, 1), Set(0, b"\0"), Get(0, 1), where="thread") == [KEYLESS, DONE, Answer(keys=b"\0")]
    assert process.play(Capability(abi.KVM_CAP_S390_SKEYS), where="thread") == [Answer(1)]


@real_since_7_0
def test_a_thread_of_the_creator_may_use_keyop(process: Process) -> None:
    new_vm(process, (0, 1))
    calls = [KeyOp(abi.KVM_S390_KEYOP_SSKE, 0, 0x40), KeyOp(abi.KVM_S390_KEYOP_ISKE, 0)]
    assert process.play(*calls, where="thread") == [Answer(keys=b"\0"), Answer(keys=b"\x40")]


@every_real_kernel
def test_a_process_that_shares_the_creators_memory_may_do_all_and_a_forked_one_nothing(real: RealKernel) -> None:
    # GET of a keyless guest, a SET twice (the first may lose the key), GET; then GET in a forked child.
    assert real.run_compiled(Path(__file__).with_name("clone_vm.c")) == (
        "CLONE_VM: get 1, set 0, set 0, get 0 key 30\n"
        "creator: get 0 key 30\n"
        "fork: get -5\n"
    )  # fmt: skip
