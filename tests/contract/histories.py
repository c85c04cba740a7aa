"""Random histories: what they are made of, how two kernels are told apart by one, and how many there were.

A history is a list of steps, each of which stands by itself: whichever are left out, the rest can be played. So
hypothesis, which leaves out all that it can, ends at the shortest history that shows a disagreement.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from skeyd.kvm import abi
from skeyd.storage_key import FRAME_SIZE
from tests.contract.operations import Answer, Create, Delete, Get, KeyOp, Operation, Set, Slot, Touch, in_runs
from tests.contract.subject import MAX, MIB, SEGMENT, Process

HISTORIES: Final = int(os.environ.get("SKEYD_HISTORIES", "12"))
"""How many each kernel gets in the process that tests share."""
NEW_PROCESSES: Final = max(4, HISTORIES // 8)
"""How many it gets in a process of their own, which costs some tenths of a second each."""

FEWEST: Final = 4
"""Steps of a history that counts for one."""
LONGEST: Final = 40
"""Steps drawn for a history."""

ROUNDS: Final = 5
"""In which histories are made up until there are enough."""

MOST_VMS: Final = 3
KEYOPS: Final = (abi.KVM_S390_KEYOP_ISKE, abi.KVM_S390_KEYOP_RRBE, abi.KVM_S390_KEYOP_SSKE)
GFNS_WITH_ADDRESS: Final = (1 << 64) // FRAME_SIZE

Layout = tuple[Slot, ...]
Step = Create | Delete | Get | Set | Touch | KeyOp

_GOOD = st.sampled_from([0x00, 0x00, 0x10, 0x38, 0x06, 0xF4, 0xFE]) | st.integers(0, 127).map(lambda half: 2 * half)
_ANY = st.sampled_from([0x01, 0x37, 0xFF]) | _GOOD
_LENGTH = st.sampled_from([1, 1, 2, 5, 100, 256, 300])


@dataclass(frozen=True)
class History:
    """What happens to the VMs of a process."""

    layouts: tuple[Layout, ...]
    """Of each VM, by its number."""
    steps: tuple[Step, ...]
    """What was drawn: a step on a VM that isn't there makes it, one that makes a VM that is there makes it anew."""

    def operations(self) -> list[Operation]:
        """All there is to do. Every key of a VM is read before the VM is deleted, and in the end none is left."""
        there: dict[int, None] = {}
        found: list[Operation] = []
        for step in self.steps:
            if step.vm in there and isinstance(step, Create | Delete):
                del there[step.vm]
                found += self._end(step.vm)
            if step.vm not in there and not isinstance(step, Delete):
                there[step.vm] = None
                found.append(Create(self.layouts[step.vm], step.vm))
            if not isinstance(step, Create | Delete):
                found.append(step)
        for vm in there:
            found += self._end(vm)
        return found

    def _end(self, vm: int) -> Iterator[Operation]:
        for slot in self.layouts[vm]:
            yield Get(slot.guest_phys_addr // FRAME_SIZE, slot.size // FRAME_SIZE, vm)
        yield Delete(vm)

    def told(self) -> str:
        """Write down what it does, an operation a line."""
        return "\n".join(f"    {one}" for one in self.operations())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        # What hypothesis writes down is what people have to read.
        printer.text(f"\n{self.told()}\n")


# --- drawing them --------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Draw one to three slots, which may touch, in any order."""
    found, at = [], draw(st.sampled_from([0, 0, 1, 2048, 1 << 24]))
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.sampled_from([1, 1, 2, 2, 3, 9]))
        found.append(Slot(at * MIB, size * MIB, draw(st.sampled_from(["anonymous", "memfd"]))))
        at += size + draw(st.sampled_from([0, 0, 1, 3]))
    return tuple(draw(st.permutations(found)))


@st.composite
def frames(draw: st.DrawFn, slots: Layout) -> int:
    """Draw a frame of memory, mostly one near the edge of a segment."""
    slot = draw(st.sampled_from(slots))
    first, count = slot.guest_phys_addr // FRAME_SIZE, slot.size // FRAME_SIZE
    near = draw(st.sampled_from([0, SEGMENT - 3, SEGMENT - 1, SEGMENT, count - 2, count - 1])) + draw(st.integers(0, 3))
    return first + draw(st.sampled_from([min(near, count - 1)]) | st.integers(0, count - 1))


@st.composite
def starts(draw: st.DrawFn, slots: Layout) -> int:
    """Draw a frame of memory, or near memory, or seldom nowhere near it."""
    gfn = draw(frames(slots))
    far = st.sampled_from([1 << 32, 1 << 52, (1 << 52) - 1, 1 << 63, (1 << 64) - 1])
    near = st.integers(-300, 300).map(lambda distance: max(0, gfn + distance))
    return draw(st.just(gfn) | st.just(gfn) | near | near | far)


@st.composite
def keys(draw: st.DrawFn, key: st.SearchStrategy[int]) -> bytes:
    """Draw keys in runs."""
    runs = draw(st.lists(st.tuples(key, _LENGTH), min_size=1, max_size=5))
    return b"".join(bytes([key]) * count for key, count in runs)


def room(slots: Layout, gfn: int) -> int:
    """Count the frames from a frame of memory to the first that is in no slot."""
    end = gfn
    for slot in sorted(slots, key=lambda slot: slot.guest_phys_addr):
        if slot.guest_phys_addr <= end * FRAME_SIZE < slot.guest_phys_addr + slot.size:
            end = (slot.guest_phys_addr + slot.size) // FRAME_SIZE
    return end - gfn


_ODD = st.sampled_from([b"", bytes(MAX), bytes(MAX + 1), b"\x38" * MAX])
# From the simplest on: what comes earlier is what hypothesis leaves.
_KINDS: Final = ("nothing", "create", "delete", *["touch"] * 4, *["store"] * 8, *["get"] * 2, *["set"] * 3, "keyop")


@st.composite
def steps(draw: st.DrawFn, layouts: tuple[Layout, ...], kinds: tuple[str, ...]) -> Step | None:
    """Draw one thing to do to one of the VMs, or nothing, which a step becomes that a disagreement can do without."""
    kind = draw(st.sampled_from(kinds))
    vm = draw(st.integers(0, len(layouts) - 1))
    slots = layouts[vm]
    match kind:
        case "store":
            gfn = draw(frames(slots))
            return Set(gfn, draw(keys(_GOOD))[: room(slots, gfn)], vm)
        case "set":
            some = keys(_GOOD) | keys(_ANY)
            return Set(draw(starts(slots)), draw(some | some | some | some | _ODD), vm)
        case "get":
            return Get(draw(starts(slots)), draw(st.integers(0, 600) | st.sampled_from([MAX, MAX + 1])), vm)
        case "touch":
            return Touch(draw(frames(slots)), draw(st.booleans()), vm)
        case "keyop":
            gfn = draw(starts(slots)) % GFNS_WITH_ADDRESS
            operation = draw(st.sampled_from([*KEYOPS, *KEYOPS, *KEYOPS, 0, 4, 255]))
            return KeyOp(operation, gfn * FRAME_SIZE + draw(st.sampled_from([0, 1, 4095])), draw(_ANY), vm)
        case "create":
            return Create(slots, vm)
        case "delete":
            return Delete(vm)
    return None


@st.composite
def histories(draw: st.DrawFn, generation: str) -> History:
    """Draw one to three VMs, and what happens to them. Where there is a KEYOP there is more of it."""
    chosen = tuple(draw(st.lists(layouts(), min_size=1, max_size=MOST_VMS)))
    step = steps(chosen, _KINDS if generation == "4.19" else (*_KINDS, "keyop", "keyop"))
    count = draw(st.integers(FEWEST, LONGEST))
    drawn = draw(st.lists(step, min_size=count, max_size=count))
    return History(chosen, tuple(one for one in drawn if one is not None))


# --- telling kernels apart -----------------------------------------------------------------------------------------


def agree(
    expected: Process, found: Process, history: History, *, names: tuple[str, str] = ("simulated", "real")
) -> None:
    """Play a history on both; fail where any answer differs."""
    operations = history.operations()
    lines = [
        f"{operation}\n    {names[0]:<10}{_short(one)}\n    {names[1]:<10}{_short(other)}"
        for operation, one, other in zip(operations, expected.play(*operations), found.play(*operations), strict=True)
        if one != other
    ]
    assert not lines, "\n".join(["the kernels disagree:", *lines, "in this history:", history.told()])


def _short(answer: Answer) -> str:
    if answer.keys is None:
        return f"{answer.returned} errno {answer.errno}"
    return f"{answer.returned} errno {answer.errno} keys {in_runs(answer.keys)}"


class Tally:
    """Counts histories: those of FEWEST steps and more, each once."""

    def __init__(self) -> None:
        self._seen: set[tuple[Operation, ...]] = set()

    @property
    def count(self) -> int:
        """How many there were."""
        return len(self._seen)

    def add(self, history: History) -> bool:
        """Count a history that was played. False for one that is too short or was played before."""
        operations = tuple(history.operations())
        if len(history.steps) < FEWEST or operations in self._seen:
            return False
        self._seen.add(operations)
        return True


# Without the phase that tries which parts of the shortest history matter: all of them do, and each try is a history.
SETTINGS: Final = settings(
    deadline=None,
    # Where CI=true is set, hypothesis would draw the same histories in every run.
    derandomize=False,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
)


def try_histories(generation: str, count: int, play: Callable[[History], None]) -> Tally:
    """Play as many different histories; fails with the shortest on which `play` does, or where there were fewer."""
    tally = Tally()
    for _ in range(ROUNDS):
        missing = count - tally.count
        if missing > 0:
            # Some more, since one in thirty doesn't count, nor does the first, which is the shortest there is.
            _try_some(generation, missing + missing // 16 + 8, play, tally)
    assert tally.count >= count, f"only {tally.count} histories of {FEWEST} steps and more, of {count} asked for"
    return tally


def _try_some(generation: str, count: int, play: Callable[[History], None], tally: Tally) -> None:
    @settings(SETTINGS, max_examples=count)
    @given(history=histories(generation))
    def play_one(history: History) -> None:
        play(history)
        # None is rejected: hypothesis may come by one again, and must then find what it found before.
        tally.add(history)

    play_one()
