"""Which kernels a sentence of the contract is about: `over` is the mark of every test here."""

from __future__ import annotations

import os
from typing import Final

import pytest

from skeyd.worker.protocol import SIMULATED_KERNELS
from tests.emulated.fixtures import suites

GENERATION_OF_SUITE: Final = {"bookworm": "4.19", "trixie": "4.19", "forky": "7.2"}
"""What each suite's kernel is expected to follow; the fixture holds it against what boots."""

PLACE: Final = "SKEYD_CONTRACT_PLACE"
"""In the environment: "adopted" has every storage-key call on real kernels made through another process."""

_NAMES: Final = {suite: "-".join(filter(None, (suite, os.environ.get(PLACE)))) for suite in suites()}


def over(*generations: str, simulated: bool = True) -> pytest.MarkDecorator:
    """Run a test over all kernels of these generations that there are, simulated ones only where that is said."""
    kernels = [
        pytest.param(f"simulated-{one}", id=f"simulated-{one}")
        for one in SIMULATED_KERNELS
        if simulated and one in generations
    ]
    kernels += [
        pytest.param(name, id=name, marks=[pytest.mark.emulated, pytest.mark.timeout(600)])
        for suite, name in _NAMES.items()
        if GENERATION_OF_SUITE[suite] in generations
    ]
    return pytest.mark.parametrize("subject", kernels, indirect=True)


every_kernel = over(*SIMULATED_KERNELS)
up_to_6_19 = over("4.19")
since_7_0 = over("7.0", "7.2")
every_real_kernel = over(*SIMULATED_KERNELS, simulated=False)
real_up_to_6_19 = over("4.19", simulated=False)
real_since_7_0 = over("7.0", "7.2", simulated=False)
