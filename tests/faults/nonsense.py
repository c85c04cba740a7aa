"""What a worker can say in place of its answer. The standard library only: workers load it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final


def say(what: str, connection: socket.socket, answer: bytes, fds: Sequence[int]) -> None:
    """Say it on a connection; `answer` is what should be said."""
    match what:
        case "nothing":
            return
        case "end":
            connection.shutdown(socket.SHUT_RDWR)
        case "twice":
            for _ in range(2):
                connection.send(answer, socket.MSG_NOSIGNAL)
        case "descriptor":
            fd = os.memfd_create("nobody asked for this")
            try:
                socket.send_fds(connection, [answer], [*fds, fd], socket.MSG_NOSIGNAL)
            finally:
                os.close(fd)
        case _:
            connection.send(PACKETS[what](answer), socket.MSG_NOSIGNAL)


def _each_number(answer: bytes, change: Callable[[int], Any]) -> bytes:
    def changed(value: Any) -> Any:
        match value:
            case dict():
                return {name: changed(one) for name, one in value.items()}
            case list():
                return [changed(one) for one in value]
            case bool() | int():
                return change(value)
        return value

    return json.dumps(changed(json.loads(answer))).encode()


PACKETS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "noise": lambda _: bytes(range(256)),
    "half": lambda answer: answer[: len(answer) // 2],
    "list": lambda answer: b"[" + answer + b"]",
    "object": lambda _: b"{}",
    "no-fields": lambda _: b'{"ok":{"none":"of them"}}',
    "ok-is-text": lambda _: b'{"ok":"yes"}',
    "texts": lambda answer: _each_number(answer, str),
    "negative": lambda answer: _each_number(answer, lambda value: -1 - value),
    "enormous": lambda answer: _each_number(answer, lambda value: value + (1 << 70)),
    "fractions": lambda answer: _each_number(answer, lambda value: value + 0.5),
    "unknown-reason": lambda _: b'{"error":{"reason":"NO_SUCH","message":"what","metadata":{}}}',
    "error-is-text": lambda _: b'{"error":"bad"}',
    "deep": lambda _: b"[" * 60_000,
    "too-long": lambda answer: answer + b" " * 70_000,
}
"""By name: what is sent for an answer. `negative` and the like leave texts as they are."""
