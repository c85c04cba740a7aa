"""A VM of another process: its ioctls answer as they do to its owner, and what is about the process is told apart."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import pytest

from skeyd.injection.errors import BufferLostError, GoneError, InjectionError, NoVmError
from skeyd.injection.injection import Injection
from skeyd.injection.maps import mappings
from skeyd.injection.registers import Call
from skeyd.injection.target import Target
from skeyd.injection.vm import ForeignVm
from skeyd.kvm import abi
from skeyd.kvm.errors import KvmError
from skeyd.kvm.system import Kvm
from tests.injection.victims import SECONDS, Victim, cannot, differences, look_at_process, peek

pytestmark = pytest.mark.usefixtures("victims")

X86: Final = platform.machine() == "x86_64"
CLOSE: Final = 3 if X86 else 6
MOST: Final = 10_000
PAGE: Final = 4096
PROT_READ: Final = 1
PROT_WRITE: Final = 2
MAP_PRIVATE_ANONYMOUS_FIXED: Final = 0x02 | 0x20 | 0x10


@dataclass
class Owner:
    """A process that has a VM without memory, in a wait."""

    victim: Victim
    target: Target
    fd: int

    def close_vm(self) -> None:
        with Injection(self.target, seconds=SECONDS) as injection:
            assert injection.checked(Call("close", CLOSE, (self.fd,))) == 0

    def foreign(self) -> ForeignVm:
        return ForeignVm(self.target, self.fd, MOST, SECONDS)


@pytest.fixture
def owner() -> Iterator[Owner]:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        cannot("/dev/kvm is missing, or not for this user")
    with Victim("ppoll", "0", "/dev/kvm") as victim, Target(victim.pid) as target:
        (kvm,) = (fd for fd, link in target.links().items() if link == "/dev/kvm")
        with Injection(target, seconds=SECONDS) as injection:
            vm = injection.ioctl(kvm, abi.KVM_CREATE_VM)
        yield Owner(victim, target, vm)


def answer(call: Callable[[int, memoryview], object], start_gfn: int, keys: memoryview) -> Any:
    """Return what it returned, or how it was refused."""
    try:
        return call(start_gfn, keys)
    except KvmError as error:
        return error.ioctl, error.errno, error.returned


def test_calls_answer_as_they_do_to_the_owner(owner: Owner) -> None:
    keys = memoryview(bytearray(b"\x10" * 4))
    with owner.foreign() as foreign, Kvm() as kvm, kvm.create_vm() as own:
        for capability in (abi.KVM_CAP_NR_MEMSLOTS, abi.KVM_CAP_S390_SKEYS, abi.KVM_CAP_S390_KEYOP):
            assert foreign.check_extension(capability) == own.check_extension(capability)
        for call in ("get_skeys", "set_skeys", "get_skeys"):
            theirs = answer(getattr(own, call), 1 << 40, keys)
            assert answer(getattr(foreign, call), 1 << 40, keys) == theirs
            # On s390x GET succeeds whatever it is asked for, as long as the guest uses no keys.
            assert isinstance(theirs, tuple) or (call == "get_skeys" and not X86)
            assert not X86 or theirs[1] == errno.ENOTTY
    assert keys == b"\x10" * 4


def test_the_process_is_as_before_and_goes_on(owner: Owner) -> None:
    with owner.foreign() as foreign:
        assert foreign.check_extension(abi.KVM_CAP_NR_MEMSLOTS) > 0
    assert owner.victim.ping() == 0  # its other thread maps memory of its own when it first answers
    before = look_at_process(owner.victim.pid)
    for _ in range(20):
        with owner.foreign() as foreign:
            assert foreign.check_extension(abi.KVM_CAP_NR_MEMSLOTS) > 0
        foreign.close()
    assert differences(before, look_at_process(owner.victim.pid)) == {}
    owner.victim.say("wake")
    assert owner.victim.result().value == 1


def test_what_is_no_vm_is_refused_and_so_is_one_that_was_closed(owner: Owner) -> None:
    for fd in (0, 999):
        with pytest.raises(NoVmError, match=f"descriptor {fd} of process"):
            ForeignVm(owner.target, fd, MOST, SECONDS)
    with owner.foreign() as foreign:
        owner.close_vm()
        with pytest.raises(NoVmError):
            foreign.check_extension(abi.KVM_CAP_NR_MEMSLOTS)
        with pytest.raises(NoVmError):
            foreign.get_skeys(0, memoryview(bytearray(1)))


def test_no_more_keys_are_asked_for_than_the_buffer_holds(owner: Owner) -> None:
    with owner.foreign() as foreign:
        for call in (foreign.get_skeys, foreign.set_skeys):
            with pytest.raises(ValueError, match=f"{MOST + 1} keys are more"):
                call(0, memoryview(bytearray(MOST + 1)))
            # So many get to the kernel.
            found = answer(call, 0, memoryview(bytearray(MOST)))
            assert isinstance(found, tuple) or (found is False and not X86)


def test_a_process_that_ends_is_told_of_and_closing_is_fine_then(owner: Owner) -> None:
    with owner.foreign() as foreign:
        owner.victim.process.kill()
        owner.victim.process.wait(SECONDS)
        with pytest.raises(GoneError):
            foreign.check_extension(abi.KVM_CAP_NR_MEMSLOTS)
        with pytest.raises(GoneError):
            foreign.set_skeys(0, memoryview(bytearray(1)))


def test_a_buffer_that_the_process_unmaps_is_told_of(owner: Owner) -> None:
    with owner.foreign() as foreign:
        with Injection(owner.target, seconds=SECONDS) as injection:
            address, size, _ = injection.note()
            injection.munmap(address, size)
        with pytest.raises(BufferLostError):
            foreign.get_skeys(0, memoryview(bytearray(1)))
    assert owner.victim.ping() == 0


def test_what_the_process_has_in_the_place_of_its_buffer_stays(owner: Owner) -> None:
    with owner.foreign(), Injection(owner.target, seconds=SECONDS) as injection:
        address, size, _ = injection.note()
        injection.munmap(address, size)
        assert injection.mmap(address, size + PAGE, PROT_READ, MAP_PRIVATE_ANONYMOUS_FIXED) == address
    assert [one.end - one.start for one in mappings(owner.victim.pid) if one.start == address] == [size + PAGE]
    # The next finds no buffer noted, and has one of its own.
    with owner.foreign() as foreign:
        assert foreign.check_extension(abi.KVM_CAP_NR_MEMSLOTS) > 0
    assert owner.victim.ping() == 0


def test_nothing_is_written_to_what_the_process_has_in_the_place_of_its_buffer(owner: Owner) -> None:
    with owner.foreign() as foreign:
        with Injection(owner.target, seconds=SECONDS) as injection:
            address, size, _ = injection.note()
            injection.munmap(address, size)
            injection.mmap(address, size, PROT_READ | PROT_WRITE, MAP_PRIVATE_ANONYMOUS_FIXED)
        for call in (foreign.set_skeys, foreign.get_skeys):
            with pytest.raises(BufferLostError):
                call(0, memoryview(bytearray(b"\x70" * MOST)))
        assert not any(peek(owner.victim.pid, address, size))


def test_only_the_buffer_goes_where_the_kernel_has_joined_it_with_other_memory(owner: Owner) -> None:
    with owner.foreign(), Injection(owner.target, seconds=SECONDS) as injection:
        address, size, _ = injection.note()
        for beside in (address - PAGE, address + size):
            injection.mmap(beside, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE_ANONYMOUS_FIXED)
        joined = [(one.start, one.end) for one in mappings(owner.victim.pid) if one.start <= address < one.end]
        assert joined == [(address - PAGE, address + size + PAGE)]
    left = [one for one in mappings(owner.victim.pid) if address - PAGE <= one.start <= address + size]
    assert [(one.start, one.end) for one in left] == [
        (address - PAGE, address),
        (address + size, address + size + PAGE),
    ]


def test_one_that_was_lost_is_taken_over_by_the_next(owner: Owner) -> None:
    owner.foreign()
    with owner.foreign() as foreign:
        assert foreign.check_extension(abi.KVM_CAP_NR_MEMSLOTS) > 0
    with Injection(owner.target, seconds=SECONDS) as injection:
        assert injection.note()[0] == 0


def test_nothing_goes_through_one_that_is_closed(owner: Owner) -> None:
    foreign = owner.foreign()
    foreign.close()
    for call in (
        lambda: foreign.get_skeys(0, memoryview(bytearray(1))),
        lambda: foreign.set_skeys(0, memoryview(bytearray(1))),
        lambda: foreign.keyop(abi.KVM_S390_KEYOP_ISKE, 0),
        lambda: foreign.check_extension(abi.KVM_CAP_NR_MEMSLOTS),
    ):
        with pytest.raises(InjectionError, match="closed"):
            call()
