"""What front and worker say to each other of a VM that another process owns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Self

from skeyd.storage_key import GFN_LIMIT
from skeyd.worker.packets import Fields

PID_MAX: Final = 1 << 31
FD_MAX: Final = (1 << 31) - 1
UID_MAX: Final = (1 << 32) - 1
HOLD_MAX_MS: Final = 10_000
ACCESSES: Final = ("injection", "qmp")
"""How the keys are reached: a thread of the VMM makes the calls, or the VMM prints them (QMP)."""
MEMORY_SOURCES: Final = ("given", "qmp", "probed")
"""Who said where the guest has memory: the request, the VMM, or the kernel when it was tried."""


@dataclass(frozen=True, slots=True)
class Adoption:
    """A VM of another process."""

    pid: int
    """0: whoever listens at qmp_socket."""
    start_time: int
    """Of that process, in clock ticks since boot: another with its number has another. 0: whichever it is."""
    fd: int
    """The VM's descriptor there; -1: the only one."""
    hold_ms: int
    """How long a call may hold a thread of the process, in milliseconds."""
    qmp_socket: str = ""
    """Where its QMP monitor listens; empty: it is not to be asked."""
    access: str = ""
    """One of ACCESSES; empty: injection, or QMP where that is not allowed and there is a qmp_socket."""

    def to_message(self) -> dict[str, Any]:
        """Write it down."""
        return {
            "pid": self.pid,
            "start_time": self.start_time,
            "fd": self.fd,
            "hold_ms": self.hold_ms,
            "qmp_socket": self.qmp_socket,
            "access": self.access,
        }

    @classmethod
    def from_message(cls, message: Fields) -> Self:
        """Read it. ProtocolError for anything that is none."""
        qmp_socket = message.text("qmp_socket")
        return cls(
            message.integer("pid", 0 if qmp_socket else 1, PID_MAX),
            message.integer("start_time", 0, GFN_LIMIT),
            message.integer("fd", -1, FD_MAX),
            message.integer("hold_ms", 1, HOLD_MAX_MS),
            qmp_socket,
            message.choice("access", ("", *ACCESSES)),
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
    """Its descriptor of the VM; -1: none is used."""
    memory_source: str = "given"
    """One of MEMORY_SOURCES."""
    access: str = "injection"
    """One of ACCESSES."""

    def to_message(self) -> dict[str, Any]:
        """Write it down."""
        return {
            "pid": self.pid,
            "start_time": self.start_time,
            "uid": self.uid,
            "executable": self.executable,
            "fd": self.fd,
            "memory_source": self.memory_source,
            "access": self.access,
        }

    @classmethod
    def from_message(cls, message: Fields) -> Self:
        """Read it. ProtocolError for anything that is none."""
        access = message.choice("access", ACCESSES)
        return cls(
            message.integer("pid", 1, PID_MAX),
            message.integer("start_time", 0, GFN_LIMIT),
            message.integer("uid", 0, UID_MAX),
            message.text("executable"),
            message.integer("fd", 0 if access == "injection" else -1, FD_MAX),
            message.choice("memory_source", MEMORY_SOURCES),
            access,
        )
