"""The random histories' worth: what they are made of, that no two are alike, that the shortest tells a disagreement."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import strategies as st

from skeyd.worker.protocol import SIMULATED_KERNELS
from tests.contract import histories
from tests.contract.histories import FEWEST, History, Tally, agree, try_histories
from tests.contract.operations import DONE, Answer, Create, Delete, Get, KeyOp, Operation, Set, Touch
from tests.contract.simulated import SimulatedKernel
from tests.contract.subject import SEGMENT, Process, slots
from tests.examples import examples

ROOT: Final = Path(__file__).parents[2]
SAMPLE: Final = examples(40)
LAYOUTS: Final = (slots((0, 1)), slots((0, 1), (3, 2)))

every_generation = pytest.mark.parametrize("generation", SIMULATED_KERNELS)


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


@every_generation
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


def test_a_step_on_a_vm_that_is_not_there_makes_it_and_every_key_is_read_before_a_vm_goes() -> None:
    history = History(LAYOUTS, (Delete(1), Touch(3, False, 1), Create(LAYOUTS[1], 1), Set(0, b"\x30"), Delete(1)))
    ends = [Get(0, SEGMENT, 1), Get(3 * SEGMENT, 2 * SEGMENT, 1), Delete(1)]
    assert history.operations() == [
        *(Create(LAYOUTS[1], 1), Touch(3, False, 1), *ends),
        *(Create(LAYOUTS[1], 1), Create(LAYOUTS[0], 0), Set(0, b"\x30"), *ends),
        *(Get(0, SEGMENT, 0), Delete(0)),
    ]


@pytest.mark.parametrize(("gfn", "frames"), [(0, 512), (300, 212), (512, 0), (768, 256), (1023, 1)])
def test_there_is_room_up_to_the_first_frame_in_no_slot(gfn: int, frames: int) -> None:
    assert histories.room(slots((1, 1), (3, 1), (0, 1)), gfn) == frames


def test_a_history_counts_once_and_a_short_one_never() -> None:
    tally = Tally()
    steps = tuple(Set(gfn, b"\x30") for gfn in range(FEWEST))
    assert not tally.add(History(LAYOUTS, ()))
    assert not tally.add(History(LAYOUTS, steps[1:]))
    assert tally.add(History(LAYOUTS, steps))
    assert not tally.add(History(LAYOUTS, steps))
    # A layout that no step meets makes no other history of it.
    assert not tally.add(History(LAYOUTS[:1], steps))
    assert tally.add(History(LAYOUTS, steps[::-1]))
    assert tally.count == 2


def test_fewer_histories_than_were_asked_for_fail_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # There are three that count, one too short, and each is drawn in two ways.
    few = st.integers(0, 7).map(lambda n: History(LAYOUTS, (Delete(0),) * 2 + (Set(0, b"\x30"),) * (n // 2 + 1)))
    monkeypatch.setattr(histories, "histories", lambda generation: few)
    assert try_histories("7.2", 3, lambda history: None).count == 3
    with pytest.raises(AssertionError, match="only 3 histories of 4 steps and more, of 4 asked for"):
        try_histories("7.2", 4, lambda history: None)


class _Wrong:
    """A process of which one answer in a while is wrong."""

    def __init__(self, process: Process, wrong: type[Operation]) -> None:
        self._process = process
        self._wrong = wrong

    def play(self, *operations: Operation, where: str = "here") -> list[Answer]:
        answers = self._process.play(*operations, where=where)
        for at, (one, answer) in enumerate(zip(operations, answers, strict=True)):
            # Only where the VM is not the first of its number.
            made = sum(isinstance(other, Create) and other.vm == one.vm for other in operations[:at])
            if isinstance(one, self._wrong) and answer == DONE and made > 1:
                answers[at] = Answer(5)
        return answers


@pytest.mark.parametrize("wrong", [Set, Touch])
def test_a_disagreement_is_told_with_the_shortest_history(wrong: type[Operation]) -> None:
    kernel = SimulatedKernel("4.19")

    def play(history: History) -> None:
        with kernel.process() as one, kernel.process() as other:
            agree(one, _Wrong(other, wrong), history)

    with pytest.raises(AssertionError, match="the kernels disagree") as failed:
        try_histories("4.19", 200, play)
    kernel.close()
    told = "\n".join([str(failed.value), *failed.value.__notes__])
    # It takes three steps: two that have the VM made and made anew, and the one that is answered wrongly.
    assert len(re.findall(r"^ +Create\(", told, re.M)) == 2, told
    assert len(re.findall(r"^ +Delete\(", told, re.M)) == 2, told
    assert len(re.findall(r"^ +(Set|Touch|KeyOp)\(", told, re.M)) <= 2, told
    assert ", keys=1 [" in told or wrong is Touch, told
    assert told.count("real ") == 1, told


def test_the_page_says_how_many_histories_the_full_run_has() -> None:
    asked = re.search(r"SKEYD_HISTORIES=(\d+)", (ROOT / "Makefile").read_text())
    assert asked
    count = int(asked[1])
    said = f"{count:,} histories in one process and {max(4, count // 8)} in new ones"
    assert said in " ".join((ROOT / "docs/kernel.md").read_text().split())
