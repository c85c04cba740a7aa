"""Calls in other processes on real s390x kernels: tests/injection and tests/adoption on the hosts.

With an unmodified QEMU as a victim: Debian's, with -accel kvm, plain and in the sandbox that libvirt puts it in.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

import pytest

from tests.emulated import unit_suite
from tests.emulated.compiler import compiled
from tests.emulated.fixtures import require_image, suites
from tests.emulated.host import EmulatedHost

SECONDS: Final = 1500.0
VICTIM: Final = Path(__file__).parents[1] / "injection" / "victim.c"
INSIDE: Final = "/srv/victim"
COUNTS: Final = {
    "SKEYD_SLICES": os.environ.get("SKEYD_SLICES", "100"),
    "SKEYD_KILLS_INJECTION": os.environ.get("SKEYD_KILLS_INJECTION", "25"),
    "SKEYD_KILLS_QEMU": os.environ.get("SKEYD_KILLS_QEMU", "25"),
    "SKEYD_ADOPTIONS": os.environ.get("SKEYD_ADOPTIONS", "10"),
    "SKEYD_KILLS_ADOPTED": os.environ.get("SKEYD_KILLS_ADOPTED", "10"),
}
"""A slice takes some tenths of a second there."""

FOR_X86_64: Final = 6
"""Tests that skip there, each with its reason."""

pytestmark = [pytest.mark.emulated, pytest.mark.timeout(SECONDS + 300)]


@pytest.mark.parametrize("suite", suites())
def test_processes_make_calls_and_go_on_as_if_nothing_had_been(suite: str) -> None:
    victim = compiled(VICTIM, "-pthread", "-std=gnu11")
    with EmulatedHost(require_image(suite), cpus=unit_suite.CPUS, append=unit_suite.APPEND) as host:
        unit_suite.install(host)
        host.put(INSIDE, victim, 0o755)
        done = host.run(
            [
                *("python3", "-m", "pytest", "tests/injection", "tests/adoption", "-v", "--tb=short", "--durations=0"),
                *("-p", "no:cacheprovider", "-o", f"timeout={SECONDS}"),
                *(f"-W{warning}" for warning in unit_suite.THEIR_WARNINGS),
            ],
            timeout=SECONDS,
            env={
                "PYTHONPATH": unit_suite.INSIDE,
                "SKEYD_VICTIM": INSIDE,
                "SKEYD_REQUIRE_INJECTION": "1",
                **COUNTS,
            },
            cwd=unit_suite.INSIDE,
            check=False,
        )
    said = done.stdout.decode(errors="replace")
    assert done.returncode == 0, said + done.stderr.decode(errors="replace")
    skipped = re.search(r"(\d+) skipped", said)
    assert skipped is not None
    assert int(skipped[1]) == FOR_X86_64, said
    assert (
        len(re.findall(r"test_qemu\w*\.py::\S+ PASSED", said)) == len(re.findall(r"test_qemu\w*\.py::\S+ ", said)) > 0
    )
