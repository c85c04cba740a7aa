"""Requests for keys that belong together, "freeze" and "snapshot", and those that wait while such keys are read."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import MemoryMap
from skeyd.worker.backend import Printing
from skeyd.worker.captures import Captures
from skeyd.worker.front_connection import FrontConnection
from skeyd.worker.keys import Keys
from skeyd.worker.packets import Fields, ProtocolError
from skeyd.worker.protocol import FREEZE_MAX_NS, KEYOPS, NANOSECONDS_MAX
from skeyd.worker.transactions import Transactions

PRINTING_SECONDS: Final = 40.0
"""How long a "snapshot" may take, waiting for others' included: less than a front waits for its answer, with what it
may take to end (skeyd.worker.dump_capture)."""


class Asked(NamedTuple):
    """What a connection asks for."""

    connection: FrontConnection
    request: Fields
    since: float
    """When it was asked, by time.monotonic()."""


class CaptureRequests:
    """Begins captures for connections, and keeps who has to wait for the end of one.

    With `print_keys` keys are read by printings, with which it begins one in so many seconds at most; else slice by
    slice, or frozen. Synchronization: none; one thread owns it.
    """

    def __init__(
        self,
        captures: Captures[FrontConnection],
        keys: Keys,
        memory_map: MemoryMap,
        transactions: Transactions,
        print_keys: Callable[[float], Printing] | None,
    ) -> None:
        self._captures = captures
        self._keys = keys
        self._memory_map = memory_map
        self._transactions = transactions
        self._print_keys = print_keys
        self._waiting: list[Asked] = []

    def must_wait(self, asked: Asked) -> bool:
        """Whether a request needs the VM while a capture has it; it is kept then, until `take_waiting`.

        ProtocolError from who awaits the end of one. SkeydError QMP_BUSY: it isn't to wait for so long.
        """
        if not self._needs_vm(asked.connection, asked.request):
            return False
        self._waiting.append(asked)
        return True

    def waiting(self) -> list[FrontConnection]:
        """Return the connections that wait, first come first."""
        return [asked.connection for asked in self._waiting]

    def take_waiting(self) -> list[Asked]:
        """Return what was asked meanwhile, first come first. Nobody waits any more."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def forget(self, connection: FrontConnection) -> bool:
        """Forget what a connection waits for. False: it doesn't."""
        kept = [asked for asked in self._waiting if asked.connection is not connection]
        waited = len(kept) < len(self._waiting)
        self._waiting = kept
        return waited

    def begin(self, asked: Asked) -> bool:
        """Begin a capture if that is asked for. False: it isn't, or the guest has no keys, at this or any moment.

        ProtocolError. SkeydError as Captures.begin and begin_printing; QMP_BUSY, GFN_NOT_MAPPED.
        """
        connection, request, since = asked
        match request.text("op"):
            case "freeze":
                return self._freeze(connection, request)
            case "snapshot":
                return self._snapshot(connection, since)
        return False

    def _needs_vm(self, connection: FrontConnection, request: Fields) -> bool:
        if self._captures.runs_for(connection):
            raise ProtocolError("a request before the answer to the last one")
        if self._captures.fileno() is None:
            return False
        match request.text("op"):
            case "get":
                if self._captures.keys_of(connection) is not None:
                    return False
                if self._print_keys is not None:
                    # It is one key that is asked for, by who doesn't wait for as long as all are printed.
                    raise SkeydError(Reason.QMP_BUSY, "all keys of this VM are being printed for a stream")
                return True
            case "keyop":
                return request.choice("operation", KEYOPS) == "iske"
            case "snapshot":
                return True
        return False

    def _snapshot(self, connection: FrontConnection, since: float) -> bool:
        if self._print_keys is None:
            raise ProtocolError("a snapshot of a VM that is read slice by slice")
        seconds = PRINTING_SECONDS - (time.monotonic() - since)
        if seconds <= 0:
            raise SkeydError(Reason.QMP_BUSY, "other streams' printings of the keys took all the time there is")
        if not self._keys.uses_keys():
            return False
        self._captures.begin_printing(connection, partial(self._print_keys, seconds))
        return True

    def _freeze(self, connection: FrontConnection, request: Fields) -> bool:
        if self._print_keys is not None:
            raise ProtocolError("freeze of a VM whose keys are printed")
        self._captures.require_none()
        self._transactions.require_idle()
        frames = connection.ranges(request)
        budget = request.integer("budget_ns", 1, FREEZE_MAX_NS) / 1e9
        slice_seconds = request.integer("slice_ns", 1, NANOSECONDS_MAX) / 1e9
        for one in frames:
            self._memory_map.require_mapped(one)
        if not self._keys.uses_keys():
            return False
        self._captures.begin(connection, frames, budget, slice_seconds)
        return True
