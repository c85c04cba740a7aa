"""What a VMM calls its guest, as its command line has it: its own word, which proves nothing."""

from __future__ import annotations

import itertools
import re
from typing import Final

NAME_MAX: Final = 255
"""Characters of a name."""
COMMAND_MAX: Final = 256 * 1024
"""Bytes of a command line that are looked at; one can have several MiB, and a VMM's name comes early."""

_ASKER: Final = (b"vm", b"adopt")
_OPTION: Final = re.compile(rb"--?name(?:=(.*))?", re.DOTALL)
# util/qemu-option.c @ v7.2: a comma that belongs to a value is written twice.
_KEY: Final = re.compile(rb"([^=,]*)=")
_VALUE: Final = re.compile(rb"[^,]*+(?:,,[^,]*+)*+")


def is_name(text: str) -> bool:
    """Tell whether a text can be a guest's name here: 1 to 255 characters that can be printed."""
    return 0 < len(text) <= NAME_MAX and text.isprintable()


def name_of(pid: int) -> str:
    """Return the guest's name, or "" where the command line has none that `is_name`.

    FileNotFoundError, ProcessLookupError: it has ended.
    """
    with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
        # A read gives a page at most where the process changes its command line meanwhile.
        parts, left = [], COMMAND_MAX
        while left and (part := file.read(left)):
            parts.append(part)
            left -= len(part)
    arguments = b"".join(parts).split(b"\0")
    if not left:
        del arguments[-1]  # it may be cut
    return name_in(arguments)


def name_in(arguments: list[bytes]) -> str:
    """Return the guest's name of a command line: of `-name NAME`, `-name guest=NAME,…`, with `=` or two dashes too.

    "" where there is none that `is_name`. As in QEMU, the last one counts. "" of a `skeyctl vm adopt` too.
    """
    # With a sudo before it, as well. Where skeyd may not see its descriptors it would pass for a VMM of that name.
    if _ASKER in itertools.pairwise(arguments):
        return ""
    found = b""
    for index, argument in enumerate(arguments[1:], 1):
        option = _OPTION.fullmatch(argument)
        if option is None:
            continue
        value = option[1]
        if value is None:
            value = arguments[index + 1] if index + 1 < len(arguments) else b""
        found = _guest(value) or found
    try:
        name = found.decode()
    except UnicodeDecodeError:
        return ""
    return name if is_name(name) else ""


def _guest(options: bytes) -> bytes:
    # The value of "guest", which is also what a first part without a key is.
    guest, at = b"", 0
    while at < len(options):
        key = _KEY.match(options, at)
        value = _VALUE.match(options, key.end() if key else at)
        assert value is not None  # noqa: S101  it matches nothing too
        if key[1] == b"guest" if key else at == 0:
            guest = value[0].replace(b",,", b",")
        at = value.end() + 1
    return guest
