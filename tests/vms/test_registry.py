"""The VMs of a runtime directory by the evidence: real workers, forged directories, and nothing killed or guessed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.limits import WORKER_ANSWER_SECONDS, WORKER_HELLO_SECONDS
from skeyd.vms import registry as registry_module
from skeyd.vms import session as session_module
from skeyd.vms.hang_up import HangUp
from skeyd.vms.registry import Registry
from skeyd.vms.runtime import RECORD, RuntimeDirectory, VmDirectory
from skeyd.vms.session import Session
from skeyd.vms.starter import ChildStarter
from skeyd.vms.vm import Vm, VmState
from skeyd.worker.protocol import LOCK, PROTOCOL, SOCKET, Fields, Spec
from tests.processes import children, end, look_at, wait_for_end
from tests.vms.fake_worker import Caller, FakeWorker, answers, hello, says
from tests.worker.specs import MIB, UID, owned, simulated, slot

OTHER_UID = "11111111-2222-3333-4444-555555555555"
STATUS = ("status", {"ok": {"uses_keys": False}})

_LOCKER = """
import os, sys
from skeyd.linux import take_lock
print(take_lock(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def runtime(runtime_dir: Path) -> Iterator[RuntimeDirectory]:
    with RuntimeDirectory.open(runtime_dir) as runtime:
        yield runtime


@pytest.fixture
def registry(runtime: RuntimeDirectory) -> Iterator[Registry]:
    """Make a registry that starts real workers; they end with the test."""
    before = children()
    starter = ChildStarter()
    made = Registry(runtime, starter)
    yield made
    made.close()
    for worker in children() - before:
        end(worker)
    starter.reap()


@pytest.fixture
def web(registry: Registry) -> Vm:
    """Make a VM with a real worker."""
    return registry.create(simulated((0, 4)))


@pytest.fixture
def forged(runtime: RuntimeDirectory, runtime_dir: Path) -> Path:
    """Make the directory of a VM as its starter would, without a worker."""
    runtime.create_vm(simulated((0, 4))).close()
    return runtime_dir / "vms" / "web"


def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (session_module, registry_module):
        monkeypatch.setattr(module, "WORKER_HELLO_SECONDS", 0.05)


@contextmanager
def _held_lock(directory: Path) -> Iterator[None]:
    # A worker that lives, as far as its lock says. Locks are a process's.
    with subprocess.Popen(
        [sys.executable, "-c", _LOCKER, str(directory / LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        yield
        process.kill()


def _kill(vm: Vm) -> None:
    pidfd = os.pidfd_open(vm.worker_pid)
    try:
        os.kill(vm.worker_pid, signal.SIGKILL)
        wait_for_end(pidfd)
    finally:
        os.close(pidfd)


def _stop(vm: Vm) -> None:
    os.kill(vm.worker_pid, signal.SIGSTOP)
    os.waitid(os.P_PID, vm.worker_pid, os.WSTOPPED | os.WNOWAIT)


def _refused(reason: Reason, use: Callable[[], object]) -> SkeydError:
    with pytest.raises(SkeydError) as refused:
        use()
    assert refused.value.reason is reason, refused.value
    return refused.value


def _talk(registry: Registry, vm_id: str = "web") -> bool:
    with registry.session(vm_id) as session:
        return session.uses_keys()


def _write(registry: Registry, vm_id: str = "web") -> None:
    with registry.writing(vm_id) as session:
        session.write_slice(GfnRange(0, 1), b"\x30", allow_enable=True)


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
    _write(registry)
    assert registry.get("web").uses_keys
    assert _talk(registry)


def test_another_front_finds_the_same_vms(registry: Registry, web: Vm, runtime: RuntimeDirectory) -> None:
    _write(registry)
    other = Registry(runtime, ChildStarter())
    (found,) = other.list_all()
    assert (found.uid, found.incarnation, found.worker_pid) == (web.uid, web.incarnation, web.worker_pid)
    assert found.uses_keys
    other.delete("web")
    assert registry.list_all() == []


def test_a_vm_that_is_deleted_is_gone_with_its_worker_and_its_name_is_free(registry: Registry, web: Vm) -> None:
    registry.delete("web")
    assert look_at(web.worker_pid) is None
    _refused(Reason.VM_NOT_FOUND, lambda: registry.get("web"))
    assert registry.create(simulated((0, 4), uid=OTHER_UID)).uid == OTHER_UID


def test_a_vm_that_is_deleted_leaves_no_zombie(registry: Registry, web: Vm) -> None:
    registry.delete("web")
    assert not Path(f"/proc/{web.worker_pid}").exists()


@pytest.mark.parametrize("use", [Registry.get, Registry.delete, _talk, _write])
def test_a_vm_that_is_not_there_is_not_found(registry: Registry, use: Callable[[Registry, str], object]) -> None:
    refusal = _refused(Reason.VM_NOT_FOUND, lambda: use(registry, "web"))
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
    _refused(Reason.VM_EXISTS, lambda: registry.create(simulated((0, 8), uid=OTHER_UID)))
    assert registry.get("web") == web


def test_the_id_of_a_dead_vm_is_taken_too(registry: Registry, web: Vm) -> None:
    _kill(web)
    _refused(Reason.VM_EXISTS, lambda: registry.create(simulated((0, 8), uid=OTHER_UID)))


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
    _refused(Reason.VM_NOT_FOUND, lambda: registry.delete("web"))


def test_a_worker_that_fails_without_a_reason_leaves_its_last_words_in_the_error(
    runtime: RuntimeDirectory, runtime_dir: Path
) -> None:
    def start(directory: VmDirectory, spec: Spec) -> None:
        log = directory.open_log()
        os.write(log, b"Traceback\nValueError: what went wrong\n")
        os.close(log)
        raise SkeydError(Reason.WORKER_FAILED, "the worker ended before it was ready")

    refusal = _refused(Reason.WORKER_FAILED, lambda: Registry(runtime, FakeStarter(start)).create(simulated((0, 1))))
    assert refusal.metadata["worker_log"] == "ValueError: what went wrong"
    assert list((runtime_dir / "vms").iterdir()) == []


def test_a_host_has_only_so_many_vms(registry: Registry, web: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "MAX_VMS", 2)
    registry.create(simulated((0, 1), vm_id="second"))
    _refused(Reason.TOO_MANY_VMS, lambda: registry.create(simulated((0, 1), vm_id="third")))
    registry.delete("web")
    registry.create(simulated((0, 1), vm_id="third"))


def test_the_host_is_looked_at_by_a_worker(runtime: RuntimeDirectory) -> None:
    assert not Registry(runtime, FakeStarter(lambda *_: None)).probe_host().has("can_own_vms")


# --- creating ------------------------------------------------------------------------------------------------------


def test_a_vm_is_creating_from_its_first_moment_on(runtime: RuntimeDirectory) -> None:
    seen: list[Vm] = []

    def start(directory: VmDirectory, spec: Spec) -> None:
        # Nothing of a worker is there yet: no lock and no socket, as of one that died.
        seen.append(starting.get("web"))
        seen.extend(starting.list_all())
        _refused(Reason.WORKER_LOST, lambda: _talk(starting))
        _refused(Reason.VM_BUSY, lambda: starting.delete("web"))

    starting = Registry(runtime, FakeStarter(start))
    starting.create(simulated((0, 1)))
    assert [vm.state for vm in seen] == [VmState.CREATING, VmState.CREATING]
    assert seen[0].uid == UID
    # What was started is no worker.
    assert starting.get("web").state is VmState.DEAD


def test_a_worker_that_lives_and_has_no_socket_yet_is_creating_and_is_not_deleted(
    registry: Registry, forged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _held_lock(forged):
        assert registry.get("web").state is VmState.QUARANTINED  # it was created long ago
        monkeypatch.setattr("skeyd.vms.registry.time.time", lambda: 1_700_000_000.0)
        vm = registry.get("web")
        assert vm.state is VmState.CREATING
        assert (vm.uid, vm.kind, vm.created) == (UID, "simulated", 1_700_000_000)
        for use in (registry.delete, lambda _: _talk(registry), lambda _: _write(registry)):
            assert "creating" in _refused(Reason.WORKER_LOST, lambda use=use: use("web")).message  # type: ignore[misc]
        assert sorted(one.name for one in forged.iterdir()) == [RECORD, LOCK]


# --- dead ----------------------------------------------------------------------------------------------------------


def test_a_vm_whose_worker_was_killed_is_dead_and_says_what_it_was(registry: Registry, web: Vm) -> None:
    _kill(web)
    vm = registry.get("web")
    assert vm == Vm("web", VmState.DEAD, "its worker is gone", UID, "simulated", 1_700_000_000)
    assert registry.list_all() == [vm]
    for use in (_talk, _write):
        refusal = _refused(Reason.VM_DEAD, lambda use=use: use(registry))  # type: ignore[misc]
        assert refusal.metadata == {"vm": "vms/web"}


def test_a_dead_vm_is_deleted_and_its_name_is_free(registry: Registry, web: Vm) -> None:
    _kill(web)
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
        with _held_lock(forged), FakeWorker(forged, script):
            assert registry.get("web").state is VmState.QUARANTINED
        (forged / SOCKET).unlink()


# --- quarantined ---------------------------------------------------------------------------------------------------


def _assert_left_alone(registry: Registry, forged: Path) -> Vm:
    # Quarantined by every way to look at it, and neither deleted nor talked with.
    vm = registry.get("web")
    assert vm.state is VmState.QUARANTINED
    assert registry.list_all() == [vm]
    for use in (Registry.delete, _talk, _write):
        refusal = _refused(Reason.VM_QUARANTINED, lambda use=use: use(registry, "web"))  # type: ignore[misc]
        assert refusal.metadata == {"vm": "vms/web"}
        assert vm.state_reason in refusal.message
    assert forged.exists()
    return vm


def test_a_worker_that_is_stopped_is_quarantined_and_ready_again_when_it_goes_on(
    registry: Registry, web: Vm, runtime_dir: Path
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        _impatient(monkeypatch)
        _stop(web)
        vm = _assert_left_alone(registry, runtime_dir / "vms" / "web")
        assert vm.state_reason == "its worker did not answer within 0.05 s"
        assert vm.uid == UID
    os.kill(web.worker_pid, signal.SIGCONT)
    assert registry.get("web") == web
    assert _talk(registry) is False


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
    _refused(Reason.VM_QUARANTINED, lambda: registry.delete("other"))
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
    with _held_lock(forged), FakeWorker(forged, *[script] * 5):
        _assert_left_alone(registry, forged)


def test_a_vm_that_the_kernel_calls_dead_is_dead_and_its_keys_are_refused(registry: Registry, forged: Path) -> None:
    dead = answers([("status", {"error": {"reason": "VM_DEAD", "message": "EIO", "metadata": {}}})])
    with _held_lock(forged), FakeWorker(forged, *[dead] * 2):
        vm = registry.get("web")
        assert (vm.state, vm.state_reason, vm.uid) == (VmState.DEAD, "EIO", UID)
        _refused(Reason.VM_DEAD, lambda: _talk(registry))


def test_a_vm_that_the_kernel_calls_dead_is_ended_when_it_is_deleted(registry: Registry, forged: Path) -> None:
    asked: list[dict[str, Any]] = []

    def script(caller: Caller) -> None:
        caller.say(hello())
        caller.answer("status", {"error": {"reason": "VM_DEAD", "message": "EIO", "metadata": {}}})
        asked.append(caller.take())
        caller.say({"error": {"reason": "VM_BUSY", "message": "this process is no worker", "metadata": {}}})
        caller.wait_for_end()

    # It still has a worker, which is asked to end like any other.
    with _held_lock(forged), FakeWorker(forged, script):
        _refused(Reason.VM_BUSY, lambda: registry.delete("web"))
    assert asked == [{"op": "shutdown", "uid": UID}]
    assert forged.exists()


def test_a_worker_that_cannot_say_whether_the_guest_uses_keys_is_ready_all_the_same(
    registry: Registry, forged: Path
) -> None:
    short = answers([("status", {"error": {"reason": "OUT_OF_MEMORY", "message": "ENOMEM", "metadata": {}}})])
    with _held_lock(forged), FakeWorker(forged, short):
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
    _refused(Reason.VM_QUARANTINED, lambda: registry.delete("bad"))
    assert os.path.lexists(path)


def test_a_file_in_the_place_of_a_vm_is_quarantined_in_the_list(registry: Registry, web: Vm, runtime_dir: Path) -> None:
    (runtime_dir / "vms" / "bad").write_text("x")
    assert [(vm.vm_id, vm.state) for vm in registry.list_all()] == [
        ("bad", VmState.QUARANTINED),
        ("web", VmState.READY),
    ]
    for use in (Registry.get, Registry.delete, _talk):
        _refused(Reason.VM_QUARANTINED, lambda use=use: use(registry, "bad"))  # type: ignore[misc]


def test_a_vm_with_files_that_are_not_skeyds_is_not_ended(registry: Registry, web: Vm, runtime_dir: Path) -> None:
    notes = runtime_dir / "vms" / "web" / "notes.txt"
    notes.write_text("somebody's")
    refusal = _refused(Reason.VM_QUARANTINED, lambda: registry.delete("web"))
    assert "notes.txt" in refusal.message
    assert registry.get("web") == web
    notes.unlink()
    registry.delete("web")


# --- deleting ------------------------------------------------------------------------------------------------------


def test_a_worker_that_agrees_to_end_and_does_not_is_told_and_keeps_its_name(
    registry: Registry, forged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "WORKER_END_SECONDS", 0.01)
    # This process: it is not going to end.
    script = answers([STATUS, ("shutdown", {"ok": {}})])
    with FakeWorker(forged, script):
        refusal = _refused(Reason.WORKER_LOST, lambda: registry.delete("web"))
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
        _refused(reason, lambda: registry.delete("web"))
    assert (forged / RECORD).exists()


def test_a_worker_that_dies_while_it_is_asked_to_end_was_lost_and_can_be_deleted_then(
    registry: Registry, forged: Path
) -> None:
    def script(caller: Caller) -> None:
        caller.say(hello())
        caller.answer(*STATUS)
        caller.take()

    with FakeWorker(forged, script):
        _refused(Reason.WORKER_LOST, lambda: registry.delete("web"))
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
        _refused(Reason.VM_BUSY, lambda: registry.delete("web"))
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
    _refused(Reason.VM_NOT_FOUND, lambda: registry.get("web"))


# --- one at a time -------------------------------------------------------------------------------------------------


def test_who_writes_keeps_other_writers_and_deletion_away_and_no_reader(registry: Registry, web: Vm) -> None:
    with registry.writing("web") as session:
        uses: list[Callable[[], object]] = [
            lambda: registry.delete("web"),
            lambda: _write(registry),
        ]
        for use in uses:
            assert _refused(Reason.VM_BUSY, use).metadata == {"vm": "vms/web"}
        _refused(Reason.VM_EXISTS, lambda: registry.create(simulated((0, 1))))  # trying again would never help
        assert _talk(registry) is False
        assert registry.get("web") == web
        assert registry.list_all() == [web]
        assert session.uses_keys() is False
        registry.create(simulated((0, 1), vm_id="other"))
    _write(registry)
    registry.delete("web")


@pytest.mark.parametrize("error", [SkeydError(Reason.WORKER_LOST, "lost"), ValueError("a bug"), KeyboardInterrupt()])
def test_a_writer_that_fails_lets_the_next_one_in(registry: Registry, web: Vm, error: BaseException) -> None:
    with pytest.raises(type(error)), registry.writing("web"):
        raise error
    _write(registry)


def test_a_writer_that_finds_no_vm_lets_the_next_one_in(registry: Registry) -> None:
    for _ in range(2):
        _refused(Reason.VM_NOT_FOUND, lambda: _write(registry))


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
        deleting = threading.Thread(target=lambda: _refused(Reason.VM_BUSY, lambda: registry.delete("web")))
        deleting.start()
        try:
            assert asked.wait(30)
            assert "another call" in _refused(Reason.VM_BUSY, lambda: _write(registry)).message
        finally:
            may_end.set()
            deleting.join(30)


def test_a_session_outlives_a_look_and_a_look_a_session(registry: Registry, web: Vm) -> None:
    with registry.session("web") as one, registry.session("web") as other:
        assert registry.get("web").state is VmState.READY
        assert one.uses_keys() == other.uses_keys()


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
    _kill(web)
    _refused(Reason.VM_DEAD, lambda: _brief(registry))


@pytest.mark.parametrize("seconds", [0.0, 1000.0], ids=["asked-first", "taken-for-granted"])
def test_a_worker_that_stopped_is_told_of_although_there_was_a_connection(
    registry: Registry, web: Vm, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    with monkeypatch.context() as impatient:
        _impatient(impatient)
        _brief(registry)
        impatient.setattr(registry_module, "PROVEN_SECONDS", seconds)
        _stop(web)
        if seconds:
            _refused(Reason.WORKER_LOST, lambda: _brief(registry))
        for _ in range(2):
            refusal = _refused(Reason.VM_QUARANTINED, lambda: _brief(registry))
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
    _refused(Reason.VM_QUARANTINED, lambda: _brief(registry))


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
        refused.append(_refused(Reason.VM_DEAD, lambda: _brief(registry)))
        drop(vm_id)

    monkeypatch.setattr(registry._idle, "drop", ask_and_drop)
    registry.delete("web")
    assert ["it is being deleted" in one.message for one in refused] == [True]


def test_a_look_at_a_vm_that_died_closes_what_was_kept_of_it(registry: Registry, web: Vm) -> None:
    before = _open_fds()
    _brief(registry)
    assert _open_fds() == before + 1
    _kill(web)
    assert registry.get("web").state is VmState.DEAD
    assert _open_fds() == before


def test_a_worker_that_gave_no_answer_on_one_kept_connection_has_none_left(
    registry: Registry, web: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _open_fds()
    with registry.session("web", brief=True):
        _brief(registry)
    assert _open_fds() == before + 2
    _impatient(monkeypatch)
    monkeypatch.setattr(registry_module, "PROVEN_SECONDS", -1.0)  # each is asked first
    _stop(web)
    try:
        _refused(Reason.VM_QUARANTINED, lambda: _brief(registry))
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
    _stop(web)
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
