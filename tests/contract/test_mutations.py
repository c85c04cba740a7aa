"""The contract's worth: a simulation that breaks one rule breaks the test that has the rule's name."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.contract.mutations import MUTATIONS, Mutation
from tests.emulated.fixtures import SUITES

ROOT: Final = Path(__file__).parents[2]
SIMULATION: Final = "skeyd/worker/simulated.py"
_seconds = itertools.count(1_000_000_000)
TESTS_FAILED: Final = 1
"""pytest's exit code; no test found and a file that can't be loaded have others."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what the contract needs."""
    copy = tmp_path_factory.mktemp("mutated")
    for name in ("skeyd", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def write(copy: Path, simulation: str) -> None:
    file = copy / SIMULATION
    file.write_text(simulation)
    # Python takes bytecode for that of a file of the same size and the same second; so no two have the same second.
    second = next(_seconds)
    os.utime(file, (second, second))


def run(copy: Path, test: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/contract/{test}"]
    environment = {**os.environ, SUITES: ""}
    return subprocess.run(
        command, cwd=copy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.rule)
def test_a_broken_rule_breaks_the_test_of_its_name(copy: Path, mutation: Mutation) -> None:
    whole = (ROOT / SIMULATION).read_text()
    assert whole.count(mutation.old) == 1, "the rule has moved; move the mutation too"
    write(copy, whole.replace(mutation.old, mutation.new))
    done = run(copy, mutation.caught_by)
    assert done.returncode == TESTS_FAILED, done.stdout
    assert "AssertionError" in done.stdout or "Failed" in done.stdout, done.stdout


def test_the_rules_that_are_whole_break_nothing(copy: Path) -> None:
    write(copy, (ROOT / SIMULATION).read_text())
    for file in sorted({mutation.caught_by.partition("::")[0] for mutation in MUTATIONS}):
        done = run(copy, file)
        assert done.returncode == 0, done.stdout
