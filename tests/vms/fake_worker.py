"""A worker that lies: a thread that listens in a VM's directory and says whatever a test wants."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from skeyd.gfn import GfnRange, MemorySlot
from skeyd.linux import sealed_memfd
from skeyd.worker.packets import MESSAGE_MAX
from skeyd.worker.protocol import BUFFER_BYTES, SOCKET, Hello
from tests.worker.processes import SECONDS
from tests.worker.specs import UID


def hello(**changes: Any) -> dict[str, Any]:
    """Make a hello that this process may say, changed as asked."""
    slots = (MemorySlot(0, GfnRange(0, 1 << 20), "none"),)
    good = Hello("web", UID, "0" * 32, "simulated", "simulated Linux 7.2", "0", os.getpid(), 1_700_000_000, slots)
    return {**good.to_message(), **changes}


class Caller:
    """Who connected."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def say(self, message: dict[str, Any] | bytes, *fds: int) -> None:
        """Send a message, or bytes that are none, and descriptors."""
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        if fds:
            socket.send_fds(self.connection, [data], fds)
        else:
            self.connection.send(data)

    def take(self) -> dict[str, Any]:
        """Take a request."""
        data = self.connection.recv(MESSAGE_MAX)
        assert data, "the front hung up"
        message = json.loads(data)
        assert isinstance(message, dict)
        return message

    def answer(self, op: str, message: dict[str, Any] | bytes) -> dict[str, Any]:
        """Take a request, which must be the one that is awaited, and answer it."""
        request = self.take()
        assert request["op"] == op
        self.say(message)
        return request

    def attach(self) -> int:
        """Answer a request for buffers as a worker does; the descriptor is the caller's."""
        assert self.take() == {"op": "attach"}
        fd = sealed_memfd("skeyd-test", BUFFER_BYTES)
        self.say({"ok": {}}, fd)
        return fd

    def require_silence(self) -> None:
        """Nothing may have been said that was not taken."""
        self.connection.setblocking(False)
        try:
            found = self.connection.recv(MESSAGE_MAX)
        except BlockingIOError:
            return
        finally:
            self.connection.settimeout(SECONDS)
        raise AssertionError(f"the front said {found!r}")

    def wait_for_end(self) -> None:
        """Say nothing more until the front hangs up."""
        while self.connection.recv(MESSAGE_MAX):
            pass


Script = Callable[[Caller], None]


class FakeWorker:
    """Listens in a directory; the first connection gets the first script, and so on, each in a thread of its own."""

    def __init__(self, directory: Path, *scripts: Script) -> None:
        self._scripts = scripts
        self._errors: list[BaseException] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(directory / SOCKET))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        for script in self._scripts:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return  # the test is over
            thread = threading.Thread(target=self._run, args=(script, accepted))
            self._threads.append(thread)
            thread.start()

    def _run(self, script: Script, accepted: socket.socket) -> None:
        with accepted:
            accepted.settimeout(SECONDS)
            try:
                script(Caller(accepted))
            except (BrokenPipeError, ConnectionResetError):
                pass  # the front hung up in the middle, as it does on liars
            except BaseException as error:
                self._errors.append(error)

    def close(self) -> None:
        """Listen no more, and wait until every script is through. Twice is fine."""
        if self._listener.fileno() == -1:
            return
        self._listener.shutdown(socket.SHUT_RDWR)  # close() would not wake who waits in accept()
        for thread in self._threads:
            thread.join(SECONDS)
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if self._errors and error is None:
            raise self._errors[0]


class Slow:
    """A script: a worker of a guest whose keys are all 0, which takes its time, as it says itself.

    Synchronization: it is read when the FakeWorker is closed.
    """

    def __init__(self, nanoseconds_a_key: int, keyless: Collection[int] = ()) -> None:
        self._nanoseconds_a_key = nanoseconds_a_key
        self._keyless = keyless
        """By number of the slice, counted from 0: those for which it says that the guest uses no keys."""
        self.asked: list[int] = []
        """How many keys each slice had."""

    def __call__(self, caller: Caller) -> None:
        """Answer until the front hangs up."""
        caller.say(hello())
        while data := caller.connection.recv(MESSAGE_MAX):
            match json.loads(data):
                case {"op": "attach"}:
                    fd = sealed_memfd("skeyd-test", BUFFER_BYTES)
                    caller.say({"ok": {}}, fd)
                    os.close(fd)
                case {"op": "status"}:
                    caller.say({"ok": {"uses_keys": True}})
                case {"op": "get", "count": count}:
                    uses_keys = len(self.asked) not in self._keyless
                    self.asked.append(count)
                    caller.say({"ok": {"uses_keys": uses_keys, "ns": count * self._nanoseconds_a_key}})
                case other:
                    raise AssertionError(f"the front said {other}")


def says(*messages: dict[str, Any] | bytes) -> Script:
    """Make a script that sends messages unasked and then waits for the front to hang up."""

    def script(caller: Caller) -> None:
        for message in messages:
            caller.say(message)
        caller.wait_for_end()

    return script


def answers(pairs: Sequence[tuple[str, dict[str, Any] | bytes]], **changes: Any) -> Script:
    """Make a script that says hello and gives each request, which must be the one that is awaited, its answer."""

    def script(caller: Caller) -> None:
        caller.say(hello(**changes))
        for op, message in pairs:
            caller.answer(op, message)
        caller.wait_for_end()

    return script
