"""What front and worker say to each other of a VM that another process owns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Self

from skeyd.storage_key import GFN_LIMIT
from skeyd.worker.packets import Fields, ProtocolError
from skeyd.worker.vmm_name import is_name

PID_MAX: Final = 1 << 31
FD_MAX: Final = (1 << 31) - 1
UID_MAX: Final = (1 << 32) - 1
HOLD_MAX_MS: Final = 10_000

MEMORY_SOURCES: Final = ("named", "probed")
"""Who says which memory slots the VM has: the caller, or the VM itself, by its answers to GET."""


@dataclass(frozen=True, slots=True)
class Adoption:
    """A VM of another process."""

    pid: int
    """0: the one of that name."""
    start_time: int
    """Of that process, in clock ticks since boot: another with its number has another. 0: whichever it is."""
    fd: int
    """The VM's descriptor there; -1: the only one."""
    hold_ms: int
    """How long a call may hold a thread of the process, in milliseconds."""
    name: str = ""
    """What the process calls its guest (skeyd.worker.vmm_name); "": it is known by its pid."""

    def to_message(self) -> dict[str, Any]:
        """Write it down."""
        return {
            "pid": self.pid,
            "start_time": self.start_time,
            "fd": self.fd,
            "hold_ms": self.hold_ms,
            "name": self.name,
        }

    @classmethod
    def from_message(cls, message: Fields) -> Self:
        """Read it. ProtocolError for anything that is none."""
        name = _name(message)
        return cls(
            message.integer("pid", 0, 0) if name else message.integer("pid", 1, PID_MAX),
            message.integer("start_time", 0, GFN_LIMIT - 1),
            message.integer("fd", -1, FD_MAX),
            message.integer("hold_ms", 1, HOLD_MAX_MS),
            name,
        )


@dataclass(frozen=True, slots=True)
class Vmm:
    """The process that owns an adopted VM."""

    pid: int
    start_time: int
    """In clock ticks since boot."""
    uid: int
    executable: str
    fd: int
    """Its descriptor of the VM."""
    memory_source: str
    """One of MEMORY_SOURCES."""
    name: str = ""
    """What it called its guest when it was adopted (skeyd.worker.vmm_name); "": nothing."""

    def to_message(self) -> dict[str, Any]:
        """Write it down."""
        return {
            "pid": self.pid,
            "start_time": self.start_time,
            "uid": self.uid,
            "executable": self.executable,
            "fd": self.fd,
            "name": self.name,
            "memory_source": self.memory_source,
        }

    @classmethod
    def from_message(cls, message: Fields) -> Self:
        """Read it. ProtocolError for anything that is none."""
        return cls(
            message.integer("pid", 1, PID_MAX),
            message.integer("start_time", 0, GFN_LIMIT - 1),
            message.integer("uid", 0, UID_MAX),
            message.text("executable"),
            message.integer("fd", 0, FD_MAX),
            message.choice("memory_source", MEMORY_SOURCES),
            _name(message),
        )


def _name(message: Fields) -> str:
    # Who wrote it can be older than names.
    name = message.text("name") if message.has("name") else ""
    if name and not is_name(name):
        raise ProtocolError(f"a VMM's name of {len(name)} characters")
    return name
