"""Create, find, look at and delete VMs. Of a VM nothing but connections is kept between two calls: each asks anew."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Final

from skeyd.errors import Reason, SkeydError, exhausted
from skeyd.limits import (
    IDLE_SESSIONS,
    IDLE_SESSIONS_A_VM,
    MAX_VMS,
    PROVEN_SECONDS,
    WORKER_END_SECONDS,
    WORKER_HELLO_SECONDS,
    WORKER_START_SECONDS,
)
from skeyd.vms.hang_up import HangUp, HangUps
from skeyd.vms.idle import IdleSessions
from skeyd.vms.runtime import RuntimeDirectory, VmDirectory
from skeyd.vms.session import Session
from skeyd.vms.starter import WorkerStarter
from skeyd.vms.vm import Vm, VmState
from skeyd.worker.candidates import Found
from skeyd.worker.packets import Fields, ProtocolError
from skeyd.worker.protocol import Spec

_ASKED_AT_ONCE: Final = 32


class Registry:
    """The VMs of one runtime directory.

    Synchronization: any thread. Deleting a VM and writing its keys exclude each other and themselves; all else runs
    side by side, and a stuck worker delays only those who ask for its VM.
    """

    def __init__(self, runtime: RuntimeDirectory, starter: WorkerStarter) -> None:
        self._runtime = runtime
        self._starter = starter
        self._busy: set[str] = set()
        self._starting: set[str] = set()
        self._ending: set[str] = set()
        self._idle = IdleSessions(IDLE_SESSIONS, IDLE_SESSIONS_A_VM)
        self._lock = threading.Lock()

    def create(self, spec: Spec) -> Vm:
        """Start a worker that makes the VM. SkeydError VM_EXISTS, TOO_MANY_VMS, or why it could not be made."""
        self._starter.reap()
        if spec.vm_id in self._runtime.vm_ids():
            # Said here too, since a VM that is being written to would answer VM_BUSY, and trying again never helps.
            name = f"vms/{spec.vm_id}"
            raise SkeydError(Reason.VM_EXISTS, f"{name} exists", {"vm": name})
        with self._exclusively(spec.vm_id), self._listed_in(self._starting, spec.vm_id):
            with self._lock:  # so that two at once don't both find room for the last one
                if len(self._runtime.vm_ids()) >= MAX_VMS:
                    raise SkeydError(Reason.TOO_MANY_VMS, f"this host has {MAX_VMS} VMs, as many as are allowed")
                directory = self._runtime.create_vm(spec)
            try:
                try:
                    self._starter.start(directory, spec)
                except BaseException as error:
                    if isinstance(error, SkeydError) and error.reason is Reason.WORKER_FAILED:
                        # Its log goes with its directory.
                        error.metadata["worker_log"] = directory.log_end()
                    self._runtime.remove_vm(directory)
                    raise
                with self._lock:
                    self._starting.discard(spec.vm_id)
                vm = self._look(directory)
                if vm.vmm is not None:
                    # For when its worker can't say it any more. The VM is there, whether this can be written or not.
                    with suppress(OSError):
                        directory.write_record(replace(spec, vmm=vm.vmm))
                return vm
            finally:
                directory.close()

    def get(self, vm_id: str, hang_up: HangUp | None = None) -> Vm:
        """Look at one VM. SkeydError VM_NOT_FOUND; WORKER_LOST where it was hung up."""
        self._starter.reap()
        with self._runtime.open_vm(vm_id) as directory:
            return self._look(directory, hang_up)

    def list_all(self, hang_ups: HangUps | None = None) -> list[Vm]:
        """Look at all VMs, in order of id. Where it was hung up, what is said of them is worth nothing.

        Those that don't answer cost WORKER_HELLO_SECONDS for every 32 of them, not for each.
        """
        self._starter.reap()
        hang_ups = hang_ups or HangUps()
        ids = self._runtime.vm_ids()
        if not ids:
            return []
        with ThreadPoolExecutor(min(_ASKED_AT_ONCE, len(ids)), "list-vms") as pool:
            looks = pool.map(lambda vm_id: self._get_if_there(vm_id, hang_ups), ids)
            return [vm for vm in looks if vm is not None]

    def count(self) -> int:
        """How many VMs there are, without a look at any."""
        return len(self._runtime.vm_ids())

    def strangers(self) -> list[str]:
        """Names in the directory of VMs that can't be a VM's."""
        return self._runtime.strangers()

    def delete(self, vm_id: str, hang_up: HangUp | None = None, told: Callable[[Vm], None] = lambda _: None) -> None:
        """End a VM and free its name. SkeydError VM_QUARANTINED where skeyd can't tell what it would end; VM_BUSY.

        It can be hung up until the worker has said who it is. `told` gets what is known of it, before it is ended.
        """
        hang_up = hang_up or HangUp()
        with self._exclusively(vm_id), self._runtime.open_vm(vm_id) as directory:
            session, vm = self._connect(directory, hang_up)
            told(vm)
            if session is not None:
                hang_up.let_go()
                with session, self._listed_in(self._ending, vm_id):
                    self._idle.drop(vm_id)
                    # Before anything is ended: afterwards the VM would be gone and its name still taken.
                    self._runtime.require_own_files(directory)
                    _end(session)
            elif vm.state is not VmState.DEAD:
                raise _not_ready(vm)
            self._starter.reap()
            self._runtime.remove_vm(directory)

    @contextmanager
    def session(self, vm_id: str, hang_up: HangUp | None = None, *, brief: bool = False) -> Iterator[Session]:
        """Talk with a VM's worker. SkeydError VM_NOT_FOUND, VM_DEAD, VM_QUARANTINED, WORKER_LOST.

        `brief`: for a question or two, over a connection that is kept for the next.
        """
        hang_up = hang_up or HangUp()
        # Before anything is asked: what changes from now on makes it another VM.
        evidence = self._runtime.evidence(vm_id) if brief else None
        session = self._idle_session(vm_id, evidence, hang_up) if brief else None
        if session is None:
            session = self._new_session(vm_id, hang_up)
            if brief:
                session.be_brief()
        done = False
        try:
            yield session
            done = True
        finally:
            hang_up.let_go()
            if done and evidence is not None:
                self._keep(vm_id, evidence, session)
            else:
                session.close()

    @contextmanager
    def writing(self, vm_id: str, hang_up: HangUp | None = None, *, brief: bool = False) -> Iterator[Session]:
        """Talk with a VM's worker as the only one who changes anything. As `session`, and VM_BUSY."""
        with self._exclusively(vm_id), self.session(vm_id, hang_up, brief=brief) as session:
            yield session

    def close(self) -> None:
        """Let go of all workers that nobody talks with. They go on."""
        self._idle.close()

    def probe_host(self) -> Fields:
        """Have a worker look at the host."""
        return self._starter.probe_host()

    def find_candidates(self) -> Found:
        """Have a worker look for processes that hold VMs. ProtocolError where what it says is no answer."""
        return Found.from_message(self._starter.find_candidates())

    def _new_session(self, vm_id: str, hang_up: HangUp) -> Session:
        with self._runtime.open_vm(vm_id) as directory:
            session, vm = self._connect(directory, hang_up)
        if session is None:
            raise _not_ready(vm)
        if vm.state is not VmState.READY:
            hang_up.let_go()
            session.close()
            raise _not_ready(vm)
        return session

    def _idle_session(self, vm_id: str, evidence: tuple[int, ...] | None, hang_up: HangUp) -> Session | None:
        # A kept session whose worker answers now, or did a moment ago.
        if evidence is None or vm_id in self._ending:
            return None
        kept = self._idle.take(vm_id, evidence)
        if kept is None:
            return None
        session, unused_seconds = kept
        session.hold_by(hang_up)
        try:
            if unused_seconds > PROVEN_SECONDS:
                session.status()
            return session
        except SkeydError as error:
            hang_up.let_go()
            session.close()
            if hang_up.was_told:
                raise
            self._idle.drop(vm_id)
            if isinstance(error.__cause__, TimeoutError):
                raise _not_ready(Vm(vm_id, VmState.QUARANTINED, _no_answer())) from None
            return None  # who asks anew is told what is wrong
        except BaseException:
            hang_up.let_go()
            session.close()
            raise

    def _keep(self, vm_id: str, evidence: tuple[int, ...], session: Session) -> None:
        with self._lock:
            # Whoever ends a VM is listed before it closes what is kept, and that of a worker that ended isn't kept.
            if vm_id not in self._ending:
                self._idle.put(vm_id, evidence, session)
                return
        session.close()

    @contextmanager
    def _listed_in(self, ids: set[str], vm_id: str) -> Iterator[None]:
        with self._lock:
            ids.add(vm_id)
        try:
            yield
        finally:
            with self._lock:
                ids.discard(vm_id)

    @contextmanager
    def _exclusively(self, vm_id: str) -> Iterator[None]:
        with self._lock:
            if vm_id in self._busy:
                raise SkeydError(
                    Reason.VM_BUSY,
                    f"another call is creating, changing or deleting vms/{vm_id}",
                    {"vm": f"vms/{vm_id}"},
                )
            self._busy.add(vm_id)
        try:
            yield
        finally:
            with self._lock:
                self._busy.remove(vm_id)

    def _get_if_there(self, vm_id: str, hang_ups: HangUps) -> Vm | None:
        try:
            return self.get(vm_id, hang_ups.one_more())
        except SkeydError as error:
            if error.reason is Reason.VM_NOT_FOUND:
                return None
            return Vm(vm_id, VmState.QUARANTINED, error.message)
        except OSError as error:  # the host is short of something; that says nothing of the VM
            return Vm(vm_id, VmState.QUARANTINED, f"it can't be looked at now: {error.strerror}")

    def _look(self, directory: VmDirectory, hang_up: HangUp | None = None) -> Vm:
        hang_up = hang_up or HangUp()
        session, vm = self._connect(directory, hang_up)
        if session is not None:
            hang_up.let_go()
            session.close()
        return vm

    def _connect(self, directory: VmDirectory, hang_up: HangUp) -> tuple[Session | None, Vm]:
        # What is known of the VM, and its worker's session where the worker is the one that was started for it.
        try:
            session, vm = self._try_to_connect(directory, hang_up)
        except OSError as error:
            if exhausted(error):
                raise
            session, vm = (
                None,
                Vm(directory.vm_id, VmState.QUARANTINED, f"its directory can't be used: {error.strerror}"),
            )
        if session is None:
            if hang_up.was_told:
                # Whatever was seen, it was seen of a connection that was cut on purpose.
                name = f"vms/{directory.vm_id}"
                raise SkeydError(
                    Reason.WORKER_LOST, f"the call on {name} ended before its worker answered", {"vm": name}
                )
            self._idle.drop(directory.vm_id)
        return session, vm

    def _try_to_connect(self, directory: VmDirectory, hang_up: HangUp) -> tuple[Session | None, Vm]:
        try:
            record = directory.read_record()
        except ProtocolError as error:
            return None, Vm(directory.vm_id, VmState.QUARANTINED, f"its record can't be read: {error}")
        if record.vm_id != directory.vm_id:
            return None, Vm(directory.vm_id, VmState.QUARANTINED, f"its record is that of {record.vm_id}")

        def vm(state: VmState, reason: str) -> Vm:
            return Vm(
                directory.vm_id,
                state,
                reason,
                uid=record.uid,
                kind=record.kind,
                created=record.created,
                vmm=record.vmm,
            )

        if directory.vm_id in self._ending:
            return None, vm(VmState.DEAD, "it is being deleted")
        if directory.vm_id in self._starting:
            # Its lock may not be taken yet, and without it a VM looks dead.
            return None, vm(VmState.CREATING, "its worker is being started")
        try:
            session = Session.connect(directory.fd, hang_up)
        except (TimeoutError, BlockingIOError):  # the second: it has not taken the connections before this one
            return None, vm(VmState.QUARANTINED, _no_answer())
        except FileNotFoundError:
            if directory.worker_lives():
                if time.time() > record.created + 2 * WORKER_START_SECONDS:
                    return None, vm(VmState.QUARANTINED, "its worker lives and its socket is gone")
                return None, vm(VmState.CREATING, "its worker has not opened its socket yet")
            return None, vm(VmState.DEAD, "it has no worker")
        except OSError as error:
            if exhausted(error):
                raise
            if directory.worker_lives():
                return None, vm(VmState.QUARANTINED, f"its worker lives and can't be reached: {error}")
            return None, vm(VmState.DEAD, "its worker is gone")
        except ProtocolError as error:
            return None, vm(VmState.QUARANTINED, f"what answers is not its worker: {error}")
        hello = session.hello
        if (hello.vm_id, hello.uid) != (record.vm_id, record.uid):
            hang_up.let_go()
            session.close()
            what = f"what answers is the worker of {hello.vm_id} (uid {hello.uid})"
            return None, vm(VmState.QUARANTINED, what)
        known = Vm(
            vm_id=directory.vm_id,
            state=VmState.READY,
            uid=hello.uid,
            kind=hello.kind,
            created=hello.created,
            incarnation=hello.incarnation,
            kernel=hello.kernel,
            worker_version=hello.version,
            worker_pid=hello.pid,
            slots=hello.slots,
            vmm=hello.vmm,
        )
        try:
            uses_keys, last_write = session.status()
            return session, replace(known, uses_keys=uses_keys, last_write=last_write)
        except SkeydError as error:
            # Who it is is known; what its guest does is not.
            if error.reason is Reason.VM_DEAD:
                return session, replace(known, state=VmState.DEAD, state_reason=error.message)
            if error.reason not in (Reason.WORKER_LOST, Reason.WORKER_FAILED):
                return session, replace(known, state_reason=error.message)
            hang_up.let_go()
            session.close()
            if error.reason is Reason.WORKER_LOST and not directory.worker_lives():
                return None, vm(VmState.DEAD, "its worker is gone")
            return None, vm(VmState.QUARANTINED, error.message)


def _end(session: Session) -> None:
    hello = session.hello
    try:
        process = os.pidfd_open(hello.pid)
    except ProcessLookupError:
        return  # it ended by itself since it answered
    try:
        # Its answer comes through the session, so the process is the worker and no other that got its number.
        session.shut_down()
        poll = select.poll()
        poll.register(process, select.POLLIN)
        ended = poll.poll(WORKER_END_SECONDS * 1000)
    finally:
        os.close(process)
    if not ended:
        name = f"vms/{hello.vm_id}"
        raise SkeydError(
            Reason.WORKER_LOST,
            f"the worker of {name} (pid {hello.pid}) agreed to end and has not in {WORKER_END_SECONDS:g} s",
            {"vm": name},
        )


def _no_answer() -> str:
    return f"its worker did not answer within {WORKER_HELLO_SECONDS:g} s"


def _not_ready(vm: Vm) -> SkeydError:
    reason = {
        VmState.DEAD: Reason.VM_DEAD,
        VmState.QUARANTINED: Reason.VM_QUARANTINED,
    }.get(vm.state, Reason.WORKER_LOST)
    name = f"vms/{vm.vm_id}"
    return SkeydError(reason, f"{name} is {vm.state.value}: {vm.state_reason}", {"vm": name})
