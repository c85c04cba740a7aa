"""A thread of another process while it is traced: stopped, let go on, waited for, and let go for good."""

from __future__ import annotations

import enum
import errno
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NoReturn

from skeyd.injection import proc, ptrace
from skeyd.injection.errors import (
    AlreadyTracedError,
    GoneError,
    InjectionError,
    NotAllowedError,
    TimedOutError,
)

_WALL: Final = 0x40000000
"""__WALL, include/uapi/linux/wait.h @ v6.12: wait for threads too."""
_SYSCALL_STOP: Final = signal.SIGTRAP | 0x80

_SEIZES: Final = 8
"""Where the kernel allows no tracing and nobody traces."""
_SPINS: Final = 50
_LOOKS: Final = 100
"""After so many turns in vain it is looked whether the thread has ended."""
_SHORTEST_NAP: Final = 50e-6
_LONGEST_NAP: Final = 1e-3

YAMA: Final = "/proc/sys/kernel/yama/ptrace_scope"


class Stop(enum.Enum):
    """Why a thread is stopped."""

    EVENT = "because it was asked to, or its process is stopped; where signals are looked for"
    SIGNAL = "a signal is about to be delivered; where signals are looked for"
    SYSCALL = "it enters a system call, or leaves one"


@dataclass(frozen=True, slots=True)
class Stopped:
    """A stop, and of Stop.SIGNAL the signal."""

    why: Stop
    signal: int = 0


class Tracee:
    """A thread from `seize` until it is detached or gone.

    What the kernel does when this process dies: it is a detach, wherever the thread is, and a signal that was about to
    be delivered is. So whatever registers a thread has while it is stopped must be ones that it can go on with.
    Synchronization: for the thread of this process that has seized it; the kernel answers ESRCH to all others.
    """

    def __init__(self, pid: int, tid: int) -> None:
        self.pid = pid
        self.tid = tid
        self.stopped: Stopped | None = None
        """None while it runs."""
        self.traced = True
        """False after `detach`, and when it has ended."""

    @classmethod
    def seize(cls, pid: int, tid: int) -> Tracee:
        """Trace a thread, which runs on. AlreadyTracedError, NotAllowedError, GoneError."""
        for left in reversed(range(_SEIZES)):
            try:
                ptrace.seize(tid, ptrace.O_TRACESYSGOOD | ptrace.O_TRACEEXEC)
            except OSError as error:
                # The kernel says the same of a tracer that was there, and is gone by the time that one looks for it.
                if left and error.errno == errno.EPERM and _is_untraced(pid, tid):
                    os.sched_yield()
                    continue
                _refused(pid, tid, error)
            break
        return cls(pid, tid)

    def stop(self, deadline: float) -> None:
        """Stop it where signals are looked for, at the next chance, however it runs now.

        Signals that come before are given to it. GoneError; TimedOutError after the time `deadline` of time.monotonic.
        """
        number = 0
        while True:
            # Each time: whatever a thread stops for, the request to stop is forgotten (ptrace_stop() @ v6.12).
            self.interrupt()
            if self.stopped is not None:
                self.go_on(number)
            stopped = self.wait(deadline)
            if stopped.why is Stop.EVENT:
                return
            number = stopped.signal

    def interrupt(self) -> None:
        """Have it stop where signals are looked for, if it doesn't stop for something else first. GoneError."""
        self._request(ptrace.interrupt, self.tid)

    def wait(self, deadline: float) -> Stopped:
        """Wait for the next stop. GoneError; TimedOutError, and it runs still."""
        turns, nap = 0, _SHORTEST_NAP
        while True:
            try:
                # Only looked at: with the wait for a stop goes the signal that it is for, which nobody would deliver if
                # this process died now.
                found = os.waitid(os.P_PID, self.tid, _WALL | os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                self._gone()
            if found is not None:
                break
            if time.monotonic() >= deadline:
                raise TimedOutError(self.tid, f"thread {self.tid} did not stop in time")
            # Nothing else tells of a tracee's stop, but SIGCHLD, which belongs to the process as a whole.
            turns += 1
            if turns < _SPINS:
                os.sched_yield()
            elif turns % _LOOKS == 0 and proc.status(self.pid, self.tid).get("State", "Z")[0] == "Z":
                # Of a first thread that ends before others the kernel tells when they have ended, too.
                self._gone()
            else:
                time.sleep(nap)
                nap = min(nap * 2, _LONGEST_NAP)
        if found.si_code != os.CLD_TRAPPED:
            self._gone()
        if found.si_status >> 8 == ptrace.EVENT_EXEC:
            self._runs_another_program()
        if found.si_status >> 8 == ptrace.EVENT_STOP:
            self.stopped = Stopped(Stop.EVENT)
        elif found.si_status == _SYSCALL_STOP:
            self.stopped = Stopped(Stop.SYSCALL)
        else:
            self.stopped = Stopped(Stop.SIGNAL, found.si_status)
        return self.stopped

    def go_on(self, number: int = 0) -> None:
        """Let it go on; `number`: with the signal that it is stopped for, else that signal is dropped."""
        self.stopped = None
        self._request(ptrace.cont, self.tid, number)

    def go_on_to_syscall(self) -> None:
        """Let it go on to where it enters or leaves a system call."""
        self.stopped = None
        self._request(ptrace.cont_to_syscall, self.tid)

    def detach(self, number: int = 0) -> None:
        """Trace it no longer. It must be stopped; it goes on. Nothing happens where it has ended or is detached."""
        if self.traced:
            self.traced = False
            try:
                ptrace.detach(self.tid, number)
            except ProcessLookupError:
                # Killed while it was stopped. Whoever is its parent waits until its tracer has taken note.
                _reap(self.tid)

    def failed(self, error: OSError) -> NoReturn:
        """Raise what a request's OSError means."""
        if error.errno == errno.ESRCH:
            self._gone()
        raise InjectionError(self.tid, f"ptrace of thread {self.tid}: {error.strerror}") from error

    def _request(self, function: Callable[..., None], *arguments: int) -> None:
        try:
            function(*arguments)
        except OSError as error:
            self.failed(error)

    def _runs_another_program(self) -> NoReturn:
        # Nothing that it had is there any more, and nothing of that may be given to the program that it runs now.
        self.traced = False
        self.stopped = None
        with suppress(OSError):
            ptrace.detach(self.tid)
        raise GoneError(self.tid, f"process {self.pid} runs another program now")

    def _gone(self) -> NoReturn:
        if self.traced:
            self.traced = False
            _reap(self.tid)
        self.stopped = None
        raise GoneError(self.tid, f"thread {self.tid} of process {self.pid} has ended")


def _reap(tid: int) -> None:
    try:
        while os.waitpid(tid, _WALL | os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _is_untraced(pid: int, tid: int) -> bool:
    return proc.status(pid, tid).get("TracerPid", "") == "0"


def _refused(pid: int, tid: int, error: OSError) -> NoReturn:
    if error.errno == errno.ESRCH:
        raise GoneError(tid, f"there is no thread {tid}") from error
    # A security module says EACCES (SELinux: avc_has_perm() @ v6.12).
    if error.errno not in (errno.EPERM, errno.EACCES):
        raise InjectionError(tid, f"PTRACE_SEIZE of thread {tid}: {error.strerror}") from error
    status = proc.status(pid, tid)
    if status.get("State", "Z")[0] in "ZX":
        raise GoneError(tid, f"thread {tid} of process {pid} has ended") from error
    tracer = int(status.get("TracerPid", "0"))
    if tracer:
        raise AlreadyTracedError(tid, tracer) from error
    raise NotAllowedError(tid, why_not_allowed(pid)) from error


def why_not_allowed(pid: int) -> str:
    """Say why the kernel lets this process not trace another, as far as it can be known."""
    return f"the kernel does not allow tracing process {pid}: {_why()}"


def _why() -> str:
    reason = "that takes CAP_SYS_PTRACE, or the same user and a process that may be dumped"
    try:
        with open(YAMA, encoding="ascii") as file:
            scope = file.read().strip()
    except OSError:
        return reason
    if scope in ("", "0"):
        return reason
    if scope == "3":
        return f"{YAMA} is 3: nobody may trace anything until the next boot"
    return f"that takes CAP_SYS_PTRACE ({YAMA} is {scope})"
