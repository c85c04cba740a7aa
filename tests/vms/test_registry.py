"""The VMs of a runtime directory: made with real workers, found again, listed; and those that can't be made."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.vms import registry as registry_module
from skeyd.vms import session as session_module
from skeyd.vms.registry import Registry
from skeyd.vms.runtime import RECORD, RuntimeDirectory, VmDirectory
from skeyd.vms.starter import ChildStarter
from skeyd.vms.vm import Vm, VmState
from skeyd.worker.candidates import Found
from skeyd.worker.packets import Fields
from skeyd.worker.protocol import LOCK, Spec
from tests.processes import children, look_at
from tests.vms.fake_worker import Caller, FakeWorker, answers
from tests.vms.registries import (
    OTHER_UID,
    STATUS,
    held_lock,
    kill_worker,
    require_refusal,
    talk,
    write_key,
)
from tests.worker.specs import MIB, UID, owned, simulated, slot

# --- ready ---------------------------------------------------------------------------------------------------------


def test_a_vm_that_was_created_is_ready_and_knows_everything_of_itself(registry: Registry) -> None:
    created = registry.create(simulated((4, 2), (0, 1), kernel="7.0"))
    assert created.state is VmState.READY
    assert created.state_reason == ""
    assert (created.vm_id, created.uid, created.kind, created.created) == ("web", UID, "simulated", 1_700_000_000)
    assert len(created.incarnation) == 32
    assert created.kernel == "simulated Linux 7.0 and 7.1"
    assert created.worker_version
    assert look_at(created.worker_pid) is not None
    assert [one.frames for one in created.slots] == [GfnRange(0, 256), GfnRange(1024, 512)]
    assert not created.uses_keys
    assert registry.get("web") == created
    assert registry.list_all() == [created]


def test_a_vm_whose_keys_were_set_uses_keys(registry: Registry, web: Vm) -> None:
    write_key(registry)
    assert registry.get("web").uses_keys
    assert talk(registry)


def test_another_front_finds_the_same_vms(registry: Registry, web: Vm, runtime: RuntimeDirectory) -> None:
    write_key(registry)
    other = Registry(runtime, ChildStarter())
    (found,) = other.list_all()
    assert (found.uid, found.incarnation, found.worker_pid) == (web.uid, web.incarnation, web.worker_pid)
    assert found.uses_keys
    other.delete("web")
    assert registry.list_all() == []


def test_a_vm_that_is_deleted_is_gone_with_its_worker_and_its_name_is_free(registry: Registry, web: Vm) -> None:
    registry.delete("web")
    assert look_at(web.worker_pid) is None
    require_refusal(Reason.VM_NOT_FOUND, lambda: registry.get("web"))
    assert registry.create(simulated((0, 4), uid=OTHER_UID)).uid == OTHER_UID


def test_a_vm_that_is_deleted_leaves_no_zombie(registry: Registry, web: Vm) -> None:
    registry.delete("web")
    assert not Path(f"/proc/{web.worker_pid}").exists()


@pytest.mark.parametrize("use", [Registry.get, Registry.delete, talk, write_key])
def test_a_vm_that_is_not_there_is_not_found(registry: Registry, use: Callable[[Registry, str], object]) -> None:
    refusal = require_refusal(Reason.VM_NOT_FOUND, lambda: use(registry, "web"))
    assert refusal.metadata == {"vm": "vms/web"}


def test_no_vms_are_an_empty_list(registry: Registry) -> None:
    assert registry.list_all() == []


def test_strangers_are_told_and_not_listed(registry: Registry, web: Vm, runtime_dir: Path) -> None:
    (runtime_dir / "vms" / "Lost+Found").mkdir()
    assert registry.strangers() == ["Lost+Found"]
    assert [vm.vm_id for vm in registry.list_all()] == ["web"]


def test_vms_are_listed_in_order_of_their_ids(registry: Registry) -> None:
    for vm_id in ("c", "a", "b"):
        registry.create(simulated((0, 1), vm_id=vm_id))
    assert [vm.vm_id for vm in registry.list_all()] == ["a", "b", "c"]


# --- not created ---------------------------------------------------------------------------------------------------


def test_an_id_that_is_taken_is_refused_and_the_vm_that_has_it_goes_on(registry: Registry, web: Vm) -> None:
    require_refusal(Reason.VM_EXISTS, lambda: registry.create(simulated((0, 8), uid=OTHER_UID)))
    assert registry.get("web") == web


def test_the_id_of_a_dead_vm_is_taken_too(registry: Registry, web: Vm) -> None:
    kill_worker(web)
    require_refusal(Reason.VM_EXISTS, lambda: registry.create(simulated((0, 8), uid=OTHER_UID)))


@pytest.mark.parametrize(
    ("spec", "reasons"),
    [
        (simulated((0, 2), (1, 2)), {Reason.MEMORY_INVALID}),
        (
            owned(slot(0, 1, "file", "/no/such/file")),
            {Reason.CAP_S390_SKEYS_MISSING, Reason.KVM_UNAVAILABLE, Reason.MEMORY_FILE_UNUSABLE},
        ),
    ],
)
def test_a_start_that_fails_leaves_no_directory_and_no_process(
    registry: Registry, runtime_dir: Path, spec: Spec, reasons: set[Reason]
) -> None:
    before = children()
    with pytest.raises(SkeydError) as refused:
        registry.create(spec)
    assert refused.value.reason in reasons
    assert list((runtime_dir / "vms").iterdir()) == []
    assert children() == before
    registry.create(simulated((0, 1)))


class FakeStarter:
    """Starts nothing; what happens instead is given."""

    def __init__(self, start: Callable[[VmDirectory, Spec], None]) -> None:
        self._start = start

    def start(self, directory: VmDirectory, spec: Spec) -> None:
        self._start(directory, spec)

    def probe_host(self) -> Fields:
        return Fields({"can_own_vms": None}, "report")

    def find_candidates(self) -> Fields:
        return Fields({"candidates": [], "unreadable": 1, "left_out": 2, "workers": 3}, "answer")

    def reap(self) -> None:
        pass


@pytest.mark.parametrize("error", [SkeydError(Reason.OUT_OF_MEMORY, "no"), OSError(5, "io"), KeyboardInterrupt()])
def test_a_start_that_fails_in_any_way_leaves_no_directory(
    runtime: RuntimeDirectory, runtime_dir: Path, error: BaseException
) -> None:
    def start(directory: VmDirectory, spec: Spec) -> None:
        os.close(directory.open_log())
        raise error

    registry = Registry(runtime, FakeStarter(start))
    with pytest.raises(type(error)):
        registry.create(simulated((0, 1)))
    assert list((runtime_dir / "vms").iterdir()) == []
    # And its name is free: nobody is at it any more.
    require_refusal(Reason.VM_NOT_FOUND, lambda: registry.delete("web"))


def test_a_worker_that_fails_without_a_reason_leaves_its_last_words_in_the_error(
    runtime: RuntimeDirectory, runtime_dir: Path
) -> None:
    def start(directory: VmDirectory, spec: Spec) -> None:
        log = directory.open_log()
        os.write(log, b"Traceback\nValueError: what went wrong\n")
        os.close(log)
        raise SkeydError(Reason.WORKER_FAILED, "the worker ended before it was ready")

    refusal = require_refusal(
        Reason.WORKER_FAILED, lambda: Registry(runtime, FakeStarter(start)).create(simulated((0, 1)))
    )
    assert refusal.metadata["worker_log"] == "ValueError: what went wrong"
    assert list((runtime_dir / "vms").iterdir()) == []


def test_a_host_has_only_so_many_vms(registry: Registry, web: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "MAX_VMS", 2)
    registry.create(simulated((0, 1), vm_id="second"))
    require_refusal(Reason.TOO_MANY_VMS, lambda: registry.create(simulated((0, 1), vm_id="third")))
    registry.delete("web")
    registry.create(simulated((0, 1), vm_id="third"))


def test_the_host_is_looked_at_by_a_worker(runtime: RuntimeDirectory) -> None:
    assert not Registry(runtime, FakeStarter(lambda *_: None)).probe_host().has("can_own_vms")


def test_candidates_are_looked_for_by_a_worker(runtime: RuntimeDirectory) -> None:
    assert Registry(runtime, FakeStarter(lambda *_: None)).find_candidates() == Found((), 1, 2, 3)


# --- creating ------------------------------------------------------------------------------------------------------


def test_a_vm_is_creating_from_its_first_moment_on(runtime: RuntimeDirectory) -> None:
    seen: list[Vm] = []

    def start(directory: VmDirectory, spec: Spec) -> None:
        # Nothing of a worker is there yet: no lock and no socket, as of one that died.
        seen.append(starting.get("web"))
        seen.extend(starting.list_all())
        require_refusal(Reason.WORKER_LOST, lambda: talk(starting))
        require_refusal(Reason.VM_BUSY, lambda: starting.delete("web"))

    starting = Registry(runtime, FakeStarter(start))
    starting.create(simulated((0, 1)))
    assert [vm.state for vm in seen] == [VmState.CREATING, VmState.CREATING]
    assert seen[0].uid == UID
    # What was started is no worker.
    assert starting.get("web").state is VmState.DEAD


def test_a_worker_that_lives_and_has_no_socket_yet_is_creating_and_is_not_deleted(
    registry: Registry, forged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_lock(forged):
        assert registry.get("web").state is VmState.QUARANTINED  # it was created long ago
        monkeypatch.setattr("skeyd.vms.registry.time.time", lambda: 1_700_000_000.0)
        vm = registry.get("web")
        assert vm.state is VmState.CREATING
        assert (vm.uid, vm.kind, vm.created) == (UID, "simulated", 1_700_000_000)
        for use in (registry.delete, lambda _: talk(registry), lambda _: write_key(registry)):
            assert "creating" in require_refusal(Reason.WORKER_LOST, lambda use=use: use("web")).message  # type: ignore[misc]
        assert sorted(one.name for one in forged.iterdir()) == [RECORD, LOCK]


# --- many ----------------------------------------------------------------------------------------------------------


def test_all_vms_are_asked_at_once(registry: Registry, runtime: RuntimeDirectory, runtime_dir: Path) -> None:
    count = 16
    # Each says who it is only when all have been asked: were they asked one after the other, none would.
    all_asked = threading.Barrier(count)

    def script_of(vm_id: str) -> Callable[[Caller], None]:
        def script(caller: Caller) -> None:
            all_asked.wait(30)
            answers([STATUS], id=vm_id)(caller)

        return script

    with ExitStack() as undo:
        for number in range(count):
            vm_id = f"vm-{number:02}"
            runtime.create_vm(simulated((0, 1), vm_id=vm_id)).close()
            undo.enter_context(FakeWorker(runtime_dir / "vms" / vm_id, script_of(vm_id)))
        vms = registry.list_all()
    assert [vm.state for vm in vms] == [VmState.READY] * count
    assert [vm.vm_id for vm in vms] == [f"vm-{number:02}" for number in range(count)]


def test_vms_that_never_answer_cost_their_time_once(
    registry: Registry, runtime: RuntimeDirectory, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 24
    for module in (session_module, registry_module):
        monkeypatch.setattr(module, "WORKER_HELLO_SECONDS", 0.5)
    with ExitStack() as undo:
        for number in range(count):
            vm_id = f"vm-{number:02}"
            runtime.create_vm(simulated((0, 1), vm_id=vm_id)).close()
            # It listens, and nobody is there to accept.
            undo.enter_context(FakeWorker(runtime_dir / "vms" / vm_id))
        before = time.monotonic()
        vms = registry.list_all()
        took = time.monotonic() - before
    assert [vm.state for vm in vms] == [VmState.QUARANTINED] * count
    # One after the other would be 12 seconds; this is generous to a machine under load.
    assert took < 0.5 * count / 2


def test_a_vm_that_goes_while_all_are_listed_is_left_out(
    registry: Registry, web: Vm, runtime: RuntimeDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "vm_ids", lambda: ["gone", "web"])
    assert registry.list_all() == [web]


def test_a_worker_uses_little_memory_however_much_its_guest_has(registry: Registry) -> None:
    vm = registry.create(simulated((0, 1 << 20), kernel="4.19"))
    status = Path(f"/proc/{vm.worker_pid}/status").read_text()
    (resident,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    assert resident * 1024 < 40 * MIB
