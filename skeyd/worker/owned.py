"""Kind "owned": a VM that this process creates with KVM_CREATE_VM and keeps."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from skeyd.gfn import GfnRange
from skeyd.kvm import abi
from skeyd.kvm.errors import KvmError
from skeyd.kvm.memory import GuestMemory
from skeyd.kvm.system import Kvm
from skeyd.worker import refusals
from skeyd.worker.own_capture import OwnCapture
from skeyd.worker.page_tables import PageTables
from skeyd.worker.protocol import SlotSpec, Spec
from skeyd.worker.slots import check_slots, memory_map


class OwnedVm:
    """A Backend over the real kernel.

    SkeydError from the constructor where the VM can't be made; nothing is left of it then.
    """

    def __init__(self, spec: Spec, open_kvm: Callable[[], Kvm] = Kvm) -> None:
        check_slots(spec.slots)
        self.kernel = os.uname().release
        self.memory_map = memory_map(spec.slots)
        with ExitStack() as undo:
            try:
                kvm = undo.enter_context(open_kvm())
                has_calls = kvm.check_extension(abi.KVM_CAP_S390_SKEYS)
                self.has_keyop = bool(kvm.check_extension(abi.KVM_CAP_S390_KEYOP))
            except (OSError, KvmError) as error:
                raise refusals.of_opening_kvm(error) from error
            if not has_calls:
                raise refusals.no_capability()
            # Memory first: it is unmapped after the VM is closed.
            memories = [undo.enter_context(_memory(number, slot)) for number, slot in enumerate(spec.slots)]
            try:
                self._vm = undo.enter_context(kvm.create_vm())
            except KvmError as error:
                raise refusals.of_create_vm(error) from error
            for number, (slot, memory) in enumerate(zip(spec.slots, memories, strict=True)):
                try:
                    self._vm.set_memory(number, slot.guest_phys_addr, memory)
                except KvmError as error:
                    raise refusals.of_memory(error, number, slot.backing == "file") from error
            kvm.close()
            slots = [(one.frames, memories[one.slot]) for one in self.memory_map.slots]
            # Linux 7.0 brought KEYOP and the end of the lost keys: its keys have page tables of their own.
            self._page_tables = None if self.has_keyop else PageTables(slots)
            self._resources = undo.pop_all()

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """As the ioctl."""
        return self._vm.get_skeys(start_gfn, buffer)

    def prepare_set(self, start_gfn: int, keys: bytes | bytearray) -> None:
        """Make the page tables that the SET would make itself, and lose a key for each."""
        if self._page_tables is not None:
            self._page_tables.make(start_gfn, keys)

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
        """As the ioctl."""
        self._vm.set_skeys(start_gfn, buffer)

    def keyop(self, operation: int, gfn: int, key: int = 0) -> int:
        """As the ioctl."""
        return self._vm.keyop(operation, gfn, key)

    def capture(self, frames: Sequence[GfnRange], into: memoryview, seconds: float, slice_seconds: float) -> OwnCapture:
        """Read slice by slice."""
        return OwnCapture(self, frames, into, seconds, slice_seconds)

    def close(self) -> None:
        """End the VM, then unmap its memory."""
        self._resources.close()


def _memory(number: int, slot: SlotSpec) -> GuestMemory:
    try:
        match slot.backing:
            case "memfd":
                return GuestMemory.memfd(slot.size)
            case "file":
                return GuestMemory.file(slot.path, slot.size)
            case "anonymous":
                return GuestMemory.anonymous(slot.size)
        raise ValueError(f"an owned VM has memory, and {slot.backing!r} is none")
    except (OSError, ValueError) as error:
        raise refusals.of_memory(error, number, slot.backing == "file") from error
