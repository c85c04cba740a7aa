"""The processes of a host that is hurt: where they are forked, whether they end, what they hold open."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.faults.calls import DEADLINE, Told

ROOT: Final = Path(__file__).parents[2]
SETTLED_SECONDS: Final = 60.0
"""How long what is under way may take to end, on a machine with much else to do."""


@dataclass(frozen=True)
class Held:
    """What two processes hold open."""

    front: Counter[str]
    worker: Counter[str]


def has_ended(pidfd: int, seconds: float) -> bool:
    """Wait for the end of a process, for so long."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class ClientProcess:
    """A client as a process of its own."""

    def __init__(self, pid: int, out: int) -> None:
        self.pid = pid
        self._out = out

    def told(self, seconds: float = DEADLINE) -> Told | None:
        """Wait for what it was told; None where it was killed, or has not been told by then."""
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return None
        data = os.read(self._out, 1 << 16)
        return Told.read(data) if data else None

    def kill(self) -> None:
        """Kill it, if it is still there."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """End it and forget it."""
        self.kill()
        os.close(self._out)


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] == "T"


def zombies_of(parent: int) -> list[int]:
    """Return the children of a process that have ended and that it has not waited for."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, its_parent = path.read_text().rpartition(")")[2].split()[:2]
            if state == "Z" and int(its_parent) == parent:
                found.append(int(path.parent.name))
    return found


def held_by(pid: int, *, of_grpc_too: bool) -> Counter[str]:
    """Count what a process holds open, by kind; sockets and the like of grpc only where that is asked for."""
    packets = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if words[4] == "0005":  # SOCK_SEQPACKET, which only front and worker use
            packets.add(f"socket:[{words[6]}]")
    held: Counter[str] = Counter()
    with suppress(FileNotFoundError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                link = str(fd.readlink())
                if link in packets:
                    held["packets"] += 1
                elif of_grpc_too or link.startswith(("/", "anon_inode:[pidfd]")):
                    held[link.partition(":[")[0]] += 1
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if "skeyd-keys" in line:
                held["memory"] += 1
    return held


class NoNamespace(Exception):  # noqa: N818 (says what happened)
    """This user may have no file systems of his own here."""


@contextmanager
def nursery(directory: Path, disk_bytes: int) -> Iterator[tuple[int, socket.socket]]:
    """Start what forks fronts and clients, and end it with all of those: its pid, and where it takes orders.

    With `disk_bytes` it has a file system of that size over the directory, which nobody else sees. NoNamespace.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.faults.nursery", str(theirs.fileno())]
    if disk_bytes:
        mount = f'mount -t tmpfs -o size={disk_bytes},mode=700 none "$0" && exec "$@"'
        as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        command = ["unshare", "--mount", *as_root, "sh", "-c", mount, str(directory), *command]
    with ours, theirs:
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        try:
            if ours.recv(100) != b"ready":
                assert disk_bytes, "the nursery did not start"
                raise NoNamespace
            yield process.pid, ours
        finally:
            ours.close()
            status = process.wait(SETTLED_SECONDS)
        assert status == 0
