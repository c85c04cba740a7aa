"""Signals that end skeyctl, kept away from grpc.

An exception that a signal handler raises within grpc's Python code can leave one of grpc's locks held for good: of 150
interrupts of a SetSkeys two left skeyctl waiting in Channel.close() for ever (grpcio 1.85). So the command runs in a
thread of its own, where no handler does, and an interrupt closes its connections: its calls end, it tidies up, it ends.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, NoReturn

from skeyd.client import Client
from skeyd.client import connect as client_of
from skeyd.linux import signals_by_socket

SECONDS: Final = 5.0
"""How long a command may take to tidy up. One that stands still in a pipe or on a disk never would."""

ONE_EVENT_SECONDS: Final = 0.5
"""Signals that come closer together are of one event."""

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ENDED: Final = b"\0"


class _Connections:
    # Those that a command has open; none can be opened once they are cut.
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Client] = []
        self.any = False
        """Whether there ever was one."""
        self.are_cut = False

    def add(self, client: Client) -> None:
        with self._lock:
            if not self.are_cut:
                self.any = True
                self._open.append(client)
                return
        client.close()

    def discard(self, client: Client) -> None:
        with self._lock:
            if client in self._open:
                self._open.remove(client)

    def cut(self) -> None:
        with self._lock:
            self.are_cut = True
            cut, self._open = self._open, []
        for client in cut:
            client.close()


_connections: Final = _Connections()


@contextmanager
def connect(target: str) -> Iterator[Client]:
    """Connect to a daemon for as long as the context lasts; an interrupt cuts the connection."""
    with client_of(target) as client:
        _connections.add(client)
        try:
            yield client
        finally:
            _connections.discard(client)


def happened() -> bool:
    """Tell whether there was an interrupt: what goes wrong from then on is its doing."""
    return _connections.are_cut


def run(command: Callable[[], NoReturn], say_interrupted: Callable[[], None], interrupted_code: int) -> NoReturn:
    """Run a command that ends with SystemExit, in a thread of its own, and exit as it did.

    With 128 and the signal's number where a signal ended it: the command has said so and ended with
    `interrupted_code` then, or `say_interrupted` does for one that can't. One that was done ends as it would have.
    For the main thread of a process that does nothing else.
    """
    ends: list[BaseException] = []
    heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup has it
    # Signals, each by its number, and the command's end come in by one socket.
    with signals_by_socket(heeded) as (told, teller):

        def work() -> None:
            try:
                command()
            except BaseException as end:
                ends.append(end)
            teller.send(_ENDED)

        threading.Thread(target=work, daemon=True).start()
        first = told.recv(1)
        signalled = first[0]
        if signalled:
            _connections.cut()
            # Before its first connection there's nothing to tidy up, and nothing done: it asks, or reads a file. After
            # its last one it is all but done, and what it says is true.
            if _connections.any:
                first = _awaited(told) or first
        if not ends:
            with suppress(OSError):  # the terminal that is gone is what SIGHUP tells of
                if sys.stderr.isatty():
                    sys.stderr.write("\n")  # after a question or a bar
                say_interrupted()
            os._exit(128 + first[0])
        end = ends[0]
        if not isinstance(end, SystemExit) or not isinstance(end.code, int):
            raise end
        with suppress(OSError):
            sys.stdout.flush()
        # At once: Python's own end would give the signals their first meaning back before it is over.
        os._exit(128 + signalled if end.code == interrupted_code and signalled else end.code)


def _awaited(told: socket.socket) -> bytes | None:
    # Wait for the command's end, or for somebody who has waited for long enough. A terminal that closes, and its shell,
    # can both send a signal: the second of one event is none of its own.
    begin = time.monotonic()
    while (left := begin + SECONDS - time.monotonic()) > 0:
        told.settimeout(left)
        try:
            said = told.recv(1)
        except TimeoutError:
            break
        if said == _ENDED or time.monotonic() - begin > ONE_EVENT_SECONDS:
            return said
    return None
