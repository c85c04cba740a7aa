"""The process that holds a VMM for a worker: it lets go when the budget has passed, whatever becomes of anybody."""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.injection import proc
from skeyd.injection.errors import TimedOutError
from skeyd.injection.frozen import Frozen
from skeyd.injection.injection import Injection
from skeyd.injection.target import Target
from skeyd.worker.held_capture import HeldCapture
from tests.injection.test_frozen import all_go_on, calls_while_nothing_moves, counted, states
from tests.injection.tracers import fork
from tests.injection.victims import SECONDS, Victim, wait_for

pytestmark = [pytest.mark.usefixtures("victims"), pytest.mark.timeout(120)]


def reading(pid: int, action: Callable[[Injection], None]) -> Callable[[float], int]:
    def read(seconds: float) -> int:
        with Target(pid) as target, Frozen(target, seconds) as injection:
            action(injection)
        return 7

    return read


def spin(injection: Injection) -> None:
    while True:
        pass


def end_of(capture: HeldCapture) -> int | None:
    """Wait for its end, and take it."""
    assert capture.step() is None or pytest.fail("it has ended already")
    descriptor = capture.fileno()
    assert descriptor is not None
    assert select.select([descriptor], [], [], SECONDS)[0]
    return capture.step()


def is_held(pid: int) -> bool:
    return {state for state, _ in states(pid).values()} == {"t"}


def test_what_it_reads_is_told_after_all_was_let_go() -> None:
    with Victim("threads") as victim:
        at = victim.counters()

        look = partial(calls_while_nothing_moves, victim.pid, at)
        for _ in range(5):
            assert end_of(HeldCapture(reading(victim.pid, look), SECONDS)) == 7
            assert {tracer for _, tracer in states(victim.pid).values()} == {0}
        all_go_on(victim.pid, at)


@pytest.mark.parametrize("stopped", [False, True], ids=["busy", "stopped"])
def test_when_the_budget_has_passed_the_kernel_ends_it_and_all_go_on(stopped: bool) -> None:
    with Victim("threads") as victim:
        at = victim.counters()
        all_go_on(victim.pid, at)
        begin = time.monotonic()
        capture = HeldCapture(reading(victim.pid, spin), 1.0)
        wait_for(lambda: is_held(victim.pid))
        if stopped:
            (holder,) = {tracer for _, tracer in states(victim.pid).values()}
            os.kill(holder, signal.SIGSTOP)
        before = counted(victim.pid, at)
        assert victim.process.poll() is None
        assert counted(victim.pid, at) == before
        with pytest.raises(SkeydError, match="the freeze_budget of 1 s has passed") as refused:
            end_of(capture)
        assert refused.value.reason is Reason.FREEZE_EXPIRED
        assert 0.9 < time.monotonic() - begin < SECONDS
        all_go_on(victim.pid, at)


def test_what_notices_by_itself_that_the_time_is_over_says_what_was_in_the_way() -> None:
    with Victim("threads") as victim:
        at = victim.counters()

        def late(injection: Injection) -> None:
            raise TimedOutError(injection.target.pid, "a test has no time")

        with pytest.raises(SkeydError, match="a test has no time") as refused:
            end_of(HeldCapture(reading(victim.pid, late), SECONDS))
        assert refused.value.reason is Reason.FREEZE_EXPIRED
        all_go_on(victim.pid, at)


def test_one_that_nobody_waits_for_is_killed_and_all_go_on() -> None:
    with Victim("threads") as victim:
        at = victim.counters()
        capture = HeldCapture(reading(victim.pid, spin), SECONDS)
        wait_for(lambda: is_held(victim.pid))
        capture.cancel()
        with pytest.raises(SkeydError, match="ended with status -9") as refused:
            end_of(capture)
        assert refused.value.reason is Reason.WORKER_FAILED
        assert {tracer for _, tracer in states(victim.pid).values()} == {0}
        all_go_on(victim.pid, at)


@pytest.mark.parametrize("way", ["in order", "with an error", "budget", "cancelled", "closed"])
def test_whoever_made_it_is_told_that_it_may_have_ended_in_the_middle_of_something(way: str) -> None:
    def fail(injection: Injection) -> None:
        raise SkeydError(Reason.VM_DEAD, "gone")

    told: list[str] = []
    with Victim("threads") as victim:
        action = {"in order": lambda _: None, "with an error": fail}.get(way, spin)
        seconds = 0.5 if way == "budget" else SECONDS
        capture = HeldCapture(reading(victim.pid, action), seconds, partial(told.append, way))
        if action is spin:
            wait_for(lambda: is_held(victim.pid))
        match way:
            case "in order":
                assert end_of(capture) == 7
            case "with an error" | "budget":
                with pytest.raises(SkeydError):
                    end_of(capture)
            case "cancelled":
                capture.cancel()
                with pytest.raises(SkeydError):
                    end_of(capture)
        capture.close()
    assert told == ([way] if action is spin else [])


def test_with_the_worker_it_ends_and_all_go_on() -> None:
    with Victim("threads") as victim:
        at = victim.counters()

        def worker() -> None:
            HeldCapture(reading(victim.pid, spin), 10 * SECONDS)  # longer than is waited for here
            signal.pause()

        child = fork(worker)
        wait_for(lambda: is_held(victim.pid))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        wait_for(lambda: {tracer for _, tracer in states(victim.pid).values()} == {0})
        all_go_on(victim.pid, at)


def test_a_mistake_in_it_is_no_answer(capfd: pytest.CaptureFixture[str]) -> None:
    def wrong(_: float) -> int:
        raise ZeroDivisionError("a bug")

    with pytest.raises(SkeydError) as refused:
        end_of(HeldCapture(wrong, SECONDS))
    assert refused.value.reason is Reason.WORKER_FAILED
    assert "a bug" in capfd.readouterr().err


def test_its_refusals_are_those_of_a_worker() -> None:
    def dead(_: float) -> int:
        raise SkeydError(Reason.VM_DEAD, "gone", {"vmm_pid": "5"})

    with pytest.raises(SkeydError, match="gone") as refused:
        end_of(HeldCapture(dead, SECONDS))
    assert (refused.value.reason, refused.value.metadata) == (Reason.VM_DEAD, {"vmm_pid": "5"})


def test_one_whose_end_cant_be_awaited_does_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(pid: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", none_left)

    def for_ever(_: float) -> int:
        signal.pause()
        return 0

    with pytest.raises(OSError, match="Too many open files"):
        HeldCapture(for_ever, SECONDS)


def test_it_is_ended_by_sigterm_which_is_the_workers_no_more() -> None:
    with Victim("threads") as victim:
        at = victim.counters()
        capture = HeldCapture(reading(victim.pid, spin), SECONDS)
        wait_for(lambda: is_held(victim.pid))
        (holder,) = {tracer for _, tracer in states(victim.pid).values()}
        assert proc.status(holder, holder)["PPid"] == str(os.getpid())
        assert Path(f"/proc/{holder}/stat").exists()
        os.kill(holder, signal.SIGTERM)
        with pytest.raises(SkeydError, match="ended with status -15"):
            end_of(capture)
        all_go_on(victim.pid, at)
