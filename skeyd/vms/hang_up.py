"""How one thread ends what another waits for: the end of a call ends its talk with a worker."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class HangUp:
    """Made before there is a connection, so that a call can end while the front still waits for a worker's hello.

    Synchronization: any thread; `now` waits for nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self.was_told = False
        """`now` was called."""

    def now(self) -> None:
        """Have whoever waits for the worker fail at once, and the worker do no more; of what is to come too."""
        with self._lock:
            self.was_told = True
            self._shut_down()

    def hold(self, connection: socket.socket) -> None:
        """Take a connection, which is what is hung up on until `let_go`."""
        with self._lock:
            self._connection = connection
            if self.was_told:
                self._shut_down()

    def let_go(self) -> None:
        """Touch the connection no more: it is to be closed, or is another call's from now on."""
        with self._lock:
            self._connection = None

    def _shut_down(self) -> None:
        if self._connection is not None:
            with suppress(OSError):  # the worker was faster
                self._connection.shutdown(socket.SHUT_RDWR)


class HangUps:
    """One for several connections at once. Synchronization: any thread; `now` waits for nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: list[HangUp] = []
        self.was_told = False
        """`now` was called."""

    def one_more(self) -> HangUp:
        """Make one for another connection."""
        made = HangUp()
        with self._lock:
            self._all.append(made)
            told = self.was_told
        if told:
            made.now()
        return made

    def now(self) -> None:
        """As HangUp.now, of all."""
        with self._lock:
            self.was_told = True
            told = list(self._all)
        for one in told:
            one.now()
