"""What front and worker say to each other: one JSON object a packet (skeyd.worker.packets).

The keys themselves never pass through the socket: they lie in the two halves ("buffers") of a sealed memfd that the
worker makes for each connection, each as large as the largest chunk, so that several slices fill one.

    worker → front   hello, at once when the connection is accepted
    front → worker   {"op": "status"}                                  → {"ok": {"uses_keys": bool, "last_write"?}}
                     {"op": "attach"}                                  → {"ok": {}} and the memfd
                     {"op": "get", "buffer", "offset", "start", "count"}
                                                                       → {"ok": {"uses_keys": bool, "ns": int}}
                     {"op": "set", "buffer", "offset", "start", "count", "allow_enable"}
                                                            → {"ok": {"repaired": int, "enabled": bool, "ns": int}}
                     {"op": "keyop", "operation", "gfn", "key"}
                                                   → {"ok": {"uses_keys": bool, "key": int, "repaired": bool}}
                     {"op": "freeze", "ranges", "budget_ns", "slice_ns"}
                                                                       → {"ok": {"uses_keys": bool, "ns": int}}
                     {"op": "snapshot"}                                → {"ok": {"uses_keys": bool, "ns": int}}
                     {"op": "shutdown", "uid"}                         → {"ok": {}}, then the worker ends
                     and the ops of skeyd.worker.outcomes, which make one call of several "set" requests
    any              {"error": {"reason", "message", "metadata"}}

"freeze" reads the keys of as many ranges as it says, which lie in the buffers as pairs of 64-bit numbers (first gfn,
frames), as they are at one moment. From then on "get" gives those to this connection, and no others, until it ends.
While it is being answered, "set" and what goes with it are refused with VM_BUSY. Its "ns" is how long the VM's owner
stood still; any other is how long the kernel had it, the longest of its calls for one request. Answers come in the
order of the requests.

"snapshot" is for VMs that are reached over QMP, which can't be frozen, and for no others: all keys are read at once,
and "get" gives those to this connection, until it asks for another. Who needs the VM meanwhile waits. Without it "get"
reads all keys for each slice. "set", "keyop" and "begin" are refused there with BACKEND_READ_ONLY.

A worker is started with a `Spec` on its standard input and says {"ok": {}} or an error, in one line, on its standard
output.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Self

from skeyd.errors import SkeydError
from skeyd.gfn import GfnRange, MemoryMap, MemorySlot
from skeyd.storage_key import FRAME_SIZE, GFN_LIMIT
from skeyd.worker.adoption import PID_MAX, Adoption, Vmm
from skeyd.worker.packets import Fields, ProtocolError

PROTOCOL: Final = 3
"""Raised with every change that an older peer would misread."""

SLICE_KEYS: Final = 262_144
"""Most keys a request, and so an ioctl: with two buffers this was 99 % of the speed of a bare ioctl loop; more would
only keep the kernel's lock for longer."""

BUFFERS: Final = 2
"""One is filled while the other is sent."""

BUFFER_KEYS: Final = 1_048_576
"""Keys in each: the largest chunk. What isn't touched costs no memory."""

BUFFER_BYTES: Final = BUFFERS * BUFFER_KEYS

FROZEN_KEYS: Final = 1 << 26
"""Most keys that a worker keeps of moments that were frozen: 64 MiB of memory, a guest of 256 GiB."""

FREEZE_MAX_NS: Final = 10_000_000_000
"""Longest that a VM may be frozen."""

RANGE: Final = struct.Struct("=QQ")
"""How "freeze" is told of a range."""

LOCK: Final = "worker.lock"
"""File in the VM's directory that its worker holds locked for as long as it lives."""

SOCKET: Final = "worker.sock"
"""Socket in the VM's directory that its worker listens on."""

KINDS: Final = ("owned", "adopted", "simulated")
KEYOPS: Final = ("iske", "rrbe", "sske")
"""What KVM_S390_KEYOP does, by the names of the instructions."""
BACKINGS: Final = ("anonymous", "memfd", "file", "none", "vmm")
""""none" is what a simulated VM has, "vmm" what an adopted one has: memory of its VMM's."""
SIMULATED_KERNELS: Final = ("4.19", "7.0", "7.2")
"""The first release of each generation that a simulated VM can follow."""

MAX_MEMORY_SLOTS: Final = 32
"""KVM_USER_MEM_SLOTS of the oldest kernels with the two calls; a host has at least as many."""

MAX_MEMORY: Final = (((1 << 31) - 1) << 12) & ~((1 << 20) - 1)
"""Bytes in a slot: KVM_MEM_MAX_NR_PAGES, 2^31 - 1 frames (include/linux/kvm_host.h @ v6.12), in whole MiB."""

_DELETED: Final = " (deleted)"
"""What /proc says behind a file's name."""

VM_ID: Final = re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
UID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
INCARNATION: Final = re.compile(r"[0-9a-f]{32}")
NANOSECONDS_MAX: Final = 1 << 62
"""Of an ioctl; over a hundred years."""
CREATED_MAX: Final = 253_402_300_799
"""The end of the year 9999, and of what a google.protobuf.Timestamp holds."""


def is_skeyd_worker(links: Iterable[str]) -> bool:
    """Whether a process is a worker, by what its descriptors link to: nobody else has a LOCK open.

    Of whichever runtime directory, also one that is gone.
    """
    return any(link.removesuffix(_DELETED).endswith(f"/{LOCK}") for link in links)


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """Memory to give a new VM."""

    guest_phys_addr: int
    """Bytes."""
    size: int
    """Bytes."""
    backing: str
    """One of BACKINGS."""
    path: str = ""
    """For "file": which."""


@dataclass(frozen=True, slots=True)
class Spec:
    """All that a worker needs to know to make its VM."""

    vm_id: str
    uid: str
    kind: str
    """One of KINDS."""
    slots: tuple[SlotSpec, ...]
    created: int
    """Seconds since 1970."""
    simulated_kernel: str = SIMULATED_KERNELS[-1]
    """One of SIMULATED_KERNELS."""
    adoption: Adoption | None = None
    """Of an adopted VM."""
    vmm: Vmm | None = None
    """Whose an adopted VM was found to be. In the record only: its worker is what finds it."""

    def to_message(self) -> dict[str, Any]:
        """Write it down."""
        return {
            "protocol": PROTOCOL,
            "id": self.vm_id,
            "uid": self.uid,
            "kind": self.kind,
            "created": self.created,
            "simulated_kernel": self.simulated_kernel,
            "adoption": self.adoption and self.adoption.to_message(),
            "vmm": self.vmm and self.vmm.to_message(),
            "slots": [
                {
                    "guest_phys_addr": slot.guest_phys_addr,
                    "size": slot.size,
                    "backing": slot.backing,
                    "path": slot.path,
                }
                for slot in self.slots
            ],
        }

    @classmethod
    def from_message(cls, message: Fields) -> Self:
        """Read it. ProtocolError for anything that is none."""
        message.integer("protocol", PROTOCOL, PROTOCOL)
        kind = message.choice("kind", KINDS)
        if kind != "adopted" and (message.has("adoption") or message.has("vmm")):
            raise ProtocolError(f"the adoption of a VM of kind {kind}")
        return cls(
            vm_id=message.text("id", VM_ID),
            uid=message.text("uid", UID),
            kind=kind,
            created=message.integer("created", 0, CREATED_MAX),
            simulated_kernel=message.choice("simulated_kernel", SIMULATED_KERNELS),
            slots=tuple(
                SlotSpec(
                    slot.integer("guest_phys_addr", 0, GFN_LIMIT - 1),
                    slot.integer("size", 1, MAX_MEMORY),
                    slot.choice("backing", BACKINGS),
                    slot.text("path"),
                )
                for slot in message.objects("slots", MAX_MEMORY_SLOTS)
            ),
            adoption=Adoption.from_message(message.object("adoption")) if kind == "adopted" else None,
            vmm=Vmm.from_message(message.object("vmm")) if message.has("vmm") else None,
        )


@dataclass(frozen=True, slots=True)
class Hello:
    """Who a worker is: what it says to everybody who connects."""

    vm_id: str
    uid: str
    incarnation: str
    kind: str
    kernel: str
    version: str
    pid: int
    created: int
    """Seconds since 1970."""
    slots: tuple[MemorySlot, ...]
    keyop: bool = False
    """Whether its kernel has KVM_S390_KEYOP, and it takes "keyop"."""
    vmm: Vmm | None = None
    """Of an adopted VM."""
    freezes: bool = False
    """Whether it takes "freeze"; workers that are older don't, and say nothing of it."""

    def to_message(self) -> dict[str, Any]:
        """Write it down."""
        return {
            "protocol": PROTOCOL,
            "id": self.vm_id,
            "uid": self.uid,
            "keyop": self.keyop,
            "incarnation": self.incarnation,
            "kind": self.kind,
            "kernel": self.kernel,
            "version": self.version,
            "pid": self.pid,
            "created": self.created,
            "vmm": self.vmm and self.vmm.to_message(),
            "freezes": self.freezes,
            "slots": [
                {
                    "slot": one.slot,
                    "start": one.frames.start,
                    "count": one.frames.count,
                    "backing": one.backing,
                }
                for one in self.slots
            ],
        }

    @classmethod
    def from_message(cls, message: Fields) -> Self:
        """Read it. ProtocolError for anything that is none, another protocol version included."""
        message.integer("protocol", PROTOCOL, PROTOCOL)
        slots = tuple(
            MemorySlot(
                slot.integer("slot", 0, MAX_MEMORY_SLOTS - 1),
                _frames(slot),
                slot.choice("backing", BACKINGS),
            )
            for slot in message.objects("slots", MAX_MEMORY_SLOTS)
        )
        if not slots:
            raise ProtocolError("a worker without memory slots")
        try:
            MemoryMap(slots)
        except SkeydError as error:
            raise ProtocolError(f"memory slots that overlap: {error.message}") from None
        kind = message.choice("kind", KINDS)
        if kind != "adopted" and message.has("vmm"):
            raise ProtocolError(f"the vmm of a VM of kind {kind}")
        return cls(
            vm_id=message.text("id", VM_ID),
            uid=message.text("uid", UID),
            incarnation=message.text("incarnation", INCARNATION),
            kind=kind,
            kernel=message.text("kernel"),
            version=message.text("version"),
            pid=message.integer("pid", 1, PID_MAX),
            created=message.integer("created", 0, CREATED_MAX),
            slots=slots,
            keyop=message.boolean("keyop"),
            vmm=Vmm.from_message(message.object("vmm")) if kind == "adopted" else None,
            freezes=message.has("freezes") and message.boolean("freezes"),
        )


def _frames(slot: Fields) -> GfnRange:
    try:
        return GfnRange(slot.integer("start", 0, GFN_LIMIT - 1), slot.integer("count", 1, GFN_LIMIT // FRAME_SIZE))
    except SkeydError as error:
        raise ProtocolError(error.message) from None
