"""Calls in other processes, on a real s390x kernel: what `make test` has of tests/injection.

`make test-injection` has all of it, with tracers killed at each step. What differs on s390x (the stub, the registers,
the arguments that lie in memory) no other machine can show.
"""

from __future__ import annotations

import re
from typing import Final

import pytest

from tests.emulated.fixtures import suites
from tests.emulated.injecting import passes_on

SECONDS: Final = 600.0
TESTS: Final = [f"tests/injection/test_{name}.py" for name in ("calls", "exec", "target", "vm", "worst")]
LEAST: Final = 50
"""So many tests there are at least."""

pytestmark = [pytest.mark.emulated, pytest.mark.timeout(SECONDS + 300)]


# One is enough for what differs from x86_64, which is the machine and not the kernel; it takes a minute.
@pytest.mark.parametrize("suite", suites()[:1])
def test_processes_make_calls_and_go_on(suite: str) -> None:
    said = passes_on(suite, TESTS, {"SKEYD_SLICES": "20"}, SECONDS)
    assert len(re.findall(r"::\S+.* PASSED", said)) >= LEAST, said
