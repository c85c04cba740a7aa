"""VMs that are dead or quarantined by the evidence: nothing is killed or guessed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skeyd.errors import Reason
from skeyd.vms.registry import Registry
from skeyd.vms.runtime import RECORD, RuntimeDirectory
from skeyd.vms.vm import Vm, VmState
from skeyd.worker.protocol import LOCK, PROTOCOL, SOCKET
from tests.processes import look_at
from tests.vms.fake_worker import Caller, FakeWorker, answers, hello, says
from tests.vms.registries import (
    OTHER_UID,
    held_lock,
    impatient,
    kill_worker,
    require_refusal,
    stop_worker,
    talk,
    write_key,
)
from tests.worker.specs import UID, simulated

# --- dead ----------------------------------------------------------------------------------------------------------


def test_a_vm_whose_worker_was_killed_is_dead_and_says_what_it_was(registry: Registry, web: Vm) -> None:
    kill_worker(web)
    vm = registry.get("web")
    assert vm == Vm("web", VmState.DEAD, "its worker is gone", UID, "simulated", 1_700_000_000)
    assert registry.list_all() == [vm]
    for use in (talk, write_key):
        refusal = require_refusal(Reason.VM_DEAD, lambda use=use: use(registry))  # type: ignore[misc]
        assert refusal.metadata == {"vm": "vms/web"}


def test_a_dead_vm_is_deleted_and_its_name_is_free(registry: Registry, web: Vm) -> None:
    kill_worker(web)
    registry.delete("web")
    assert registry.create(simulated((0, 4), uid=OTHER_UID)).uid == OTHER_UID


def test_a_vm_that_never_had_a_worker_is_dead(registry: Registry, forged: Path) -> None:
    assert registry.get("web").state is VmState.DEAD
    registry.delete("web")
    assert not forged.exists()


def test_a_worker_that_dies_between_hello_and_status_is_dead_and_not_lost(registry: Registry, forged: Path) -> None:
    with FakeWorker(forged, lambda caller: caller.say(hello())):
        assert registry.get("web").state is VmState.DEAD


def test_a_worker_that_hangs_up_and_lives_is_quarantined(registry: Registry, forged: Path) -> None:
    for script in (lambda _: None, lambda caller: caller.say(hello())):
        with held_lock(forged), FakeWorker(forged, script):
            assert registry.get("web").state is VmState.QUARANTINED
        (forged / SOCKET).unlink()


# --- quarantined ---------------------------------------------------------------------------------------------------


def _assert_left_alone(registry: Registry, forged: Path) -> Vm:
    # Quarantined by every way to look at it, and neither deleted nor talked with.
    vm = registry.get("web")
    assert vm.state is VmState.QUARANTINED
    assert registry.list_all() == [vm]
    for use in (Registry.delete, talk, write_key):
        refusal = require_refusal(Reason.VM_QUARANTINED, lambda use=use: use(registry, "web"))  # type: ignore[misc]
        assert refusal.metadata == {"vm": "vms/web"}
        assert vm.state_reason in refusal.message
    assert forged.exists()
    return vm


def test_a_worker_that_is_stopped_is_quarantined_and_ready_again_when_it_goes_on(
    registry: Registry, web: Vm, runtime_dir: Path
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        impatient(monkeypatch)
        stop_worker(web)
        vm = _assert_left_alone(registry, runtime_dir / "vms" / "web")
        assert vm.state_reason == "its worker did not answer within 0.05 s"
        assert vm.uid == UID
    os.kill(web.worker_pid, signal.SIGCONT)
    assert registry.get("web") == web
    assert talk(registry) is False


def test_a_worker_of_another_uid_is_quarantined_and_lives(registry: Registry, web: Vm, runtime_dir: Path) -> None:
    directory = runtime_dir / "vms" / "web"
    record = (directory / RECORD).read_text()
    (directory / RECORD).write_text(record.replace(UID, OTHER_UID))
    vm = _assert_left_alone(registry, directory)
    assert UID in vm.state_reason
    assert vm.uid == OTHER_UID
    assert look_at(web.worker_pid) is not None
    (directory / RECORD).write_text(record)
    assert registry.get("web") == web


@pytest.mark.parametrize("content", [None, b"", b"{", b"\0" * 10, b'{"protocol": 2}'])
def test_a_vm_whose_record_is_unreadable_is_quarantined_and_its_worker_lives(
    registry: Registry, web: Vm, runtime_dir: Path, content: bytes | None
) -> None:
    record = runtime_dir / "vms" / "web" / RECORD
    record.unlink()
    if content is not None:
        record.write_bytes(content)
    vm = _assert_left_alone(registry, record.parent)
    assert RECORD in vm.state_reason
    assert look_at(web.worker_pid) is not None


def test_a_directory_under_another_name_is_quarantined_and_its_worker_lives(
    registry: Registry, web: Vm, runtime_dir: Path
) -> None:
    (runtime_dir / "vms" / "web").rename(runtime_dir / "vms" / "other")
    vm = registry.get("other")
    assert vm.state is VmState.QUARANTINED
    assert "that of web" in vm.state_reason
    require_refusal(Reason.VM_QUARANTINED, lambda: registry.delete("other"))
    assert look_at(web.worker_pid) is not None


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(says(b"HTTP/1.1 200 OK\r\n\r\n"), id="another program"),
        pytest.param(says(hello(pid=1)), id="a liar"),
        pytest.param(says(hello(protocol=PROTOCOL - 1)), id="an older version"),
        pytest.param(says(hello(id="other")), id="another vm"),
        pytest.param(says(hello(uid=OTHER_UID)), id="another uid"),
        pytest.param(answers([("status", {"ok": {}})]), id="nonsense"),
        pytest.param(
            answers([("status", {"error": {"reason": "WORKER_FAILED", "message": "EIO", "metadata": {}}})]),
            id="a failure",
        ),
        pytest.param(
            says(hello(slots=[{"slot": 0, "start": 0, "count": 2, "backing": "none"}] * 2)), id="memory twice"
        ),
    ],
)
def test_what_answers_and_cannot_be_explained_is_quarantined(
    registry: Registry, forged: Path, script: Callable[[Caller], None]
) -> None:
    with held_lock(forged), FakeWorker(forged, *[script] * 5):
        _assert_left_alone(registry, forged)


def test_a_vm_that_the_kernel_calls_dead_is_dead_and_its_keys_are_refused(registry: Registry, forged: Path) -> None:
    dead = answers([("status", {"error": {"reason": "VM_DEAD", "message": "EIO", "metadata": {}}})])
    with held_lock(forged), FakeWorker(forged, *[dead] * 2):
        vm = registry.get("web")
        assert (vm.state, vm.state_reason, vm.uid) == (VmState.DEAD, "EIO", UID)
        require_refusal(Reason.VM_DEAD, lambda: talk(registry))


def test_a_vm_that_the_kernel_calls_dead_is_ended_when_it_is_deleted(registry: Registry, forged: Path) -> None:
    asked: list[dict[str, Any]] = []

    def script(caller: Caller) -> None:
        caller.say(hello())
        caller.answer("status", {"error": {"reason": "VM_DEAD", "message": "EIO", "metadata": {}}})
        asked.append(caller.take())
        caller.say({"error": {"reason": "VM_BUSY", "message": "this process is no worker", "metadata": {}}})
        caller.wait_for_end()

    # It still has a worker, which is asked to end like any other.
    with held_lock(forged), FakeWorker(forged, script):
        require_refusal(Reason.VM_BUSY, lambda: registry.delete("web"))
    assert asked == [{"op": "shutdown", "uid": UID}]
    assert forged.exists()


def test_a_worker_that_cannot_say_whether_the_guest_uses_keys_is_ready_all_the_same(
    registry: Registry, forged: Path
) -> None:
    short = answers([("status", {"error": {"reason": "OUT_OF_MEMORY", "message": "ENOMEM", "metadata": {}}})])
    with held_lock(forged), FakeWorker(forged, short):
        vm = registry.get("web")
        assert (vm.state, vm.state_reason, vm.uses_keys) == (VmState.READY, "ENOMEM", None)


@pytest.mark.parametrize(
    ("name", "what"), [(LOCK, "link"), (LOCK, "directory"), (RECORD, "directory"), (RECORD, "fifo"), (RECORD, "link")]
)
def test_a_directory_that_cannot_be_used_is_quarantined_and_no_other_vm_is_kept_from_view(
    registry: Registry, web: Vm, runtime: RuntimeDirectory, runtime_dir: Path, name: str, what: str
) -> None:
    runtime.create_vm(simulated((0, 1), vm_id="bad")).close()
    path = runtime_dir / "vms" / "bad" / name
    path.unlink(missing_ok=True)
    match what:
        case "link":
            path.symlink_to(runtime_dir)
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
    vms = registry.list_all()
    assert [(vm.vm_id, vm.state) for vm in vms] == [("bad", VmState.QUARANTINED), ("web", VmState.READY)]
    assert registry.get("bad").state is VmState.QUARANTINED
    require_refusal(Reason.VM_QUARANTINED, lambda: registry.delete("bad"))
    assert os.path.lexists(path)


def test_a_file_in_the_place_of_a_vm_is_quarantined_in_the_list(registry: Registry, web: Vm, runtime_dir: Path) -> None:
    (runtime_dir / "vms" / "bad").write_text("x")
    assert [(vm.vm_id, vm.state) for vm in registry.list_all()] == [
        ("bad", VmState.QUARANTINED),
        ("web", VmState.READY),
    ]
    for use in (Registry.get, Registry.delete, talk):
        require_refusal(Reason.VM_QUARANTINED, lambda use=use: use(registry, "bad"))  # type: ignore[misc]


def test_a_vm_with_files_that_are_not_skeyds_is_not_ended(registry: Registry, web: Vm, runtime_dir: Path) -> None:
    notes = runtime_dir / "vms" / "web" / "notes.txt"
    notes.write_text("somebody's")
    refusal = require_refusal(Reason.VM_QUARANTINED, lambda: registry.delete("web"))
    assert "notes.txt" in refusal.message
    assert registry.get("web") == web
    notes.unlink()
    registry.delete("web")
