"""A VM's descriptor: what the kernel is given, and what its answers mean."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from skeyd.kvm import abi
from skeyd.kvm.errors import ClosedError, KvmError
from skeyd.kvm.memory import GuestMemory
from skeyd.kvm.vm import Vm

MIB = 1 << 20
GET, SET = abi.KVM_S390_GET_SKEYS, abi.KVM_S390_SET_SKEYS


@pytest.fixture
def vm() -> Iterator[Vm]:
    """Make a Vm over a descriptor that is none: the real kernel answers ENOTTY."""
    reader, writer = os.pipe()
    with Vm(reader) as vm:
        yield vm
    os.close(writer)


@dataclass
class Seen:
    """A call as the kernel sees it."""

    request: int
    argument: bytes
    keys: bytes
    """What lay at skeydata_addr when the call was made."""


class FakeKernel:
    """fcntl.ioctl for the two key calls: follows the address it is given, as the kernel does."""

    def __init__(self, answer: int, keys: bytes = b"") -> None:
        self.answer = answer
        self.keys = keys
        self.seen: list[Seen] = []

    def __call__(self, fd: int, request: int, argument: bytearray) -> int:
        _, count, address, _ = abi.kvm_s390_skeys.unpack(argument)
        memory = (ctypes.c_ubyte * count).from_address(address)
        self.seen.append(Seen(request, bytes(argument), bytes(memory)))
        memory[: len(self.keys)] = list(self.keys)
        return self.answer


def _kernel(monkeypatch: pytest.MonkeyPatch, answer: int, keys: bytes = b"") -> FakeKernel:
    kernel = FakeKernel(answer, keys)
    monkeypatch.setattr(fcntl, "ioctl", kernel)
    return kernel


# --- what the kernel is given --------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 0x1234, 0x0102_0304_0506_0708, (1 << 64) - 3])
def test_set_gives_the_kernel_start_count_address_and_zeros(
    vm: Vm, monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    kernel = _kernel(monkeypatch, 0)
    vm.set_skeys(start, memoryview(bytearray(b"\x10\x20\x38")))

    (seen,) = kernel.seen
    assert seen.request == SET
    assert seen.keys == b"\x10\x20\x38"
    assert len(seen.argument) == 64
    assert abi.kvm_s390_skeys.unpack(seen.argument)[:2] == (start, 3)
    assert seen.argument[24:] == bytes(40)  # flags and reserved


def test_get_gives_the_kernel_the_callers_own_buffer_to_fill(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _kernel(monkeypatch, 0, b"\x10\x20\x38")
    buffer = bytearray(b"\xee" * 5)
    with memoryview(buffer) as whole:
        assert vm.get_skeys(7, whole[1:4])

    (seen,) = kernel.seen
    assert seen.request == GET
    assert abi.kvm_s390_skeys.unpack(seen.argument)[:2] == (7, 3)
    assert seen.argument[24:] == bytes(40)
    assert buffer == b"\xee\x10\x20\x38\xee"


def test_a_memory_slot_is_given_to_the_kernel_as_it_lies(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bytes]] = []

    def kernel(fd: int, request: int, argument: bytearray) -> int:
        seen.append((request, bytes(argument)))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", kernel)
    with GuestMemory.anonymous(3 * MIB) as memory:
        vm.set_memory(9, 0x8000_0000_0000, memory)
        expected = abi.kvm_userspace_memory_region.pack(9, 0, 0x8000_0000_0000, 3 * MIB, memory.address)
    assert seen == [(abi.KVM_SET_USER_MEMORY_REGION, expected)]


def test_memory_that_is_closed_never_reaches_the_kernel(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _kernel(monkeypatch, 0)
    memory = GuestMemory.anonymous(MIB)
    memory.close()
    with pytest.raises(ClosedError):
        vm.set_memory(0, 0, memory)
    assert kernel.seen == []


@pytest.mark.parametrize("readonly", [b"\x10", memoryview(b"\x10")])
def test_a_buffer_that_cannot_be_written_to_never_reaches_the_kernel(
    vm: Vm, monkeypatch: pytest.MonkeyPatch, readonly: bytes | memoryview
) -> None:
    kernel = _kernel(monkeypatch, 0)
    for call in (vm.get_skeys, vm.set_skeys):
        with pytest.raises(TypeError):
            call(0, memoryview(readonly))
    assert kernel.seen == []


# --- what its answers mean -----------------------------------------------------------------------------------------


def test_get_that_returns_1_says_that_the_guest_uses_no_keys(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    _kernel(monkeypatch, 1)
    assert not vm.get_skeys(0, memoryview(bytearray(1)))


@pytest.mark.parametrize("call", ["get_skeys", "set_skeys"])
def test_plus_5_is_the_efault_of_linux_7_0(vm: Vm, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    _kernel(monkeypatch, 5)
    with pytest.raises(KvmError) as refused:
        getattr(vm, call)(0, memoryview(bytearray(1)))
    assert (refused.value.errno, refused.value.returned) == (errno.EFAULT, 5)


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("get_skeys", 2),
        ("get_skeys", 4),
        ("get_skeys", 6),
        ("get_skeys", 1 << 30),
        ("set_skeys", 1),
        ("set_skeys", 2),
        ("set_skeys", 1 << 30),
    ],
)
def test_a_positive_number_that_nobody_has_explained_is_no_success(
    vm: Vm, monkeypatch: pytest.MonkeyPatch, call: str, answer: int
) -> None:
    _kernel(monkeypatch, answer)
    with pytest.raises(KvmError) as refused:
        getattr(vm, call)(0, memoryview(bytearray(1)))
    assert refused.value.returned == answer
    assert refused.value.ioctl == ("KVM_S390_GET_SKEYS" if call == "get_skeys" else "KVM_S390_SET_SKEYS")


@pytest.mark.parametrize("call", ["get_skeys", "set_skeys"])
def test_a_refused_call_holds_on_to_nothing(vm: Vm, call: str) -> None:
    # The error is alive, with its traceback and all frames in it, while the buffer is given back. A worker that can't
    # do that while it tells of the error ends, and the VM with it.
    memory = mmap.mmap(-1, 4096)
    with memoryview(memory) as whole:
        part = whole[:16]
    with pytest.raises(KvmError) as refused, part:
        getattr(vm, call)(0, part)
    memory.close()
    assert refused.value.errno == errno.ENOTTY


# --- after close ---------------------------------------------------------------------------------------------------


def test_a_closed_vm_is_closed_and_the_kernel_sees_nothing_more_of_it(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    vm.close()
    kernel = _kernel(monkeypatch, 0)
    with GuestMemory.anonymous(MIB) as memory, pytest.raises(ClosedError):
        vm.set_memory(0, 0, memory)
    with pytest.raises(ClosedError):
        vm.get_skeys(0, memoryview(bytearray(1)))
    with pytest.raises(ClosedError):
        vm.set_skeys(0, memoryview(bytearray(1)))
    with pytest.raises(ClosedError):
        vm.check_extension(abi.KVM_CAP_S390_SKEYS)
    assert kernel.seen == []


def test_closing_twice_is_fine_and_closes_nobody_elses_descriptor(vm: Vm) -> None:
    vm.close()
    other = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        vm.close()
        os.fstat(other)
    finally:
        os.close(other)


def test_the_descriptor_is_nobody_elses(vm: Vm) -> None:
    assert [name for name in vars(vm) if not name.startswith("_")] == []
    assert not hasattr(vm, "fileno")


# --- the real kernel -----------------------------------------------------------------------------------------------


def test_a_real_vm_without_keys_says_so_and_one_without_the_calls_answers_enotty(real_vm: Vm) -> None:
    with GuestMemory.anonymous(MIB) as memory:
        real_vm.set_memory(0, 0, memory)
        keys = memoryview(bytearray(4))
        if os.uname().machine == "s390x":
            assert not real_vm.get_skeys(0, keys)
        else:
            for call in (real_vm.get_skeys, real_vm.set_skeys):
                with pytest.raises(KvmError) as refused:
                    call(0, keys)
                assert refused.value.errno == errno.ENOTTY
        real_vm.close()  # before its memory


def test_the_real_kernel_refuses_memory_slots_that_overlap(real_vm: Vm) -> None:
    with GuestMemory.anonymous(2 * MIB) as one, GuestMemory.anonymous(2 * MIB) as other:
        real_vm.set_memory(0, 0, one)
        with pytest.raises(KvmError) as refused:
            real_vm.set_memory(1, MIB, other)
        assert refused.value.errno == errno.EEXIST
        assert refused.value.ioctl == "KVM_SET_USER_MEMORY_REGION"
        real_vm.set_memory(1, 2 * MIB, other)
        real_vm.close()  # before its memory


# --- one frame -----------------------------------------------------------------------------------------------------


def test_keyop_gives_the_kernel_the_address_in_bytes_and_takes_the_key_that_it_writes(
    vm: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bytes]] = []

    def kernel(fd: int, request: int, argument: bytearray) -> int:
        seen.append((request, bytes(argument)))
        argument[8] = 0x36
        return 0

    monkeypatch.setattr(fcntl, "ioctl", kernel)
    assert vm.keyop(abi.KVM_S390_KEYOP_SSKE, 0x1234, 0x50) == 0x36
    assert seen == [(abi.KVM_S390_KEYOP, (0x1234000).to_bytes(8, sys.byteorder) + b"\x50\x03" + bytes(6))]


def test_keyop_that_returns_a_number_is_no_key(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: abi.PGM_ADDRESSING)
    with pytest.raises(KvmError) as refused:
        vm.keyop(abi.KVM_S390_KEYOP_ISKE, 0)
    assert (refused.value.ioctl, refused.value.returned) == ("KVM_S390_KEYOP", 5)


def test_keyop_on_a_descriptor_that_is_no_vm_is_refused_by_the_real_kernel(vm: Vm) -> None:
    with pytest.raises(KvmError) as refused:
        vm.keyop(abi.KVM_S390_KEYOP_ISKE, 0)
    assert (refused.value.ioctl, refused.value.errno) == ("KVM_S390_KEYOP", errno.ENOTTY)
