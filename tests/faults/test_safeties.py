"""The worth of these tests: with a safety switched off, the test that is named for it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.faults.safeties import SAFETIES, Safety

ROOT: Final = Path(__file__).parents[2]
TESTS_FAILED: Final = 1
"""pytest's exit code; no test found and a file that can't be loaded have others."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a copy to break."""
    made = tmp_path_factory.mktemp("unsafe")
    for name in ("skeyd", "tests"):
        shutil.copytree(ROOT / name, made / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", made)
    return made


def run(copy: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Have pytest run tests of a copy."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)],
        cwd=copy,
        # No bytecode: a file changed twice within a second would be taken for what it was before.
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", ["injection/", ""], ids=["injection", "others"])
def test_with_all_safeties_on_their_tests_pass_and_none_is_skipped(copy: Path, part: str) -> None:
    # tests/injection forks, and is for a process without gRPC.
    tests = {safety.caught_by for safety in SAFETIES if safety.caught_by.startswith("injection/") == bool(part)}
    done = run(copy, *sorted(tests))
    assert done.returncode == 0, done.stdout
    assert " skipped" not in done.stdout, done.stdout


@pytest.mark.timeout(300)
@pytest.mark.parametrize("safety", SAFETIES, ids=lambda safety: safety.what)
def test_a_safety_that_is_off_is_noticed(copy: Path, safety: Safety) -> None:
    file = copy / "skeyd" / safety.file
    whole = file.read_text()
    assert whole.count(safety.old) == 1, "the safety has moved; move its row too"
    try:
        file.write_text(whole.replace(safety.old, safety.new))
        done = run(copy, safety.caught_by)
    finally:
        file.write_text(whole)
    assert done.returncode == TESTS_FAILED, done.stdout
