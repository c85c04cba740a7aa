"""VMs are ended, and one call at a time changes a VM."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.vms import registry as registry_module
from skeyd.vms.hang_up import HangUp
from skeyd.vms.registry import Registry
from skeyd.vms.runtime import RECORD
from skeyd.vms.session import Session
from skeyd.vms.vm import Vm, VmState
from tests.vms.fake_worker import Caller, FakeWorker, answers, hello
from tests.vms.registries import (
    STATUS,
    require_refusal,
    talk,
    write_key,
)
from tests.worker.specs import UID, simulated

# --- deleting ------------------------------------------------------------------------------------------------------


def test_a_worker_that_agrees_to_end_and_does_not_is_told_and_keeps_its_name(
    registry: Registry, forged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "WORKER_END_SECONDS", 0.01)
    # This process: it is not going to end.
    script = answers([STATUS, ("shutdown", {"ok": {}})])
    with FakeWorker(forged, script):
        refusal = require_refusal(Reason.WORKER_LOST, lambda: registry.delete("web"))
    assert f"pid {os.getpid()}" in refusal.message
    assert (forged / RECORD).exists()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"error": {"reason": "VM_BUSY", "message": "no", "metadata": {}}}, Reason.VM_BUSY),
        (b"{", Reason.WORKER_FAILED),
    ],
)
def test_a_worker_that_does_not_agree_to_end_keeps_its_name(
    registry: Registry, forged: Path, answer: Any, reason: Reason
) -> None:
    with FakeWorker(forged, answers([STATUS, ("shutdown", answer)])):
        require_refusal(reason, lambda: registry.delete("web"))
    assert (forged / RECORD).exists()


def test_a_worker_that_dies_while_it_is_asked_to_end_was_lost_and_can_be_deleted_then(
    registry: Registry, forged: Path
) -> None:
    def script(caller: Caller) -> None:
        caller.say(hello())
        caller.answer(*STATUS)
        caller.take()

    with FakeWorker(forged, script):
        require_refusal(Reason.WORKER_LOST, lambda: registry.delete("web"))
    assert registry.get("web").state is VmState.DEAD
    registry.delete("web")


def test_what_is_ended_is_the_vm_that_was_looked_at(registry: Registry, forged: Path) -> None:
    asked: list[dict[str, Any]] = []

    def script(caller: Caller) -> None:
        caller.say(hello())
        caller.answer(*STATUS)
        asked.append(caller.take())
        caller.say({"error": {"reason": "VM_BUSY", "message": "no", "metadata": {}}})
        caller.wait_for_end()

    with FakeWorker(forged, script):
        require_refusal(Reason.VM_BUSY, lambda: registry.delete("web"))
    assert asked == [{"op": "shutdown", "uid": UID}]


def test_a_deletion_whose_call_ends_once_the_worker_has_said_who_it_is_ends_well(
    registry: Registry, web: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang_up = HangUp()
    shut_down = Session.shut_down

    def end_call_and_shut_down(session: Session) -> None:
        hang_up.now()
        shut_down(session)

    monkeypatch.setattr(Session, "shut_down", end_call_and_shut_down)
    registry.delete("web", hang_up)
    assert hang_up.was_told
    require_refusal(Reason.VM_NOT_FOUND, lambda: registry.get("web"))


# --- one at a time -------------------------------------------------------------------------------------------------


def test_who_writes_keeps_other_writers_and_deletion_away_and_no_reader(registry: Registry, web: Vm) -> None:
    with registry.writing("web") as session:
        uses: list[Callable[[], object]] = [
            lambda: registry.delete("web"),
            lambda: write_key(registry),
        ]
        for use in uses:
            assert require_refusal(Reason.VM_BUSY, use).metadata == {"vm": "vms/web"}
        require_refusal(Reason.VM_EXISTS, lambda: registry.create(simulated((0, 1))))  # trying again would never help
        assert talk(registry) is False
        assert registry.get("web") == web
        assert registry.list_all() == [web]
        assert session.uses_keys() is False
        registry.create(simulated((0, 1), vm_id="other"))
    write_key(registry)
    registry.delete("web")


@pytest.mark.parametrize("error", [SkeydError(Reason.WORKER_LOST, "lost"), ValueError("a bug"), KeyboardInterrupt()])
def test_a_writer_that_fails_lets_the_next_one_in(registry: Registry, web: Vm, error: BaseException) -> None:
    with pytest.raises(type(error)), registry.writing("web"):
        raise error
    write_key(registry)


def test_a_writer_that_finds_no_vm_lets_the_next_one_in(registry: Registry) -> None:
    for _ in range(2):
        require_refusal(Reason.VM_NOT_FOUND, lambda: write_key(registry))


def test_who_deletes_keeps_writers_away(registry: Registry, forged: Path) -> None:
    asked = threading.Event()
    may_end = threading.Event()

    def script(caller: Caller) -> None:
        caller.say(hello())
        caller.answer(*STATUS)
        caller.take()
        asked.set()
        assert may_end.wait(30)
        caller.say({"error": {"reason": "VM_BUSY", "message": "after all not", "metadata": {}}})
        caller.wait_for_end()

    with FakeWorker(forged, script):
        deleting = threading.Thread(target=lambda: require_refusal(Reason.VM_BUSY, lambda: registry.delete("web")))
        deleting.start()
        try:
            assert asked.wait(30)
            assert "another call" in require_refusal(Reason.VM_BUSY, lambda: write_key(registry)).message
        finally:
            may_end.set()
            deleting.join(30)


def test_a_session_outlives_a_look_and_a_look_a_session(registry: Registry, web: Vm) -> None:
    with registry.session("web") as one, registry.session("web") as other:
        assert registry.get("web").state is VmState.READY
        assert one.uses_keys() == other.uses_keys()
