"""Short calls' connections to workers: when they are used again, when they are closed, and who hangs up on them."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.limits import WORKER_ANSWER_SECONDS, WORKER_HELLO_SECONDS
from skeyd.vms import registry as registry_module
from skeyd.vms.hang_up import HangUp
from skeyd.vms.registry import Registry
from skeyd.vms.runtime import RECORD, RuntimeDirectory
from skeyd.vms.session import Session
from skeyd.vms.vm import Vm, VmState
from tests.vms.registries import (
    OTHER_UID,
    impatient,
    kill_worker,
    require_refusal,
    stop_worker,
)
from tests.worker.specs import UID, simulated

# --- connections that are kept -------------------------------------------------------------------------------------


def _open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _brief(registry: Registry, vm_id: str = "web") -> Session:
    # The session that a short call gets, which it has ended with.
    with registry.session(vm_id, brief=True) as session:
        session.uses_keys()
    return session


def test_a_short_call_has_the_connection_of_the_one_before(registry: Registry, web: Vm) -> None:
    first = _brief(registry)
    assert _brief(registry) is first
    with registry.writing("web", brief=True) as session:
        assert session is first
        session.write_slice(GfnRange(0, 1), b"\x30", allow_enable=True)
    assert _brief(registry) is first
    # Of two at once each has its own.
    with registry.session("web", brief=True) as one, registry.session("web", brief=True) as other:
        assert one is first
        assert other is not first
    with registry.session("web") as session:
        assert session is not first, "a stream has one of its own"


def test_a_short_call_waits_no_longer_for_an_answer_than_for_a_hello(registry: Registry, web: Vm) -> None:
    for _ in ("made", "kept"):
        with registry.session("web", brief=True) as session:
            assert session._channel.connection.gettimeout() == WORKER_HELLO_SECONDS
    with registry.session("web") as session:
        assert session._channel.connection.gettimeout() == WORKER_ANSWER_SECONDS


@pytest.mark.parametrize("error", [SkeydError(Reason.VM_BUSY, "busy"), KeyboardInterrupt()])
def test_the_connection_of_a_call_that_failed_is_not_kept(registry: Registry, web: Vm, error: BaseException) -> None:
    first = _brief(registry)

    def fail() -> None:
        with registry.session("web", brief=True) as session:
            assert session is first
            raise error

    with pytest.raises(type(error)):
        fail()
    assert _brief(registry) is not first


def test_a_connection_with_an_answer_that_nobody_took_is_not_kept(registry: Registry, web: Vm) -> None:
    with registry.session("web", brief=True) as session:
        session._send({"op": "status"})
    assert _brief(registry) is not session


def test_a_worker_that_died_is_told_of_although_there_was_a_connection(registry: Registry, web: Vm) -> None:
    _brief(registry)
    kill_worker(web)
    require_refusal(Reason.VM_DEAD, lambda: _brief(registry))


@pytest.mark.parametrize("seconds", [0.0, 1000.0], ids=["asked-first", "taken-for-granted"])
def test_a_worker_that_stopped_is_told_of_although_there_was_a_connection(
    registry: Registry, web: Vm, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    with monkeypatch.context() as patched:
        impatient(patched)
        _brief(registry)
        patched.setattr(registry_module, "PROVEN_SECONDS", seconds)
        stop_worker(web)
        if seconds:
            require_refusal(Reason.WORKER_LOST, lambda: _brief(registry))
        for _ in range(2):
            refusal = require_refusal(Reason.VM_QUARANTINED, lambda: _brief(registry))
            assert "did not answer within 0.05 s" in refusal.message
    os.kill(web.worker_pid, signal.SIGCONT)
    _brief(registry)


def test_a_vm_that_was_made_again_has_none_of_the_connections_of_the_one_before(registry: Registry, web: Vm) -> None:
    with registry.session("web", brief=True):
        _brief(registry)
        registry.delete("web")
    again = registry.create(simulated((0, 4), uid=OTHER_UID))
    with registry.session("web", brief=True) as session:
        assert (session.hello.uid, session.hello.incarnation) == (OTHER_UID, again.incarnation)


def test_what_changes_in_a_vms_directory_is_seen_although_there_was_a_connection(
    registry: Registry, web: Vm, runtime_dir: Path
) -> None:
    _brief(registry)
    record = runtime_dir / "vms" / "web" / RECORD
    record.write_text(record.read_text().replace(UID, OTHER_UID))
    require_refusal(Reason.VM_QUARANTINED, lambda: _brief(registry))


def test_a_vm_that_is_deleted_and_a_registry_that_is_closed_keep_no_connection_open(
    registry: Registry, web: Vm, runtime: RuntimeDirectory
) -> None:
    before = _open_fds()
    registry.create(simulated((0, 1), vm_id="other"))
    for vm_id in ("web", "other"):
        _brief(registry, vm_id)
    assert _open_fds() == before + 2
    registry.delete("other")
    assert _open_fds() == before + 1
    registry.close()
    assert _open_fds() == before
    _brief(registry)
    assert _open_fds() == before


def test_a_connection_that_comes_back_while_its_vm_is_deleted_is_not_kept(
    registry: Registry, web: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _open_fds()
    short_call = ExitStack()
    short_call.enter_context(registry.session("web", brief=True))
    shut_down = Session.shut_down

    def end_short_call_and_shut_down(session: Session) -> None:
        short_call.close()  # the worker is still there, and the connection good
        shut_down(session)

    monkeypatch.setattr(Session, "shut_down", end_short_call_and_shut_down)
    registry.delete("web")
    assert _open_fds() == before


def test_no_short_call_has_a_kept_connection_to_a_vm_that_is_being_deleted(
    registry: Registry, web: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    _brief(registry)
    drop = registry._idle.drop
    refused: list[SkeydError] = []

    def ask_and_drop(vm_id: str) -> None:
        monkeypatch.setattr(registry._idle, "drop", drop)
        refused.append(require_refusal(Reason.VM_DEAD, lambda: _brief(registry)))
        drop(vm_id)

    monkeypatch.setattr(registry._idle, "drop", ask_and_drop)
    registry.delete("web")
    assert ["it is being deleted" in one.message for one in refused] == [True]


def test_a_look_at_a_vm_that_died_closes_what_was_kept_of_it(registry: Registry, web: Vm) -> None:
    before = _open_fds()
    _brief(registry)
    assert _open_fds() == before + 1
    kill_worker(web)
    assert registry.get("web").state is VmState.DEAD
    assert _open_fds() == before


def test_a_worker_that_gave_no_answer_on_one_kept_connection_has_none_left(
    registry: Registry, web: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _open_fds()
    with registry.session("web", brief=True):
        _brief(registry)
    assert _open_fds() == before + 2
    impatient(monkeypatch)
    monkeypatch.setattr(registry_module, "PROVEN_SECONDS", -1.0)  # each is asked first
    stop_worker(web)
    try:
        require_refusal(Reason.VM_QUARANTINED, lambda: _brief(registry))
        assert _open_fds() == before
    finally:
        os.kill(web.worker_pid, signal.SIGCONT)


def test_a_call_that_ends_later_takes_the_connection_from_nobody(registry: Registry, web: Vm) -> None:
    hang_up = HangUp()
    with registry.session("web", hang_up, brief=True) as first:
        pass
    with registry.session("web", brief=True) as session:
        hang_up.now()  # as gRPC does when all of a call is over
        assert session is first
        assert not session.uses_keys()


@pytest.mark.parametrize("kept", [True, False])
def test_who_waits_for_a_stopped_worker_is_woken_by_the_end_of_its_call(
    registry: Registry, web: Vm, kept: bool
) -> None:
    if kept:
        _brief(registry)
    stop_worker(web)
    before = _open_fds() - kept
    hang_up = HangUp()

    def use() -> None:
        with registry.session("web", hang_up, brief=True) as session:
            session.uses_keys()

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(use)
        while hang_up._connection is None:
            assert not waiting.done()
        hang_up.now()
        refusal = waiting.exception(4.0)
    assert isinstance(refusal, SkeydError)
    assert refusal.reason is Reason.WORKER_LOST
    assert _open_fds() == before
    os.kill(web.worker_pid, signal.SIGCONT)
