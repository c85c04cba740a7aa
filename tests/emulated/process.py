"""Commands inside an emulated host, seen from outside: the other end of agent.py."""

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Self

from tests.emulated import agent
from tests.emulated.machine import HostDied, Machine

ANSWER_TIMEOUT = 30.0  # seconds for what the agent does at once, on a machine that has much else to do


@contextlib.contextmanager
def answering(machine: Machine) -> Iterator[None]:
    """Take a TimeoutError in here to mean that the agent no longer answers: raise HostDied."""
    try:
        yield
    except TimeoutError as error:
        raise HostDied(f"the agent no longer answers\n{machine.console_tail()}") from error


class Process:
    """A command that was started inside and is left running.

    Synchronization: one thread at a time.
    """

    def __init__(self, call: "Call", open_processes: "set[Process]") -> None:
        """Take over a call, and a place in the set of those that are to be closed with the host."""
        self._call = call
        self._open = open_processes
        self._open.add(self)
        self._status: int | None = None

    @property
    def pid(self) -> int:
        """Its number, inside."""
        return self._call.pid

    def signal(self, number: int) -> None:
        """Send it a signal, and return when that is done. Raises ProcessLookupError if it has ended or was closed."""
        if self._status is None:
            self._must_be_open()
            self._status = self._call.signal(number)
        if self._status is not None:
            self.close()
            raise ProcessLookupError(f"process {self.pid} has ended with {self._status}")

    def wait(self, timeout: float) -> int:
        """Wait until it ends, and return its status, -N for the signal N, as subprocess does.

        Raises subprocess.TimeoutExpired after `timeout` seconds, and leaves it running; ProcessLookupError if it
        was closed before anybody saw it end.
        """
        if self._status is None:
            self._must_be_open()
            try:
                self._status = self._call.finish(time.monotonic() + timeout, lambda *_: None)
            except TimeoutError as error:
                raise subprocess.TimeoutExpired(self._call.argv, timeout) from error
            self.close()
        return self._status

    def close(self) -> None:
        """Kill it, with what it started, unless it has ended. Does nothing the second time."""
        self._open.discard(self)
        self._call.close()

    def _must_be_open(self) -> None:
        if self not in self._open:
            raise ProcessLookupError(f"process {self.pid} was killed when its handle was closed")


class Call:
    """One connection to the agent, and so one command, from its request to its end; leaving the context closes it.

    Synchronization: one thread at a time.
    """

    def __init__(self, machine: Machine, port: int, request: agent.Request, given: bytes, timeout: float) -> None:
        """Have the command started, and wait for that.

        Raises TimeoutError after `timeout` seconds, OSError as the start raised it inside, and HostDied.
        """
        self.argv = request["argv"]
        self._machine = machine
        deadline = time.monotonic() + timeout
        with self._talking(), contextlib.ExitStack() as undo:
            self._socket = socket.create_connection(("127.0.0.1", port), timeout)
            undo.callback(self._socket.close)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._frames = agent.Frames(self._socket)
            self._frames.send(agent.REQUEST, json.dumps(request).encode())
            view = memoryview(given)
            for at in range(0, len(given), agent.PIECE):
                self._frames.send(agent.INPUT, bytes(view[at : at + agent.PIECE]))
            kind, payload = self._frames.receive(max(deadline - time.monotonic(), 0))
            undo.pop_all()
        if kind == agent.REFUSED:
            self.close()
            number, text, name = json.loads(payload)
            raise OSError(number, f"{text} (inside the emulated host)", name)
        assert kind == agent.STARTED
        self.pid = int(json.loads(payload))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, which kills the command if it still runs."""
        self._socket.close()

    def finish(self, deadline: float, keep: Callable[[int, bytes], None]) -> int:
        """Wait for the command's end and return its status; `keep` is called with each output frame.

        Raises TimeoutError at the deadline, on time.monotonic's clock; it may be called again then.
        """
        while True:
            with self._talking():
                kind, payload = self._frames.receive(max(deadline - time.monotonic(), 0))
            if kind == agent.ENDED:
                return int(json.loads(payload))
            keep(kind, payload)

    def kill(self, keep: Callable[[int, bytes], None]) -> None:
        """Kill the command with what it started, and wait for its last output."""
        with answering(self._machine):
            with self._talking():
                self._frames.send(agent.KILL)
            self.finish(time.monotonic() + ANSWER_TIMEOUT, keep)

    def signal(self, number: int) -> int | None:
        """Send the command a signal; return its status if it had ended before, None otherwise."""
        with answering(self._machine), self._talking():
            self._frames.send(agent.SIGNAL, json.dumps(number).encode())
            kind, payload = self._frames.receive(ANSWER_TIMEOUT)
        return int(json.loads(payload)) if kind == agent.ENDED else None

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise
        except (OSError, EOFError) as error:
            raise HostDied(f"the emulated host went away: {error}\n{self._machine.console_tail()}") from error
