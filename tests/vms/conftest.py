"""Registries with real workers; and what the tests of the front's side are held to: no descriptor stays open."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from skeyd.vms.registry import Registry
from skeyd.vms.runtime import RuntimeDirectory
from skeyd.vms.starter import ChildStarter
from skeyd.vms.vm import Vm
from tests.processes import children, end
from tests.worker.specs import simulated


@pytest.fixture(autouse=True)
def no_fd_left(open_fds: None) -> None:
    """Hold every test of this folder to it."""


@pytest.fixture
def runtime(runtime_dir: Path) -> Iterator[RuntimeDirectory]:
    with RuntimeDirectory.open(runtime_dir) as runtime:
        yield runtime


@pytest.fixture
def registry(runtime: RuntimeDirectory) -> Iterator[Registry]:
    """Make a registry that starts real workers; they end with the test."""
    before = children()
    starter = ChildStarter()
    made = Registry(runtime, starter)
    yield made
    made.close()
    for worker in children() - before:
        end(worker)
    starter.reap()


@pytest.fixture
def web(registry: Registry) -> Vm:
    """Make a VM with a real worker."""
    return registry.create(simulated((0, 4)))


@pytest.fixture
def forged(runtime: RuntimeDirectory, runtime_dir: Path) -> Path:
    """Make the directory of a VM as its starter would, without a worker."""
    runtime.create_vm(simulated((0, 4))).close()
    return runtime_dir / "vms" / "web"
