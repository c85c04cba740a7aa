"""Who the contract is kept by: kernels, real and simulated, and what tests need of each."""

from __future__ import annotations

import errno
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol

from skeyd.kvm import abi
from skeyd.storage_key import SEGMENT_FRAMES
from tests.contract.operations import DONE, HERE, Answer, Create, Get, Operation, Set, Slot, Touch, in_runs

MIB: Final = 1 << 20
MAX: Final = abi.KVM_S390_SKEYS_MAX
SEGMENT: Final = SEGMENT_FRAMES


class Process(Protocol):
    """An address space that makes VMs, and works on them until it ends."""

    def play(self, *operations: Operation, where: str = HERE) -> list[Answer]:
        """Do operations one after the other; elsewhere than in the process itself on real kernels only."""


class Subject(Protocol):
    """A kernel."""

    @property
    def name(self) -> str:
        """Say which."""

    @property
    def generation(self) -> str:
        """The first release that followed the same rules: "4.19", "7.0" or "7.2"."""

    @property
    def shared(self) -> Process:
        """One that many tests use, since it takes long to make one: storage keys are enabled in it."""

    def process(self) -> AbstractContextManager[Process]:
        """Make a process in which nothing has happened yet. It ends, with its VMs, when the context is left."""


@dataclass(frozen=True)
class Vm:
    """One VM of a process, as tests talk with it."""

    process: Process
    number: int = 0

    def get(self, start: int, count: int) -> Answer:
        """Return the call's answer."""
        return self._play(Get(start, count, self.number))

    def set(self, start: int, keys: bytes) -> Answer:
        """Return the call's answer."""
        return self._play(Set(start, keys, self.number))

    def keys(self, start: int, count: int) -> bytes:
        """Return what GET finds; a guest that uses no keys fails the test, and so does an error."""
        answer = self.get(start, count)
        assert answer.keys is not None, answer
        assert answer == Answer(keys=answer.keys)
        return answer.keys

    def require_keys(self, start: int, wanted: bytes | bytearray) -> None:
        """Fail the test where GET finds other keys, and say so in few words, however many there are."""
        # What pytest would say by itself of two that are long takes it minutes where it may not be cut, as on CI.
        found = self.keys(start, len(wanted))
        wrong = [at for at in range(len(wanted)) if found[at] != wanted[at]] if found != wanted else []
        if wrong:
            shown = slice(wrong[0], wrong[0] + SEGMENT)
            raise AssertionError(
                f"{len(wrong)} of {len(wanted)} keys are wrong; from frame {start + wrong[0]:#x} on there are "
                f"{in_runs(found[shown])}, not {in_runs(bytes(wanted[shown]))}"
            )

    def is_keyless(self) -> bool:
        """Tell whether the guest uses no storage keys."""
        return self.get(0, 1).returned == abi.KVM_S390_GET_SKEYS_NONE

    def accept(self, start: int, keys: bytes) -> None:
        """Set keys, and be sure that the kernel said yes."""
        assert self.set(start, keys) == DONE

    def store(self, start: int, keys: bytes) -> None:
        """Set keys twice: whatever a kernel loses the first time, it keeps the second."""
        self.accept(start, keys)
        self.accept(start, keys)

    def touch(self, gfn: int, *, write: bool) -> None:
        """Read or write the frame's memory in the process."""
        assert self._play(Touch(gfn, write, self.number)) == DONE

    def _play(self, operation: Operation) -> Answer:
        (answer,) = self.process.play(operation)
        return answer


def slots(*wanted: tuple[int, int], backing: str = "anonymous") -> tuple[Slot, ...]:
    """Make slots of (start, size) in MiB."""
    return tuple(Slot(start * MIB, size * MIB, backing) for start, size in wanted)


def new_vm(process: Process, *wanted: tuple[int, int], number: int = 0) -> Vm:
    """Make a VM with slots of (start, size) in MiB; of 4 MiB where none are given."""
    assert process.play(Create(slots(*(wanted or [(0, 4)])), number)) == [DONE]
    return Vm(process, number)


def hole(generation: str) -> Answer:
    """Return what both calls answer for a frame in no slot."""
    return Answer(abi.PGM_ADDRESSING) if generation == "7.0" else Answer.refused(errno.EFAULT)
