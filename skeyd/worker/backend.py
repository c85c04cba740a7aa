"""What every kind of VM offers: the two ioctls, with the kernel's answers and the kernel's errors."""

from __future__ import annotations

from typing import Protocol

from skeyd.gfn import MemoryMap


class Backend(Protocol):
    """A VM at the level of KVM_S390_GET_SKEYS and KVM_S390_SET_SKEYS. Refusals are KvmErrors, as from a kernel."""

    kernel: str
    """uname -r, or the generation that is simulated."""
    memory_map: MemoryMap

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """As skeyd.kvm.vm.Vm.get_skeys: False where the guest uses no storage keys."""

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
        """As skeyd.kvm.vm.Vm.set_skeys."""

    def close(self) -> None:
        """End the VM. Closing twice is fine."""
