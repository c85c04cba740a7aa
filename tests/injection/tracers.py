"""Tracers that are killed: forked by a test, they count their own steps. The product has no switch for it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any, Final, NoReturn

from skeyd.injection import ptrace
from skeyd.injection.buffer import Buffer
from skeyd.injection.injection import Injection
from skeyd.injection.memory import Memory
from skeyd.injection.target import Target
from tests.injection.victims import SECONDS

SIZE: Final = 20000
FIONREAD: Final = 0x541B
_NEVER: Final = 1 << 60


def session(pid: int) -> None:
    """Do all that there is: map, call, write, read in one slice, call and unmap in another.

    Also where a killed one has left its stub: that is written anew and taken away, so that each has as many steps.
    """
    with Target(pid) as target:
        target.stub_is_ours = True
        with Injection(target, seconds=SECONDS) as injection:
            buffer = Buffer.open(injection, SIZE)
            buffer.write(0, b"\xff" * 4)
            assert injection.ioctl(0, FIONREAD, buffer.address) == 0
            assert buffer.read(0, 4) == bytes(4)
        with Injection(target, seconds=SECONDS) as injection:
            assert injection.ioctl(0, FIONREAD, buffer.address) == 0
            buffer.close(injection)


class Steps:
    """Counts a process's requests and moves of memory, and kills the process at one of them."""

    def __init__(self, last: int = _NEVER, after: bool = False) -> None:
        self.count = 0
        self._last = last
        self._after = after

    def install(self) -> None:
        """Wrap what every step goes through."""
        ptrace.request = self._wrapped(ptrace.request)
        Memory._moved = self._wrapped(Memory._moved)  # type: ignore[method-assign]

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            here = self.count == self._last
            self.count += 1
            if here and not self._after:
                os.kill(os.getpid(), signal.SIGKILL)
            answer = function(*arguments)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        return step


def fork(action: Callable[[], None]) -> int:
    """Do something in a process of its own, whose status is 0 where it succeeded; return its pid."""
    pid = os.fork()
    if pid == 0:
        _do(action)
    return pid


def _do(action: Callable[[], None]) -> NoReturn:
    status = 1
    try:
        action()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def count_steps_of(action: Callable[[], None]) -> int:
    """Return how many steps something has."""
    reading, writing = os.pipe()

    def counted() -> None:
        steps = Steps()
        steps.install()
        action()
        os.write(writing, str(steps.count).encode())

    child = fork(counted)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        said = file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return int(said)


def count_steps(pid: int) -> int:
    """Return how many steps a session has."""
    return count_steps_of(lambda: session(pid))


def kill_at(pid: int, step: int, after: bool) -> bool:
    """Have a session killed at a step; whether it came to that."""

    def killed() -> None:
        Steps(step, after).install()
        session(pid)

    status = os.waitstatus_to_exitcode(os.waitpid(fork(killed), 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def kill_after(action: Callable[[], None], seconds: float) -> None:
    """Have something that is done over and over killed, after some seconds."""

    def busy() -> None:
        while True:
            action()

    child = fork(busy)
    end = time.monotonic() + seconds
    # Not a sleep: the moment is what is drawn, down to the microsecond.
    while time.monotonic() < end:
        os.sched_yield()
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def run(action: Callable[[], None]) -> None:
    """Do something in a process of its own, and wait for its success."""
    assert os.waitstatus_to_exitcode(os.waitpid(fork(action), 0)[1]) == 0
