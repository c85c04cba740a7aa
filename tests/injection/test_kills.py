"""Tracers that are killed, at each step and at any moment: the process goes on as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
from functools import partial
from pathlib import Path

import pytest

from skeyd.injection import proc
from skeyd.injection.buffer import Buffer
from skeyd.injection.cave import Cave
from skeyd.injection.errors import AlreadyTracedError, GoneError, InUseError, TimedOutError
from skeyd.injection.injection import Injection
from skeyd.injection.machine import this_machine
from skeyd.injection.registers import Call
from skeyd.injection.target import Target
from skeyd.injection.tracee import Tracee
from tests.injection.test_calls import FUTEX, GETPID, PPOLL, READ, X86, hold
from tests.injection.tracers import count_steps, fork, kill_after, kill_at, run, session
from tests.injection.victims import SECONDS, Victim, differences, python_victim, wait_for

pytestmark = [pytest.mark.usefixtures("victims"), pytest.mark.timeout(300)]

KILLS = int(os.environ.get("SKEYD_KILLS_INJECTION", "100"))


def in_child(pid: int) -> None:
    run(lambda: session(pid))


def turns(victim: Victim) -> None:
    """See that the mode loop goes on: both threads run, and all that it computes and waits for is right."""
    assert victim.ping() == 0
    before = victim.total()
    wait_for(lambda: victim.total() > before + 1)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_tracer_that_is_killed_at_any_step_harms_nothing_and_leaves_nothing_to_the_next(after: bool) -> None:
    with Victim("loop") as victim:
        in_child(victim.pid)
        turns(victim)
        before = victim.look()
        steps = count_steps(victim.pid)
        assert steps > 40
        for step in range(steps):
            assert kill_at(victim.pid, step, after), f"step {step} of {steps}"
            turns(victim)
            in_child(victim.pid)
            assert differences(before, victim.look()) == {}, f"step {step} of {steps}"


def test_registers_are_what_they_were_whichever_step_a_tracer_is_killed_at() -> None:
    with Victim("registers") as victim:
        for step in range(count_steps(victim.pid)):
            assert kill_at(victim.pid, step, step % 2 == 1)
            assert victim.ping() == 0
            in_child(victim.pid)
        victim.say("wake")
        # What lies further below the stack than a function may use has the last block in it: that isn't put back.
        assert victim.result().value in (0, *range(1000 + 129, 1000 + 8192))


@pytest.mark.parametrize(
    ("mode", "number", "value"),
    [("ppoll", PPOLL, 1), ("ppoll-mask", PPOLL, 1), ("read", READ, 5), ("futex", FUTEX, 0)],
)
def test_an_interrupted_wait_is_waited_for_again_whichever_step_a_tracer_is_killed_at(
    mode: str, number: int, value: int
) -> None:
    with Victim(mode) as victim:
        for step in range(count_steps(victim.pid)):
            victim.wait_until_in(number)
            assert kill_at(victim.pid, step, step % 2 == 0)
            in_child(victim.pid)
        assert victim.ping() == 0
        victim.wait_until_in(number)
        victim.say("wake")
        result = victim.result()
        assert (result.value, result.errno) == (value, 0)


@pytest.mark.skipif(not X86, reason="on s390x it ends early with EINTR; docs/injection.md says why")
@pytest.mark.parametrize("mode", ["poll", "nanosleep", "futex"])
def test_a_wait_for_some_time_keeps_its_end_whichever_step_a_tracer_is_killed_at(mode: str) -> None:
    with Victim("loop") as victim:
        steps = count_steps(victim.pid)
    for step in range(0, steps, 2):
        with Victim(mode, "150") as victim:
            assert kill_at(victim.pid, step, step % 4 == 0)
            result = victim.result()
            assert (result.value, result.errno) == ((-1, 110) if mode == "futex" else (0, 0)), f"step {step}"
            assert result.seconds >= 0.15


def test_a_tracer_that_is_killed_at_any_moment_harms_nothing() -> None:
    rng = random.Random(5)  # noqa: S311  no secret
    with Victim("loop") as victim, python_victim() as interpreter:
        in_child(victim.pid)
        turns(victim)
        before = victim.look()
        for _ in range(KILLS):
            for one in (victim, interpreter):
                kill_after(partial(session, one.pid), rng.random() * 0.03)
            turns(victim)
            assert interpreter.ping() == 499500
        in_child(victim.pid)
        assert differences(before, victim.look()) == {}


def test_a_signal_that_comes_before_a_tracer_is_killed_is_delivered_once(tracers: list[int]) -> None:
    reading, writing = os.pipe()
    with Victim("loop") as victim:

        def holder(calls: bool) -> None:
            with Target(victim.pid) as target, Injection(target, seconds=SECONDS) as injection:
                injection.call(Call("getpid", GETPID, ()))
                os.kill(victim.pid, signal.SIGUSR1)
                os.write(writing, b"x")
                while calls:
                    injection.call(Call("getpid", GETPID, ()))
                signal.pause()

        for number in range(20):
            tracers.append(fork(partial(holder, number % 2 == 0)))
            assert os.read(reading, 1) == b"x"
            os.kill(tracers[-1], signal.SIGKILL)
            os.waitpid(tracers.pop(), 0)
            wait_for(lambda number=number: victim.ping() == number + 1)
        before = victim.total()
        wait_for(lambda: victim.total() > before + 1)
        assert victim.ping() == 20
    os.close(reading)
    os.close(writing)


def left_in_a_call(victim: Victim, tracers: list[int]) -> None:
    """Have a tracer killed that has a thread in a call which doesn't end."""

    def stuck() -> None:
        with Target(victim.pid) as target, Injection(target, seconds=SECONDS) as injection:
            injection.call(Call("read", READ, (3, 0, 16)))

    tracers.append(fork(stuck))
    path = Path(f"/proc/{victim.pid}/task/{victim.pid}/syscall")
    wait_for(lambda: path.read_text().startswith(f"{READ} 0x3 "))
    os.kill(tracers[0], signal.SIGKILL)
    os.waitpid(tracers.pop(), 0)
    victim.wait_until_in(READ)


def no_time(injection: Injection, cave: Cave) -> None:
    raise TimedOutError(injection.target.pid, "a test has no time")


def test_a_thread_that_a_killed_tracer_left_in_a_call_is_brought_back_by_the_next(
    tracers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Victim("futex") as victim:
        victim.wait_until_in(FUTEX)

        left_in_a_call(victim, tracers)
        # One that has no time for it takes nothing away from under the thread.
        with Target(victim.pid) as target, monkeypatch.context() as patch:
            patch.setattr(Injection, "_leave_stub", no_time)
            with pytest.raises(TimedOutError):
                Injection(target).__enter__()
        victim.wait_until_in(READ)
        hold(victim.pid)
        victim.wait_until_in(FUTEX)
        victim.say("wake")
        assert victim.result().value == 0


def test_a_handler_that_returns_to_where_a_killed_tracer_left_its_thread_finds_the_stub_there(
    tracers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_the_handler(self: Tracee, deadline: float) -> None:
        # A signal comes right before the thread is stopped: in front of the handler's first instruction.
        if not signals:
            signals.append(signal.SIGUSR1)
            os.kill(self.pid, signal.SIGUSR1)
            wait_for(lambda: proc.status(self.pid, self.tid)["State"][0] == "t")
        stop(self, deadline)

    stop, signals = Tracee.stop, list[signal.Signals]()
    with Victim("futex") as victim:
        victim.wait_until_in(FUTEX)
        left_in_a_call(victim, tracers)
        monkeypatch.setattr(Tracee, "stop", in_the_handler)
        hold(victim.pid)
        assert signals
        victim.wait_until_in(FUTEX)
        victim.say("wake")
        result = victim.result()
        assert (result.value, result.signals) == (0, 1)


def test_what_a_killed_tracer_left_is_taken_over_where_it_fits_and_unmapped_where_not() -> None:
    with Victim("loop") as victim:
        in_child(victim.pid)
        before = victim.look()
        for size in (5000, 5000, 9000, 5000):

            def left(size: int = size) -> None:
                with Target(victim.pid) as target, Injection(target, seconds=SECONDS) as injection:
                    Buffer.open(injection, size)
                    os.kill(os.getpid(), signal.SIGKILL)

            os.waitpid(fork(left), 0)
            (new,) = set(str(victim.look()["maps"]).splitlines()) - set(str(before["maps"]).splitlines())
            start, _, end = new.split()[0].partition("-")
            assert int(end, 16) - int(start, 16) == 4096 + -(-size // 4096) * 4096
        in_child(victim.pid)
        assert differences(before, victim.look()) == {}


def test_memory_of_the_process_own_is_never_taken_for_what_was_left() -> None:
    with Victim("loop") as victim, Target(victim.pid) as target:
        turns(victim)  # after which its second thread has the memory that it needs to answer
        lines = str(victim.look()["maps"]).splitlines()
        heap = next(line for line in lines if line.endswith("[heap]")).split()[0].split("-")
        start, end = (int(word, 16) for word in heap)
        with Injection(target, seconds=SECONDS) as injection:
            injection.write_note(start, end - start, 1 << 32 | 0x7FFFFFFF)
        with Injection(target, seconds=SECONDS) as injection:
            buffer = Buffer.open(injection, 5000)
            buffer.close(injection)
        assert str(victim.look()["maps"]).splitlines() == lines
        turns(victim)


# --- others who are there --------------------------------------------------------------------------------------------


def test_a_second_tracer_is_told_of_the_first(tracers: list[int]) -> None:
    reading, writing = os.pipe()
    with Victim("read") as victim:

        def holder() -> None:
            with Target(victim.pid) as target, Injection(target, seconds=SECONDS):
                os.write(writing, b"x")
                signal.pause()

        tracers.append(fork(holder))
        assert os.read(reading, 1) == b"x"
        with Target(victim.pid) as target:
            for thread in target.threads():
                with pytest.raises(AlreadyTracedError, match=f"traced by process {tracers[0]} ") as refused:
                    Injection(target, thread.tid).__enter__()
                assert refused.value.tracer == tracers[0]
        os.kill(tracers[0], signal.SIGKILL)
        os.waitpid(tracers.pop(), 0)
        hold(victim.pid)
        victim.say("wake")
        assert victim.result().value == 5
    os.close(reading)
    os.close(writing)


def test_a_buffer_whose_owner_lives_is_not_taken_from_it_and_ones_own_is(tracers: list[int]) -> None:
    with Victim("loop") as victim, Target(victim.pid) as target:
        told, telling = os.pipe()

        def owner() -> None:
            with Target(victim.pid) as its_target, Injection(its_target, seconds=SECONDS) as injection:
                Buffer.open(injection, 5000)
            os.write(telling, b"!")
            signal.pause()

        tracers.append(fork(owner))
        assert os.read(told, 1) == b"!"
        os.close(told)
        os.close(telling)
        with Injection(target, seconds=SECONDS) as injection:
            with pytest.raises(InUseError, match=f"used by process {tracers[0]} ") as refused:
                Buffer.open(injection, 5000)
            assert refused.value.owner == tracers[0]
        os.kill(tracers[0], signal.SIGKILL)
        os.waitpid(tracers.pop(), 0)
        with Injection(target, seconds=SECONDS) as injection:
            taken = Buffer.open(injection, 5000).address
            # What this process has lost itself, too.
            buffer = Buffer.open(injection, 5000)
            assert buffer.address == taken
            buffer.close(injection)
        turns(victim)


def test_the_stub_is_gone_when_nobody_needs_it_and_there_while_a_buffer_is() -> None:
    machine = this_machine()
    assert machine is not None
    with Victim("loop") as victim, Target(victim.pid) as target:

        def stub() -> bytes:
            address = Cave.find(victim.pid, target.memory, machine).address
            return target.memory.read(address, 64)

        assert not any(stub())
        with Injection(target, seconds=SECONDS) as injection:
            assert stub().startswith(machine.STUB)
            buffer = Buffer.open(injection, 16)
        assert stub().startswith(machine.STUB)
        with Injection(target, seconds=SECONDS) as injection:
            buffer.close(injection)
        assert not any(stub())


# --- a process that ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "held", "in a call"])
def test_a_process_that_ends_is_gone_and_nothing_else(when: str) -> None:
    with Victim("read") as victim, Target(victim.pid) as target:
        if when == "before":
            victim.process.kill()
            victim.process.wait()
            with pytest.raises(GoneError):
                Injection(target).__enter__()
            return
        with pytest.raises(GoneError):
            until_it_ends(target, victim, when == "in a call")
    with pytest.raises(GoneError):
        Target(victim.pid)


def until_it_ends(target: Target, victim: Victim, in_a_call: bool) -> None:
    path = Path(f"/proc/{victim.pid}/task/{victim.pid}/syscall")

    def kill() -> None:
        if in_a_call:
            wait_for(lambda: path.read_text().startswith(f"{READ} 0x3 "))
        os.kill(victim.pid, signal.SIGKILL)

    with Injection(target, seconds=SECONDS) as injection:
        child = fork(kill)
        try:
            if in_a_call:
                injection.call(Call("read", READ, (3, 0, 16)))
            while True:
                injection.call(Call("getpid", GETPID, ()))
        finally:
            os.waitpid(child, 0)
