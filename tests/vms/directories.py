"""Runtime directories for tests, with one VM that has no worker, and other processes that hold a lock in one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from skeyd.vms.runtime import RuntimeDirectory, VmDirectory
from tests.worker.specs import simulated

FRONT: Final = """
import sys
from pathlib import Path
from skeyd.vms.runtime import RuntimeDirectory
with RuntimeDirectory.open(Path(sys.argv[1])):
    print("open", flush=True)
    sys.stdin.read()
"""

LOCKER: Final = """
import os, sys
from skeyd.linux import take_lock
print(take_lock(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)), flush=True)
sys.stdin.read()
"""


@contextmanager
def another(program: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Run one of these programs: locks are a process's."""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() in ("open\n", "True\n")
        yield process
        process.kill()


def mode_of(path: Path) -> int:
    """Return who may do what with a file, a link not followed."""
    return path.lstat().st_mode & 0o7777


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Name a directory that isn't there yet."""
    return tmp_path / "run"


@pytest.fixture
def runtime(path: Path) -> Iterator[RuntimeDirectory]:
    """Open it as a front does."""
    with RuntimeDirectory.open(path) as runtime:
        yield runtime


@pytest.fixture
def web(runtime: RuntimeDirectory) -> Iterator[VmDirectory]:
    """Make the directory of a VM that has no worker."""
    directory = runtime.create_vm(simulated((0, 4)))
    yield directory
    directory.close()
