"""Targets that promise a run on real kernels fail where there can be none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["test-kernels", "test-big-endian"]


def make(target: str, binaries: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Make a target with the programs of an environment, whose setting up isn't what is tested."""
    found = shutil.which("make")
    assert found is not None
    # What a machine says of CI and of the emulated hosts is not this test's.
    mine = {name: value for name, value in os.environ.items() if name != "CI" and not name.startswith("SKEYD_")}
    return subprocess.run(
        [found, "--no-print-directory", "-C", str(ROOT), "-o", ".venv/.ready", f"BIN={binaries}", target],
        env={**mine, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def program(path: Path, commands: str) -> None:
    """Write a program of the shell's."""
    path.write_text(f"#!/bin/sh\n{commands}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("target", TARGETS)
def test_without_images_and_what_builds_them_it_fails_and_says_what_is_missing(target: str, tmp_path: Path) -> None:
    only_a_shell = tmp_path / "bin"
    only_a_shell.mkdir()
    for name in ("bash", "sh"):
        (only_a_shell / name).symlink_to(f"/bin/{name}")
    # The tests would be skipped, which is a success.
    program(tmp_path / "python", f'exec {sys.executable} "$@"')
    program(tmp_path / "pytest", "exit 0")
    done = make(target, tmp_path, PATH=str(only_a_shell), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 2, done.stdout
    assert "lacks qemu-system-s390x mmdebstrap" in done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_a_test_that_finds_no_image_fails_too(target: str, tmp_path: Path) -> None:
    """The images may go, or the compiler be missing, after the first step."""
    for name in ("python", "pytest"):
        program(tmp_path / name, 'echo "${0##*/} $SKEYD_REQUIRE_EMULATED $SKEYD_EMULATED_SUITES"')
    done = make(target, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line for line in done.stdout.splitlines() if line.startswith(("python ", "pytest "))] == [
        "python 1 ",
        "pytest 1 bookworm trixie forky",
    ]
