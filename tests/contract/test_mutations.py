"""The contract's worth: a simulation that breaks one rule breaks the test that has the rule's name.

And the random histories': most of them do what a kernel allows, and the shortest tells of a disagreement.
"""

from __future__ import annotations

import functools
import itertools
import os
import queue
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest
from hypothesis import settings

from skeyd.worker.protocol import SIMULATED_KERNELS
from tests.contract import histories
from tests.contract.histories import FEWEST, History, agree, try_histories
from tests.contract.mutations import MUTATIONS, Mutation
from tests.contract.operations import DONE, Answer, Create, Delete, KeyOp, Operation, Set, Touch
from tests.contract.simulated import SimulatedKernel
from tests.contract.subject import Process
from tests.emulated.fixtures import SUITES

ROOT: Final = Path(__file__).parents[2]
SIMULATION: Final = "skeyd/worker/simulated.py"
AT_ONCE: Final = 2
# Without the plugins that pytest would find by itself: to load them takes as long as all the rest.
PYTEST: Final = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
SAMPLE: Final = 40
"""Random histories that are enough to see what they are like."""
Outcome = subprocess.CompletedProcess[str]

_seconds = itertools.count(1_000_000_000)
TESTS_FAILED: Final = 1
"""pytest's exit code; no test found and a file that can't be loaded have others."""


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> queue.SimpleQueue[Path]:
    """Make copies of what the contract needs, as many as are tried at once."""
    copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for _ in range(AT_ONCE):
        copy = tmp_path_factory.mktemp("mutated")
        for name in ("skeyd", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        copies.put(copy)
    return copies


@pytest.fixture(scope="module")
def outcomes(copies: queue.SimpleQueue[Path]) -> dict[Mutation, Outcome]:
    """Try all mutations, some at once: each is a process that starts for longer than it runs."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(MUTATIONS, pool.map(functools.partial(run, copies), MUTATIONS), strict=True))


def run(copies: queue.SimpleQueue[Path], mutation: Mutation) -> Outcome:
    whole = (ROOT / SIMULATION).read_text()
    assert whole.count(mutation.old) == 1, "the rule has moved; move the mutation too"
    copy = copies.get()
    try:
        file = copy / SIMULATION
        file.write_text(whole.replace(mutation.old, mutation.new))
        # Python takes bytecode for that of a file of the same size and the same second; so no two have the same second.
        second = next(_seconds)
        os.utime(file, (second, second))
        return subprocess.run(
            [*PYTEST, f"tests/contract/{mutation.caught_by}"],
            cwd=copy,
            env={**os.environ, SUITES: "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    finally:
        copies.put(copy)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.rule)
def test_a_broken_rule_breaks_the_test_of_its_name(outcomes: dict[Mutation, Outcome], mutation: Mutation) -> None:
    done = outcomes[mutation]
    assert done.returncode == TESTS_FAILED, done.stdout
    assert mutation.shows in done.stdout, done.stdout


# --- random histories ----------------------------------------------------------------------------------------------


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


@pytest.mark.usefixtures("same_histories")
@pytest.mark.parametrize("wrong", [Set, Touch])
def test_a_disagreement_is_told_with_the_shortest_history(wrong: type[Operation]) -> None:
    kernel = SimulatedKernel("4.19")

    def play(history: History) -> None:
        with kernel.process() as one, kernel.process() as other:
            agree(one, _Wrong(other, wrong), history)

    with pytest.raises(AssertionError, match="the kernels disagree") as failed:
        try_histories("4.19", 200, play)
    kernel.close()
    told = str(failed.value)
    # It takes three steps: two that have the VM made and made anew, and the one that is answered wrongly.
    assert len(re.findall(r"^ +Create\(", told, re.M)) == 2, told
    assert len(re.findall(r"^ +Delete\(", told, re.M)) == 2, told
    assert len(re.findall(r"^ +(Set|Touch|KeyOp)\(", told, re.M)) <= 2, told
    assert ", keys=1 [" in told or wrong is Touch, told
    assert told.count("real ") == 1, told
