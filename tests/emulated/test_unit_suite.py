"""The whole unit suite on big-endian machines: Debian's Python, grpcio, protobuf and structlog, and a real /dev/kvm."""

from __future__ import annotations

import os
from typing import Final

import pytest

from tests.emulated import unit_suite
from tests.emulated.fixtures import SUITES, suites

SECONDS: Final = 2700.0
"""For a third of the tests, which take a fifth of that on an idle machine; three times as long for all."""

pytestmark = [pytest.mark.emulated, pytest.mark.timeout(3 * SECONDS + 600)]

LEAST: Final = 5600
"""Of all tests, so many pass at least: a suite that isn't collected any more would pass, too."""
LEAST_OF_A_SHARE: Final = 1150
"""The same of one of three shares."""

ALL: Final = "SKEYD_ALL_UNIT_TESTS"
"""Set to 1: every host runs all tests. Otherwise each runs a share, so that together they run all.

Only where SKEYD_EMULATED_SUITES names the hosts, as CI does: it takes many minutes.
"""

PYTHON: Final = {"bookworm": "3.11", "trixie": "3.13", "forky": "3.14"}
# All three have these two, the floors of pyproject.toml; structlog's floor is bookworm's.
LIBRARIES: Final = {"grpcio": "1.51.1", "protobuf": "4.21.12"}
STRUCTLOG: Final = {"bookworm": "22.3", "trixie": "25.3", "forky": "25."}


@pytest.mark.skipif(SUITES not in os.environ, reason=f"takes many minutes; name the hosts in {SUITES} to run it")
@pytest.mark.parametrize("suite", suites())
def test_the_unit_suite_passes_on(suite: str, capfd: pytest.CaptureFixture[str]) -> None:
    def say(line: str) -> None:
        # It takes minutes: who waits sees how far it is.
        with capfd.disabled():
            print(f"\n{line}", end="", flush=True)  # noqa: T201

    shares = 1 if os.environ.get(ALL) == "1" else len(suites())
    outcome = unit_suite.run(suite, 3 * SECONDS / shares, say, suites().index(suite) % shares, shares)

    versions = outcome.versions
    assert (versions["byte order"], versions["machine"]) == ("big", "s390x")
    assert versions["python"].rpartition(".")[0] == PYTHON[suite]
    assert {name: versions[name] for name in LIBRARIES} == LIBRARIES
    assert versions["structlog"].startswith(STRUCTLOG[suite])
    failed = [half.end for half in outcome.halves if half.status != 0]
    assert not failed, f"the unit suite failed on {suite}:\n" + "\n".join(failed)
    assert outcome.count("failed") == outcome.count("error") == 0
    assert outcome.count("passed") >= (LEAST if shares == 1 else LEAST_OF_A_SHARE * 3 // shares)
