"""What is in the way of calls: sandboxes, rights, no vDSO to write to. Each is named, and the process lives on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from skeyd.injection import cave
from skeyd.injection.errors import GoneError, NotAllowedError, RefusedError, TimedOutError, UnsupportedError
from skeyd.injection.injection import Injection
from skeyd.injection.machine import this_machine
from skeyd.injection.maps import mappings
from skeyd.injection.registers import Call
from skeyd.injection.target import Target
from tests.injection.test_calls import FIONREAD, FUTEX, READ, X86, hold
from tests.injection.test_kills import turns
from tests.injection.tracers import count_steps, kill_at, run, session
from tests.injection.victims import SECONDS, Victim, differences, wait_for

pytestmark = pytest.mark.usefixtures("victims")

ROOT = Path(__file__).parents[2]


# --- sandboxes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("forbidden-eperm", r"ioctl in process \d+ answered EPERM .*; its sandbox \(seccomp\) may be"),
        (
            "forbidden-enosys",
            r"ioctl in process \d+ answered ENOSYS .*; its sandbox \(seccomp\) may be",
        ),
        ("forbidden-trap", r"the sandbox \(seccomp\) of \d+ forbids the system call ioctl"),
    ],
)
def test_a_call_that_a_sandbox_forbids_is_named_and_the_process_lives_on(mode: str, said: str) -> None:
    with Victim(mode) as victim, Target(victim.pid) as target:
        victim.wait_until_in(READ)
        # The number of the call is what a trapped one seems to have returned; the descriptor is, on s390x.
        for fd in (0, target.machine.IOCTL):
            with Injection(target, seconds=SECONDS) as injection, pytest.raises(RefusedError, match=said) as refused:
                injection.ioctl(fd, FIONREAD, 0)
            assert refused.value.call == "ioctl"
            assert refused.value.by_seccomp is (True if mode == "forbidden-trap" else None)
        hold(victim.pid)
        victim.wait_until_in(READ)
        victim.say("wake")
        assert victim.result().value == 5


# --- rights ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_who_may_not_trace_is_told_so() -> None:
    def unprivileged(pid: int) -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        with Target(pid) as target:
            assert (target.uid, target.executable) == (0, "")
            with pytest.raises(NotAllowedError, match=r"the kernel does not allow tracing .*CAP_SYS_PTRACE"):
                Injection(target).__enter__()
            with pytest.raises(PermissionError):
                target.vm_fds()

    with Victim("read") as victim:
        run(lambda: unprivileged(victim.pid))
        hold(victim.pid)


def test_a_process_that_is_not_there_is_gone() -> None:
    with pytest.raises(GoneError, match="there is no process 4194305"):
        Target(4194305)
    with Victim("read") as victim, Target(victim.pid) as target:
        with pytest.raises(GoneError, match="there is no thread 4194305"):
            Injection(target, 4194305).__enter__()
        with Victim("read") as other:
            with pytest.raises(GoneError, match=f"{other.pid} is no thread of process {victim.pid}"):
                Injection(target, other.pid).__enter__()
            hold(other.pid)


# --- places ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_vdso(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no vDSO found, as where the kernel was booted with vdso=0."""
    monkeypatch.setattr(cave, "_in_vdso", lambda *_: iter(()))


def test_without_a_vdso_the_stub_lies_behind_the_code_of_a_file(no_vdso: None) -> None:
    machine = this_machine()
    assert machine is not None
    with Victim("loop") as victim, Target(victim.pid) as target:
        address = cave.Cave.find(victim.pid, target.memory, machine).address
        (there,) = (one for one in mappings(victim.pid) if one.start <= address < one.end)
        assert there.access == "r-xp"
        assert there.path.startswith("/")
        run(lambda: session(victim.pid))
        before = victim.look()
        for step in range(0, count_steps(victim.pid), 3):
            assert kill_at(victim.pid, step, step % 2 == 0)
            turns(victim)
            run(lambda: session(victim.pid))
        assert differences(before, victim.look()) == {}


def test_a_process_without_any_room_is_left_alone(no_vdso: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cave, "_in_files", lambda *_: iter(()))
    with Victim("futex") as victim, Target(victim.pid) as target:
        with pytest.raises(UnsupportedError, match="no code of process"):
            Injection(target).__enter__()
        victim.wait_until_in(FUTEX)
        victim.say("wake")
        assert victim.result().value == 0


@pytest.mark.skipif(not X86, reason="the sequence is written for x86_64")
def test_a_restartable_sequence_is_restarted_and_not_left_in_the_middle() -> None:
    with Victim("sequence") as victim:
        hold(victim.pid, 100)
        victim.say("wake")
        aborts = victim.result().value
        if aborts == -2:
            pytest.skip("this libc registers none")
        # One that is left in the middle is forgotten by the kernel, and aborted no more.
        assert aborts >= 100


def test_a_slice_that_has_no_time_left_lets_the_thread_go() -> None:
    with Victim("read") as victim, Target(victim.pid) as target:
        victim.wait_until_in(READ)
        with Injection(target, seconds=SECONDS) as injection:
            injection._deadline = 0.0
            with pytest.raises(TimedOutError, match="read"):
                injection.call(Call("read", READ, (3, 0, 16)))
        wait_for(lambda: "TracerPid:\t0\n" in Path(f"/proc/{victim.pid}/status").read_text())
        victim.say("wake")
        assert victim.result().value == 5


def test_what_a_worker_would_load_needs_no_site_packages() -> None:
    source = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import skeyd.injection.buffer\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", source], stdout=subprocess.PIPE, text=True, check=True)
    assert set(done.stdout.split()) - {"__main__"} == {"skeyd"}
