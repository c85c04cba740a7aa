"""What every kind of VM offers: the storage-key ioctls, with the kernel's answers and the kernel's errors."""

from __future__ import annotations

from typing import Protocol

from skeyd.gfn import MemoryMap


class Backend(Protocol):
    """A VM at the level of KVM_S390_GET_SKEYS, KVM_S390_SET_SKEYS and KVM_S390_KEYOP.

    Refusals are KvmErrors, as from a kernel.
    """

    kernel: str
    """uname -r, or the generation that is simulated."""
    memory_map: MemoryMap
    has_keyop: bool
    """Whether there is KVM_S390_KEYOP."""

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """As skeyd.kvm.vm.Vm.get_skeys: False where the guest uses no storage keys."""

    def prepare_set(self, start_gfn: int, keys: bytes | bytearray) -> None:
        """Do what can be done for a SET of these keys to lose none. It may be nothing: no proof rests on it.

        All frames are in memory slots. Nothing is changed but R and C of frames whose keys are set next.
        """

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
        """As skeyd.kvm.vm.Vm.set_skeys."""

    def keyop(self, operation: int, gfn: int, key: int = 0) -> int:
        """As skeyd.kvm.vm.Vm.keyop."""

    def close(self) -> None:
        """End the VM. Closing twice is fine."""
