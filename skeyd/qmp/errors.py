"""What can go wrong with a QMP monitor."""

from __future__ import annotations


class QmpError(Exception):
    """A monitor could not be used. The message names the socket, and says what happened."""


class UnreachableError(QmpError):
    """Nobody listens there, or this process may not connect, or it is no unix socket."""


class BusyError(QmpError):
    """It says nothing in time: another client has it, or its process is stopped or at work."""


class BrokenError(QmpError):
    """What it says is not QMP, or it hung up."""


class RefusedError(QmpError):
    """It answered a command with an error."""

    def __init__(self, message: str, command: str, error_class: str, description: str) -> None:
        self.command = command
        self.error_class = error_class
        """QEMU's QapiErrorClass; most errors are a GenericError."""
        self.description = description
        """For people; QEMU promises nothing of it."""
        super().__init__(message)
