"""VMs on the shared daemon for the tests of the API."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from skeyd.v1 import vm_pb2
from tests.daemon import DaemonProcess
from tests.rpc.stubs import Stubs, new_id

NewVm = Callable[..., str]


@pytest.fixture(scope="session")
def stubs(shared_daemon: DaemonProcess) -> Iterator[Stubs]:
    """Stubs on the shared daemon's unix socket."""
    with Stubs(shared_daemon.target) as made:
        yield made


@pytest.fixture
def new_vm(stubs: Stubs) -> Iterator[NewVm]:
    """Make simulated VMs, slots as (address, size) in MiB; they are deleted afterwards. Returns the name."""
    made: list[str] = []

    def make(
        *slots: tuple[int, int], kernel: vm_pb2.SimulatedKernel.ValueType = vm_pb2.SIMULATED_KERNEL_UNSPECIFIED
    ) -> str:
        made.append(stubs.create(new_id(), *slots, kernel=kernel).name)
        return made[-1]

    yield make
    for name in made:
        if name in stubs.names():
            stubs.delete(name)
