"""Emulated hosts for tests: one boot per suite and session, however many tests use it.

A conftest.py takes the fixture over with ``from tests.emulated.fixtures import emulated_hosts as emulated_hosts``.
"""

import os
from collections.abc import Iterator

import pytest

from tests.emulated import recipe
from tests.emulated.host import BootFailed, EmulatedHost
from tests.emulated.image import Image

REQUIRE = "SKEYD_REQUIRE_EMULATED"
SUITES = "SKEYD_EMULATED_SUITES"
DEFAULT_SUITES = "bookworm forky"
"""A kernel that loses keys, and one that has KEYOP."""


def is_required() -> bool:
    """Tell whether a test must fail, not be skipped, where there is no emulated host: in CI, or when asked to."""
    return os.environ.get("CI") == "true" or os.environ.get(REQUIRE) == "1"


def suites() -> list[str]:
    """Return the suites that tests are to run on: words of recipe.SUITES in SKEYD_EMULATED_SUITES, or DEFAULT_SUITES.

    Sorted as recipe.SUITES is: tests of one host follow one another, whatever the order of the words.
    """
    wanted = os.environ.get(SUITES, DEFAULT_SUITES).split()
    unknown = set(wanted) - set(recipe.SUITES)
    if unknown:
        raise ValueError(f"{SUITES} has {', '.join(sorted(unknown))}, which is none of {', '.join(recipe.SUITES)}")
    return [suite for suite in recipe.SUITES if suite in wanted]


def host_suites() -> list[str]:
    """Return the suites for tests that are about the host and skeyd on it: all of SKEYD_EMULATED_SUITES, or one.

    What kernels differ in is the contract's business (tests/contract), which runs on `suites()`.
    """
    return suites() if SUITES in os.environ else suites()[:1]


def require_image(suite: str) -> Image:
    """Return a suite's image, which is built. Where it isn't, the test is skipped, or fails if `is_required`.

    Never builds: that takes minutes, and a test's time limit would end it.
    """
    image = Image(suite)
    reason = image.missing()
    if reason is None and not image.is_built():
        reason = (
            f"The emulated host {suite} is not built. Once, some 5 minutes: python3 -m tests.emulated.image {suite}"
        )
    if reason is None:
        return image
    if is_required():
        pytest.fail(reason, pytrace=False)
    pytest.skip(f"{reason} ({REQUIRE}=1 makes this a failure)")


class EmulatedHosts:
    """Running hosts by what was asked for. Every test that asks for the same gets the same: leave no mess in it."""

    def __init__(self) -> None:
        self._hosts: dict[tuple[str, bool, int], EmulatedHost] = {}
        self._failures: dict[tuple[str, bool, int], BootFailed] = {}

    def __call__(self, suite: str = "bookworm", *, systemd: bool = False, cpus: int = 1) -> EmulatedHost:
        """Return a running host, booting it if it isn't there, or no longer.

        Raises BootFailed, at once where the same boot has failed before. Skips or fails as `require_image` does.
        """
        wanted = suite, systemd, cpus
        image = require_image(suite)
        if wanted in self._failures:
            raise self._failures[wanted]
        host = self._hosts.get(wanted)
        if host is not None and host.is_running():
            return host
        if host is not None:
            host.__exit__()
        host = EmulatedHost(image, systemd=systemd, cpus=cpus)
        try:
            host.__enter__()
        except BootFailed as failure:
            self._failures[wanted] = failure
            raise
        self._hosts[wanted] = host
        return host

    def close(self) -> None:
        """Stop them all."""
        while self._hosts:
            self._hosts.popitem()[1].__exit__()


# One for the process: several conftest.py may take the fixture over, and each is a fixture of its own to pytest.
_shared = EmulatedHosts()


@pytest.fixture(scope="session")
def emulated_hosts() -> Iterator[EmulatedHosts]:
    """Give tests the hosts they share, booted when first asked for."""
    yield _shared
    _shared.close()
