"""A QEMU, and a daemon that lets its VM be adopted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adoption.qemu_vm import KINDS
from tests.daemon import DaemonProcess
from tests.injection.qemu import Qemu, require_qemu
from tests.rpc.stubs import Stubs


@pytest.fixture(params=KINDS)
def qemu(request: pytest.FixtureRequest, runtime_dir: Path) -> Iterator[Qemu]:
    """Run one with a paused guest, in each of the ways of KINDS."""
    require_qemu()
    qemu = Qemu(runtime_dir, *KINDS[request.param])
    yield qemu
    qemu.close()


@pytest.fixture
def daemon(runtime_dir: Path) -> Iterator[DaemonProcess]:
    """Run one with --allow-adoption."""
    daemon = DaemonProcess(runtime_dir / "skeyd")
    try:
        daemon.start("--allow-adoption")
        yield daemon
    finally:
        daemon.end_everything()


@pytest.fixture
def stubs(daemon: DaemonProcess) -> Iterator[Stubs]:
    """Talk with the daemon."""
    with Stubs(daemon.target) as stubs:
        yield stubs
