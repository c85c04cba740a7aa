"""Front, worker and client killed at random moments, over VMs of a real kernel: tests/faults, run on the host."""

from __future__ import annotations

import os
import re
from typing import Final

import pytest

from tests.emulated import unit_suite
from tests.emulated.fixtures import host_suites, require_image
from tests.emulated.host import EmulatedHost

SECONDS: Final = 900.0
KILLS: Final = os.environ.get("SKEYD_KILLS_EMULATED", "100")
BATCH: Final = 25
"""As tests/faults/test_random_kills.py has it."""

pytestmark = [pytest.mark.emulated, pytest.mark.timeout(SECONDS + 300)]


# One host: it takes three minutes, and what kernels differ in is the contract's business. SKEYD_EMULATED_SUITES names
# another.
@pytest.mark.parametrize("suite", host_suites()[:1])
def test_whoever_is_killed_whenever_it_is_no_key_of_a_real_guest_is_lost(suite: str) -> None:
    with EmulatedHost(require_image(suite), cpus=unit_suite.CPUS, append=unit_suite.APPEND) as host:
        unit_suite.install(host)
        done = host.run(
            [
                *("python3", "-m", "pytest", "tests/faults/test_random_kills.py", "-v", "--tb=short", "--durations=0"),
                *("-p", "no:cacheprovider", "-o", f"timeout={SECONDS}"),
                *(f"-W{warning}" for warning in unit_suite.THEIR_WARNINGS),
            ],
            timeout=SECONDS,
            env={"PYTHONPATH": unit_suite.INSIDE, "SKEYD_KILLS": KILLS, "SKEYD_KILLS_KIND": "owned"},
            cwd=unit_suite.INSIDE,
            check=False,
        )
    said = done.stdout.decode(errors="replace")
    assert done.returncode == 0, said + done.stderr.decode(errors="replace")
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None
    assert int(passed[1]) == -(-int(KILLS) // BATCH)
