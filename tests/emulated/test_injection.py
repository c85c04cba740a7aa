"""Calls in other processes on real s390x kernels: all of tests/injection and tests/adoption on the hosts.

With an unmodified QEMU as a victim: Debian's, with -accel kvm, plain and in the sandbox that libvirt puts it in.
"""

from __future__ import annotations

import os
import re
from typing import Final

import pytest

from tests.emulated.fixtures import suites
from tests.emulated.injecting import passes_on

SECONDS: Final = 3600.0
COUNTS: Final = {
    "SKEYD_SLICES": "100",
    "SKEYD_KILLS_INJECTION": "25",
    "SKEYD_KILLS_QEMU": "25",
    "SKEYD_ADOPTIONS": "10",
    "SKEYD_KILLS_ADOPTED": "10",
}
"""Unless the environment says otherwise."""

FOR_X86_64: Final = 6
"""Tests that skip there, each with its reason."""

FOR_OTHERS: Final = {"bookworm": 2, "forky": 1}
"""Tests that skip on one suite and run on another: memory devices take QEMU 10, and 7.x lets no guest run there."""

pytestmark = [pytest.mark.emulated, pytest.mark.timeout(SECONDS + 300)]


@pytest.mark.parametrize("suite", suites())
def test_processes_make_calls_and_go_on_as_if_nothing_had_been(suite: str) -> None:
    counts = {name: os.environ.get(name, count) for name, count in COUNTS.items()}
    said = passes_on(suite, ["tests/injection", "tests/adoption"], counts, SECONDS)
    skipped = re.search(r"(\d+) skipped", said)
    assert skipped is not None
    assert int(skipped[1]) == FOR_X86_64 + FOR_OTHERS.get(suite, 0), said
    assert (
        len(re.findall(r"test_qemu\w*\.py::\S+ PASSED", said)) == len(re.findall(r"test_qemu\w*\.py::\S+ ", said)) > 0
    )
