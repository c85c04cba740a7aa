"""One host to hurt for all tests here: what is judged after each case is that it can go on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.faults.world import World


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Run it; SKEYD_KILLS_KIND=owned has its VMs on this machine's own kernel."""
    made = World(os.environ.get("SKEYD_KILLS_KIND", "simulated"))
    try:
        yield made
    finally:
        made.close()
