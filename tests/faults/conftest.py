"""One host to hurt for all tests here: what is judged after each case is that it can go on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.world import World


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Run it."""
    made = World()
    try:
        yield made
    finally:
        made.close()
