"""What the tests of injection are held to: no descriptor stays open, and victims can be made."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from skeyd.injection.machine import this_machine
from tests.injection.victims import cannot, require_victims


@pytest.fixture(autouse=True)
def no_fd_left(open_fds: None) -> None:
    """Hold every test of this folder to it."""


@pytest.fixture
def victims(open_fds: None) -> None:
    """Ask for victims; skipped where there can be none."""
    if this_machine() is None:
        cannot(f"skeyd can't inject on {os.uname().machine}")
    require_victims()


@pytest.fixture
def tracers() -> Iterator[list[int]]:
    """Give a list for the pids of forked tracers, which are killed and reaped at the end if they are there still."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            continue
