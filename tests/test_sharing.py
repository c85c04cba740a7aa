"""How tests are dealt out to several processes: each to one of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEALT = ("tests/test_gfn.py", "tests/test_checksum.py")


def collected(*options: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    lines = subprocess.run([*command, *options, *DEALT], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [line for line in lines.splitlines() if "::" in line]


def test_all_shares_together_are_all_tests_each_once() -> None:
    whole = collected()
    shares = [collected(f"--share={number}/3") for number in (1, 2, 3)]
    assert sorted(whole) == sorted(test for share in shares for test in share)
    assert min(map(len, shares)) > len(whole) // 6


def test_of_what_is_quartered_a_share_has_some_and_of_the_rest_all_that_is_its_own() -> None:
    quartered, other = DEALT
    before = collected("--share=2/2")
    after = collected("--share=2/2", f"--quarter-of={quartered}")
    assert [test for test in after if test.startswith(other)] == [test for test in before if test.startswith(other)]
    rest = [test for test in after if test.startswith(quartered)]
    whole = {test for test in before if test.startswith(quartered)}
    assert set(rest) < whole
    assert len(whole) // 10 < len(rest) < len(whole) // 2


def test_a_parameter_of_a_megabyte_has_a_short_name() -> None:
    module = "tests/rpc/test_messages.py"
    names = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider", module],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.splitlines()
    assert any("message-of-2000000" in name for name in names)
    assert max(map(len, names)) < 300
