"""A connection to a QMP monitor: one command at a time, each within a time."""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self

from skeyd.linux import Peer, peer_of
from skeyd.qmp.errors import BrokenError, BusyError, QmpError, RefusedError, UnreachableError
from skeyd.qmp.words import LINE_MAX, error_of, is_event, object_of, shown, version_of

_PART: Final = 64 * 1024


class Monitor:
    """A monitor that has said its greeting and takes commands.

    `seconds` are for all of it: connecting, the greeting, and each command that says nothing else has what is left.
    The constructor raises UnreachableError, BusyError, BrokenError. After one of those it is of no more use. A monitor
    takes one client at a time: another that connects is not told so, and gets no greeting.

    Synchronization: one thread.
    """

    def __init__(self, path: str, seconds: float) -> None:
        self._path = path
        self._until = time.monotonic() + seconds
        self._seconds = seconds
        self._said = bytearray()
        self._looked = 0
        """How much of it is known to have no end of a line."""
        self._asked = 0
        self._command = ""
        """What is to be answered; empty: nothing."""
        self._answer: dict[str, Any] | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._connect()
            self.peer: Peer = peer_of(self._socket)
            """The process that called listen, which most often is the VMM; libvirt listens for its VMMs."""
            self.version: str = self._broken(version_of, self._object("no greeting"))
            """Of QEMU, as 7.2.22."""
            self.execute("qmp_capabilities")
        except QmpError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise self._error(BrokenError, str(error.strerror)) from error
        except BaseException:
            self.close()
            raise

    def execute(self, command: str, arguments: dict[str, Any] | None = None, fd: int | None = None) -> Any:
        """Run a command, with a descriptor to go along with it, and return its answer. RefusedError, and the others."""
        self.begin(command, arguments, fd)
        return self.answer()

    def begin(self, command: str, arguments: dict[str, Any] | None = None, fd: int | None = None) -> None:
        """Run a command whose answer is taken later."""
        if self._command:
            raise ValueError(f"{self._command} is not answered yet")
        self._asked += 1
        message: dict[str, Any] = {"execute": command, "id": self._asked}
        if arguments is not None:
            message["arguments"] = arguments
        data = json.dumps(message).encode() + b"\n"
        try:
            self._wait()
            if fd is not None:
                sent = socket.send_fds(self._socket, [data], [fd], socket.MSG_NOSIGNAL)
            else:
                sent = self._socket.send(data, socket.MSG_NOSIGNAL)
        except (TimeoutError, BlockingIOError) as error:
            raise self._late(f"no room for {command}") from error
        except OSError as error:
            raise self._error(BrokenError, f"it hung up before {command}: {error.strerror}") from error
        if sent != len(data):
            # Commands are short, and the one before has been answered.
            raise self._error(BusyError, f"it doesn't take {command}")
        self._command = command

    def is_asked(self) -> bool:
        """Whether a command was begun whose answer was not taken."""
        return bool(self._command)

    def is_answered(self) -> bool:
        """Whether `answer` has something to tell without waiting."""
        self._socket.settimeout(0)
        if self._has_looked():
            return True
        if not self.seconds_left():
            raise self._late(f"no answer to {self._command}")
        # No more than a part: a monitor may send events without end, and others are served before the next look.
        return self._receive() and self._has_looked()

    def answer(self) -> Any:
        """Return the answer of the command that was begun, as execute."""
        while self._answer is None:
            self._look_at(self._whole_line(f"no answer to {self._command}"))
        answer, self._answer = self._answer, None
        command, self._command = self._command, ""
        error = self._broken(error_of, answer)
        if error is not None:
            text = f"the QMP monitor at {shown(self._path)} refused {command}: {error[1]} ({error[0]})"
            raise RefusedError(text, command, *error)
        return answer["return"]

    def settle(self) -> None:
        """Wait for what was begun and is not answered, if anything is, and forget the answer."""
        if self._command:
            with suppress(RefusedError):
                self.answer()

    def allow(self, seconds: float) -> None:
        """Give what follows so many seconds from now on, whatever was left."""
        self._seconds = seconds
        self._until = time.monotonic() + seconds

    def seconds_left(self) -> float:
        """How long what is asked now may take; never below 0."""
        return max(0.0, self._until - time.monotonic())

    def fileno(self) -> int:
        """Return the socket's descriptor: readable when the monitor has said something."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self) -> None:
        try:
            # Through a descriptor: a unix address has 107 bytes at most, and a path may be longer.
            found = os.open(self._path, os.O_PATH | os.O_CLOEXEC)
            try:
                if not stat.S_ISSOCK(os.fstat(found).st_mode):
                    raise self._error(UnreachableError, "it is no unix socket", "there is no QMP monitor at")
                self._wait()
                self._socket.connect(f"/proc/self/fd/{found}")
            finally:
                os.close(found)
        except (TimeoutError, BlockingIOError) as error:
            raise self._late("no connection") from error
        except OSError as error:
            raise self._error(UnreachableError, str(error.strerror), "there is no QMP monitor at") from error

    def _object(self, what: str) -> dict[str, Any]:
        said: dict[str, Any] = self._broken(object_of, self._whole_line(what))
        return said

    def _look_at(self, line: bytes) -> None:
        said = self._broken(object_of, line)
        if is_event(said):
            return
        # Only one is ever awaited, so that another's id is a mistake, or a lie.
        if not self._command or type(said.get("id")) is not int or said["id"] != self._asked:
            raise self._error(BrokenError, "an answer is to nothing that was asked")
        self._answer = said

    def _has_looked(self) -> bool:
        # Whether the answer is among what was said so far.
        while self._answer is None:
            line = self._line()
            if line is None:
                return False
            self._look_at(line)
        return True

    def _whole_line(self, what: str) -> bytes:
        while True:
            # Also where there are lines already: a monitor may send events without end.
            if not self.seconds_left():
                raise self._late(what)
            line = self._line()
            if line is not None:
                return line
            try:
                self._wait()
                self._receive()
            except TimeoutError as error:
                raise self._late(what) from error

    def _line(self) -> bytes | None:
        end = self._said.find(b"\n", self._looked)
        if end < 0:
            self._looked = len(self._said)
            if self._looked > LINE_MAX:
                raise self._error(BrokenError, f"a line has more than {LINE_MAX} bytes")
            return None
        line = bytes(self._said[:end])
        del self._said[: end + 1]
        self._looked = 0
        return line

    def _receive(self) -> bool:
        # Not recvmsg: descriptors that are sent are closed by the kernel.
        try:
            part = self._socket.recv(_PART)
        except TimeoutError:
            raise
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._error(BrokenError, f"it hung up: {error.strerror}") from error
        if not part:
            raise self._error(BrokenError, "it hung up" + (" in the middle of a line" if self._said else ""))
        self._said += part
        return True

    def _wait(self) -> None:
        left = self.seconds_left()
        if not left:
            raise TimeoutError
        self._socket.settimeout(left)

    def _broken(self, function: Any, value: Any) -> Any:
        try:
            return function(value)
        except BrokenError as error:
            raise self._error(BrokenError, str(error)) from None

    def _late(self, what: str) -> BusyError:
        error = self._error(
            BusyError,
            f"{what} within {self._seconds:g} s. It takes one client at a time, and another may have it (libvirt keeps "
            "that of its VMs), or its process is stopped or at work",
        )
        assert isinstance(error, BusyError)  # noqa: S101  for mypy
        return error

    def _error(self, kind: type[QmpError], what: str, where: str = "the QMP monitor at") -> QmpError:
        return kind(f"{where} {shown(self._path)}: {what}")
