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


@pytest.mark.timeout(300)
@pytest.mark.parametrize("safety", SAFETIES, ids=lambda safety: safety.what)
def test_a_safety_that_is_off_is_noticed(copy: Path, safety: Safety) -> None:
    file = copy / "skeyd" / safety.file
    whole = file.read_text()
    assert whole.count(safety.old) == 1, "the safety has moved; move its row too"
    try:
        file.write_text(whole.replace(safety.old, safety.new))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{safety.caught_by}"],
            cwd=copy,
            # No bytecode: a file changed twice within a second would be taken for what it was before.
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    finally:
        file.write_text(whole)
    assert done.returncode == TESTS_FAILED, done.stdout
