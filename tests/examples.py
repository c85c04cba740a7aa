"""How many examples a property is tried on: its own number here, a share of it where the machine is slow."""

from __future__ import annotations

from typing import Final

from hypothesis import HealthCheck, settings

EMULATED: Final = "emulated"
"""The profile for an emulated host, whose CPU is some twenty times slower: `pytest --hypothesis-profile emulated`."""

LEAST: Final = 5
"""Fewer examples than these are no property any more."""

_WHOLE: Final = 100  # hypothesis's own number, which a profile makes smaller


def register() -> None:
    """Make the profile known. It takes effect for what is imported after it was chosen, as tests are."""
    settings.register_profile(EMULATED, max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def examples(count: int) -> int:
    """Return the share of a number of examples that the chosen profile leaves."""
    return max(count * settings().max_examples // _WHOLE, min(count, LEAST))
