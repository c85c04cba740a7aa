"""The kernels, and VMs on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.contract.kernels import GENERATION_OF_SUITE
from tests.contract.operations import HERE, Delete
from tests.contract.real import RealKernel
from tests.contract.simulated import SimulatedKernel
from tests.contract.subject import Process, Subject, Vm, new_vm
from tests.emulated.fixtures import EmulatedHosts
from tests.emulated.fixtures import emulated_hosts as emulated_hosts

MakeVm = Callable[..., Vm]


class Kernels:
    """Subjects by name, made when first asked for: a boot and a server for a session."""

    def __init__(self, hosts: EmulatedHosts) -> None:
        self._hosts = hosts
        self._kernels: dict[str, RealKernel | SimulatedKernel] = {}

    def __call__(self, name: str) -> RealKernel | SimulatedKernel:
        """Return a suite's kernel, SUITE-PLACE, or simulated-GENERATION."""
        if name not in self._kernels:
            self._kernels[name] = self._make(name)
        return self._kernels[name]

    def _make(self, name: str) -> RealKernel | SimulatedKernel:
        suite, _, place = name.partition("-")
        if suite not in GENERATION_OF_SUITE:
            return SimulatedKernel(place)
        kernel = RealKernel(self._hosts(suite), place or HERE)
        assert kernel.generation == GENERATION_OF_SUITE[suite], f"{suite} has {kernel.name} now"
        return kernel

    def close(self) -> None:
        """End them all."""
        while self._kernels:
            self._kernels.popitem()[1].close()


@pytest.fixture(scope="session")
def kernels(emulated_hosts: EmulatedHosts) -> Iterator[Kernels]:
    """Keep the kernels that a session has asked for."""
    made = Kernels(emulated_hosts)
    yield made
    made.close()


# A module's, so that a boot is no test's own: no test may leave a process behind.
@pytest.fixture(scope="module")
def subject(kernels: Kernels, request: pytest.FixtureRequest) -> RealKernel | SimulatedKernel:
    """Give a test the kernel that its mark names."""
    return kernels(request.param)


@pytest.fixture
def generation(subject: Subject) -> str:
    """Say whose rules the kernel follows."""
    return subject.generation


@pytest.fixture
def real(subject: RealKernel | SimulatedKernel) -> RealKernel:
    """Give a test the kernel where only real ones are asked for."""
    assert isinstance(subject, RealKernel)
    return subject


@pytest.fixture
def process(subject: Subject) -> Iterator[Process]:
    """Make a process in which nothing has happened yet."""
    with subject.process() as process:
        yield process


@pytest.fixture
def keyless_vm(process: Process) -> MakeVm:
    """Make the first VM of a new process, with slots of (start, size) in MiB; its guest uses no keys yet."""
    return lambda *wanted: new_vm(process, *wanted)


@pytest.fixture
def make_vm(subject: Subject) -> Iterator[MakeVm]:
    """Make a VM with slots of (start, size) in MiB, which uses storage keys; nothing was set or touched yet."""
    made: list[Vm] = []

    def make(*wanted: tuple[int, int]) -> Vm:
        vm = new_vm(subject.shared, *wanted, number=len(made))
        made.append(vm)
        # A zero key makes no page table.
        vm.accept((wanted or [(0, 4)])[0][0] * 256, b"\0")
        return vm

    yield make
    for vm in made:
        vm.process.play(Delete(vm.number))
