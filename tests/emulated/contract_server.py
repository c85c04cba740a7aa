"""Plays the contract's operations on the real kernel: `python3 -m tests.emulated.contract_server PORT READY`.

Runs inside an emulated host; tests/contract/operations.py has the operations and the messages. A connection is a
process of its own, forked before it has a VM: on Linux up to 6.19 whether keys are used is a matter of the process.
The connection's end is the process's.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import gc
import mmap
import os
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn

from skeyd.errors import SkeydError
from skeyd.kvm import abi, ioctl
from skeyd.kvm.errors import KvmError
from skeyd.kvm.memory import GuestMemory
from skeyd.kvm.system import Kvm
from skeyd.kvm.vm import Vm
from skeyd.storage_key import FRAME_SIZE
from skeyd.worker.owned import OwnedVm
from skeyd.worker.protocol import SlotSpec, Spec
from tests.contract import operations
from tests.contract.operations import (
    DONE,
    HERE,
    AddSlot,
    Answer,
    Capability,
    Create,
    Delete,
    Get,
    KeyOp,
    Operation,
    Raw,
    Resident,
    Set,
    Slot,
    Touch,
    Unmap,
)
from tests.emulated import adopting

ADDRESS: Final = "127.0.0.1"
SYS_PIDFD_GETFD: Final = 438  # include/uapi/asm-generic/unistd.h @ v6.12; the same number on every architecture
PROT_NONE: Final = 0
PAGEMAP_ENTRY: Final = struct.Struct("=Q")  # Documentation/admin-guide/mm/pagemap.rst @ v6.12
PRESENT: Final = 63
AFTER_EXEC: Final = "--after-exec"

_CALLS: Final = {"get": abi.KVM_S390_GET_SKEYS, "set": abi.KVM_S390_SET_SKEYS}


class _WatchedVm(Vm):
    # Knows its descriptor's number, for calls that Vm doesn't make, and where its memory is, for touching it.
    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.fd = fd
        self.memories: list[tuple[int, GuestMemory]] = []

    def set_memory(self, slot: int, guest_phys_addr: int, memory: GuestMemory) -> None:
        super().set_memory(slot, guest_phys_addr, memory)
        self.memories.append((guest_phys_addr, memory))


class _WatchingKvm(Kvm):
    def __init__(self) -> None:
        super().__init__()
        self.vm: _WatchedVm | None = None

    def create_vm(self) -> Vm:
        self.vm = _WatchedVm(ioctl.call(self._open_fd(), abi.KVM_CREATE_VM, 0))
        return self.vm


class OwnedGuest:
    """An owned VM, made by skeyd's own code, with its descriptor and its memory at hand."""

    def __init__(self, slots: tuple[Slot, ...]) -> None:
        kvm = _WatchingKvm()
        specs = tuple(SlotSpec(slot.guest_phys_addr, slot.size, slot.backing) for slot in slots)
        self._owned = OwnedVm(Spec("contract", "", "owned", specs, 0), lambda: kvm)
        assert kvm.vm is not None
        self._vm = kvm.vm
        self.fd = kvm.vm.fd
        self.get_skeys = self._owned.get_skeys
        self.set_skeys = self._owned.set_skeys
        self.close = self._owned.close

    def touch(self, gfn: int, write: bool) -> None:
        """Read or write a byte of a frame that is in a slot."""
        address = gfn * FRAME_SIZE
        for start, memory in self._vm.memories:
            if start <= address < start + memory.size:
                with memory.view() as view:
                    if write:
                        view[address - start] = 1
                    else:
                        view[address - start]
                return
        raise ValueError(f"gfn {gfn:#x} is in no slot")

    def resident(self) -> int:
        """Count the pages of its memory that are there."""
        count = 0
        with Path("/proc/self/pagemap").open("rb") as pagemap:
            for _, memory in self._vm.memories:
                pagemap.seek(memory.address // mmap.PAGESIZE * PAGEMAP_ENTRY.size)
                entries = pagemap.read(memory.size // mmap.PAGESIZE * PAGEMAP_ENTRY.size)
                count += sum(entry >> PRESENT & 1 for (entry,) in PAGEMAP_ENTRY.iter_unpack(entries))
        return count

    def unmap(self) -> None:
        """Take its memory away."""
        for _, memory in self._vm.memories:
            memory.close()


class Process:
    """The VMs of this process, and what can be done with them."""

    def __init__(self) -> None:
        self._guests: dict[int, OwnedGuest] = {}
        self._more_memory: list[GuestMemory] = []
        self.adopter = adopting.Adopter(_end_after)

    def play(self, operation: Operation) -> Answer:
        """Do one operation."""
        try:
            match operation:
                case Create(slots, vm):
                    self._guests[vm] = OwnedGuest(slots)
                    return DONE
                case Get() | Set() | Touch():
                    return operations.play(self._guests[operation.vm], operation)
                case Delete(vm):
                    self._guests.pop(vm).close()
                    return DONE
                case Resident(vm):
                    return Answer(self._guests[vm].resident())
                case Unmap(vm):
                    self._guests[vm].unmap()
                    return DONE
            return play_raw(self._guests[operation.vm].fd, operation, self._more_memory)
        except KvmError as error:
            return Answer.of_error(error)
        except SkeydError as error:
            if not isinstance(error.__cause__, KvmError):
                raise
            return Answer.of_error(error.__cause__)

    def descriptors(self) -> dict[int, int]:
        """Return each VM's."""
        return {vm: guest.fd for vm, guest in self._guests.items()}


def play_raw(fd: int, operation: Operation, memories: list[GuestMemory]) -> Answer:
    """Do an operation on a VM of which only the descriptor is known; raises KvmError or answers."""
    match operation:
        case Get(start, count):
            return _raw(fd, Raw("get", start, count, bytes([operations.UNTOUCHED]) * count))
        case Set(start, keys):
            return _raw(fd, Raw("set", start, len(keys), keys))
        case Raw():
            return _raw(fd, operation)
        case Capability(number):
            return Answer(ioctl.call(fd, abi.KVM_CHECK_EXTENSION, number))
        case KeyOp(number, address, key):
            written = bytearray(abi.kvm_s390_keyop.pack(address, key, number))
            try:
                returned = fcntl.ioctl(fd, abi.KVM_S390_KEYOP, written)
            except OSError as error:
                return Answer.refused(error.errno or 0)
            return Answer(returned, keys=bytes([abi.kvm_s390_keyop.unpack(written)[1]]))
        case AddSlot(number, guest_phys_addr, size, offset):
            whole = -(-(offset + size) // abi.MEMORY_ALIGNMENT) * abi.MEMORY_ALIGNMENT
            memory = GuestMemory.anonymous(whole)
            memories.append(memory)
            region = abi.kvm_userspace_memory_region
            # SAFETY: the region lies in `memory`, which stays mapped until the process ends.
            argument = region.pack(number, 0, guest_phys_addr, size, memory.address + offset)
            return Answer(ioctl.call(fd, abi.KVM_SET_USER_MEMORY_REGION, argument))
    raise ValueError(f"{operation} needs the process that made the VM")


def _raw(fd: int, raw: Raw) -> Answer:
    # The keys lie at the end of a page, and the one after it is not accessible: a pointer can run out of memory.
    pages = -(-max(len(raw.keys), 1) // mmap.PAGESIZE)
    with mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        first = ctypes.addressof(byte := ctypes.c_ubyte.from_buffer(memory))
        del byte
        end = first + pages * mmap.PAGESIZE
        # SAFETY: the last page of what was just mapped, which nobody else knows of.
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE):
            raise OSError("mprotect failed")
        at = pages * mmap.PAGESIZE - len(raw.keys)
        memory[at : at + len(raw.keys)] = raw.keys
        pointer = {"good": first + at, "none": 0, "inaccessible": end, "short": first + at + 1}[raw.pointer]
        argument = bytearray(abi.kvm_s390_skeys.pack(raw.start, raw.count, pointer, raw.flags))
        argument[-36:] = bytes([raw.reserved]) * 36
        try:
            answer = Answer(fcntl.ioctl(fd, _CALLS[raw.call], argument))
        except OSError as error:
            answer = Answer.refused(error.errno or 0)
        found = memory[at : at + len(raw.keys)]
        return Answer(answer.returned, answer.errno, found if found != raw.keys else None)


# --- places that are not the process that made the VM -----------------------------------------------------------------


def _in_thread(process: Process, wanted: list[Operation]) -> list[Answer]:
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.extend(map(process.play, wanted)))
    thread.start()
    thread.join()
    return answers


def _in_child(take: Callable[[dict[int, int], socket.socket], dict[int, int]]) -> Any:
    # A forked child that gets at the descriptors by `take` and does the operations with nothing but them.
    def run(process: Process, wanted: list[Operation]) -> list[Answer]:
        ours, theirs = socket.socketpair()
        descriptors = process.descriptors()
        with ours, theirs:
            child = os.fork()
            if not child:
                _end_after(lambda: _answer(theirs, take(descriptors, theirs), wanted))
            theirs.close()
            if take is _receive:
                socket.send_fds(ours, [b"!"], list(descriptors.values()))
            message = operations.receive(ours)
            os.waitpid(child, 0)
        assert message is not None, "the child failed"
        return operations.answers_of(message)

    return run


def _answer(connection: socket.socket, descriptors: dict[int, int], wanted: list[Operation]) -> None:
    answers = []
    for operation in wanted:
        try:
            answers.append(play_raw(descriptors[operation.vm], operation, []))
        except KvmError as error:
            answers.append(Answer.of_error(error))
    operations.send(connection, operations.response(answers))


def _adopted(process: Process, wanted: list[Operation]) -> list[Answer]:
    # What skeyd asks of a VM is asked by a process that traces this one; the rest is the owner's doing.
    answers = []
    for operation in wanted:
        if adopting.is_for_it(operation):
            descriptors = process.descriptors()
            answers.append(process.adopter.play(descriptors[operation.vm], list(descriptors.values()), operation))
            continue
        if isinstance(operation, Delete):
            process.adopter.release()
        answers.append(process.play(operation))
    return answers


def _inherit(descriptors: dict[int, int], _: socket.socket) -> dict[int, int]:
    return descriptors


def _receive(descriptors: dict[int, int], connection: socket.socket) -> dict[int, int]:
    # By SCM_RIGHTS, in a process that has none of its own.
    for fd in descriptors.values():
        os.close(fd)
    _, received, _, _ = socket.recv_fds(connection, 1, len(descriptors))
    return dict(zip(descriptors, received, strict=True))


def _take_from_parent(descriptors: dict[int, int], _: socket.socket) -> dict[int, int]:
    parent = os.pidfd_open(os.getppid())
    taken = {}
    for vm, fd in descriptors.items():
        os.close(fd)
        taken[vm] = ctypes.CDLL(None, use_errno=True).syscall(SYS_PIDFD_GETFD, parent, fd, 0)
        if taken[vm] < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return taken


_PLACES: Final[dict[str, Callable[[Process, list[Operation]], list[Answer]]]] = {
    HERE: lambda process, wanted: [process.play(operation) for operation in wanted],
    "thread": _in_thread,
    "child": _in_child(_inherit),
    "receiver": _in_child(_receive),
    "taker": _in_child(_take_from_parent),
    operations.ADOPTED: _adopted,
}


def _exec(connection: socket.socket, process: Process, message: dict[str, Any]) -> NoReturn:
    # The same process with another program, and so another address space: the descriptors and the request go along.
    descriptors = process.descriptors()
    for fd in (connection.fileno(), *descriptors.values()):
        os.set_inheritable(fd, True)
    given = {"connection": connection.fileno(), "vms": list(descriptors.items()), "request": message}
    program = [sys.executable, "-m", "tests.emulated.contract_server", AFTER_EXEC, operations.to_text(given)]
    os.execv(sys.executable, program)  # noqa: S606 (to become another program is the point)


def _go_on(given: dict[str, Any]) -> None:
    connection = socket.socket(fileno=given["connection"])
    _answer(connection, dict(given["vms"]), operations.operations_of(given["request"]))
    attend(connection, Process())


# --- the server ----------------------------------------------------------------------------------------------------


def attend(connection: socket.socket, process: Process) -> None:
    """Answer requests until the connection ends."""
    while (message := operations.receive(connection)) is not None:
        if message["where"] == "exec":
            _exec(connection, process, message)
        wanted = operations.operations_of(message)
        operations.send(connection, operations.response(_PLACES[message["where"]](process, wanted)))


def _end_after(work: Callable[[], None]) -> NoReturn:
    # A forked process never returns into its parent's code; what fails is told on standard error.
    status = 1
    try:
        work()
        status = 0
    except BaseException:  # whatever it is, this process ends here
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def serve(port: int, ready: str) -> None:
    """Take connections for ever; `ready` is a fifo that somebody waits at."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a connection's process
    # A forked process that collects garbage touches all of its memory, and each first touch is a page to copy.
    gc.disable()
    gc.freeze()
    with socket.create_server((ADDRESS, port)) as listener:
        Path(ready).write_text("ready")
        while True:
            connection, _ = listener.accept()
            with connection:
                if not os.fork():
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    listener.close()
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    _end_after(functools.partial(attend, connection, Process()))


def main() -> None:
    """Serve, or go on after an exec."""
    if sys.argv[1] == AFTER_EXEC:
        _go_on(operations.from_text(sys.argv[2]))
    else:
        serve(int(sys.argv[1]), sys.argv[2])


if __name__ == "__main__":
    main()
