"""Faults on order: a process looks at each named point whether it is to be hurt there.

An order is the file `fault-WHO.json` in the daemon's runtime directory: {"id", "point", "nth", "action"}. It is carried
out once, and the file then has the name `fired-WHO.json`, so that a test knows that it was. What "always:" begins is
done again and again from then on, until that file is gone. The standard library only: workers load it.
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from typing import Any, Final

ALWAYS: Final = "always:"
TRACE: Final = "trace"
"""Where this file is, every ioctl of a worker leaves a line in it."""


def order_name(who: str) -> str:
    """Name the file of an order."""
    return f"fault-{who}.json"


def fired_name(who: str) -> str:
    """Name the file of an order that was carried out."""
    return f"fired-{who}.json"


class Trigger:
    """The points of one process. `directory` is the runtime directory, or where it is below `directory_fd`."""

    def __init__(self, who: str, directory: str, directory_fd: int | None = None) -> None:
        self._order = os.path.join(directory, order_name(who))  # noqa: PTH118  a worker has no pathlib loaded
        self._fired = os.path.join(directory, fired_name(who))  # noqa: PTH118
        self._trace = os.path.join(directory, TRACE)  # noqa: PTH118
        self._fd = directory_fd
        self._counted: tuple[int, int] = (0, 0)
        self._lasting: Any = None

    def at(self, point: str) -> str | None:
        """Be killed or stopped here if that was ordered, or return what else was."""
        order = self._read(self._order)
        if order is None and self._lasting is not None and self._lasting["point"] == point:
            # It may have been taken back meanwhile.
            self._lasting = self._read(self._fired)
            return str(self._lasting["action"]).removeprefix(ALWAYS) if self._lasting is not None else None
        if order is None or order["point"] != point:
            return None
        number, seen = self._counted
        seen = seen + 1 if number == order["id"] else 1
        self._counted = order["id"], seen
        if seen != order["nth"]:
            return None
        try:
            os.rename(self._order, self._fired, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except FileNotFoundError:
            return None
        action = str(order["action"])
        self._lasting = order if action.startswith(ALWAYS) else None
        action = action.removeprefix(ALWAYS)
        match action.split(":"):
            case ["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["stop"]:
                os.kill(os.getpid(), signal.SIGSTOP)
            case ["wake", pid]:
                os.kill(int(pid), signal.SIGCONT)
        return action

    def note(self, line: str) -> None:
        """Leave a line in the trace, if there is one."""
        with suppress(FileNotFoundError):
            fd = os.open(self._trace, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, dir_fd=self._fd)
            try:
                os.write(fd, line.encode() + b"\n")
            finally:
                os.close(fd)

    def _read(self, name: str) -> Any:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._fd)
        except FileNotFoundError:
            return None
        with os.fdopen(fd) as file:
            return json.load(file)
