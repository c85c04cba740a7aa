"""What a monitor says, line by line: a greeting, events, answers. Everything that comes is checked here."""

from __future__ import annotations

import json
import re
from typing import Any, Final, NoReturn

from skeyd.qmp.errors import BrokenError

LINE_MAX: Final = 256 * 1024
"""Bytes in a line. The longest that is asked for, query-cpus-fast of 248 CPUs, has some 50 KiB."""

TEXT_MAX: Final = 512
"""Characters of a text of the monitor's that are taken over into an error."""

_VERSION: Final = ("major", "minor", "micro")
_BREAKS: Final = re.compile(r"\s+")


def object_of(line: bytes) -> dict[str, Any]:
    """Read a line that is to be a JSON object. BrokenError."""
    try:
        # As text, since json guesses at UTF-16 and UTF-32 where it gets bytes. It may be nested as deep as the parser
        # allows, which is the recursion limit, or from Python 3.14 on the stack's: nothing here goes down into it.
        value = json.loads(line.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BrokenError(f"what it says is no JSON: {shown(str(error))}") from None
    if not isinstance(value, dict):
        raise BrokenError("what it says is no JSON object")
    return value


def version_of(greeting: dict[str, Any]) -> str:
    """Return the version of QEMU that a greeting has, as 7.2.22. BrokenError where it is no greeting."""
    found: Any = greeting
    for name in ("QMP", "version", "qemu"):
        found = found.get(name) if isinstance(found, dict) else None
    numbers = [found.get(name) for name in _VERSION] if isinstance(found, dict) else []
    if not numbers or not all(type(one) is int and 0 <= one < 1 << 16 for one in numbers):
        raise BrokenError("its greeting is not QMP's")
    return ".".join(map(str, numbers))


def is_event(said: dict[str, Any]) -> bool:
    """Whether it is an event, which comes between answers whenever it likes."""
    return isinstance(said.get("event"), str) and not said.keys() & {"id", "return", "error"}


def error_of(said: dict[str, Any]) -> tuple[str, str] | None:
    """Return class and description of an answer that is an error, fit to be shown; None: it is none. BrokenError."""
    if ("return" in said) == ("error" in said):
        raise BrokenError("an answer has both or none of return and error")
    if "return" in said:
        return None
    error = said["error"]
    if not isinstance(error, dict) or not all(isinstance(error.get(name), str) for name in ("class", "desc")):
        raise BrokenError("an error has no class and desc")
    return shown(error["class"]), shown(error["desc"])


def shown(text: str) -> str:
    """Make a text of a stranger's one line that can be shown on terminals and in logs."""
    text = _BREAKS.sub(" ", text[:TEXT_MAX]).strip()
    return "".join(character if character.isprintable() else "?" for character in text)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
