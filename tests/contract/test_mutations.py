"""The contract's worth: a simulation that breaks one rule breaks the test that has the rule's name."""

from __future__ import annotations

import functools
import itertools
import os
import queue
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from tests.contract.mutations import MUTATIONS, Mutation
from tests.emulated.fixtures import SUITES

ROOT: Final = Path(__file__).parents[2]
SIMULATION: Final = "skeyd/worker/simulated.py"
AT_ONCE: Final = 2
# Without the plugins that pytest would find by itself: to load them takes as long as all the rest.
PYTEST: Final = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
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
