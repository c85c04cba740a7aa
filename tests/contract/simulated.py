"""The simulated kernels as subjects of the contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from skeyd.kvm import abi
from skeyd.kvm.errors import KvmError
from skeyd.storage_key import FRAME_SIZE
from skeyd.worker.protocol import SlotSpec, Spec
from skeyd.worker.simulated import SimulatedProcess, SimulatedVm
from tests.contract.operations import (
    DONE,
    HERE,
    Answer,
    Capability,
    Create,
    Delete,
    Get,
    KeyOp,
    Operation,
    Set,
    Touch,
    play,
)
from tests.contract.subject import Subject, new_vm


class SimulatedKernel:
    """A Subject: one of the generations that SimulatedVm knows."""

    def __init__(self, generation: str) -> None:
        self.name = f"simulated {generation}"
        self.generation = generation
        self.shared = _Process(generation)
        new_vm(self.shared, number=-1).store(0, b"\0")

    @contextmanager
    def process(self) -> Iterator[_Process]:
        """Make a process."""
        process = _Process(self.generation)
        try:
            yield process
        finally:
            process.close()

    def close(self) -> None:
        """End the shared process."""
        self.shared.close()


class _Process:
    def __init__(self, generation: str) -> None:
        self._generation = generation
        self._process = SimulatedProcess()
        self._vms: dict[int, SimulatedVm] = {}

    def play(self, *operations: Operation, where: str = HERE) -> list[Answer]:
        assert where == HERE, "a simulation is in one process only"
        return [self._play(operation) for operation in operations]

    def _play(self, operation: Operation) -> Answer:
        match operation:
            case Create(slots, number):
                specs = tuple(SlotSpec(slot.guest_phys_addr, slot.size, slot.backing) for slot in slots)
                spec = Spec("contract", "", "simulated", specs, 0, self._generation)
                self._vms[number] = SimulatedVm(spec, self._process)
                return DONE
            case Delete(number):
                self._vms.pop(number).close()
                return DONE
            case KeyOp(number, address, key):
                try:
                    found = self._vms[operation.vm].keyop(number, address // FRAME_SIZE, key)
                except KvmError as error:
                    return Answer.of_error(error)
                return Answer(keys=bytes([found]))
            case Capability(number):
                return Answer(int(number == abi.KVM_CAP_S390_KEYOP and self._vms[operation.vm].has_keyop))
            case Get() | Set() | Touch():
                return play(self._vms[operation.vm], operation)
        raise ValueError(f"no simulation does {operation}")

    def close(self) -> None:
        while self._vms:
            self._vms.popitem()[1].close()


_: type[Subject] = SimulatedKernel
