"""What the contract has a process do with its VMs, and what it answers: one language for a simulation and a kernel.

Standard library and skeyd only: both ends of the connection into an emulated host load it.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import socket
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self

from skeyd.kvm import abi
from skeyd.kvm.errors import KvmError
from skeyd.storage_key import runs_of_equal

UNTOUCHED: Final = 0xEF
"""What buffers are full of before a GET: it has the reserved bit, so no kernel ever put it there as a key."""

HERE: Final = "here"
"""In the process that made the VM."""
ADOPTED: Final = "adopted"
"""The same, but it is another process that has its first thread make the storage-key calls (skeyd.injection)."""


# --- operations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """Memory for a VM; bytes."""

    guest_phys_addr: int
    size: int
    backing: str = "anonymous"


@dataclass(frozen=True)
class Create:
    """Make a VM, by which number later operations of the process know it."""

    slots: tuple[Slot, ...]
    vm: int = 0


@dataclass(frozen=True)
class Delete:
    """Close a VM and unmap its memory."""

    vm: int = 0


@dataclass(frozen=True)
class Get:
    """KVM_S390_GET_SKEYS."""

    start: int
    count: int
    vm: int = 0


@dataclass(frozen=True, repr=False)
class Set:
    """KVM_S390_SET_SKEYS."""

    start: int
    keys: bytes
    vm: int = 0

    def __repr__(self) -> str:
        # A million keys would be no help to who looks for what went wrong.
        return f"Set(start={self.start:#x}, keys={len(self.keys)} [{in_runs(self.keys)}], vm={self.vm})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        # hypothesis writes dataclasses down by itself, but for those that say how.
        printer.text(repr(self))


@dataclass(frozen=True)
class Touch:
    """Read or write a byte of the guest's memory, in the host process."""

    gfn: int
    write: bool
    vm: int = 0


@dataclass(frozen=True)
class Raw:
    """One of the two calls with a structure that skeyd would never send. Real kernels only.

    `pointer` is to as many keys as `keys` has: "good", "none" (address 0), "inaccessible", or "short" (one byte further
    on, so that the last key is inaccessible).
    """

    call: str
    """ "get" or "set"."""
    start: int
    count: int
    keys: bytes
    flags: int = 0
    reserved: int = 0
    """Each byte of the reserved field."""
    pointer: str = "good"
    vm: int = 0


@dataclass(frozen=True)
class KeyOp:
    """KVM_S390_KEYOP, one key in and one out; the address in bytes."""

    operation: int
    address: int
    key: int = 0
    vm: int = 0


@dataclass(frozen=True)
class AddSlot:
    """KVM_SET_USER_MEMORY_REGION with numbers that skeyd would never send; bytes. Real kernels only."""

    number: int
    guest_phys_addr: int
    size: int
    offset: int = 0
    """Of the memory in the process, from a multiple of 1 MiB on."""
    vm: int = 0


@dataclass(frozen=True)
class Capability:
    """KVM_CHECK_EXTENSION of the VM; a simulation knows of KVM_CAP_S390_KEYOP only."""

    number: int
    vm: int = 0


@dataclass(frozen=True)
class Resident:
    """Count the pages that are behind a VM's memory. Real kernels only."""

    vm: int = 0


@dataclass(frozen=True)
class Unmap:
    """Take away what is behind a VM's memory slots; the slots stay. Real kernels only."""

    vm: int = 0


Operation = Create | Delete | Get | Set | Touch | Raw | KeyOp | AddSlot | Capability | Resident | Unmap

_OPERATIONS: Final[dict[str, type[Operation]]] = {
    one.__name__: one for one in (Create, Delete, Get, Set, Touch, Raw, KeyOp, AddSlot, Capability, Resident, Unmap)
}


# --- answers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What an operation came to."""

    returned: int = 0
    """By the call; -1 with an errno."""
    errno: int = 0
    keys: bytes | None = None
    """The buffer after a call that writes; None where it was left as it was."""

    @classmethod
    def refused(cls, errno: int) -> Self:
        """Answer with an errno and nothing else."""
        return cls(-1, errno)

    @classmethod
    def of_error(cls, error: KvmError) -> Self:
        """Answer what the kernel did, without what skeyd takes it to stand for."""
        return cls.refused(error.errno) if error.returned is None else cls(error.returned)


DONE: Final = Answer()
KEYLESS: Final = Answer(abi.KVM_S390_GET_SKEYS_NONE)


# --- playing -------------------------------------------------------------------------------------------------------


class Guest(Protocol):
    """A VM that its own process works on: a Backend whose memory can be touched."""

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """As skeyd.worker.backend.Backend.get_skeys."""

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
        """As skeyd.worker.backend.Backend.set_skeys."""

    def touch(self, gfn: int, write: bool) -> None:
        """Read or write a byte of a frame that is in a slot."""


def play(guest: Guest, operation: Get | Set | Touch) -> Answer:
    """Do one of the operations that every kind of VM has."""
    match operation:
        case Touch(gfn, write):
            guest.touch(gfn, write)
            return DONE
        case Set(start, keys):
            try:
                guest.set_skeys(start, memoryview(bytearray(keys)))
            except KvmError as error:
                return Answer.of_error(error)
            return DONE
        case Get(start, count):
            buffer = bytearray([UNTOUCHED]) * count
            try:
                answer = DONE if guest.get_skeys(start, memoryview(buffer)) else KEYLESS
            except KvmError as error:
                answer = Answer.of_error(error)
            return dataclasses.replace(answer, keys=written(buffer))


def written(buffer: bytearray) -> bytes | None:
    """Return a buffer that was full of UNTOUCHED, or None where it still is."""
    return bytes(buffer) if buffer.strip(bytes([UNTOUCHED])) else None


def in_runs(keys: bytes) -> str:
    """Write keys down for people: each run of equal ones once."""
    runs = ((key, count) for _, count, key in runs_of_equal(keys))
    return " ".join(f"{key:02x}" if count == 1 else f"{key:02x}*{count}" for key, count in runs)


# --- messages ------------------------------------------------------------------------------------------------------

_LENGTH: Final = struct.Struct(">I")


def request(operations: Iterable[Operation], where: str) -> dict[str, Any]:
    """Put operations into a message; `where` is HERE or a place that the server knows."""
    return {"where": where, "operations": [{"do": type(one).__name__, **dataclasses.asdict(one)} for one in operations]}


def operations_of(message: dict[str, Any]) -> list[Operation]:
    """Take operations out of a message."""
    return [_operation(**fields) for fields in message["operations"]]


def _operation(do: str, **fields: Any) -> Operation:
    if "slots" in fields:
        fields["slots"] = tuple(Slot(**slot) for slot in fields["slots"])
    return _OPERATIONS[do](**fields)


def response(answers: Iterable[Answer]) -> dict[str, Any]:
    """Put answers into a message."""
    return {"answers": [dataclasses.astuple(one) for one in answers]}


def answers_of(message: dict[str, Any]) -> list[Answer]:
    """Take answers out of a message."""
    return [Answer(*fields) for fields in message["answers"]]


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send a message after its length."""
    text = to_text(message).encode()
    connection.sendall(_LENGTH.pack(len(text)) + text)


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """Wait for a message. None where the other side has closed the connection; EOFError where that cut one short."""
    head = _exactly(connection, _LENGTH.size)
    if not head:
        return None
    (length,) = _LENGTH.unpack(head)
    return from_text(_exactly(connection, length))


def to_text(message: dict[str, Any]) -> str:
    """Write a message as JSON, bytes in it compressed."""
    return json.dumps(message, default=_pack)


def from_text(text: str | bytes) -> dict[str, Any]:
    """Read what `to_text` has written."""
    message: dict[str, Any] = json.loads(text, object_hook=_unpack)
    return message


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(count - len(parts))
        if not part:
            if parts:
                raise EOFError("the connection ended within a message")
            return b""
        parts += part
    return bytes(parts)


def _pack(value: object) -> dict[str, str]:
    if not isinstance(value, bytes):
        raise TypeError(f"{value!r} can't be sent")
    return {"zlib": base64.b64encode(zlib.compress(value, 1)).decode()}


def _unpack(value: dict[str, Any]) -> Any:
    return zlib.decompress(base64.b64decode(value["zlib"])) if value.keys() == {"zlib"} else value
