"""A real worker process, and a front that says to it whatever a test wants."""

from __future__ import annotations

import json
import mmap
import os
import resource
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import skeyd
from skeyd.linux import lock_is_held
from skeyd.worker.channel import address_in
from skeyd.worker.packets import MESSAGE_MAX, encode
from skeyd.worker.protocol import BUFFER_BYTES, LOCK, SOCKET, Spec

WORKER: Final = str(Path(skeyd.__file__).parent / "worker" / "__main__.py")
SECONDS: Final = 30.0
"""How long anything may take; only a failing test waits that long."""


class Front:
    """A connection to a worker that can also break the protocol."""

    def __init__(self, directory: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.socket.settimeout(SECONDS)
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self.socket.connect(address_in(fd, SOCKET))
            finally:
                os.close(fd)
        except BaseException:
            self.socket.close()
            raise

    def take(self) -> dict[str, Any] | None:
        """Take one message. None: the worker hung up."""
        data = self.socket.recv(MESSAGE_MAX)
        if not data:
            return None
        message = json.loads(data)
        assert isinstance(message, dict)
        return message

    def hello(self) -> dict[str, Any]:
        """Take the hello."""
        hello = self.take()
        assert hello is not None, "the worker hung up instead of saying who it is"
        return hello

    def say(self, **message: Any) -> None:
        """Send a message without waiting for the answer."""
        self.socket.send(encode(message))

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send a message and take the answer."""
        self.say(**message)
        answer = self.take()
        assert answer is not None, f"the worker hung up on {message}"
        return answer

    def ok(self, **message: Any) -> dict[str, Any]:
        """Send a message and take what is in its good answer."""
        answer = self.ask(**message)
        assert "ok" in answer, answer
        good = answer["ok"]
        assert isinstance(good, dict)
        return good

    def refused(self, **message: Any) -> str:
        """Send a message and take the reason of its refusal."""
        answer = self.ask(**message)
        assert "error" in answer, answer
        return str(answer["error"]["reason"])

    def attach(self) -> int:
        """Ask for the buffers; the descriptor is the caller's."""
        self.say(op="attach")
        data, fds, _, _ = socket.recv_fds(self.socket, MESSAGE_MAX, 1)
        assert json.loads(data) == {"ok": {}}
        (fd,) = fds
        return fd

    @contextmanager
    def shared(self) -> Iterator[mmap.mmap]:
        """Attach, and map the memory that is shared."""
        fd = self.attach()
        try:
            buffers = mmap.mmap(fd, BUFFER_BYTES)
        finally:
            os.close(fd)
        with buffers:
            yield buffers

    def is_hung_up_on(self) -> bool:
        """Wait for the worker's next word, and say whether it was to hang up."""
        with suppress(ConnectionResetError):
            return self.take() is None
        return True  # it closed with a request of ours unread

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class WorkerProcess:
    """A worker, started as the front's starter does it."""

    def __init__(
        self,
        directory: Path,
        spec: Spec | bytes,
        *,
        import_time: bool = False,
        stdout: socket.socket | None = None,
        address_space: int | None = None,
    ) -> None:
        self.directory = directory
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", *(["-X", "importtime"] if import_time else []), WORKER, "vm", str(fd)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if stdout is None else stdout.fileno(),
                stderr=subprocess.PIPE,
                cwd="/",
                env={},
                pass_fds=(fd,),
            )
        finally:
            os.close(fd)
        assert self.process.stdin is not None
        if address_space is not None:
            # It waits for its spec, so this is before it maps anything for the VM.
            resource.prlimit(self.process.pid, resource.RLIMIT_AS, (address_space, address_space))
        with suppress(BrokenPipeError), self.process.stdin as stdin:
            stdin.write(spec if isinstance(spec, bytes) else encode(spec.to_message()))
        self.process.stdin = None  # communicate() would flush it

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def first_line(self) -> dict[str, Any]:
        """Wait for the one thing that it says on standard output."""
        assert self.process.stdout is not None
        line = json.loads(self.process.stdout.readline())
        assert isinstance(line, dict)
        return line

    def reason(self) -> str:
        """Wait for the one thing that it says where it is the reason why it can't start, and for its end."""
        reason = str(self.first_line()["error"]["reason"])
        assert self.process.wait(SECONDS) == 1
        return reason

    def connect(self) -> Front:
        """Connect to it."""
        return Front(self.directory)

    def meet(self) -> Front:
        """Connect to it and take its hello."""
        front = self.connect()
        front.hello()
        return front

    def holds_its_lock(self) -> bool:
        """Whether its lock is held, by whomever."""
        try:
            fd = os.open(self.directory / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            return lock_is_held(fd)
        finally:
            os.close(fd)

    def open_files(self) -> list[str]:
        """Return what its descriptors are, in order of their names."""
        found = []
        for fd in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since it was listed
                found.append(str(fd.readlink()))
        return sorted(found)

    def serves(self) -> bool:
        """Whether it answers a request on a new connection."""
        with self.meet() as front:
            return "uses_keys" in front.ok(op="status")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()


def hung_up(connection: socket.socket, seconds: float = SECONDS) -> bool:
    """Wait until both directions of a connection are closed, whatever lies unread in it."""
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(seconds * 1000))
