"""Random histories on a simulated and on a real kernel side by side: every answer and every key must agree.

SKEYD_HISTORIES is how many histories each kernel gets; the full run has 1,000 and more.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skeyd.kvm import abi
from skeyd.storage_key import FRAME_SIZE
from tests.contract.conftest import Kernels
from tests.contract.kernels import every_real_kernel
from tests.contract.operations import Answer, Create, Delete, Get, KeyOp, Operation, Set, Slot, Touch, in_runs
from tests.contract.real import RealKernel
from tests.contract.simulated import SimulatedKernel
from tests.contract.subject import MAX, MIB, SEGMENT, Process

HISTORIES: Final = int(os.environ.get("SKEYD_HISTORIES", "12"))
NEW_PROCESSES: Final = max(4, HISTORIES // 8)
"""A process of its own costs a history ten times what it costs else."""

KEYOPS: Final = (abi.KVM_S390_KEYOP_ISKE, abi.KVM_S390_KEYOP_RRBE, abi.KVM_S390_KEYOP_SSKE)
GFNS_WITH_ADDRESS: Final = (1 << 64) // FRAME_SIZE

LONGEST: Final = 16
"""Operations in a history."""

_GOOD = st.sampled_from([0x00, 0x00, 0x10, 0x38, 0x06, 0xF4, 0xFE]) | st.integers(0, 127).map(lambda half: 2 * half)
_ANY = st.sampled_from([0x01, 0x37, 0xFF]) | _GOOD


@dataclass(frozen=True)
class History:
    """What happens to two VMs, from their making on."""

    slots: tuple[tuple[Slot, ...], ...]
    """Of each VM."""
    steps: tuple[Operation, ...]

    def operations(self) -> list[Operation]:
        """All there is to do: the VMs are made, and at the end every key is read and the VMs deleted."""
        vms = range(len(self.slots))
        return [
            *(Create(self.slots[vm], vm) for vm in vms),
            *self.steps,
            *(
                Get(slot.guest_phys_addr // FRAME_SIZE, slot.size // FRAME_SIZE, vm)
                for vm in vms
                for slot in self.slots[vm]
            ),
            *(Delete(vm) for vm in vms),
        ]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Slot, ...]:
    """Draw one to three slots, which may touch, in any order."""
    found, at = [], draw(st.sampled_from([0, 0, 1, 2048]))
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 2))
        found.append(Slot(at * MIB, size * MIB, draw(st.sampled_from(["anonymous", "memfd"]))))
        at += size + draw(st.sampled_from([0, 0, 1, 3]))
    return tuple(draw(st.permutations(found)))


@st.composite
def frames(draw: st.DrawFn, slots: tuple[Slot, ...]) -> int:
    """Draw a frame of memory, mostly one near the edge of a segment."""
    slot = draw(st.sampled_from(slots))
    first, count = slot.guest_phys_addr // FRAME_SIZE, slot.size // FRAME_SIZE
    near = draw(st.sampled_from([0, SEGMENT - 3, SEGMENT - 1, SEGMENT, count - 2, count - 1])) + draw(st.integers(0, 3))
    return first + draw(st.sampled_from([min(near, count - 1)]) | st.integers(0, count - 1))


@st.composite
def starts(draw: st.DrawFn, slots: tuple[Slot, ...]) -> int:
    """Draw a frame of memory, or near memory, or seldom nowhere near it."""
    gfn = draw(frames(slots))
    far = st.sampled_from([1 << 32, 1 << 52, (1 << 52) - 1, 1 << 63, (1 << 64) - 1])
    return draw(
        st.just(gfn)
        | st.just(gfn)
        | st.just(gfn)
        | st.integers(-300, 300).map(lambda distance: max(0, gfn + distance))
        | far
    )


@st.composite
def keys(draw: st.DrawFn) -> bytes:
    """Draw keys in runs, mostly good ones."""
    key = draw(st.sampled_from([_GOOD, _GOOD, _ANY]))
    runs = draw(st.lists(st.tuples(key, st.sampled_from([1, 1, 2, 5, 100, 256, 300])), min_size=1, max_size=5))
    return b"".join(bytes([key]) * count for key, count in runs)


@st.composite
def steps(draw: st.DrawFn, layouts: tuple[tuple[Slot, ...], ...]) -> Operation:
    """Draw one thing to do to one of the VMs."""
    vm = draw(st.integers(0, len(layouts) - 1))
    match draw(st.sampled_from(["set", "set", "set", "get", "touch", "touch", "keyop"])):
        case "set":
            odd = st.sampled_from([b"", bytes(MAX), bytes(MAX + 1), b"\x38" * MAX])
            wanted = draw(keys() | keys() | keys() | odd)
            return Set(draw(starts(layouts[vm])), wanted, vm)
        case "get":
            return Get(draw(starts(layouts[vm])), draw(st.integers(0, 600) | st.sampled_from([MAX, MAX + 1])), vm)
        case "keyop":
            gfn = draw(starts(layouts[vm])) % GFNS_WITH_ADDRESS
            operation = draw(st.sampled_from([*KEYOPS, *KEYOPS, *KEYOPS, 0, 4, 255]))
            return KeyOp(operation, gfn * FRAME_SIZE + draw(st.sampled_from([0, 1, 4095])), draw(_ANY), vm)
    return Touch(draw(frames(layouts[vm])), draw(st.booleans()), vm)


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Draw one or two VMs, and what happens to them."""
    chosen = tuple(draw(st.lists(layouts(), min_size=1, max_size=2)))
    return History(chosen, tuple(draw(st.lists(steps(chosen), max_size=LONGEST))))


def agree(simulated: Process, real: Process, history: History) -> None:
    """Play a history on both, and tell the two apart where they can be."""
    operations = history.operations()
    expected, found = simulated.play(*operations), real.play(*operations)
    lines = [
        f"{operation}\n    simulated {_short(one)}\n    real      {_short(other)}"
        for operation, one, other in zip(operations, expected, found, strict=True)
        if one != other
    ]
    assert not lines, "the kernels disagree:\n" + "\n".join(lines)


def _short(answer: Answer) -> str:
    if answer.keys is None:
        return f"{answer.returned} errno {answer.errno}"
    return f"{answer.returned} errno {answer.errno} keys {in_runs(answer.keys)}"


def _simulation_of(kernels: Kernels, real: RealKernel) -> SimulatedKernel:
    simulated = kernels(f"simulated-{real.generation}")
    assert isinstance(simulated, SimulatedKernel)
    return simulated


TIMEOUT: Final = 600 + HISTORIES
"""Seconds; a history takes some twentieth of one on an idle machine."""

_settings = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


@every_real_kernel
@pytest.mark.timeout(TIMEOUT)
@settings(_settings, max_examples=HISTORIES)
@given(history=histories())
def test_every_history_goes_the_same_way_in_a_process_that_uses_keys(
    kernels: Kernels, subject: RealKernel, history: History
) -> None:
    agree(_simulation_of(kernels, subject).shared, subject.shared, history)


@every_real_kernel
@pytest.mark.timeout(TIMEOUT)
@settings(_settings, max_examples=NEW_PROCESSES)
@given(history=histories())
def test_every_history_goes_the_same_way_in_a_new_process(
    kernels: Kernels, subject: RealKernel, history: History
) -> None:
    with _simulation_of(kernels, subject).process() as simulated, subject.process() as process:
        agree(simulated, process, history)
