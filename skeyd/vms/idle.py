"""Connections to workers that nobody uses now, kept for the next short call: to make one costs more than the call."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from skeyd.vms.session import Session


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    vm_id: str
    evidence: object
    session: Session
    since: float


class IdleSessions:
    """At most `most` sessions, and `most_a_vm` of one VM; those that were used last stay.

    Synchronization: any thread.
    """

    def __init__(self, most: int, most_a_vm: int) -> None:
        self._most = most
        self._most_a_vm = most_a_vm
        self._lock = threading.Lock()
        self._kept: list[_Kept] = []
        self._closed = False

    def put(self, vm_id: str, evidence: object, session: Session) -> None:
        """Keep a session, or close it. `evidence`: what was seen of the VM when it was made."""
        mine = _Kept(vm_id, evidence, session, time.monotonic())
        with self._lock:
            if self._closed or not session.is_quiet():
                out = [mine]
            else:
                self._kept.append(mine)
                of_vm = [one for one in self._kept if one.vm_id == vm_id]
                out = of_vm[: -self._most_a_vm] or self._kept[: -self._most]
                self._kept = [one for one in self._kept if one not in out]
        _close(out)

    def take(self, vm_id: str, evidence: object) -> tuple[Session, float] | None:
        """Return the VM's session that was used last, and how many seconds ago that was.

        Those of other evidence or with a worker that ended are closed. Whether the worker still answers is not known.
        """
        with self._lock:
            of_vm = [one for one in self._kept if one.vm_id == vm_id]
            out = [one for one in of_vm if one.evidence != evidence or not one.session.is_quiet()]
            good = next((one for one in reversed(of_vm) if one not in out), None)
            self._kept = [one for one in self._kept if one is not good and one not in out]
        _close(out)
        return None if good is None else (good.session, time.monotonic() - good.since)

    def drop(self, vm_id: str) -> None:
        """Close all of a VM."""
        with self._lock:
            out = [one for one in self._kept if one.vm_id == vm_id]
            self._kept = [one for one in self._kept if one.vm_id != vm_id]
        _close(out)

    def close(self) -> None:
        """Close all, and keep none from now on."""
        with self._lock:
            self._closed = True
            out, self._kept = self._kept, []
        _close(out)


def _close(kept: list[_Kept]) -> None:
    for one in kept:
        one.session.close()
