"""Storage-key calls on the VMs of a process, made as skeyd makes them on a QEMU's: by another process that traces it.

A part of contract_server.py: the tracer is a child of the process that has the VMs, whose first thread it holds.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final, NoReturn

from skeyd.injection.target import Target
from skeyd.injection.vm import ForeignVm
from skeyd.kvm import abi
from skeyd.kvm.errors import KvmError
from skeyd.storage_key import FRAME_SIZE
from tests.contract import operations
from tests.contract.operations import Answer, Get, KeyOp, Operation, Set

MOST_KEYS: Final = abi.KVM_S390_SKEYS_MAX + 1
"""One more than a call may have, to be refused by the kernel."""
SECONDS: Final = 60.0


def is_for_it(operation: Operation) -> bool:
    """Tell whether an operation is one of a ForeignVm's."""
    return isinstance(operation, Get | Set) or (isinstance(operation, KeyOp) and not operation.address % FRAME_SIZE)


class Adopter:
    """Plays operations on VMs of this process from a child of it, which is forked when it is first needed.

    `end_after` runs the child's part, and ends the process with it.
    """

    def __init__(self, end_after: Callable[[Callable[[], None]], NoReturn]) -> None:
        self._end_after = end_after
        self._connection: socket.socket | None = None

    def play(self, fd: int, others: list[int], operation: Operation) -> Answer:
        """Do one operation on a VM's descriptor. `others` are all VMs' descriptors, which the child is not to keep."""
        if self._connection is None:
            self._connection, theirs = socket.socketpair()
            if not os.fork():
                self._connection.close()
                for other in others:
                    os.close(other)
                self._end_after(lambda: _serve(theirs, os.getppid()))
            theirs.close()
        (answer,) = self._ask({"fd": fd, **operations.request([operation], operations.HERE)})
        return answer

    def release(self) -> None:
        """Leave nothing in this process: before a VM of it is closed."""
        if self._connection is not None:
            self._ask({"fd": None, **operations.request([], operations.HERE)})

    def _ask(self, message: dict[str, object]) -> list[Answer]:
        assert self._connection is not None
        operations.send(self._connection, message)
        said = operations.receive(self._connection)
        assert said is not None, "the adopting process has ended"
        return operations.answers_of(said)


def _serve(connection: socket.socket, pid: int) -> None:
    with Target(pid) as target, ExitStack() as held:
        fd: int | None = None
        vm: ForeignVm | None = None
        while (message := operations.receive(connection)) is not None:
            if message["fd"] != fd:
                # One buffer a process: a QEMU has one VM.
                held.close()
                fd, vm = message["fd"], None
                if fd is not None:
                    vm = held.enter_context(ForeignVm(target, fd, MOST_KEYS, SECONDS))
            answers = [_play(vm, one) for one in operations.operations_of(message) if vm is not None]
            operations.send(connection, operations.response(answers))


def _play(vm: ForeignVm, operation: Operation) -> Answer:
    match operation:
        case KeyOp(number, address, key):
            try:
                return Answer(keys=bytes([vm.keyop(number, address // FRAME_SIZE, key)]))
            except KvmError as error:
                return Answer.of_error(error)
        case Get() | Set():
            return operations.play(_Guest(vm), operation)
    raise ValueError(f"{operation} is none that another process does")


class _Guest:
    def __init__(self, vm: ForeignVm) -> None:
        self.get_skeys = vm.get_skeys
        self.set_skeys = vm.set_skeys

    def touch(self, gfn: int, write: bool) -> None:
        raise ValueError(f"gfn {gfn:#x} is touched by the VM's own process (write: {write})")
