"""Processes all of whose threads are held at once: none of them moves meanwhile, and afterwards all go on."""

from __future__ import annotations

import os
import random
import signal
import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from skeyd.injection import proc
from skeyd.injection.buffer import Buffer
from skeyd.injection.errors import AlreadyTracedError, GoneError, InjectionError, TimedOutError
from skeyd.injection.expiry import end_at, end_with_parent
from skeyd.injection.frozen import Frozen
from skeyd.injection.injection import Injection
from skeyd.injection.registers import Call
from skeyd.injection.target import Target
from skeyd.injection.tracee import Tracee
from tests.injection.test_calls import FIONREAD, FUTEX, GETPID, PPOLL, READ, VFORK, hold
from tests.injection.test_kills import turns
from tests.injection.tracers import Steps, count_steps_of, fork, kill_after, run
from tests.injection.victims import COUNTERS, SECONDS, Victim, differences, peek, python_victim, wait_for

pytestmark = [pytest.mark.usefixtures("victims"), pytest.mark.timeout(300)]

KILLS = int(os.environ.get("SKEYD_KILLS_INJECTION", "100"))
COUNTING: Final = struct.Struct(f"={COUNTERS}Q")
SIGNALS: Final = COUNTERS - 1


def counted(pid: int, at: int) -> tuple[int, ...]:
    found: tuple[int, ...] = COUNTING.unpack(peek(pid, at, COUNTING.size))
    return found


def calls(injection: Injection, times: int = 3) -> None:
    for _ in range(times):
        assert injection.call(Call("getpid", GETPID, ())) == injection.target.pid


def calls_while_nothing_moves(pid: int, at: int, injection: Injection) -> None:
    """Have calls made by a process whose counters are at an address."""
    before = counted(pid, at)
    calls(injection)
    assert counted(pid, at) == before


def all_go_on(pid: int, at: int) -> None:
    """See that every thread moves: each worker, the first, and the one that makes others."""
    before = counted(pid, at)
    wait_for(lambda: all(new > old for old, new in zip(before[:SIGNALS], counted(pid, at)[:SIGNALS], strict=True)))


def states(pid: int) -> dict[int, tuple[str, int]]:
    """Return of each thread how it is, and who traces it."""
    found = {tid: proc.status(pid, tid) for tid in proc.threads(pid)}
    return {tid: (status["State"][0], int(status["TracerPid"])) for tid, status in found.items() if status}


def freeze(pid: int, action: Callable[[Injection], None] = calls, seconds: float = SECONDS) -> None:
    with Target(pid) as target, Frozen(target, seconds) as injection:
        action(injection)


# --- all of them -----------------------------------------------------------------------------------------------------


def test_no_thread_moves_while_all_are_held_and_all_go_on_afterwards() -> None:
    with Victim("threads") as victim:
        at = victim.counters()
        all_go_on(victim.pid, at)

        def look(injection: Injection) -> None:
            before, held = counted(victim.pid, at), states(victim.pid)
            assert len(held) >= COUNTERS - 1
            assert set(held.values()) == {("t", os.getpid())}
            calls(injection, 20)
            end = time.monotonic() + 0.02
            while time.monotonic() < end:
                os.sched_yield()
            assert counted(victim.pid, at) == before
            assert states(victim.pid) == held

        for _ in range(20):
            run(partial(freeze, victim.pid, look))
            assert {tracer for _, tracer in states(victim.pid).values()} == {0}
        all_go_on(victim.pid, at)
        assert victim.ping() == 0


def test_a_thread_that_comes_while_others_are_being_held_is_held_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each list is read while one more thread than it has is there, until nobody is left to make any.
    listed = proc.threads
    with Victim("threads") as victim:
        at = victim.counters()
        late: list[int] = []

        def without_some(pid: int) -> list[int]:
            found = listed(pid)
            late.append(len(found))
            return found[: min(len(found), 5 * len(late))]

        def look(injection: Injection) -> None:
            before = counted(victim.pid, at)
            calls(injection)
            assert counted(victim.pid, at) == before
            assert {tracer for _, tracer in states(victim.pid).values()} == {os.getpid()}

        def held() -> None:
            monkeypatch.setattr(proc, "threads", without_some)
            with Target(victim.pid) as target, Frozen(target, SECONDS) as injection:
                monkeypatch.undo()
                look(injection)

        run(held)
        all_go_on(victim.pid, at)


@pytest.mark.parametrize(
    ("mode", "number", "value"),
    [("ppoll", PPOLL, 1), ("ppoll-mask", PPOLL, 1), ("read", READ, 5), ("futex", FUTEX, 0)],
)
def test_waits_are_gone_on_with(mode: str, number: int, value: int) -> None:
    with Victim(mode) as victim:
        victim.wait_until_in(number)
        for _ in range(20):
            run(partial(freeze, victim.pid))
        assert victim.ping() == 0
        victim.wait_until_in(number)
        victim.say("wake")
        result = victim.result()
        assert (result.value, result.errno) == (value, 0)


def test_a_process_is_afterwards_what_it_was() -> None:
    with Victim("loop") as victim, python_victim() as interpreter:
        for one in (victim, interpreter):
            run(partial(freeze, one.pid))
            one.ping()
            before = one.look()
            for _ in range(20):
                run(partial(freeze, one.pid))
            assert differences(before, one.look()) == {}
        turns(victim)
        assert interpreter.ping() == 499500


# --- signals ---------------------------------------------------------------------------------------------------------


def test_a_signal_waits_for_the_end_or_stops_in_front_of_its_handler_and_is_never_lost() -> None:
    with Victim("threads") as victim:
        at = victim.counters()
        # The first thread blocks signals until it has made the others, and two that are pending are one.
        all_go_on(victim.pid, at)

        def look(injection: Injection) -> None:
            before = counted(victim.pid, at)
            for _ in range(2):
                calls(injection)
                os.kill(victim.pid, signal.SIGUSR1)
                calls(injection)
                assert counted(victim.pid, at) == before

        for number in range(10):
            run(partial(freeze, victim.pid, look))
            # The handler of the first blocks the second, which is pending. A third would be one with that.
            wait_for(lambda number=number: counted(victim.pid, at)[SIGNALS] == 2 * (number + 1))
        all_go_on(victim.pid, at)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("when", ["before", "held, before calls", "held, after calls"])
def test_a_process_that_is_stopped_stays_so_and_goes_on_when_it_is_told(when: str) -> None:
    with Victim("threads") as victim:
        at = victim.counters()
        all_go_on(victim.pid, at)
        if when == "before":
            os.kill(victim.pid, signal.SIGSTOP)
            wait_for(lambda: state(victim.pid) == "T")

        def look(injection: Injection) -> None:
            before = counted(victim.pid, at)
            if when == "held, after calls":
                calls(injection)
            if when != "before":
                os.kill(victim.pid, signal.SIGSTOP)
            if when != "held, after calls":
                calls(injection)
            assert counted(victim.pid, at) == before

        run(partial(freeze, victim.pid, look))
        wait_for(lambda: {one for one, _ in states(victim.pid).values()} == {"T"})
        os.kill(victim.pid, signal.SIGCONT)
        all_go_on(victim.pid, at)


def test_a_process_that_is_told_to_go_on_waits_until_it_is_let_go() -> None:
    with Victim("threads") as victim:
        at = victim.counters()
        os.kill(victim.pid, signal.SIGSTOP)
        wait_for(lambda: {one for one, _ in states(victim.pid).values()} == {"T"})

        def look(injection: Injection) -> None:
            before = counted(victim.pid, at)
            os.kill(victim.pid, signal.SIGCONT)
            calls(injection)
            assert counted(victim.pid, at) == before

        run(partial(freeze, victim.pid, look))
        all_go_on(victim.pid, at)


# --- what is in the way ----------------------------------------------------------------------------------------------


def test_a_thread_that_nothing_stops_has_all_let_go_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first thread is in vfork: the second one is to make the calls, and is held, when it comes out.
    with Victim("vfork", "2600") as victim, Target(victim.pid) as target:
        victim.wait_until_in(VFORK)
        second = target.threads()[1].tid

        def refused() -> None:
            begin = time.monotonic()
            with Target(victim.pid) as its_target:
                monkeypatch.setattr(Target, "choose_thread", lambda _: second)
                with pytest.raises(TimedOutError, match=f"thread {victim.pid} did not stop in time"):
                    Frozen(its_target, 0.2).__enter__()
            assert time.monotonic() - begin < 2

        run(refused)
        # This end of the process that held them let go of the first one too.
        assert victim.ping() == 0
        result = victim.result()
        assert (result.value, result.signals) == (7, 0)


def test_another_tracer_of_any_thread_keeps_it_from_beginning(
    tracers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    with Victim("threads") as victim, Target(victim.pid) as target:
        at = victim.counters()
        all_go_on(victim.pid, at)
        other = target.threads()[5].tid

        def holder() -> None:
            Tracee.seize(victim.pid, other)
            os.write(writing, b"x")
            signal.pause()

        tracers.append(fork(holder))
        assert os.read(reading, 1) == b"x"
        with pytest.raises(AlreadyTracedError, match=f"traced by process {tracers[0]} "):
            Frozen(target, SECONDS).__enter__()
        # One that comes after the look at who traces is met when that thread is to be held.
        monkeypatch.setattr(Target, "check_untraced", lambda *_: None)
        with pytest.raises(AlreadyTracedError, match=f"traced by process {tracers[0]} ") as refused:
            Frozen(target, SECONDS).__enter__()
        assert refused.value.tracer == tracers[0]
        all_go_on(victim.pid, at)
        assert {tracer for _, tracer in states(victim.pid).values()} == {0, tracers[0]}
        os.kill(tracers[0], signal.SIGKILL)  # else its thread would be a zombie, and the process never at its end
        os.waitpid(tracers.pop(), 0)
    os.close(reading)
    os.close(writing)


def test_of_two_that_freeze_at_once_one_gets_on_and_the_other_is_told() -> None:
    with Victim("threads") as victim:
        at = victim.counters()

        look = partial(calls_while_nothing_moves, victim.pid, at)

        def several() -> None:
            done = 0
            while done < 5:
                try:
                    freeze(victim.pid, look)
                    done += 1
                except AlreadyTracedError:
                    os.sched_yield()

        children = [fork(several) for _ in range(2)]
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
        all_go_on(victim.pid, at)


@pytest.mark.parametrize("called", [False, True])
def test_a_process_that_is_killed_meanwhile_is_gone(called: bool) -> None:
    with Victim("threads") as victim:

        def look(injection: Injection) -> None:
            os.kill(victim.pid, signal.SIGKILL)
            while called:
                calls(injection)

        def ended() -> None:
            try:
                freeze(victim.pid, look)
            except GoneError:
                return
            assert not called

        run(ended)
        assert victim.process.wait(SECONDS) == -signal.SIGKILL


def test_the_time_is_for_all_of_it_the_calls_too() -> None:
    with Victim("threads") as victim:
        at = victim.counters()

        def read(injection: Injection) -> None:
            injection.call(Call("read", READ, (0, 0, 16)))

        def refused() -> None:
            begin = time.monotonic()
            with pytest.raises(TimedOutError, match="read"):
                freeze(victim.pid, read, 0.5)
            assert time.monotonic() - begin < SECONDS

        with pytest.raises(InjectionError):
            freeze(victim.pid, seconds=0.0)
        # A read of the pipe that nobody writes to: its standard input, which another thread waits at.
        run(refused)
        all_go_on(victim.pid, at)


# --- tracers that are killed -----------------------------------------------------------------------------------------


def session(pid: int) -> None:
    with Target(pid) as target:
        target.stub_is_ours = True  # as in tests.injection.tracers
        with Injection(target, seconds=SECONDS) as injection:
            buffer = Buffer.open(injection, 5000)
        with Frozen(target, SECONDS) as injection:
            for _ in range(2):
                buffer.write(0, b"\xff" * 4)
                assert injection.ioctl(0, FIONREAD, buffer.address) == 0
                assert buffer.read(0, 4) == bytes(4)
        with Injection(target, seconds=SECONDS) as injection:
            buffer.close(injection)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("mode", ["loop", "threads"])
def test_a_tracer_that_is_killed_at_any_step_lets_all_go_on(mode: str, after: bool) -> None:
    with Victim(mode) as victim:
        at = victim.counters()
        steps = count_steps_of(lambda: session(victim.pid))
        assert steps > 100
        for step in range(0, steps, 1 if mode == "loop" else 3):

            def killed(step: int = step) -> None:
                Steps(step, after).install()
                session(victim.pid)

            status = os.waitstatus_to_exitcode(os.waitpid(fork(killed), 0)[1])
            # With threads that come and go no two sessions have as many steps.
            assert status == -signal.SIGKILL or (status == 0 and mode == "threads" and step > steps // 2), step
            if mode == "loop":
                turns(victim)
            else:
                all_go_on(victim.pid, at)
            assert {tracer for _, tracer in states(victim.pid).values()} == {0}
        run(lambda: session(victim.pid))
        assert victim.ping() == 0


def test_a_tracer_that_is_killed_at_any_moment_lets_all_go_on() -> None:
    rng = random.Random(8)  # noqa: S311  no secret
    with Victim("threads") as victim, python_victim() as interpreter:
        at = victim.counters()
        for _ in range(KILLS):
            for one in (victim, interpreter):
                kill_after(partial(session, one.pid), rng.random() * 0.06)
            all_go_on(victim.pid, at)
            assert interpreter.ping() == 499500
        run(lambda: session(victim.pid))
        hold(victim.pid)
        assert victim.ping() == 0


# --- the time that the kernel keeps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [False, True])
def test_a_process_with_an_end_is_killed_then_and_what_it_holds_goes_on(stopped: bool) -> None:
    reading, writing = os.pipe()
    with Victim("threads") as victim:
        at = victim.counters()

        def holder() -> None:
            end_at(time.monotonic() + 0.4)
            with Target(victim.pid) as target, Frozen(target, SECONDS):
                os.write(writing, b"x")
                if stopped:
                    os.kill(os.getpid(), signal.SIGSTOP)
                while True:
                    pass

        child = fork(holder)
        begin = time.monotonic()
        os.close(writing)
        assert os.read(reading, 1) == b"x"
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert time.monotonic() - begin >= 0.3
        os.close(reading)
        all_go_on(victim.pid, at)


def test_a_process_ends_with_its_parent() -> None:
    reading, writing = os.pipe()

    def parent() -> None:
        me = os.getpid()
        told, telling = os.pipe()

        def child() -> None:
            end_with_parent(me)
            os.write(telling, b"x")
            signal.pause()

        fork(child)
        assert os.read(told, 1) == b"x"

    run(parent)

    def orphan() -> None:
        end_with_parent(1 << 22)
        os.write(writing, b"no")

    assert os.waitstatus_to_exitcode(os.waitpid(fork(orphan), 0)[1]) == -signal.SIGKILL
    os.close(writing)
    assert os.read(reading, 2) == b""
    os.close(reading)
