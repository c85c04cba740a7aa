"""Monitors that say what a test wants: over a real unix socket, and on a thread."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

SECONDS: Final = 30.0
GREETING: Final = {
    "QMP": {"version": {"qemu": {"major": 9, "minor": 2, "micro": 1}, "package": ""}, "capabilities": []}
}


class Conversation:
    """One client's connection, from the monitor's side."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._file = connection.makefile("rb")

    def say(self, *messages: Any) -> None:
        """Send messages, a line each; bytes as they are."""
        for message in messages:
            data = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\r\n"
            self.connection.sendall(data)

    def hear(self) -> dict[str, Any]:
        """Take the client's next command."""
        message: dict[str, Any] = json.loads(self._file.readline())
        return message

    def read(self, count: int) -> bytes:
        """Take bytes that are no command."""
        return self._file.read(count)

    def greet(self) -> None:
        """Greet, and take the client's first command."""
        self.say(GREETING)
        self.answer({}, "qmp_capabilities")

    def answer(self, value: Any, command: str | None = None) -> dict[str, Any]:
        """Answer the client's next command, which must be that one; returns it."""
        heard = self.hear()
        assert command is None or heard["execute"] == command, heard
        self.say({"return": value, "id": heard["id"]})
        return heard

    def flood(self, data: bytes) -> None:
        """Say it until nobody listens any more."""
        with suppress(OSError):
            while True:
                self.connection.sendall(data)

    def close(self) -> None:
        """Let go of the connection, which would stay open else."""
        self._file.close()

    def wait_for_end(self) -> None:
        """Wait until the client has hung up."""
        with suppress(ConnectionResetError):
            assert self._file.read(1) == b""


class FakeMonitor:
    """A monitor that has one conversation after the other, until it is closed; what fails in one fails the test."""

    def __init__(self, path: Path, converse: Callable[[Conversation], None]) -> None:
        self.path = str(path)
        self._converse = converse
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve)
        self._failed: BaseException | None = None
        self.clients = 0

    def _serve(self) -> None:
        try:
            while True:
                try:
                    connection, _ = self._listener.accept()
                except OSError:
                    return
                self.clients += 1
                connection.settimeout(SECONDS)
                with connection, closing(Conversation(connection)) as conversation:
                    self._converse(conversation)
        except BaseException as error:
            self._failed = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(SECONDS)
        self._listener.close()
        assert not self._thread.is_alive()
        if error is None and self._failed is not None:
            raise self._failed
