"""Which process it is, which of its threads, and which VMs it has."""

from __future__ import annotations

import os
import time

import pytest

from skeyd.injection import proc
from skeyd.injection import target as target_module
from skeyd.injection.buffer import Buffer
from skeyd.injection.errors import GoneError, UnsupportedError
from skeyd.injection.injection import Injection
from skeyd.injection.registers import Call
from skeyd.injection.target import Target
from tests.injection.test_calls import X86, hold
from tests.injection.victims import SECONDS, Victim, program

PRCTL = 157 if X86 else 172
PR_SET_NAME = 15

pytestmark = pytest.mark.usefixtures("victims")


def test_a_target_says_who_it_is() -> None:
    with Victim("read") as victim, Target(victim.pid) as target:
        assert (target.pid, target.name, target.uid) == (victim.pid, "victim", os.geteuid())
        assert target.executable == program()
        assert 0 < target.start_time / os.sysconf("SC_CLK_TCK") <= time.clock_gettime(time.CLOCK_BOOTTIME) + 0.02
        assert target.vm_fds() == []
        first, second = target.threads()
        assert (first.tid, first.name, first.is_vcpu, second.is_vcpu) == (victim.pid, "victim", False, False)


def test_a_target_that_has_ended_is_gone_though_another_has_its_number_by_then() -> None:
    with Victim("read") as victim, Target(victim.pid) as target:
        victim.process.kill()
        victim.process.wait()
        with pytest.raises(GoneError, match=f"process {victim.pid} has ended"):
            target.check()
        with pytest.raises(GoneError):
            target.threads()


def test_a_target_that_was_closed_is_used_no_more() -> None:
    with Victim("read") as victim:
        with Target(victim.pid) as target:
            target.check()
        with pytest.raises(GoneError, match="nobody's target"):
            target.check()
        target.close()
        hold(victim.pid)


def test_the_first_thread_is_first_though_later_ones_have_lower_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    # As where the kernel's numbers have come to their end and begun anew.
    monkeypatch.setattr("os.listdir", lambda _: ["301", "32767", "300"])
    assert proc.threads(32767) == [32767, 300, 301]


def test_a_thread_that_runs_a_vcpu_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with Victim("read") as victim, Target(victim.pid) as target:
        first, second = (thread.tid for thread in target.threads())
        assert target.choose_thread() == first
        monkeypatch.setattr(Target, "_runs_a_vcpu", lambda _, tid: tid == first)
        assert target.choose_thread() == second
        monkeypatch.setattr(Target, "_runs_a_vcpu", lambda *_: True)
        with pytest.raises(UnsupportedError, match="no thread that is no vCPU's"):
            target.choose_thread()


def test_qemus_name_for_a_vcpus_thread_is_enough() -> None:
    with Victim("read") as victim, Target(victim.pid) as target:
        with Injection(target, seconds=SECONDS) as injection:
            buffer = Buffer.open(injection, 16)
            buffer.write(0, b"CPU 0/KVM\0")
            assert injection.checked(Call("prctl", PRCTL, (PR_SET_NAME, buffer.address))) == 0
            buffer.close(injection)
        assert target.threads()[0].is_vcpu
        assert target.choose_thread() != victim.pid


def test_a_machine_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "this_machine", lambda: None)
    with Victim("read") as victim, pytest.raises(UnsupportedError, match="can't have processes make calls on"):
        Target(victim.pid)
