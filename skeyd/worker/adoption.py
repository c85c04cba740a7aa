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

ACCESSES: Final = ("injection", "qmp")
"""How the keys are reached: a thread of the VMM makes the calls, or the VMM prints them (QMP)."""
MEMORY_SOURCES: Final = ("named", "probed", "qmp")
"""Who says which memory slots the VM has: the caller, the VM itself by its answers to GET, or the VMM."""

VMM_METADATA: Final = ("vmm_pid", "vmm_start_time", "vmm_uid", "vmm_executable", "vmm_name")
"""What errors and the log call the fields of a VmmProcess."""


@dataclass(frozen=True, slots=True)
class Adoption:
    """A VM of another process."""

    pid: int
    """0: the one of that name, or whoever listens at qmp_socket."""
    start_time: int
    """Of that process, in clock ticks since boot: another with its number has another. 0: whichever it is."""
    fd: int
    """The VM's descriptor there; -1: the only one."""
    hold_ms: int
    """How long a call may hold a thread of the process, in milliseconds."""
    name: str = ""
    """What the process calls its guest (skeyd.worker.vmm_name); "": it is known by its pid, or its monitor."""
    qmp_socket: str = ""
    """Where its QMP monitor listens; "": it is not to be asked."""
    access: str = ""
    """One of ACCESSES; "": injection, or QMP where that is not allowed and there is a qmp_socket."""

    def to_message(self) -> dict[str, Any]:
        """Write it down."""
        return {
            "pid": self.pid,
            "start_time": self.start_time,
            "fd": self.fd,
            "hold_ms": self.hold_ms,
            "name": self.name,
            "qmp_socket": self.qmp_socket,
            "access": self.access,
        }

    @classmethod
    def from_message(cls, message: Fields) -> Self:
        """Read it. ProtocolError for anything that is none."""
        # Who wrote it can be older than this.
        name, qmp_socket = _name(message), message.text("qmp_socket") if message.has("qmp_socket") else ""
        if name and qmp_socket:
            raise ProtocolError("a VMM by its name and by its monitor")
        return cls(
            message.integer("pid", 0 if name or qmp_socket else 1, 0 if name else PID_MAX),
            message.integer("start_time", 0, GFN_LIMIT - 1),
            message.integer("fd", -1, FD_MAX),
            message.integer("hold_ms", 1, HOLD_MAX_MS),
            name,
            qmp_socket,
            message.choice("access", ("", *ACCESSES)) if message.has("access") else "",
        )


@dataclass(frozen=True, slots=True)
class VmmProcess:
    """A process that has a VM."""

    pid: int
    start_time: int
    """In clock ticks since boot."""
    uid: int
    executable: str
    name: str
    """What it calls its guest (skeyd.worker.vmm_name), its own word; "": nothing that can be shown whole."""

    def to_message(self) -> dict[str, Any]:
        """Write it down."""
        return {
            "pid": self.pid,
            "start_time": self.start_time,
            "uid": self.uid,
            "executable": self.executable,
            "name": self.name,
        }

    def to_metadata(self) -> dict[str, str]:
        """Write it down for an error's metadata, in VMM_METADATA's words; without what isn't known."""
        values = (self.pid, self.start_time, self.uid, self.executable, self.name)
        return {word: str(value) for word, value in zip(VMM_METADATA, values, strict=True) if value != ""}

    @staticmethod
    def fields_of(message: Fields) -> dict[str, Any]:
        """Read what there is of a VmmProcess in a message that says more. ProtocolError for anything that is none."""
        return {
            "pid": message.integer("pid", 1, PID_MAX),
            "start_time": message.integer("start_time", 0, GFN_LIMIT - 1),
            "uid": message.integer("uid", 0, UID_MAX),
            "executable": message.text("executable"),
            "name": _name(message),
        }


@dataclass(frozen=True, slots=True)
class Vmm(VmmProcess):
    """The process that owns an adopted VM, as it was when it was adopted."""

    fd: int
    """Its descriptor of the VM; -1: none is used."""
    memory_source: str
    """One of MEMORY_SOURCES."""
    access: str = "injection"
    """One of ACCESSES."""

    @classmethod
    def of(cls, process: VmmProcess, fd: int, memory_source: str, access: str) -> Self:
        """Say of a process how its VM was adopted."""
        known = (process.pid, process.start_time, process.uid, process.executable, process.name)
        return cls(*known, fd, memory_source, access)

    def to_message(self) -> dict[str, Any]:
        """Write it down."""
        return {
            **VmmProcess.to_message(self),
            "fd": self.fd,
            "memory_source": self.memory_source,
            "access": self.access,
        }

    @classmethod
    def from_message(cls, message: Fields) -> Self:
        """Read it. ProtocolError for anything that is none."""
        # Who wrote it can be older than the other one.
        access = message.choice("access", ACCESSES) if message.has("access") else "injection"
        return cls(
            **cls.fields_of(message),
            fd=message.integer("fd", 0 if access == "injection" else -1, FD_MAX),
            memory_source=message.choice("memory_source", MEMORY_SOURCES),
            access=access,
        )


def _name(message: Fields) -> str:
    # Who wrote it can be older than names.
    name = message.text("name") if message.has("name") else ""
    if name and not is_name(name):
        raise ProtocolError(f"a VMM's name of {len(name)} characters")
    return name
