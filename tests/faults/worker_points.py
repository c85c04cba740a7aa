"""The points of a worker (tests/faults/worker says which), and what can happen there. The standard library only."""

from __future__ import annotations

import errno
import functools
import json
import os
from collections.abc import Callable
from typing import Any, Final

from skeyd.kvm import abi
from skeyd.kvm.errors import KvmError
from skeyd.worker import journal
from skeyd.worker.channel import Channel
from skeyd.worker.keys import Keys
from skeyd.worker.owned import OwnedVm
from skeyd.worker.packets import Fields
from skeyd.worker.simulated import SimulatedVm
from skeyd.worker.transactions import Transactions
from tests.faults import nonsense
from tests.faults.trigger import Trigger

JOURNAL_MEMORY_BYTES: Final = 70
"""So that a journal's first slices lie in memory and the others in its file."""


_KEYOPS: Final = {
    abi.KVM_S390_KEYOP_ISKE: "iske",
    abi.KVM_S390_KEYOP_SSKE: "sske",
    abi.KVM_S390_KEYOP_RRBE: "rrbe",
}


class Points:
    """Where a worker is, and its trigger.

    Synchronization: a worker has one thread.
    """

    def __init__(self, trigger: Trigger) -> None:
        self.trigger = trigger
        self.phase = "other"
        self.verifying = False
        self.gets = 0
        self.sets = 0

    def ioctl(self, kind: str) -> str:
        """Name the ioctl that comes: what it is for follows from what came before it."""
        if not self.verifying:
            return f"{self.phase}.{kind}"
        if kind == "set":
            self.sets += 1
            return f"{self.phase}.{'set' if self.sets == 1 else 'repair'}"
        self.gets += 1
        return f"{self.phase}.{'read_back' if self.gets == 1 else 'read_again'}"


def install(directory_fd: int) -> None:
    """Put the points into this process, which serves the VM of a directory."""
    vm_id = os.readlink(f"/proc/self/fd/{directory_fd}").rpartition("/")[2]  # noqa: PTH115
    points = Points(Trigger(f"worker-{vm_id}", "../..", directory_fd))
    journal.MEMORY_BYTES = JOURNAL_MEMORY_BYTES  # type: ignore[misc]
    journal.JOINED_KEYS = 1  # type: ignore[misc]  # so that each slice is a record
    for backend in (SimulatedVm, OwnedVm):
        _wrap(backend, "get_skeys", functools.partial(_around_get, points))
        _wrap(backend, "set_skeys", functools.partial(_around_set, points))
        _wrap(backend, "keyop", functools.partial(_around_keyop, points))
    _wrap(Transactions, "set", functools.partial(_in_phase, points, "set"))
    _wrap(Transactions, "step", functools.partial(_in_phase, points, "rollback"))
    _wrap(Keys, "write_checked", functools.partial(_verifying, points))
    for name in ("begin", "commit", "abandon"):
        _wrap(Transactions, name, functools.partial(_around, points, name))
    _wrap(journal.Journal, "push", functools.partial(_around, points, "set.push"))
    _wrap(journal.Journal, "pop", functools.partial(_around, points, "rollback.pop"))
    _wrap(os, "pwrite", functools.partial(_around_write, points))
    _wrap(os, "pread", functools.partial(_around_read, points))
    _wrap(Channel, "receive", _remember_op)
    _wrap(Channel, "send", functools.partial(_around_answer, points))


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        return around(original, *arguments, **named)

    setattr(owner, name, wrapped)


def _around(points: Points, name: str, original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    points.trigger.at(f"{name}.before")
    answer = original(*arguments, **named)
    points.trigger.at(f"{name}.after")
    return answer


def _in_phase(points: Points, phase: str, original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    if phase == "rollback" and not arguments[0].rolling_back:
        return original(*arguments, **named)
    if phase == "rollback":
        points.trigger.at("step.before")
    points.phase = phase
    try:
        return original(*arguments, **named)
    finally:
        points.phase = "other"
        if phase == "rollback":
            points.trigger.at("step.after")


def _verifying(points: Points, original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    points.verifying, points.gets, points.sets = True, 0, 0
    try:
        return original(*arguments, **named)
    finally:
        points.verifying = False


def _refuse(ioctl: str, action: str | None) -> None:
    if action is not None and action.startswith("errno:"):
        raise KvmError(ioctl, getattr(errno, action.removeprefix("errno:")))


def _around_get(points: Points, original: Callable[..., Any], backend: Any, start: int, buffer: memoryview) -> bool:
    name = points.ioctl("get")
    points.trigger.note(f"get {start} {buffer.nbytes}")
    _refuse("KVM_S390_GET_SKEYS", points.trigger.at(f"{name}.before"))
    answer: bool = original(backend, start, buffer)
    _refuse("KVM_S390_GET_SKEYS", points.trigger.at(f"{name}.after"))
    return answer


def _around_set(points: Points, original: Callable[..., Any], backend: Any, start: int, buffer: memoryview) -> None:
    name = points.ioctl("set")
    points.trigger.note(f"set {start} {buffer.nbytes}")
    action = points.trigger.at(f"{name}.before")
    _refuse("KVM_S390_SET_SKEYS", action)
    middle = buffer.nbytes // 2
    if action == "lose":
        # As Linux up to 6.19 does: one key stays what it was, and the answer is 0.
        original(backend, start, buffer[:middle])
        original(backend, start + middle + 1, buffer[middle + 1 :])
        return
    if action is not None and action.startswith("half:"):
        original(backend, start, buffer[:middle])
        _refuse("KVM_S390_SET_SKEYS", f"errno:{action.removeprefix('half:')}")
    original(backend, start, buffer)
    _refuse("KVM_S390_SET_SKEYS", points.trigger.at(f"{name}.after"))


def _around_keyop(
    points: Points, original: Callable[..., int], backend: Any, operation: int, gfn: int, key: int = 0
) -> int:
    name = f"keyop.{_KEYOPS[operation]}"
    points.trigger.note(f"{_KEYOPS[operation]} {gfn} 1")
    action = points.trigger.at(f"{name}.before")
    _refuse("KVM_S390_KEYOP", action)
    if action == "lose":
        return original(backend, abi.KVM_S390_KEYOP_ISKE, gfn)
    found = original(backend, operation, gfn, key)
    _refuse("KVM_S390_KEYOP", points.trigger.at(f"{name}.after"))
    return found


def _around_write(points: Points, original: Callable[..., int], fd: int, data: Any, at: int) -> int:
    action = points.trigger.at("set.write.before")
    if action is not None and action.startswith("errno:"):
        number = getattr(errno, action.removeprefix("errno:"))
        raise OSError(number, os.strerror(number))
    if action == "half":
        return original(fd, memoryview(data)[: len(data) // 2], at)
    written = original(fd, data, at)
    points.trigger.at("set.write.after")
    return written


def _around_read(points: Points, original: Callable[..., bytes], fd: int, length: int, at: int) -> bytes:
    action = points.trigger.at("rollback.read.before")
    if action is not None and action.startswith("errno:"):
        number = getattr(errno, action.removeprefix("errno:"))
        raise OSError(number, os.strerror(number))
    data = original(fd, length, at)
    if action == "damage":
        return data[:-1] + bytes([data[-1] ^ 0x40])
    if action == "cut":
        return data[:-1]
    points.trigger.at("rollback.read.after")
    return data


_ops: dict[int, str] = {}
"""What was last asked on a connection, by its descriptor."""


def _remember_op(original: Callable[..., Any], channel: Channel, what: str) -> tuple[Fields, list[int]] | None:
    received: tuple[Fields, list[int]] | None = original(channel, what)
    if received is not None:
        _ops[channel.connection.fileno()] = received[0].text("op")
    return received


def _around_answer(
    points: Points, original: Callable[..., None], channel: Channel, message: dict[str, Any], fds: Any = ()
) -> None:
    number = channel.connection.fileno()
    op = "hello" if "protocol" in message else _ops.get(number, "?")
    action = points.trigger.at(f"answer.{op}.before")
    if action is not None and action.startswith("say:"):
        nonsense.say(action.removeprefix("say:"), channel.connection, json.dumps(message).encode(), fds)
        return
    original(channel, message, fds)
    points.trigger.at(f"answer.{op}.after")
