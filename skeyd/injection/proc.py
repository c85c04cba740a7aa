"""Files of /proc about one thread."""

from __future__ import annotations

import os

from skeyd.injection.errors import GoneError


def status(pid: int, tid: int) -> dict[str, str]:
    """Return /proc/PID/task/TID/status, by its names. Empty where the thread is gone."""
    try:
        with open(f"/proc/{pid}/task/{tid}/status", encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def threads(pid: int) -> list[int]:
    """Return the ids of a process's threads, the first thread's first, the others ascending. GoneError.

    Where the kernel's numbers have begun anew since the process was started, later threads have lower ones (seen).
    """
    try:
        return sorted((int(name) for name in os.listdir(f"/proc/{pid}/task")), key=lambda tid: (tid != pid, tid))
    except (FileNotFoundError, ProcessLookupError) as error:
        raise GoneError(pid, f"process {pid} has ended") from error


def system_call(pid: int, tid: int) -> tuple[int, ...] | None:
    """Return the system call that a thread waits in: its number (-1: none), six arguments, stack and code address.

    None: it runs at this moment, or is gone, or this kernel doesn't say. Where it waits in none, only the addresses and
    -1 are told: the arguments are 0. OSError EPERM, EACCES: tracing is not allowed.
    """
    try:
        with open(f"/proc/{pid}/task/{tid}/syscall", encoding="ascii") as file:
            words = file.read().split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    if not words or words[0] == "running":
        return None
    numbers = [int(word, 0) for word in words]
    if len(numbers) == 3:
        return numbers[0], 0, 0, 0, 0, 0, 0, numbers[1], numbers[2]
    return tuple(numbers)


def start_time(pid: int) -> int:
    """Return when a process was started, in clock ticks since boot. FileNotFoundError, ProcessLookupError."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def myself() -> int:
    """Return a number of 64 bits that stands for this process: its pid, and above that some of its start time."""
    return os.getpid() | (start_time(os.getpid()) & 0xFFFFFFFF) << 32


def is_alive(owner: int) -> bool:
    """Whether the process lives that a number stands for, or may: /proc can hide those of other users (hidepid)."""
    pid = owner & 0xFFFFFFFF
    try:
        return start_time(pid) & 0xFFFFFFFF == owner >> 32
    except PermissionError:
        return True
    except (FileNotFoundError, ProcessLookupError):
        pass
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        pass
    return False
