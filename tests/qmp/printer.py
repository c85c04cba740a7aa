"""A VMM's monitor that prints keys, when and as a test says."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tests.qmp.monitors import GREETING, SECONDS, Conversation
from tests.worker.test_dump import dump


def put(write: int, data: bytes) -> None:
    """Write all of it, as a VMM that gets EPIPE goes on."""
    with suppress(BrokenPipeError):
        while data:
            data = data[os.write(write, data) :]


class Printer:
    """Answers what a worker asks a VMM whose frames from 0 on have these keys."""

    def __init__(self, keys: bytes) -> None:
        self.commands: list[str] = []
        self.given = -1
        """What it was given and has not closed; -1: nothing."""
        self.answers: dict[str, Any] = {"qmp_capabilities": {}, "query-status": {"running": True}}
        self.held: dict[int, str] = {}
        """What others gave it, by what names."""
        self._name = ""
        self.prints: Callable[[int], dict[str, Any]] = self.all_at_once
        self.goes_on = threading.Event()
        """Set where the second half may be printed."""
        self._text = dump(0, keys)

    def converse(self, one: Conversation) -> None:
        """Answer until the client hangs up."""
        # A client waits for each answer, so that what comes is one command, with its descriptors.
        with suppress(ConnectionResetError, BrokenPipeError):
            one.say(GREETING)
            while True:
                data, fds, *_ = socket.recv_fds(one.connection, 1 << 16, 1)
                if not data:
                    return
                command = json.loads(data)
                self.commands.append(command["execute"])
                answer = self._answer(command["execute"], command.get("arguments"), fds)
                one.say({**answer, "id": command["id"]})

    def all_at_once(self, write: int) -> dict[str, Any]:
        """Print as QEMU does."""
        put(write, self._text)
        return {"return": {}}

    def half_by_half(self, write: int) -> dict[str, Any]:
        """Print one half, and the other when the test lets it."""
        put(write, self._text[: len(self._text) // 2])
        assert self.goes_on.wait(SECONDS)
        put(write, self._text[len(self._text) // 2 :])
        return {"return": {}}

    def let_go(self) -> None:
        """Close what it was given."""
        if self.given >= 0:
            os.close(self.given)
            self.given = -1

    def _answer(self, command: str, arguments: Any, fds: list[int]) -> dict[str, Any]:
        match command:
            case "add-fd":
                (self.given,) = fds
                self._name = arguments["opaque"]
                return {"return": {"fdset-id": 3, "fd": self.given}}
            case "remove-fd" if arguments["fd"] in self.held:
                del self.held[arguments["fd"]]
                return {"return": {}}
            case "remove-fd":
                assert arguments == {"fdset-id": 3, "fd": self.given}
                self.let_go()
                return {"return": {}}
            case "query-fdsets":
                held = self.held | ({self.given: self._name} if self.given >= 0 else {})
                named = [{"fd": fd, "opaque": name} for fd, name in held.items()]
                return {"return": [{"fdset-id": 3, "fds": named}, {"fdset-id": 4, "fds": [{"fd": 99}]}]}
            case "dump-skeys":
                assert arguments == {"filename": f"/proc/self/fd/{self.given}"}
                # QEMU opens it anew.
                write = os.open(arguments["filename"], os.O_WRONLY | os.O_CLOEXEC)
                try:
                    return self.prints(write)
                finally:
                    os.close(write)
        return {"return": self.answers[command]}
