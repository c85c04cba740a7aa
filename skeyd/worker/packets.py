"""JSON objects in packets, every field checked by who receives them.

The socket is SOCK_SEQPACKET, which keeps packets apart, so that no length is ever parsed.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from skeyd.errors import Reason, SkeydError

MESSAGE_MAX: Final = 64 * 1024
"""Bytes in a packet."""

TEXT_MAX: Final = 1024
"""Characters."""


class ProtocolError(Exception):
    """The other side sent what the protocol forbids. The message names it."""


class Fields:
    """A JSON object whose fields are taken one by one, each checked. ProtocolError names the first that is wrong."""

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise ProtocolError(f"{what} is no object")
        self._fields: dict[str, Any] = value
        self._what = what

    def has(self, name: str) -> bool:
        """Whether there is a field of that name that isn't null."""
        return self._fields.get(name) is not None

    def integer(self, name: str, least: int, most: int) -> int:
        """Take a whole number between two bounds, both included."""
        value = self._fields.get(name)
        if type(value) is not int or not least <= value <= most:
            raise ProtocolError(f"{self._what}: {name} is no number from {least} to {most}")
        return value

    def integers(self, name: str, most: int, least: int, greatest: int) -> tuple[int, ...]:
        """Take a list of at most `most` whole numbers between two bounds, both included."""
        value = self._fields.get(name)
        if not isinstance(value, list) or len(value) > most:
            raise ProtocolError(f"{self._what}: {name} is no list of at most {most}")
        if not all(type(one) is int and least <= one <= greatest for one in value):
            raise ProtocolError(f"{self._what}: {name} has what is no number from {least} to {greatest}")
        return tuple(value)

    def boolean(self, name: str) -> bool:
        """Take true or false."""
        value = self._fields.get(name)
        if not isinstance(value, bool):
            raise ProtocolError(f"{self._what}: {name} is neither true nor false")
        return value

    def text(self, name: str, form: re.Pattern[str] | None = None) -> str:
        """Take a printable string of at most 1,024 characters, all of which a pattern matches if one is given."""
        value = self._fields.get(name)
        # Printable: it is shown on terminals and written into logs and protobufs, which take no lone surrogates.
        if not isinstance(value, str) or len(value) > TEXT_MAX or not value.isprintable():
            raise ProtocolError(f"{self._what}: {name} is no text of at most {TEXT_MAX} characters")
        if form and not form.fullmatch(value):
            raise ProtocolError(f"{self._what}: {name} is no text of the right form")
        return value

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """Take one of a few words."""
        value = self._fields.get(name)
        if not isinstance(value, str) or value not in choices:
            raise ProtocolError(f"{self._what}: {name} is none of {', '.join(choices)}")
        return value

    def objects(self, name: str, most: int) -> list[Fields]:
        """Take a list of objects."""
        value = self._fields.get(name)
        if not isinstance(value, list) or len(value) > most:
            raise ProtocolError(f"{self._what}: {name} is no list of at most {most}")
        return [Fields(one, f"{self._what}: {name}[{index}]") for index, one in enumerate(value)]

    def object(self, name: str) -> Fields:
        """Take an object."""
        return Fields(self._fields.get(name), f"{self._what}: {name}")

    def texts(self) -> dict[str, str]:
        """Take all fields, which must be strings."""
        return {name: self.text(name) for name in self._fields}


def encode(message: dict[str, Any]) -> bytes:
    """Write a message down. ProtocolError where it doesn't fit a packet."""
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > MESSAGE_MAX:
        raise ProtocolError(f"a message of {len(data)} bytes doesn't fit a packet")
    return data


def decode(data: bytes, what: str, most: int = MESSAGE_MAX) -> Fields:
    """Read a message. ProtocolError for anything but one JSON object of at most so many bytes."""
    if len(data) > most:
        raise ProtocolError(f"{what} is longer than a packet may be")
    try:
        return Fields(json.loads(data), what)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{what} is no JSON: {error}") from None


def error_message(error: SkeydError) -> dict[str, Any]:
    """Put an error into an answer."""
    text = {name: printable(value) for name, value in error.metadata.items()}
    return {"error": {"reason": error.reason.name, "message": printable(error.message), "metadata": text}}


def printable(text: str) -> str:
    """Make a text one that Fields.text takes: question marks for what is not printable, and no more than TEXT_MAX."""
    return "".join(character if character.isprintable() else "?" for character in text[:TEXT_MAX])


def take_answer(answer: Fields) -> Fields:
    """Return what is in a good answer; raise the SkeydError that is in the other kind."""
    if not answer.has("error"):
        return answer.object("ok")
    error = answer.object("error")
    name, message = error.text("reason"), error.text("message")
    if name not in Reason.__members__:
        raise SkeydError(Reason.WORKER_FAILED, f"the worker gave a reason unknown here, {name}: {message}")
    raise SkeydError(Reason[name], message, error.object("metadata").texts())
