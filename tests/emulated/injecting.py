"""Tests of calls in other processes, run on a host: with an unmodified QEMU, and with a victim compiled for it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from tests.emulated import unit_suite
from tests.emulated.compiler import compiled
from tests.emulated.fixtures import require_image
from tests.emulated.host import EmulatedHost

VICTIM: Final = Path(__file__).parents[1] / "injection" / "victim.c"
INSIDE: Final = "/srv/victim"


def passes_on(suite: str, tests: list[str], counts: Mapping[str, str], seconds: float) -> str:
    """Have pytest run these tests on a host, and return what it said. They must pass, in so many seconds.

    `counts` are the variables that say how often something is tried: a slice takes some tenths of a second there.
    """
    with EmulatedHost(require_image(suite), cpus=unit_suite.CPUS, append=unit_suite.APPEND) as host:
        unit_suite.install(host)
        host.put(INSIDE, compiled(VICTIM, "-pthread", "-std=gnu11"), 0o755)
        try:
            done = host.run(
                [
                    *("python3", "-m", "pytest", *tests, "-v", "--tb=short", "--durations=0"),
                    *("-p", "no:cacheprovider", "-o", f"timeout={seconds}"),
                    *(f"-W{warning}" for warning in unit_suite.THEIR_WARNINGS),
                ],
                timeout=seconds,
                env={
                    "PYTHONPATH": unit_suite.INSIDE,
                    "SKEYD_VICTIM": INSIDE,
                    "SKEYD_REQUIRE_INJECTION": "1",
                    **counts,
                },
                cwd=unit_suite.INSIDE,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            # Which test it was in is all there is to go by.
            pytest.fail(f"{error}\n{(error.stdout or b'').decode(errors='replace')}", pytrace=False)
    said = done.stdout.decode(errors="replace")
    assert done.returncode == 0, said + done.stderr.decode(errors="replace")
    return said
