"""What the unit suite on emulated hosts leaves out is there to be left out, and nothing else goes with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.emulated.unit_suite import NOT_IN_A_SHARE, NOT_THERE, ROOT, left_out


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
def everything() -> set[str]:
    """Collect all tests."""
    return collected()


@pytest.fixture(scope="module")
def shared() -> set[str]:
    """Collect what runs on emulated hosts that take a share each."""
    return collected(*left_out(shares=3))


@pytest.fixture(scope="module")
def there() -> set[str]:
    """Collect what an emulated host runs that runs all tests."""
    return collected(*left_out(shares=1))


# A test that moves, or is renamed, would run there again, or its row say nothing.
def check(gone: set[str], names: tuple[str, ...]) -> None:
    for name in names:
        assert any(test.startswith(name) for test in gone), f"{name} is the beginning of no test's name"
    assert all(test.startswith(names) for test in gone)


@pytest.mark.timeout(240)
def test_every_name_is_that_of_a_test_and_no_other_test_is_left_out(
    everything: set[str], there: set[str], shared: set[str]
) -> None:
    check(everything - there, tuple(NOT_THERE))
    check(there - shared, tuple(NOT_IN_A_SHARE))


@pytest.mark.timeout(240)
def test_nearly_all_run_where_all_do(everything: set[str], there: set[str]) -> None:
    # These run there too, by themselves.
    by_themselves = ("tests/injection/", "tests/adoption/")
    assert len(there) >= 0.95 * sum(not test.startswith(by_themselves) for test in everything)


@pytest.mark.timeout(240)
def test_what_depends_on_the_machine_is_in_a_share(shared: set[str]) -> None:
    for name, least in {
        "tests/encoding/test_codec.py::": 25,
        "tests/encoding/test_runs.py::": 10,
        "tests/encoding/test_zstd.py::": 20,
        "tests/rpc/test_get_encodings.py::": 20,
        "tests/faults/test_client.py::test_a_chunk_that_is_wrong_never_reaches_the_kernel": 8,
        "tests/faults/test_worker.py::test_a_key_that_the_kernel_loses_is_set_again": 12,
        "tests/faults/test_worker.py::test_old_keys_that_are_damaged_are_never_set": 9,
    }.items():
        assert sum(test.startswith(name) for test in shared) >= least, name
