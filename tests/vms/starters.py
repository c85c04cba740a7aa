"""Starters for tests, with one VM's directory, and children that aren't what they should be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from skeyd.errors import SkeydError
from skeyd.vms import starter as starter_module
from skeyd.vms.runtime import RuntimeDirectory, VmDirectory
from skeyd.vms.starter import ChildStarter
from tests.processes import children, end
from tests.worker.specs import simulated


@pytest.fixture
def web(runtime_dir: Path) -> Iterator[VmDirectory]:
    """Make the directory of a VM that has no worker."""
    with RuntimeDirectory.open(runtime_dir) as runtime:
        directory = runtime.create_vm(simulated((0, 4)))
        yield directory
        directory.close()


def ended(starter: ChildStarter) -> Iterator[ChildStarter]:
    """Give a test a starter, and end what it started: the body of a fixture."""
    before = children()
    yield starter
    for child in children() - before:
        end(child)
    starter.reap()


def put_program(monkeypatch: pytest.MonkeyPatch, runtime_dir: Path, program: str) -> None:
    """Have a child that lies started in the place of the worker's program."""
    path = runtime_dir / "program.py"
    path.write_text(program)
    monkeypatch.setattr(starter_module, "_WORKER", str(path))


def refusal_of(starter: ChildStarter, web: VmDirectory) -> SkeydError:
    """Return why no worker was started. No child lives on."""
    before = children()
    with pytest.raises(SkeydError) as refused:
        starter.start(web, simulated((0, 4)))
    assert children() == before, "the child lives on"
    return refused.value
