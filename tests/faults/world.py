"""A host to hurt: a front with points, its VMs, and the oracle's judgement of what is left of them."""

from __future__ import annotations

import itertools
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from skeyd.v1 import vm_pb2, vm_service_pb2, vm_service_pb2_grpc
from tests.faults.calls import DEADLINE, Connection, Plan, Told, set_skeys
from tests.faults.front_points import PATIENCE, SLICE_KEYS
from tests.faults.oracle import Oracle, WorkerGone
from tests.faults.trigger import TRACE, fired_name, order_name
from tests.processes import look_at

ROOT: Final = Path(__file__).parents[2]
FRAMES: Final = 1024
RANGES: Final = ((100, 412), (700, 100), (820, 100))
"""What a call sets, of a guest of four segments: chunks of 200, 200, 12, 100 and 100 frames, which are 13 slices."""
KEYS: Final = sum(count for _, count in RANGES)
SETTLED_SECONDS: Final = 60.0
"""How long what is under way may take to end, on a machine with much else to do."""
KERNELS: Final = {
    "4.19": vm_pb2.SIMULATED_KERNEL_LINUX_4_19,
    "7.0": vm_pb2.SIMULATED_KERNEL_LINUX_7_0,
    "7.2": vm_pb2.SIMULATED_KERNEL_LINUX_7_2,
    "owned": vm_pb2.SIMULATED_KERNEL_UNSPECIFIED,
}
"""Kernels below a VM; "owned" is this machine's own."""

_EVEN: Final = bytes(byte & 0xFE for byte in range(256))
_ACC_F: Final = bytes(byte & 0xF8 for byte in range(256))
_REFERENCED_CHANGED: Final = 0x06
_numbers = itertools.count(1)


def some_keys(count: int, seed: int) -> bytes:
    """Return keys that look like nothing in particular; the same ones for the same seed."""
    return random.Random(seed).randbytes(count).translate(_EVEN)  # noqa: S311  no secret


def acc_f(keys: bytes) -> bytes:
    """Return what nobody but a SET changes."""
    return keys.translate(_ACC_F)


OLD: Final = some_keys(256, 1) + bytes(256) + some_keys(256, 2) + bytes(256)
"""Keys of a guest before a call. The second and the fourth MiB have none yet: there Linux up to 6.19 loses one."""


@dataclass(frozen=True)
class Fault:
    """Something to happen once."""

    who: str
    """ "front", "client" or "worker"; the last is the worker of the VM that is written to."""
    point: str
    action: str
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.who}-{self.point}-{self.action}-{self.nth}"


@dataclass
class Guest:
    """A VM to be written to."""

    name: str
    kernel: str
    old: bytes | None
    """All its keys; None: it uses none."""
    incarnation: str
    worker_pid: int

    @property
    def vm_id(self) -> str:
        """The name without its "vms/"."""
        return self.name.removeprefix("vms/")


@dataclass(frozen=True)
class Held:
    """What two processes hold open."""

    front: Counter[str]
    worker: Counter[str]


class Front:
    """A running daemon."""

    def __init__(self, pid: int, tcp: str, target: str) -> None:
        self.pid = pid
        self.tcp = tcp
        self.pidfd = os.pidfd_open(pid)
        self.connection = Connection(target)
        self.vms = vm_service_pb2_grpc.VmServiceStub(self.connection.channel)

    def lives(self) -> bool:
        """Whether it has not ended."""
        return not has_ended(self.pidfd, 0)

    def close(self) -> None:
        """Let go of it."""
        self.connection.channel.close()
        os.close(self.pidfd)


def has_ended(pidfd: int, seconds: float) -> bool:
    """Wait for the end of a process, for so long."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class World:
    """One runtime directory with a front, a VM that nobody writes to, and those that are written to.

    Synchronization: one thread.
    """

    def __init__(self, kind: str = "simulated", disk_bytes: int = 0) -> None:
        """`kind` is that of its VMs. `disk_bytes`: its processes see a file system of that size in its place."""
        self.kind = kind
        self.inside = self.directory = Path(tempfile.mkdtemp(prefix="skeyd-"))
        """Where its processes find the runtime directory; and where this process does."""
        self._resources = ExitStack()
        self._resources.callback(shutil.rmtree, self.inside)
        log = tempfile.NamedTemporaryFile(prefix="skeyd-", suffix=".log")  # noqa: SIM115  the stack's
        self._log = self._resources.enter_context(log)
        try:
            pid, self._nursery = self._resources.enter_context(nursery(self.inside, disk_bytes))
        except BaseException:
            self._resources.close()
            raise
        if disk_bytes:
            self.directory = Path(f"/proc/{pid}/root{self.inside}")
        self._front: Front | None = None
        self._guests: dict[str, Guest] = {}
        try:
            self.bystander = self.new_guest(self.kernels[0])
        except BaseException:
            self.close()
            raise

    @property
    def kernels(self) -> tuple[str, ...]:
        """Those that its VMs can have."""
        return ("owned",) if self.kind == "owned" else ("4.19", "7.0", "7.2")

    # --- its processes ---------------------------------------------------------------------------------------------

    @property
    def front(self) -> Front:
        """The front, started if there is none."""
        if self._front is not None and not self._front.lives():
            self._front.close()
            self._front = None
        if self._front is None:
            ready, theirs = os.pipe()
            with os.fdopen(ready, "rb") as said:
                try:
                    pid = self._bear({"role": "front", "runtime_dir": str(self.inside)}, theirs)
                finally:
                    os.close(theirs)
                tcp = said.read().decode()
            assert tcp, f"the front ended: {Path(self._log.name).read_text()}"
            self._front = Front(pid, tcp, self.target)
        return self._front

    @property
    def target(self) -> str:
        """Where it listens."""
        return f"unix:{self.directory}/skeyd.sock"

    def start_client(self, plan: Plan) -> ClientProcess:
        """Have a process make the call."""
        ready, theirs = os.pipe()
        order = {
            "role": "client",
            "runtime_dir": str(self.inside),
            "target": f"unix:{self.inside}/skeyd.sock",
            "plan": json.dumps({**vars(plan), "keys": plan.keys.hex()}),
        }
        try:
            return ClientProcess(self._bear(order, theirs), ready)
        finally:
            os.close(theirs)

    def _bear(self, order: dict[str, str], out: int) -> int:
        socket.send_fds(self._nursery, [json.dumps(order).encode()], [self._log.fileno(), out])
        return int(self._nursery.recv(100))

    def close(self) -> None:
        """End everything."""
        if self._front is not None:
            self._front.close()
        self._resources.close()

    # --- its VMs ---------------------------------------------------------------------------------------------------

    def guest(self, kernel: str) -> Guest:
        """Return a VM whose keys are OLD; one that was used before, where it is as it was."""
        if kernel not in self._guests:
            self._guests[kernel] = self.new_guest(kernel)
        return self._guests[kernel]

    def new_guest(self, kernel: str, *, keyless: bool = False) -> Guest:
        """Make a VM with OLD keys, or none."""
        request = vm_service_pb2.CreateVmRequest(vm_id=f"vm-{next(_numbers)}", simulated_kernel=KERNELS[kernel])
        request.kind = vm_pb2.VM_KIND_OWNED if kernel == "owned" else vm_pb2.VM_KIND_SIMULATED
        request.memory_slots.add(memory_size=FRAMES * 4096)
        vm = self.front.vms.CreateVm(request, timeout=DEADLINE).vm
        guest = Guest(vm.name, kernel, None, vm.incarnation, vm.worker_pid)
        if not keyless:
            self.restore(guest)
        return guest

    def restore(self, guest: Guest) -> None:
        """Give a guest its OLD keys: the next SetSkeys, which must work."""
        plan = Plan(guest.name, ((0, FRAMES),), OLD, allow_enable=True, request_id=f"restore-{next(_numbers)}")
        told = set_skeys(self.front.connection, plan)
        assert told.outcome == "APPLIED", told
        guest.old = OLD
        self.require_keys(guest, OLD)

    def require_keys(self, guest: Guest, wanted: bytes | None) -> None:
        """Have the oracle find exactly these keys."""
        found = self.read(guest)
        assert (found is None) == (wanted is None)
        if found is not None and wanted is not None:
            self.require_equal(guest, found, wanted, "the keys")

    def require_equal(self, guest: Guest, found: bytes, wanted: bytes, what: str) -> None:
        """Compare keys: on a simulated VM R and C too, which nobody else sets there."""
        assert len(found) == len(wanted)
        if guest.kernel == "owned":
            found, wanted = acc_f(found), acc_f(wanted)
        wrong = [gfn for gfn in range(len(found)) if found[gfn] != wanted[gfn]]
        assert not wrong, f"{what}: {len(wrong)} differ, from {wrong[0]} to {wrong[-1]}"

    def talk(self, guest: Guest) -> Oracle:
        """Talk with a worker, past the front. WorkerGone where there is none."""
        return Oracle(self.directory / "vms" / guest.vm_id)

    def read(self, guest: Guest) -> bytes | None:
        """Read all keys, past the front. WorkerGone where there is no worker."""
        with self.talk(guest) as oracle:
            assert oracle.hello["pid"] == guest.worker_pid
            return oracle.keys()

    def look(self, guest: Guest) -> vm_pb2.Vm:
        """Get a VM from the front."""
        return self.front.vms.GetVm(vm_service_pb2.GetVmRequest(name=guest.name), timeout=DEADLINE).vm

    def delete(self, guest: Guest) -> None:
        """Delete a VM, and hold on to it no longer."""
        self.front.vms.DeleteVm(vm_service_pb2.DeleteVmRequest(name=guest.name), timeout=DEADLINE)
        self.forget(guest)

    def forget(self, guest: Guest) -> None:
        """Use a VM no more, in whatever state it is: what one case leaves must not fail another."""
        if self._guests.get(guest.kernel) is guest:
            del self._guests[guest.kernel]
        for file in self.directory.glob("fault-*.json"):
            file.unlink()

    # --- hurting them ----------------------------------------------------------------------------------------------

    def plan(self, guest: Guest, **changes: Any) -> Plan:
        """Plan a call that sets new keys in both ranges."""
        number = next(_numbers)
        plan = Plan(guest.name, RANGES, some_keys(KEYS, 1000 + number), request_id=f"call-{number}")
        return replace(plan, **changes)

    def arm(self, guest: Guest, *faults: Fault) -> None:
        """Order faults."""
        for fault in faults:
            who = f"worker-{guest.vm_id}" if fault.who == "worker" else fault.who
            order = {"id": next(_numbers), "point": fault.point, "nth": fault.nth, "action": fault.action}
            with suppress(FileNotFoundError):
                (self.directory / fired_name(who)).unlink()
            # Written whole before it can be read.
            new = self.directory / "fault.new"
            new.write_text(json.dumps(order))
            new.rename(self.directory / order_name(who))

    def fired(self, guest: Guest, fault: Fault) -> bool:
        """Tell whether a fault happened, and take its order back if it didn't."""
        who = f"worker-{guest.vm_id}" if fault.who == "worker" else fault.who
        with suppress(FileNotFoundError):
            (self.directory / order_name(who)).unlink()
        return (self.directory / fired_name(who)).exists()

    @contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """Have the front wait no longer than this for an answer."""
        file = self.directory / PATIENCE
        file.write_text(str(seconds))
        try:
            yield
        finally:
            file.unlink()

    @contextmanager
    def trace(self) -> Iterator[Callable[[], list[tuple[str, int, int]]]]:
        """Write down the ioctls of all workers: gives ("get" or "set", first gfn, frames) of each so far."""
        file = self.directory / TRACE
        file.touch()
        try:
            yield lambda: [
                (kind, int(start), int(count)) for kind, start, count in map(str.split, file.read_text().splitlines())
            ]
        finally:
            file.unlink()

    @contextmanager
    def woken(self, guest: Guest, fault: Fault) -> Iterator[None]:
        """Send SIGCONT to whoever stops itself meanwhile."""
        pid = self.front.pid if fault.who == "front" else guest.worker_pid
        given_up = threading.Event()

        def wake() -> None:
            while not given_up.is_set() and not is_stopped(pid):
                pass
            os.kill(pid, signal.SIGCONT)

        waker = threading.Thread(target=wake)
        waker.start()
        try:
            yield
        finally:
            given_up.set()
            waker.join()

    def wake(self, pid: int) -> None:
        """Send SIGCONT to who has stopped itself."""
        os.kill(pid, signal.SIGCONT)

    def kill_front(self) -> None:
        """Kill the front, and wait until it is gone."""
        if self._front is not None and self._front.lives():
            os.kill(self._front.pid, signal.SIGKILL)
            assert has_ended(self._front.pidfd, SETTLED_SECONDS)

    def kill_worker(self, guest: Guest) -> None:
        """Kill a worker, and wait until it is gone."""
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(guest.worker_pid)
            try:
                os.kill(guest.worker_pid, signal.SIGKILL)
                assert has_ended(pidfd, SETTLED_SECONDS)
            finally:
                os.close(pidfd)

    def set_skeys(self, plan: Plan, *, resume: bool = False) -> Told:
        """Make a call from this process."""
        return set_skeys(self.front.connection, plan, resume=resume)

    def hurt(self, guest: Guest, plan: Plan, fault: Fault) -> Case:
        """Make a call, have a fault happen in it, and judge what is left."""
        with self.judged(guest, plan, fault) as case:
            case.told = self.set_skeys(plan)
        return case

    # --- and the judgement -----------------------------------------------------------------------------------------

    def held(self, guest: Guest) -> Held:
        """Look what front and worker hold open. What is grpc's own comes and goes as it likes."""
        return Held(_held_by(self.front.pid, of_grpc_too=False), _held_by(guest.worker_pid, of_grpc_too=True))

    def held_at_rest(self, guest: Guest) -> Held:
        """Look when nobody talks with the worker: each learns that the other has hung up when it comes to it."""
        until = time.monotonic() + SETTLED_SECONDS
        while True:
            held = self.held(guest)
            # A worker's own packets are those of its listener.
            if held.worker["packets"] <= 1 and not (held.front["packets"] or held.worker["memory"]):
                break
            assert time.monotonic() < until, f"they go on talking: {held}"
        return held

    @contextmanager
    def judged(self, guest: Guest, plan: Plan, *faults: Fault) -> Iterator[Case]:
        """Have something done to a call while faults are ordered, each of which must happen; judge what is left then.

        What is left is thrown away where the test has failed before.
        """
        case = Case(self, guest, plan, self.held_at_rest(guest), self.front.pid, faults)
        self.arm(guest, *faults)
        try:
            yield case
            case.judge()
        except BaseException:
            self.forget(guest)
            raise


class ClientProcess:
    """A client as a process of its own."""

    def __init__(self, pid: int, out: int) -> None:
        self.pid = pid
        self._out = out

    def told(self, seconds: float = DEADLINE) -> Told | None:
        """Wait for what it was told; None where it was killed, or has not been told by then."""
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return None
        data = os.read(self._out, 1 << 16)
        return Told.read(data) if data else None

    def kill(self) -> None:
        """Kill it, if it is still there."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """End it and forget it."""
        self.kill()
        os.close(self._out)


class Case:
    """One call that something was done to."""

    def __init__(
        self, world: World, guest: Guest, plan: Plan, held: Held, front_pid: int, faults: tuple[Fault, ...]
    ) -> None:
        self.world = world
        self.guest = guest
        self.plan = plan
        self.told = Told("")
        """What the client was told, to be set."""
        self.outcome = ""
        """What came of it, as the judgement found."""
        self._held = held
        self._front_pid = front_pid
        self._faults = faults

    def judge(self) -> None:
        """Hold everything against the invariants of docs/design.md."""
        world, guest = self.world, self.guest
        self._settle()
        for fault in self._faults:
            # A fault that never happened shows nothing.
            assert world.fired(guest, fault), f"{fault} never happened; told {self.told}"
        vm = world.look(guest)
        try:
            now = world.read(guest)
        except WorkerGone:
            # A process that was killed hangs up before it lets go of its lock: it is dead once it has.
            until = time.monotonic() + SETTLED_SECONDS
            while (vm.state != vm_pb2.VM_STATE_DEAD or look_at(guest.worker_pid)) and time.monotonic() < until:
                vm = world.look(guest)
            self._judge_dead(vm)
            self._judge_others()
            return
        assert vm.state == vm_pb2.VM_STATE_READY, vm
        assert vm.incarnation == guest.incarnation
        assert vm.uses_storage_keys == (now is not None)
        self._judge_enabled(now)
        mine = vm.last_write.request_id == self.plan.request_id and vm.HasField("last_write")
        found = vm_pb2.WriteOutcome.Name(vm.last_write.outcome).removeprefix("WRITE_OUTCOME_") if mine else "UNCHANGED"
        if self.plan.validate_only:
            assert found == "UNCHANGED"
        elif self._is_known:
            assert self.told.outcome == found, f"told {self.told}, and GetVm says {vm.last_write}"
        self.outcome = found
        self._judge_keys(now, vm.last_write if mine else vm_pb2.LastWrite())
        self._judge_held()
        self._judge_others()
        self._judge_next(vm)

    @property
    def _is_known(self) -> bool:
        return self.told.outcome not in ("", "UNKNOWN")

    def _settle(self) -> None:
        # Until nobody writes and nothing is being rolled back: a header alone says so, and changes nothing.
        probe = Plan(self.guest.name, ((0, 1),), b"\0", allow_enable=True, end="close", chunks=0)
        until = time.monotonic() + SETTLED_SECONDS
        # A front that was killed may not have ended yet.
        while (told := self.world.set_skeys(probe)).reason == "VM_BUSY" or told.is_of_nobody:
            assert time.monotonic() < until, f"it never settles: {told}"
        assert told.reason in ("STREAM_INCOMPLETE", "VM_DEAD"), told

    def _judge_dead(self, vm: vm_pb2.Vm) -> None:
        assert vm.state == vm_pb2.VM_STATE_DEAD, vm
        assert look_at(self.guest.worker_pid) is None
        self.outcome = "DEAD"
        told = self.world.set_skeys(self.world.plan(self.guest, allow_enable=True))
        assert told.reason == "VM_DEAD"
        assert told.metadata.get("outcome", "UNCHANGED") == "UNCHANGED"
        self.world.delete(self.guest)
        self._judge_front()

    def _judge_enabled(self, now: bytes | None) -> None:
        # 4: nothing is enabled that nobody allowed, and who can be told is told.
        if now is None or self.guest.old is not None:
            assert not self.told.enabled
            return
        assert self.plan.allow_enable
        assert self.told.enabled or not self._is_known, self.told

    def _judge_keys(self, now: bytes | None, last: vm_pb2.LastWrite) -> None:
        # 1 and 2.
        world, guest, plan = self.world, self.guest, self.plan
        frames = plan.frames()
        if now is None:
            assert guest.old is None
            assert self.outcome in ("UNCHANGED", "ROLLED_BACK") or (self.outcome == "KEPT" and not last.keys_set)
            return
        old = bytes(FRAMES) if guest.old is None else guest.old
        new = bytearray(old)
        for gfn, key in zip(frames, plan.keys, strict=True):
            new[gfn] = key
        told = self.told
        match self.outcome:  # which is what was told, if anything was
            case "APPLIED":
                world.require_equal(guest, acc_f(now), acc_f(bytes(new)), "ACC and F of an applied call")
                beside = [gfn for gfn in range(FRAMES) if gfn not in set(frames)]
                world.require_equal(guest, _at(now, beside), _at(old, beside), "keys beside an applied call")
                lost = [gfn for gfn in frames if new[gfn] & ~now[gfn] & _REFERENCED_CHANGED]
                assert not lost or guest.kernel == "owned"
                assert last.keys_set == len(plan.keys)
                if self._is_known:
                    assert (told.keys_set, told.crc32) == (len(plan.keys), zlib.crc32(plan.keys))
            case "UNCHANGED" | "ROLLED_BACK":
                world.require_equal(guest, now, old, f"the keys of a call that is {self.outcome}")
            case "DIRTY":
                dirty = {gfn for one in last.dirty for gfn in range(one.start_gfn, one.start_gfn + one.count)}
                assert dirty
                assert dirty <= set(frames) or len(last.dirty) == 256
                beside = [gfn for gfn in range(FRAMES) if gfn not in dirty]
                world.require_equal(guest, _at(now, beside), _at(old, beside), "keys beside dirty frames")
                assert _at(now, sorted(dirty)) != _at(old, sorted(dirty)), "no frame is dirty"
                if self._is_known:
                    assert told.metadata["dirty"].split(",")[0] == _first(last)
            case "KEPT":
                self._judge_kept(now, old, last)
            case other:
                raise AssertionError(f"no end of a call: {other}")

    def _judge_kept(self, now: bytes, old: bytes, last: vm_pb2.LastWrite) -> None:
        plan, told, frames = self.plan, self.told, self.plan.frames()
        assert plan.keep
        done = last.keys_set
        # Where the kernel stopped in the middle of a slice, all who ask are told of it.
        unsure = [gfn for one in last.dirty for gfn in range(one.start_gfn, one.start_gfn + one.count)]
        assert not unsure or unsure == list(range(unsure[0], unsure[0] + len(unsure)))
        assert len(unsure) <= SLICE_KEYS
        assert set(unsure) <= set(frames[done:])
        assert acc_f(_at(now, frames[:done])) == acc_f(plan.keys[:done])
        if done:
            assert last.next_gfn == frames[done - 1] + 1
        if self._is_known:
            assert (told.keys_set, told.crc32) == (done, zlib.crc32(plan.keys[:done])), told
            assert int(told.metadata["next_gfn"], 16) == [*frames, frames[-1] + 1][done]
            assert _frames_of(told.metadata.get("uncertain", "")) == unsure
        rest = [gfn for gfn in range(FRAMES) if gfn not in {*frames[:done], *unsure}]
        self.world.require_equal(self.guest, _at(now, rest), _at(old, rest), "keys after those that were kept")

    def _judge_held(self) -> None:
        # 5: what they hold open is what they held.
        held = self.world.held_at_rest(self.guest)
        assert held.worker == self._held.worker
        assert held.front == self._held.front or self.world.front.pid != self._front_pid

    def _judge_front(self) -> None:
        if self.world.front.pid != self._front_pid:
            return
        self.world.look(self.world.bystander)  # which reaps
        assert not _zombies_of(self.world.front.pid)

    def _judge_others(self) -> None:
        # 3: a VM beside it is as it was.
        bystander = self.world.bystander
        if bystander is self.guest:
            return
        assert look_at(bystander.worker_pid) is not None
        self.world.require_keys(bystander, bystander.old)
        vm = self.world.look(bystander)
        assert (vm.state, vm.incarnation) == (vm_pb2.VM_STATE_READY, bystander.incarnation)

    def _judge_next(self, vm: vm_pb2.Vm) -> None:
        world, guest, plan = self.world, self.guest, self.plan
        whole = replace(plan, end="commit", chunks=1 << 30, spoil="", seconds=DEADLINE)
        if self.outcome == "APPLIED" and not self._is_known:
            # Who was not told sends it again, and it is not applied twice.
            with world.trace() as ioctls:
                again = world.set_skeys(whole)
                assert (again.outcome, again.answers) == ("APPLIED", ("result",)), again
                assert not [kind for kind, _, _ in ioctls() if kind == "set"]
        if self.outcome == "KEPT" and not plan.digest:
            again = world.set_skeys(whole, resume=True)
            assert again.outcome == "APPLIED", again
            assert again.begun["keys_set"] == vm.last_write.keys_set
            assert again.begun["crc32"] == zlib.crc32(plan.keys[: vm.last_write.keys_set])
            now = world.read(guest)
            assert now is not None
            assert acc_f(_at(now, plan.frames())) == acc_f(plan.keys)
        if guest.old is not None or plan.allow_enable:
            world.restore(guest)


def _at(keys: bytes | bytearray, frames: list[int]) -> bytes:
    return bytes(keys[gfn] for gfn in frames)


def _frames_of(text: str) -> list[int]:
    if not text:
        return []
    first, _, last = text.partition("-")
    return list(range(int(first, 16), int(last or first, 16) + 1))


def _first(last: vm_pb2.LastWrite) -> str:
    one = last.dirty[0]
    return hex(one.start_gfn) if one.count == 1 else f"{one.start_gfn:#x}-{one.start_gfn + one.count - 1:#x}"


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] == "T"


def _zombies_of(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, its_parent = path.read_text().rpartition(")")[2].split()[:2]
            if state == "Z" and int(its_parent) == parent:
                found.append(int(path.parent.name))
    return found


def _held_by(pid: int, *, of_grpc_too: bool) -> Counter[str]:
    packets = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if words[4] == "0005":  # SOCK_SEQPACKET, which only front and worker use
            packets.add(f"socket:[{words[6]}]")
    held: Counter[str] = Counter()
    with suppress(FileNotFoundError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                link = str(fd.readlink())
                if link in packets:
                    held["packets"] += 1
                elif of_grpc_too or link.startswith(("/", "anon_inode:[pidfd]")):
                    held[link.partition(":[")[0]] += 1
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if "skeyd-keys" in line:
                held["memory"] += 1
    return held


class NoNamespace(Exception):  # noqa: N818 (says what happened)
    """This user may have no file systems of his own here."""


@contextmanager
def nursery(directory: Path, disk_bytes: int) -> Iterator[tuple[int, socket.socket]]:
    """Start what forks fronts and clients, and end it with all of those: its pid, and where it takes orders.

    With `disk_bytes` it has a file system of that size over the directory, which nobody else sees. NoNamespace.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.faults.nursery", str(theirs.fileno())]
    if disk_bytes:
        mount = f'mount -t tmpfs -o size={disk_bytes},mode=700 none "$0" && exec "$@"'
        as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        command = ["unshare", "--mount", *as_root, "sh", "-c", mount, str(directory), *command]
    with ours, theirs:
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        try:
            if ours.recv(100) != b"ready":
                assert disk_bytes, "the nursery did not start"
                raise NoNamespace
            yield process.pid, ours
        finally:
            ours.close()
            status = process.wait(SETTLED_SECONDS)
        assert status == 0
