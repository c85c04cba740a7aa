"""A QEMU's VM, adopted, on real s390x kernels: what `make test` has of it, on one of each generation.

`make test-injection` has all of it, more often, and with more ways in which QEMU is run.
"""

from __future__ import annotations

import re
from typing import Final

import pytest

from tests.emulated.fixtures import suites
from tests.emulated.injecting import passes_on

SECONDS: Final = 900.0
COUNTS: Final = {"SKEYD_ADOPTIONS": "3", "SKEYD_KILLS_ADOPTED": "3"}
LEAST: Final = 15
"""So many tests there are at least."""
ALSO: Final = {"bookworm": "test_qemu_running", "forky": "test_memory_backends"}
"""What can be seen on one suite only: each skips on the others, and says why."""

pytestmark = [pytest.mark.emulated, pytest.mark.timeout(SECONDS + 300)]


# trixie's kernel is of bookworm's generation.
@pytest.mark.parametrize("suite", [suite for suite in suites() if suite != "trixie"])
def test_qemus_vms_are_adopted_and_let_go(suite: str) -> None:
    files = ["test_qemu", "test_qemu_frozen", "test_qemu_lives", ALSO[suite]]
    tests = [*(f"tests/adoption/{name}.py" for name in files), "-k", "not sandboxed and not memfd"]
    said = passes_on(suite, tests, COUNTS, SECONDS)
    assert len(re.findall(r"::\S+ PASSED", said)) >= LEAST, said
    assert " skipped" not in said, said
