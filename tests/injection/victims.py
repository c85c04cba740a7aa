"""Processes for calls to be injected into, and what they look like from outside."""

from __future__ import annotations

import atexit
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pytest

from skeyd.injection.memory import Memory
from skeyd.injection.tracee import YAMA
from tests.processes import look_at

SOURCE: Final = Path(__file__).with_name("victim.c")
SECONDS: Final = 30.0
"""For what comes at once, on however busy a machine."""
PROGRAM: Final = "SKEYD_VICTIM"
"""Names the victim where there is no compiler, as on an emulated host."""
REQUIRE: Final = "SKEYD_REQUIRE_INJECTION"

COUNTERS: Final = 27
"""Of the mode threads: of each worker, of the threads that one makes, of the first, and how many signals there were."""

_MOVES: Final = (
    *("State", "VmRSS", "VmHWM", "RssAnon", "RssFile", "RssShmem", "VmPTE"),
    *("voluntary_ctxt_switches", "nonvoluntary_ctxt_switches", "SigQ"),
)
"""What of /proc/PID/status changes by itself; SigQ is the user's. RSS has the one page of text that is a copy."""


def cannot(why: str) -> None:
    """Skip the test, or fail it where it is required."""
    if os.environ.get(REQUIRE) == "1" or os.environ.get("CI") == "true":
        pytest.fail(why, pytrace=False)
    pytest.skip(f"{why} ({REQUIRE}=1 makes this a failure)")


@cache
def program() -> str:
    """Compile the victim, once, or take one that somebody has compiled."""
    if PROGRAM in os.environ:
        return os.environ[PROGRAM]
    directory = Path(tempfile.mkdtemp(prefix="skeyd-victim-"))
    atexit.register(shutil.rmtree, directory)
    done = subprocess.run(
        ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", directory / "victim", SOURCE],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return str(directory / "victim")


def require_victims() -> None:
    """Skip where no victim can be made, or none traced."""
    if PROGRAM not in os.environ and shutil.which("gcc") is None:
        cannot("the victim is a C program, and there is no gcc")
    if os.geteuid() != 0 and Path(YAMA).exists() and Path(YAMA).read_text().strip() != "0":
        cannot("only root may trace here (Yama)")


@dataclass(frozen=True)
class Result:
    """What the victim says at its end."""

    value: int
    errno: int
    seconds: float
    signals: int


class Victim:
    """A process in a context; killed at its end, whatever it is in."""

    def __init__(self, *arguments: str, command: Sequence[str] | None = None, pass_fds: Sequence[int] = ()) -> None:
        self._command = list(command or [program(), *arguments])
        self._pass_fds = pass_fds
        self._rest = b""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, pass_fds=self._pass_fds
        )
        try:
            assert self.line() == "ready"
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    @property
    def pid(self) -> int:
        return self.process.pid

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if look_at(self.pid) is not None:
            self.process.kill()
        self.process.wait(SECONDS)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word.encode() + b"\n")

    def line(self, seconds: float = SECONDS) -> str:
        """Return its next line; TimeoutError, EOFError."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        while b"\n" not in self._rest:
            if not select.select([fd], [], [], seconds)[0]:
                raise TimeoutError(f"the victim said nothing in {seconds} s")
            got = os.read(fd, 4096)
            if not got:
                raise EOFError(f"the victim ended, its status {self.process.poll()}")
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def ping(self) -> int:
        """Return how many SIGUSR1 it has counted."""
        self.say("ping")
        word, _, count = self.line().partition(" ")
        assert word == "pong"
        return int(count)

    def total(self) -> int:
        """Return how many turns the mode loop has made."""
        self.say("total")
        word, _, count = self.line().partition(" ")
        assert word == "total"
        return int(count)

    def counters(self) -> int:
        """Return where the counters of the mode threads lie."""
        self.say("counters")
        word, address, count = self.line().split()
        assert (word, int(count)) == ("counters", COUNTERS)
        return int(address)

    def result(self) -> Result:
        word, value, number, seconds, signals = self.line().split()
        assert word == "result"
        return Result(int(value), int(number), float(seconds), int(signals))

    def wait_until_in(self, number: int, tid: int | None = None) -> None:
        """Wait until its first thread waits in a system call."""
        path = Path(f"/proc/{self.pid}/task/{tid or self.pid}/syscall")
        wait_for(lambda: path.read_text().split()[0] == str(number))

    def look(self) -> dict[str, object]:
        """Return what /proc says of it and should be the same afterwards."""
        return look_at_process(self.pid)


def peek(pid: int, address: int, size: int) -> bytes:
    """Read a process's memory."""
    memory = Memory.open(pid)
    try:
        return memory.read(address, size)
    finally:
        memory.close()


def look_at_process(pid: int) -> dict[str, object]:
    """Return what /proc says of a process and should be the same afterwards."""
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    return {
        "maps": (proc / "maps").read_text(),
        "fd": {fd.name: str(fd.readlink()) for fd in (proc / "fd").iterdir()},
        "task": sorted(task.name for task in (proc / "task").iterdir()),
        **{name: value for name, value in status.items() if name not in _MOVES},
    }


def differences(before: dict[str, object], after: dict[str, object]) -> dict[str, tuple[object, object]]:
    """Return what differs between two looks."""
    return {
        name: (before.get(name), after.get(name))
        for name in before.keys() | after.keys()
        if before.get(name) != after.get(name)
    }


def python_victim() -> Victim:
    """Make a victim of a Python interpreter, which waits for lines and answers each."""
    source = "import sys\nprint('ready', flush=True)\nfor _ in sys.stdin: print('pong', sum(range(1000)), flush=True)"
    return Victim(command=[sys.executable, "-c", source])


def wait_for(condition: object, seconds: float = SECONDS) -> None:
    """Wait until a condition holds; TimeoutError. Looks again as often as the processor is free."""
    import time

    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it did not come to be")
        os.sched_yield()
