"""An owned VM: made whole or not at all, and unmade in the right order."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.kvm import abi
from skeyd.kvm.errors import ClosedError, KvmError
from skeyd.kvm.memory import GuestMemory
from skeyd.kvm.system import Kvm
from skeyd.kvm.vm import Vm
from skeyd.worker.owned import OwnedVm
from skeyd.worker.protocol import SlotSpec
from tests.kvm.maps import mapped_bytes, mappings, pages_present
from tests.worker.specs import MIB, owned, slot


class FakeVm(Vm):
    """A VM that takes memory slots, or doesn't."""

    def __init__(self, refuses: dict[int, int]) -> None:
        self.refuses = refuses
        self.slots: list[tuple[int, int, int, int]] = []
        self.mapped_at_close: int | None = None
        self.calls: list[tuple[str, int, memoryview]] = []

    def set_memory(self, slot: int, guest_phys_addr: int, memory: GuestMemory) -> None:
        if slot in self.refuses:
            raise KvmError("KVM_SET_USER_MEMORY_REGION", self.refuses[slot])
        self.slots.append((slot, guest_phys_addr, memory.address, memory.size))

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        self.calls.append(("get", start_gfn, buffer))
        return True

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
        self.calls.append(("set", start_gfn, buffer))

    def keyop(self, operation: int, gfn: int, key: int = 0) -> int:
        return operation << 16 | gfn << 8 | key

    def close(self) -> None:
        if self.mapped_at_close is None:
            self.mapped_at_close = sum(mapped_bytes(start, start + size) for _, _, start, size in self.slots)


class FakeKvm(Kvm):
    """A host with the storage-key calls; what goes wrong is given."""

    def __init__(
        self,
        *,
        skeys: int | KvmError = 1,
        keyop: int = 0,
        create: KvmError | None = None,
        refuses: dict[int, int] | None = None,
    ) -> None:
        self.skeys = skeys
        self.keyop = keyop
        self.create = create
        self.vm = FakeVm(refuses or {})
        self.closed = False
        self.created = False

    def check_extension(self, capability: int) -> int:
        if capability == abi.KVM_CAP_S390_KEYOP:
            return self.keyop
        assert capability == abi.KVM_CAP_S390_SKEYS
        if isinstance(self.skeys, KvmError):
            raise self.skeys
        return self.skeys

    def create_vm(self) -> Vm:
        if self.create is not None:
            raise self.create
        self.created = True
        return self.vm

    def close(self) -> None:
        self.closed = True


SLOTS = (slot(0, 1), slot(4, 2, "memfd"), slot(8, 1, "memfd"))


def _opens(kvm: FakeKvm) -> Callable[[], Kvm]:
    return lambda: kvm


def _guest_bytes() -> int:
    # Memory of guests that can be told from all other memory: a memfd has its name, a file its path.
    return sum(one.end - one.start for one in mappings() if "skeyd-guest" in one.path or "guest.mem" in one.path)


@pytest.fixture(autouse=True)
def no_memory_left() -> Iterator[None]:
    """Hold every test of this file to it, those where a VM could not be made above all."""
    assert _guest_bytes() == 0
    yield
    assert _guest_bytes() == 0


def _refusal(kvm: FakeKvm, *slots: SlotSpec) -> SkeydError:
    with pytest.raises(SkeydError) as refused:
        OwnedVm(owned(*(slots or SLOTS)), _opens(kvm))
    return refused.value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "guest.mem"
    with path.open("wb") as file:
        file.truncate(2 * MIB)
    return path


# --- made ----------------------------------------------------------------------------------------------------------


def test_every_slot_is_given_to_the_kernel_with_memory_of_its_own(file: Path) -> None:
    kvm = FakeKvm()
    vm = OwnedVm(owned(slot(16, 2, "file", str(file)), *SLOTS), _opens(kvm))
    try:
        given = kvm.vm.slots
        assert [(number, address, size) for number, address, _, size in given] == [
            (0, 16 * MIB, 2 * MIB),
            (1, 0, MIB),
            (2, 4 * MIB, 2 * MIB),
            (3, 8 * MIB, MIB),
        ]
        assert all(mapped_bytes(start, start + size) == size for _, _, start, size in given)
        behind = {one.start: one.path for one in mappings()}
        assert behind[given[0][2]] == str(file)
        assert "memfd:skeyd-guest" in behind[given[2][2]]
        assert vm.kernel == os.uname().release
        assert [one.slot for one in vm.memory_map.slots] == [1, 2, 3, 0]
    finally:
        vm.close()


def test_the_device_is_closed_as_soon_as_the_vm_is_made() -> None:
    kvm = FakeKvm()
    vm = OwnedVm(owned(*SLOTS), _opens(kvm))
    assert kvm.closed
    assert kvm.vm.mapped_at_close is None
    vm.close()


def test_the_two_calls_go_to_the_vm_as_they_are() -> None:
    kvm = FakeKvm()
    vm = OwnedVm(owned(*SLOTS), _opens(kvm))
    buffer = memoryview(bytearray(2))
    assert vm.get_skeys(3, buffer)
    vm.set_skeys(4, buffer)
    assert kvm.vm.calls == [("get", 3, buffer), ("set", 4, buffer)]
    vm.close()


@pytest.mark.parametrize("capability", [0, 1])
def test_whether_there_is_keyop_is_what_the_kernel_says(capability: int) -> None:
    vm = OwnedVm(owned(*SLOTS), _opens(FakeKvm(keyop=capability)))
    assert vm.has_keyop is bool(capability)
    assert vm.keyop(3, 0x10, 0x38) == 3 << 16 | 0x10 << 8 | 0x38
    vm.close()


@pytest.mark.parametrize("keyop", [0, 1])
def test_page_tables_are_made_before_a_set_where_the_kernel_is_from_before_keyop(keyop: int) -> None:
    kvm = FakeKvm(keyop=keyop)
    vm = OwnedVm(owned(*SLOTS), _opens(kvm))
    try:
        keys = bytes(300) + b"\x10" * 212
        vm.prepare_set(1024, keys)
        assert kvm.vm.calls == []
        there = {at: pages_present(start, size) for at, (_, at, start, size) in enumerate(kvm.vm.slots)}
        assert [(at, page) for at, pages in there.items() for page, one in enumerate(pages) if one] == (
            [] if keyop else [(4 * MIB, 300)]
        )
    finally:
        vm.close()


def test_memory_is_unmapped_after_the_vm_is_closed() -> None:
    # The other way round the kernel would answer EFAULT for frames that have a key, to whoever still asks.
    kvm = FakeKvm()
    vm = OwnedVm(owned(*SLOTS), _opens(kvm))
    vm.close()
    assert kvm.vm.mapped_at_close == 4 * MIB
    assert sum(mapped_bytes(start, start + size) for _, _, start, size in kvm.vm.slots) == 0


def test_closing_twice_is_fine() -> None:
    vm = OwnedVm(owned(*SLOTS), _opens(FakeKvm()))
    vm.close()
    vm.close()


# --- not made ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EMFILE])
def test_a_device_that_cannot_be_opened_is_unavailable(number: int) -> None:
    def open_kvm() -> Kvm:
        raise OSError(number, os.strerror(number))

    with pytest.raises(SkeydError) as refused:
        OwnedVm(owned(*SLOTS), open_kvm)
    assert refused.value.reason is Reason.KVM_UNAVAILABLE
    assert refused.value.metadata["errno"] == str(number)


def test_a_device_that_is_not_kvms_is_unavailable() -> None:
    with pytest.raises(SkeydError) as refused:
        OwnedVm(owned(*SLOTS), lambda: Kvm("/dev/null"))
    assert refused.value.reason is Reason.KVM_UNAVAILABLE


def test_a_host_without_the_calls_makes_no_vm() -> None:
    kvm = FakeKvm(skeys=0)
    assert _refusal(kvm).reason is Reason.CAP_S390_SKEYS_MISSING
    assert kvm.closed
    assert not kvm.created


def test_a_capability_that_the_kernel_would_not_tell_makes_no_vm() -> None:
    kvm = FakeKvm(skeys=KvmError("KVM_CHECK_EXTENSION", errno.EIO))
    assert _refusal(kvm).reason is Reason.KVM_UNAVAILABLE
    assert kvm.closed
    assert not kvm.created


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EINVAL, Reason.PGSTE_UNAVAILABLE),
        (errno.ENOMEM, Reason.OUT_OF_MEMORY),
        (errno.EMFILE, Reason.KERNEL_REFUSED),
    ],
)
def test_a_vm_that_the_kernel_did_not_make_leaves_nothing(number: int, reason: Reason) -> None:
    kvm = FakeKvm(create=KvmError("KVM_CREATE_VM", number))
    refusal = _refusal(kvm)
    assert refusal.reason is reason
    assert isinstance(refusal.__cause__, KvmError)
    assert kvm.closed


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EINVAL, Reason.MEMORY_INVALID),
        (errno.EEXIST, Reason.MEMORY_INVALID),
        (errno.ENOMEM, Reason.OUT_OF_MEMORY),
    ],
)
def test_a_slot_that_the_kernel_did_not_take_leaves_no_vm_and_no_memory(
    which: int, number: int, reason: Reason
) -> None:
    kvm = FakeKvm(refuses={which: number})
    refusal = _refusal(kvm)
    assert refusal.reason is reason
    assert refusal.metadata == {"slot": str(which)}
    assert kvm.closed
    assert kvm.vm.mapped_at_close == sum(size for _, _, _, size in kvm.vm.slots)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_file_that_cannot_be_used_is_known_before_a_vm_is_made(which: int, tmp_path: Path) -> None:
    kvm = FakeKvm()
    slots = list(SLOTS)
    slots[which] = slot(100, 1, "file", str(tmp_path / "missing"))
    refusal = _refusal(kvm, *slots)
    assert refusal.reason is Reason.MEMORY_FILE_UNUSABLE
    assert refusal.metadata == {"slot": str(which)}
    assert refusal.message == f"memory slot {which}: No such file or directory"
    assert kvm.closed
    assert not kvm.created


def test_a_file_that_is_too_short_is_not_used(file: Path) -> None:
    refusal = _refusal(FakeKvm(), slot(0, 3, "file", str(file)))
    assert refusal.reason is Reason.MEMORY_FILE_UNUSABLE
    assert "fewer than the slot's" in refusal.message


def test_a_path_that_no_file_can_have_is_refused_by_slot() -> None:
    refusal = _refusal(FakeKvm(), slot(0, 1, "file", "/guests/a\0b"))
    assert refusal.reason is Reason.MEMORY_FILE_UNUSABLE


def test_an_owned_vm_has_memory_behind_every_slot() -> None:
    refusal = _refusal(FakeKvm(), slot(0, 1, "none"))
    assert refusal.reason is Reason.MEMORY_INVALID
    assert refusal.metadata == {"slot": "0"}


def test_slots_that_no_kernel_takes_never_reach_this_one() -> None:
    def open_kvm() -> Kvm:
        pytest.fail("the device was opened")

    for slots in ((), (slot(0, 2), slot(1, 2))):
        with pytest.raises(SkeydError) as refused:
            OwnedVm(owned(*slots), open_kvm)
        assert refused.value.reason is Reason.MEMORY_INVALID


# --- the real kernel -----------------------------------------------------------------------------------------------


def test_a_real_host_that_is_no_s390x_says_so_or_that_it_has_no_kvm() -> None:
    # On an s390x host this makes a real VM, unless the process lacks PGSTE page tables.
    try:
        vm = OwnedVm(owned(*SLOTS))
    except SkeydError as error:
        allowed = {Reason.KVM_UNAVAILABLE}
        allowed |= {Reason.PGSTE_UNAVAILABLE} if os.uname().machine == "s390x" else {Reason.CAP_S390_SKEYS_MISSING}
        assert error.reason in allowed  # noqa: PT017  either outcome is one
    else:
        assert os.uname().machine == "s390x"
        assert not vm.get_skeys(0, memoryview(bytearray(1)))
        vm.close()
        with pytest.raises(ClosedError):
            vm.get_skeys(0, memoryview(bytearray(1)))
