"""malloc keeps what messages take, in a process of its own: what is set can't be taken back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from skeyd import malloc

# Four messages in flight, then none. Without the settings all is given back each time: a fault for each page.
FAULTS = """
import resource
from skeyd import malloc
if {tuned}:
    assert malloc.tune()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def messages():
    for _ in range(20):
        held = [bytearray(4 << 20) for _ in range(4)]
        del held
messages()
before = faults()
messages()
print(faults() - before)
"""


def _faults(tuned: bool) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(tuned=tuned)], capture_output=True, text=True, timeout=60, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="another libc")
def test_memory_of_messages_is_kept() -> None:
    assert _faults(tuned=True) < 1024
    assert _faults(tuned=False) > 1024, "else there is nothing to tune"


def test_another_libc_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        def mallopt(self, number: int, size: int) -> int:
            raise AssertionError("its numbers mean something else")

    monkeypatch.setattr("ctypes.CDLL", lambda _: Other())
    assert not malloc.tune()


def test_the_settings_are_whole_pages_and_keep_less_than_the_front_may_have() -> None:
    assert all(size % (1 << 20) == 0 for _, size in malloc.SETTINGS.values())
