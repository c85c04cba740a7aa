"""A host to hurt: a front with points, and its VMs."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from skeyd.v1 import vm_pb2, vm_service_pb2, vm_service_pb2_grpc
from tests.faults.calls import DEADLINE, Connection, Plan, Told, set_skeys
from tests.faults.case import Case
from tests.faults.front_points import PATIENCE
from tests.faults.oracle import Oracle
from tests.faults.processes import (
    SETTLED_SECONDS,
    ClientProcess,
    Held,
    has_ended,
    held_by,
    is_stopped,
    nursery,
)
from tests.faults.subjects import FRAMES, KERNELS, KEYS, OLD, RANGES, Fault, Guest, acc_f, some_keys
from tests.faults.trigger import TRACE, fired_name, order_name

_numbers = itertools.count(1)


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
        return Held(held_by(self.front.pid, of_grpc_too=False), held_by(guest.worker_pid, of_grpc_too=True))

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
