"""What the tests of a worker are held to: no descriptor stays open."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from skeyd.worker.protocol import Spec
from tests.worker.processes import WorkerProcess
from tests.worker.specs import simulated


@pytest.fixture(autouse=True)
def no_fd_left(open_fds: None) -> None:
    """Hold every test of this folder to it."""


@pytest.fixture
def start(runtime_dir: Path) -> Iterator[Callable[..., WorkerProcess]]:
    """Start worker processes, each in a directory of its own unless told otherwise; they end with the test."""
    with ExitStack() as undo:
        numbers = iter(range(100))

        def start(spec: Spec | bytes | None = None, directory: Path | None = None, **how: Any) -> WorkerProcess:
            if directory is None:
                directory = runtime_dir / str(next(numbers))
                directory.mkdir()
            if spec is None:
                spec = simulated((0, 4))
            return undo.enter_context(WorkerProcess(directory, spec, **how))

        yield start


@pytest.fixture
def worker(start: Callable[..., WorkerProcess]) -> WorkerProcess:
    """Start one simulated VM of 4 MiB, and wait until it serves."""
    worker = start()
    assert worker.first_line() == {"ok": {}}
    return worker


@pytest.fixture(scope="module")
def shared_worker() -> Iterator[WorkerProcess]:
    """Start one for all tests of a module that leave it as it was: without keys, without connections, alive."""
    with (
        tempfile.TemporaryDirectory(prefix="skeyd-") as directory,
        WorkerProcess(Path(directory), simulated((0, 4))) as worker,
    ):
        assert worker.first_line() == {"ok": {}}
        yield worker
        assert worker.process.poll() is None, "one of the tests has ended it"
