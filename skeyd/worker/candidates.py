"""What the short-lived process that looks for VMMs says of them; skeyd.worker.vmm_search is where it looks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Final, Self

from skeyd.errors import Reason
from skeyd.storage_key import GFN_LIMIT
from skeyd.worker.adoption import FD_MAX, VmmProcess
from skeyd.worker.packets import Fields, ProtocolError

CANDIDATES_MAX: Final = 1024
"""Most candidates in an answer."""
CANDIDATES_BYTES: Final = 1024 * 1024
"""Most bytes of them, as JSON. A gRPC client takes 4 MiB by default."""
FDS_MAX: Final = 64
"""Most VM descriptors that are named of one process."""
COUNT_MAX: Final = (1 << 32) - 1
REFUSALS: Final = ("", Reason.VMM_TRACED.name, Reason.VMM_NOT_TRACEABLE.name, Reason.VMM_UNSUITABLE.name)


@dataclass(frozen=True, slots=True)
class Candidate(VmmProcess):
    """A process that holds KVM VMs, and what is known of it without touching it."""

    vm_fds: tuple[int, ...]
    """Its descriptors of VMs, ascending, FDS_MAX of them at most."""
    vcpus: int
    """Its descriptors of vCPUs."""
    mapped: int
    """VmSize of /proc/PID/status, in bytes."""
    resident: int
    """VmRSS of /proc/PID/status, in bytes."""
    refusal: str = ""
    """The name of the Reason for which it could not be adopted now; "": none is known."""
    refusal_detail: str = ""
    """The same in words."""

    def to_message(self) -> dict[str, Any]:
        """Write it down."""
        return {
            **VmmProcess.to_message(self),
            "vm_fds": list(self.vm_fds),
            "vcpus": self.vcpus,
            "mapped": self.mapped,
            "resident": self.resident,
            "refusal": self.refusal,
            "refusal_detail": self.refusal_detail,
        }

    @classmethod
    def from_message(cls, message: Fields) -> Self:
        """Read it. ProtocolError for anything that is none."""
        return cls(
            **cls.fields_of(message),
            vm_fds=message.integers("vm_fds", FDS_MAX, 0, FD_MAX),
            vcpus=message.integer("vcpus", 0, COUNT_MAX),
            mapped=message.integer("mapped", 0, GFN_LIMIT - 1),
            resident=message.integer("resident", 0, GFN_LIMIT - 1),
            refusal=message.choice("refusal", REFUSALS),
            refusal_detail=message.text("refusal_detail"),
        )


@dataclass(frozen=True, slots=True)
class Found:
    """All that was found, and how much was not looked at."""

    candidates: tuple[Candidate, ...]
    """In order of pid."""
    unreadable: int
    """Processes whose descriptors the kernel doesn't show to this user."""
    left_out: int
    """Candidates and processes beyond a bound."""
    workers: int
    """Processes with VMs that are skeyd's own workers."""

    def to_message(self) -> dict[str, Any]:
        """Write it down."""
        return {
            "candidates": [one.to_message() for one in self.candidates],
            "unreadable": self.unreadable,
            "left_out": self.left_out,
            "workers": self.workers,
        }

    @classmethod
    def from_message(cls, message: Fields) -> Self:
        """Read it. ProtocolError for anything that is none."""
        candidates = tuple(map(Candidate.from_message, message.objects("candidates", CANDIDATES_MAX)))
        if any(one.pid >= other.pid for one, other in itertools.pairwise(candidates)):
            raise ProtocolError("candidates that are not in order of pid")
        return cls(
            candidates,
            message.integer("unreadable", 0, COUNT_MAX),
            message.integer("left_out", 0, COUNT_MAX),
            message.integer("workers", 0, COUNT_MAX),
        )
