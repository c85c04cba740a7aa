"""A VM as the front sees it at one moment."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from skeyd.gfn import MemorySlot
from skeyd.worker.adoption import Vmm
from skeyd.worker.outcomes import LastWrite


class VmState(enum.Enum):
    """What is known of a VM now."""

    CREATING = "creating"
    READY = "ready"
    QUARANTINED = "quarantined"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Vm:
    """One look at a VM. Fields that only its worker knows are empty where it did not answer."""

    vm_id: str
    state: VmState
    state_reason: str = ""
    uid: str = ""
    kind: str = ""
    """One of worker.protocol.KINDS, or empty where even the record doesn't say."""
    created: int = 0
    """Seconds since 1970; 0 where it is not known."""
    incarnation: str = ""
    kernel: str = ""
    worker_version: str = ""
    worker_pid: int = 0
    slots: tuple[MemorySlot, ...] = ()
    uses_keys: bool | None = None
    """None: not known."""
    last_write: LastWrite | None = None
    """None: there was no SetSkeys that set a key, or it is not known."""
    vmm: Vmm | None = None
    """Whose it is, of an adopted one; where its worker did not answer, whose it was when it was adopted."""
