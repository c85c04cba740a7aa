"""Fixtures of the tests on emulated hosts."""

from tests.emulated.fixtures import emulated_hosts as emulated_hosts
