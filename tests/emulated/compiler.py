"""Programs in C for the emulated hosts, compiled on this machine."""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.emulated.fixtures import REQUIRE, is_required

PROGRAM = "s390x-linux-gnu-gcc"
PACKAGES = "gcc-s390x-linux-gnu libc6-dev-s390x-cross"

FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror")


@functools.cache
def compiled(source: Path, *flags: str) -> bytes:
    """Compile one file with FLAGS and others into an s390x program, to `put` on a host.

    A program that the compiler refuses, or warns of, fails the test with what it said.
    """
    require_compiler()
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / source.stem
        done = subprocess.run(
            [PROGRAM, *FLAGS, *flags, "-o", str(program), str(source)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return program.read_bytes()


def require_compiler() -> None:
    """Skip the test where there is no compiler, or fail it where the emulated host is required."""
    if shutil.which(PROGRAM) is None:
        reason = f"This needs a compiler for s390x: apt-get install -y --no-install-recommends {PACKAGES}"
        if is_required():
            pytest.fail(reason, pytrace=False)
        pytest.skip(f"{reason} ({REQUIRE}=1 makes this a failure)")
