"""What the unit suite on emulated hosts leaves out is there to be left out, and nothing else goes with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.emulated.unit_suite import NOT_THERE, ROOT, left_out


def collected(*options: str) -> set[str]:
    """Return the names of all tests that pytest would run."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "tests", "--collect-only", "-q", "-m", "not emulated"),
            *("-p", "no:cacheprovider", *options),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line}


@pytest.fixture(scope="module")
def there() -> set[str]:
    """Collect what runs on an emulated host."""
    return collected(*left_out())


@pytest.mark.timeout(120)
def test_every_name_is_that_of_a_test_and_no_other_test_is_left_out(there: set[str]) -> None:
    gone = collected() - there
    # A test that moves, or is renamed, would run there again, or its row say nothing.
    for name in NOT_THERE:
        assert any(test.startswith(name) for test in gone), f"{name} is the beginning of no test's name"
    assert all(test.startswith(tuple(NOT_THERE)) for test in gone)


@pytest.mark.timeout(120)
def test_what_depends_on_the_machine_runs_there(there: set[str]) -> None:
    for name, least in {
        "tests/encoding/test_codec.py::": 25,
        "tests/encoding/test_runs.py::": 10,
        "tests/rpc/test_get_encodings.py::": 20,
        "tests/faults/test_client.py::test_a_chunk_that_is_wrong_never_reaches_the_kernel": 8,
        "tests/faults/test_worker.py::test_a_key_that_the_kernel_loses_is_set_again": 12,
        "tests/faults/test_worker.py::test_old_keys_that_are_damaged_are_never_set": 9,
    }.items():
        assert sum(test.startswith(name) for test in there) >= least, name
