"""Random histories on a simulated and on a real kernel side by side: every answer and every key must agree.

SKEYD_HISTORIES is how many histories each kernel gets; the full run has 1,000, and 125 in new processes.
"""

from __future__ import annotations

from typing import Final

import pytest

from tests.contract.conftest import Kernels
from tests.contract.histories import HISTORIES, NEW_PROCESSES, History, agree, try_histories
from tests.contract.kernels import every_real_kernel
from tests.contract.real import RealKernel
from tests.contract.simulated import SimulatedKernel

TIMEOUT: Final = 600 + 3 * HISTORIES
"""Seconds; a history takes some third of one, two cores shared with others."""


def _simulation_of(kernels: Kernels, real: RealKernel) -> SimulatedKernel:
    simulated = kernels(f"simulated-{real.generation}")
    assert isinstance(simulated, SimulatedKernel)
    return simulated


@every_real_kernel
@pytest.mark.timeout(TIMEOUT)
def test_every_history_goes_the_same_way_in_a_process_that_uses_keys(kernels: Kernels, subject: RealKernel) -> None:
    simulated = _simulation_of(kernels, subject)
    try_histories(subject.generation, HISTORIES, lambda history: agree(simulated.shared, subject.shared, history))


@every_real_kernel
@pytest.mark.timeout(TIMEOUT)
def test_every_history_goes_the_same_way_in_a_new_process(kernels: Kernels, subject: RealKernel) -> None:
    def play(history: History) -> None:
        with _simulation_of(kernels, subject).process() as simulated, subject.process() as process:
            agree(simulated, process, history)

    try_histories(subject.generation, NEW_PROCESSES, play)
