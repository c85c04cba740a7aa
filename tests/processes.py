"""Processes of a test: who is there, and ending them for sure."""

from __future__ import annotations

import ctypes
import os
import select
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PR_SET_CHILD_SUBREAPER: Final = 36


@dataclass(frozen=True)
class Process:
    """A process, told apart from a later one of the same number by its start time."""

    pid: int
    started: str
    command: str

    def __str__(self) -> str:
        return f"{self.pid} {self.command}"


def adopt_orphans() -> None:
    """Have orphaned descendants become children of this process instead of init's."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def children() -> set[Process]:
    """Return the living children of this process; adopted ones that have ended are reaped."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            pids = (task / "children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile; another has its children
            continue
        for pid in pids:
            process = look_at(int(pid))
            if process is not None:
                found.add(process)
    return found


def look_at(pid: int) -> Process | None:
    """Return a living process, or None where it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if stat[0] == "Z" else Process(pid, stat[19], command.strip())


def links_of(pid: int) -> list[str]:
    """Return what a process holds open, as /proc names it; empty where it is gone."""
    found = []
    with suppress(OSError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile, which says nothing of the others
                found.append(str(fd.readlink()))
    return found


def end(process: Process) -> None:
    """Kill a process and wait until it is gone."""
    with suppress(ProcessLookupError, ChildProcessError):
        fd = os.pidfd_open(process.pid)
        try:
            os.kill(process.pid, signal.SIGKILL)
            wait_for_end(fd)
            os.waitpid(process.pid, os.WNOHANG)
        finally:
            os.close(fd)


def wait_for_end(pidfd: int, seconds: float = 30) -> None:
    """Wait for a process to end; TimeoutError."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if not poll.poll(seconds * 1000):
        raise TimeoutError(f"the process did not end in {seconds} s")
