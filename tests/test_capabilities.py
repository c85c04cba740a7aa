"""The right to trace: who gives it up has it in no set and gets it back by no program, and all other rights stay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from skeyd.capabilities import CAP_SYS_PTRACE
from tests.daemon import DaemonProcess
from tests.vm_requests import simulated

SETS: Final = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
CAP_SETPCAP: Final = 8

# Does something and says what it had, what it has, and what a program has that it executes.
PROGRAM: Final = f"""
import json, subprocess, sys
from skeyd.capabilities import CAP_SYS_PTRACE, give_up, hold_back
def sets():
    with open("/proc/self/status") as status:
        found = dict(line.split() for line in status if line.startswith("Cap"))
    return [int(found[name + ":"], 16) for name in {SETS!r}]
if len(sys.argv) == 1:
    print(json.dumps(sets()))
else:
    before = sets()
    exec(sys.argv[1])
    after = sets()
    print(json.dumps([before, after, json.loads(subprocess.check_output(sys.orig_argv[:3]))]))
"""
Sets = dict[str, int]


@pytest.fixture(scope="module")
def as_root() -> list[str]:
    """Return what makes a command root's, in a user namespace where these tests aren't root's."""
    if os.geteuid() == 0:
        return []
    words = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*words, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("needs root, or a kernel that gives users namespaces of their own")
    return words


def run(through: list[str], does: str) -> tuple[Sets, Sets, Sets]:
    """Return the sets of a process before it does something and afterwards, and those of a program that it executes."""
    said = subprocess.check_output([*through, sys.executable, "-c", PROGRAM, does], text=True)
    before, after, executed = (dict(zip(SETS, sets, strict=True)) for sets in json.loads(said))
    return before, after, executed


def has(sets: Sets) -> list[str]:
    return [name for name in SETS if sets[name] >> CAP_SYS_PTRACE & 1]


def others(sets: Sets) -> Sets:
    return {name: value & ~(1 << CAP_SYS_PTRACE) for name, value in sets.items()}


def test_who_gives_it_up_has_it_in_no_set_and_nothing_that_it_executes_has(as_root: list[str]) -> None:
    before, after, executed = run(as_root, "give_up(CAP_SYS_PTRACE)")
    assert {"CapPrm", "CapEff", "CapBnd"} <= set(has(before))
    assert has(after) == has(executed) == []
    assert after == others(before)
    assert others(executed) == others(before)


def test_who_gives_it_up_twice_has_given_it_up(as_root: list[str]) -> None:
    _, after, _ = run(as_root, "give_up(CAP_SYS_PTRACE); give_up(CAP_SYS_PTRACE)")
    assert has(after) == []


def test_who_may_not_change_the_bounding_set_gives_up_all_else(as_root: list[str]) -> None:
    before, after, _ = run(as_root, f"hold_back({CAP_SETPCAP}); give_up(CAP_SYS_PTRACE)")
    assert (has(after), after["CapBnd"]) == (["CapBnd"], before["CapBnd"])


def test_who_holds_it_back_cant_use_it_and_what_it_executes_can(as_root: list[str]) -> None:
    before, after, executed = run(as_root, "hold_back(CAP_SYS_PTRACE)")
    assert has(after) == [name for name in has(before) if name != "CapEff"]
    assert others(after) == others(before)
    assert executed == before


@pytest.mark.parametrize(
    ("does", "then", "executed_then"),
    [
        ("hold_back", ["CapInh", "CapPrm", "CapBnd", "CapAmb"], ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"]),
        ("give_up", ["CapBnd"], ["CapBnd"]),
    ],
)
def test_it_is_the_same_for_a_user_whom_a_service_manager_gave_nothing_else(
    as_root: list[str], does: str, then: list[str], executed_then: list[str]
) -> None:
    # With the securebit programs that root executes have no more than others'.
    user = ["setpriv", "--securebits=+noroot", "--inh-caps=-all,+sys_ptrace", "--ambient-caps=-all,+sys_ptrace"]
    before, after, executed = run([*as_root, *user], f"{does}(CAP_SYS_PTRACE)")
    assert has(before) == list(SETS)
    assert (has(after), has(executed)) == (then, executed_then)


def sets_of(path: Path) -> Sets:
    found = dict(line.split()[:2] for line in (path / "status").read_text().splitlines() if line.startswith("Cap"))
    return {name: int(found[f"{name}:"], 16) for name in SETS}


@pytest.mark.parametrize(
    ("arguments", "has_it"), [([], []), (["--allow-adoption"], ["CapPrm", "CapBnd"])], ids=["by default", "adopting"]
)
def test_no_thread_of_the_daemon_uses_it_and_no_worker_of_another_kind_has_it(
    runtime_dir: Path, as_root: list[str], arguments: list[str], has_it: list[str]
) -> None:
    daemon = DaemonProcess(runtime_dir, tuple(as_root))
    try:
        daemon.start(*arguments)
        with daemon.connect() as client:
            client.create_vm(simulated("web", 4))
            tasks = list(Path(f"/proc/{daemon.pid}/task").iterdir())
            assert len(tasks) > 1
            assert all(has(sets_of(task)) == has_it for task in tasks)
            (worker,) = daemon.worker_pids()
            assert has(sets_of(Path(f"/proc/{worker}"))) == []
    finally:
        daemon.end_everything()
