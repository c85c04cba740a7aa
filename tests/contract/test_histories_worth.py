"""What random histories are worth: they have all that they are said to have, and nothing wrong goes unnoticed."""

from __future__ import annotations

import dataclasses
import errno
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

import pytest
from hypothesis import Phase, settings

from skeyd.storage_key import FRAME_SIZE, RESERVED
from skeyd.worker.protocol import SIMULATED_KERNELS
from tests.contract import histories
from tests.contract.histories import FEWEST, History, agree, try_histories
from tests.contract.operations import DONE, Answer, Create, Delete, Get, KeyOp, Operation, Set, Slot, Touch
from tests.contract.simulated import SimulatedKernel
from tests.contract.subject import MAX, Process, hole

SAMPLE: Final = 100
"""Random histories that are enough to see what they are like."""


@pytest.fixture
def same_histories(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the same in every run: how short the shortest one is, and how long they are, is a matter of luck."""
    monkeypatch.setattr(histories, "SETTINGS", settings(histories.SETTINGS, derandomize=True, database=None))


def played(generation: str) -> Iterator[tuple[list[Operation], list[Answer]]]:
    """Play SAMPLE histories, each in a new process."""
    kernel = SimulatedKernel(generation)
    done: list[tuple[list[Operation], list[Answer]]] = []

    def play(history: History) -> None:
        operations = history.operations()
        with kernel.process() as process:
            answers = process.play(*operations)
        if len(history.steps) >= FEWEST:
            done.append((operations, answers))

    try_histories(generation, SAMPLE, play)
    kernel.close()
    return iter(done)


@pytest.mark.usefixtures("same_histories")
@pytest.mark.parametrize("generation", SIMULATED_KERNELS)
def test_histories_are_long_and_most_of_their_sets_succeed_and_vms_come_and_go_in_the_middle(generation: str) -> None:
    sets = accepted = came_and_went = length = count = 0
    for operations, answers in played(generation):
        count += 1
        works = [at for at, one in enumerate(operations) if isinstance(one, Set | Touch | KeyOp)]
        length += len(works)
        results = [answer for one, answer in zip(operations, answers, strict=True) if isinstance(one, Set)]
        sets += len(results)
        accepted += results.count(DONE)
        came_and_went += any(isinstance(one, Delete | Create) for one in operations[works[0] : works[-1]] if works)
    # What a thousand of them come to is about 16 steps that change something, 4 of 5 SETs, and 7 of 10 histories.
    assert length >= 8 * count
    assert accepted >= sets // 2
    assert came_and_went >= count // 4


def _kinds(generation: str, operations: list[Operation], answers: list[Answer]) -> Iterator[str]:
    # What of that which a history can have it has.
    created = [one for one in operations if isinstance(one, Create)]
    there: dict[int, tuple[Slot, ...]] = {}
    for at, (one, answer) in enumerate(zip(operations, answers, strict=True)):
        match one:
            case Create():
                there[one.vm] = one.slots
                yield from (
                    kind
                    for kind, is_so in {
                        "a VM beside another": len(there) > 1,
                        "a VM beside two others": len(there) > 2,
                        "several slots": len(one.slots) > 1,
                        "slots from 2^32 on": any(slot.guest_phys_addr >= 1 << 44 for slot in one.slots),
                        "slots that touch": any(
                            first.guest_phys_addr + first.size == other.guest_phys_addr
                            for first in one.slots
                            for other in one.slots
                        ),
                        "a VM made anew": sum(other.vm == one.vm for other in created) > 1,
                    }.items()
                    if is_so
                )
            case Delete():
                del there[one.vm]
            case Set():
                in_slot = any(
                    slot.guest_phys_addr <= one.start * FRAME_SIZE < slot.guest_phys_addr + slot.size
                    for slot in there[one.vm]
                )
                if any(key & RESERVED for key in one.keys):
                    yield "a bad key" if in_slot else "a bad key in a hole"
                elif answer == hole(generation):
                    yield "a SET into a hole" if in_slot else "a SET in a hole"
                if not 1 <= len(one.keys) <= MAX:
                    yield "a SET with a bad count"
                if one.start >= 1 << 52:
                    yield "a SET from 2^52 on"
            case Get():
                # Those of the end, which read all keys of a VM, come right before it is deleted.
                is_end = isinstance(operations[at + 1], Delete | Get) and any(
                    one.start * FRAME_SIZE == slot.guest_phys_addr and one.count * FRAME_SIZE == slot.size
                    for slot in there[one.vm]
                )
                if not is_end:
                    yield "a GET in the middle"
                    yield "a GET that fails" if answer.errno or answer.returned else "a GET that gives keys"
                elif answer.keys is not None and any(answer.keys):
                    yield "a key at the end"
            case Touch():
                yield "a write" if one.write else "a read"
            case KeyOp():
                yield f"KEYOP {one.operation}"
                yield "KEYOP that fails" if answer.errno else "KEYOP that gives a key"


EVERYWHERE: Final = {
    "a VM beside another": 20,
    "a VM beside two others": 10,
    "several slots": 20,
    "slots from 2^32 on": 7,
    "slots that touch": 15,
    "a VM made anew": 20,
    "a bad key": 3,
    "a bad key in a hole": 1,
    "a SET into a hole": 9,
    "a SET in a hole": 12,
    "a SET with a bad count": 1,
    "a SET from 2^52 on": 4,
    "a GET in the middle": 20,
    "a GET that fails": 20,
    "a GET that gives keys": 2,
    "a key at the end": 30,
    "a write": 20,
    "a read": 20,
    "KEYOP that fails": 14,
}
"""In so many of SAMPLE histories at least: far fewer than there are, since draws of hypothesis are much alike."""
WITH_KEYOP: Final = {"KEYOP that gives a key": 20, **{f"KEYOP {one}": 10 for one in histories.KEYOPS}}


@pytest.mark.usefixtures("same_histories")
@pytest.mark.parametrize("generation", SIMULATED_KERNELS)
def test_histories_have_all_that_they_are_said_to_have(generation: str) -> None:
    found: Counter[str] = Counter()
    for operations, answers in played(generation):
        found.update(set(_kinds(generation, operations, answers)))
    wanted = EVERYWHERE if generation == "4.19" else EVERYWHERE | WITH_KEYOP
    assert {kind: found[kind] for kind in wanted if found[kind] < wanted[kind]} == {}


class _Wrong:
    """A process of which one answer in a while is wrong."""

    def __init__(self, process: Process, wrong: Callable[[Operation, Answer], Answer]) -> None:
        self._process = process
        self._wrong = wrong

    def play(self, *operations: Operation, where: str = "here") -> list[Answer]:
        answers = self._process.play(*operations, where=where)
        for at, (one, answer) in enumerate(zip(operations, answers, strict=True)):
            # Only where the VM is not the first of its number.
            made = sum(isinstance(other, Create) and other.vm == one.vm for other in operations[:at])
            if made > 1:
                answers[at] = self._wrong(one, answer)
        return answers


def another_answer(kind: type[Operation]) -> Callable[[Operation, Answer], Answer]:
    return lambda one, answer: Answer(5) if isinstance(one, kind) and answer == DONE else answer


def another_bit(kind: type[Operation], bit: int) -> Callable[[Operation, Answer], Answer]:
    def wrong(one: Operation, answer: Answer) -> Answer:
        if not isinstance(one, kind) or not answer.keys or answer.returned or not any(answer.keys):
            return answer
        return dataclasses.replace(answer, keys=answer.keys[:-1] + bytes([answer.keys[-1] ^ bit]))

    return wrong


def another_errno(kind: type[Operation]) -> Callable[[Operation, Answer], Answer]:
    return lambda one, answer: Answer.refused(errno.EIO) if isinstance(one, kind) and answer.errno else answer


@pytest.fixture
def unshrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the same in every run, and leave a history that fails as it is."""
    chosen = settings(histories.SETTINGS, derandomize=True, database=None, phases=(Phase.generate,))
    monkeypatch.setattr(histories, "SETTINGS", chosen)


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize(
    "wrong",
    [
        *(
            pytest.param(another_bit(Get, bit), id=f"bit {bit:#x} of a key in a GET")
            for bit in (0x02, 0x04, 0x08, 0x80)
        ),
        *(pytest.param(another_bit(KeyOp, bit), id=f"bit {bit:#x} of a key in a KEYOP") for bit in (0x02, 0x08)),
        *(pytest.param(another_errno(kind), id=f"errno of a {kind.__name__}") for kind in (Get, Set, KeyOp)),
    ],
)
def test_whatever_is_wrong_in_an_answer_is_a_disagreement(wrong: Callable[[Operation, Answer], Answer]) -> None:
    kernel = SimulatedKernel("7.2")

    def play(history: History) -> None:
        with kernel.process() as one, kernel.process() as other:
            agree(one, _Wrong(other, wrong), history)

    with pytest.raises(AssertionError, match="the kernels disagree"):
        try_histories("7.2", 100, play)
    kernel.close()


@pytest.mark.usefixtures("same_histories")
@pytest.mark.parametrize("kind", [Set, Touch])
def test_a_disagreement_is_told_with_the_shortest_history(kind: type[Operation]) -> None:
    kernel = SimulatedKernel("4.19")

    def play(history: History) -> None:
        with kernel.process() as one, kernel.process() as other:
            agree(one, _Wrong(other, another_answer(kind)), history)

    with pytest.raises(AssertionError, match="the kernels disagree") as failed:
        try_histories("4.19", 200, play)
    kernel.close()
    told = str(failed.value)
    # It takes three steps: two that have the VM made and made anew, and the one that is answered wrongly.
    assert len(re.findall(r"^ +Create\(", told, re.M)) == 2, told
    assert len(re.findall(r"^ +Delete\(", told, re.M)) == 2, told
    assert len(re.findall(r"^ +(Set|Touch|KeyOp)\(", told, re.M)) <= 2, told
    assert ", keys=1 [" in told or kind is Touch, told
    assert told.count("real ") == 1, told
