"""What the tests of the front's side are held to: no descriptor stays open."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_fd_left(open_fds: None) -> None:
    """Hold every test of this folder to it."""
