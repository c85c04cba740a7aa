"""Signals that end skeyctl, kept away from grpc.

An exception that a signal handler raises within grpc's Python code can leave one of grpc's locks held for good: of 150
interrupts of a SetSkeys two left skeyctl waiting in Channel.close() for ever (grpcio 1.85). So the command runs in a
thread of its own, where no handler does, and an interrupt closes its connections: its calls end, it tidies up, it ends.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, NoReturn

from skeyd.client import Client
from skeyd.client import connect as client_of

SECONDS: Final = 5.0
"""How long a command may take to tidy up. One that stands still in a pipe or on a disk never would."""

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Interrupted(BaseException):
    def __init__(self, number: int) -> None:
        self.number = number


class _Connections:
    # Those that a command has open; none can be opened once they are cut.
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Client] = []
        self.are_cut = False

    def add(self, client: Client) -> None:
        with self._lock:
            if not self.are_cut:
                self._open.append(client)
                return
        client.close()

    def discard(self, client: Client) -> None:
        with self._lock:
            if client in self._open:
                self._open.remove(client)

    def cut(self) -> bool:
        with self._lock:
            self.are_cut = True
            cut, self._open = self._open, []
        for client in cut:
            client.close()
        return bool(cut)


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


def run(command: Callable[[], NoReturn], say_interrupted: Callable[[], None]) -> NoReturn:
    """Run a command that ends with SystemExit, in a thread of its own, and exit as it did.

    With 128 and the signal's number where a signal ended it; the command has said so then, or `say_interrupted` does
    for one that can't. For the main thread of a process that does nothing else.
    """
    ends: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    waiting = True

    def work() -> None:
        try:
            command()
        except BaseException as end:
            ends.put(end)

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal waiting
        if not waiting:
            os._exit(128 + number)  # who interrupts twice has waited for long enough
        waiting = False
        raise _Interrupted(number)

    try:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, handle)
        threading.Thread(target=work, daemon=True).start()
        end = ends.get()
        waiting = False
    except _Interrupted as interrupted:
        end = _interrupt(ends, interrupted.number, say_interrupted)
    raise end


def _interrupt(
    ends: queue.SimpleQueue[BaseException], number: int, say_interrupted: Callable[[], None]
) -> BaseException:
    # Without a connection there's nothing to tidy up: it asks, or reads a file.
    if _connections.cut():
        try:
            end = ends.get(timeout=SECONDS)
        except queue.Empty:
            pass
        else:
            return SystemExit(128 + number) if isinstance(end, SystemExit) and end.code else end
    if sys.stderr.isatty():
        sys.stderr.write("\n")  # after a question or a bar
    say_interrupted()
    os._exit(128 + number)
