"""The runtime directory: private, one front at a time, and nothing half-made in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.vms.runtime import LOG, RECORD, RuntimeDirectory, RuntimeDirectoryError, VmDirectory
from skeyd.worker.packets import MESSAGE_MAX, ProtocolError
from skeyd.worker.protocol import LOCK, PROTOCOL, SOCKET, SlotSpec, Spec
from tests.worker.specs import UID, simulated

OTHER_UID = "11111111-2222-3333-4444-555555555555"

_FRONT = """
import sys
from pathlib import Path
from skeyd.vms.runtime import RuntimeDirectory
with RuntimeDirectory.open(Path(sys.argv[1])):
    print("open", flush=True)
    sys.stdin.read()
"""

_LOCKER = """
import os, sys
from skeyd.linux import take_lock
print(take_lock(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)), flush=True)
sys.stdin.read()
"""


@contextmanager
def _another(program: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    # Locks are a process's.
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() in ("open\n", "True\n")
        yield process
        process.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def runtime(path: Path) -> Iterator[RuntimeDirectory]:
    with RuntimeDirectory.open(path) as runtime:
        yield runtime


@pytest.fixture
def web(runtime: RuntimeDirectory) -> Iterator[VmDirectory]:
    """Make the directory of a VM that has no worker."""
    directory = runtime.create_vm(simulated((0, 4)))
    yield directory
    directory.close()


def _mode(path: Path) -> int:
    return path.lstat().st_mode & 0o7777


def _why_not(path: Path) -> str:
    with pytest.raises(RuntimeDirectoryError) as refused, RuntimeDirectory.open(path):
        pass
    return str(refused.value)


# --- private -------------------------------------------------------------------------------------------------------


def test_a_missing_directory_is_made_for_its_owner_alone_with_its_parents(tmp_path: Path) -> None:
    path = tmp_path / "some" / "where" / "run"
    with RuntimeDirectory.open(path) as runtime:
        assert runtime.path == path
        assert runtime.socket_path == path / "skeyd.sock"
        assert (_mode(path), _mode(path / "vms"), _mode(path / "front.lock")) == (0o700, 0o700, 0o600)


def test_a_directory_of_before_is_used_again_with_what_is_in_it(path: Path) -> None:
    with RuntimeDirectory.open(path) as runtime:
        runtime.create_vm(simulated((0, 4))).close()
    with RuntimeDirectory.open(path) as runtime:
        assert runtime.vm_ids() == ["web"]


def test_a_relative_path_means_where_the_front_was_started(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    with RuntimeDirectory.open(Path("run")) as runtime:
        assert runtime.path == path


@pytest.mark.parametrize("inside", [".", "vms"])
@pytest.mark.parametrize("mode", [0o701, 0o710, 0o704, 0o740, 0o702, 0o720, 0o755, 0o777, 0o1777])
def test_a_directory_that_is_open_to_others_is_refused_and_left_as_it_is(path: Path, inside: str, mode: int) -> None:
    open_one = path / inside
    open_one.mkdir(parents=True)
    path.chmod(0o700)
    open_one.chmod(mode)
    assert "is open to others" in (why := _why_not(path))
    assert f"mode {mode:04o}" in why
    assert _mode(open_one) == mode


@pytest.mark.parametrize("inside", [".", "vms"])
def test_a_directory_of_somebody_else_is_refused(path: Path, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only root could make one for real; who this process is is faked here and nothing else.
    (path / "vms").mkdir(parents=True, mode=0o700)
    path.chmod(0o700)
    uids = iter([os.getuid()] if inside == "vms" else [])
    monkeypatch.setattr(os, "geteuid", lambda: next(uids, os.getuid() + 1))
    assert f"belongs to uid {os.getuid()}, not to uid {os.getuid() + 1}" in (why := _why_not(path))
    assert ("vms" in why) == (inside == "vms")


@pytest.mark.parametrize("inside", [".", "vms"])
def test_what_is_no_directory_is_refused(path: Path, inside: str) -> None:
    if inside == "vms":
        path.mkdir(mode=0o700)
    (path / inside).write_text("not mine")
    assert str(path) in _why_not(path)
    assert (path / inside).read_text() == "not mine"


@pytest.mark.parametrize("inside", [".", "vms"])
def test_a_symbolic_link_to_a_private_directory_is_refused(path: Path, inside: str) -> None:
    elsewhere = path.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    if inside == "vms":
        path.mkdir(mode=0o700)
        (path / "vms").symlink_to(elsewhere)
    else:
        path.symlink_to(elsewhere)
    assert "is no directory" in _why_not(path)
    assert list(elsewhere.iterdir()) == []


def test_a_lock_that_is_a_symbolic_link_is_not_followed(path: Path) -> None:
    path.mkdir(mode=0o700)
    (path / "front.lock").symlink_to(path / "elsewhere")
    assert "symbolic links" in _why_not(path)
    assert not (path / "elsewhere").exists()


def test_a_lock_that_is_a_directory_is_refused(path: Path) -> None:
    (path / "front.lock").mkdir(parents=True)
    path.chmod(0o700)
    assert "Is a directory" in _why_not(path)


def test_an_error_of_whoever_uses_it_is_passed_on_as_it_is(path: Path) -> None:
    with pytest.raises(FileNotFoundError), RuntimeDirectory.open(path):
        (path / "missing").read_text()


# --- one front -----------------------------------------------------------------------------------------------------


def test_a_second_front_is_refused_and_told_the_pid_of_the_first(path: Path) -> None:
    with _another(_FRONT, path) as front:
        why = _why_not(path)
        assert f"another skeyd (pid {front.pid})" in why
        assert "--runtime-dir" in why


def test_a_front_that_was_killed_leaves_the_directory_free(path: Path) -> None:
    with _another(_FRONT, path) as front:
        front.kill()
        front.wait(30)
        with RuntimeDirectory.open(path):
            assert (path / "front.lock").read_text() == f"{os.getpid()}\n"


def test_a_front_that_is_refused_changes_nothing_for_the_first(path: Path) -> None:
    with _another(_FRONT, path) as front:
        (path / "vms" / f".new-{UID}").mkdir()  # the first one's, in the middle of its work
        for _ in range(2):
            assert f"pid {front.pid}" in _why_not(path)
        assert (path / "vms" / f".new-{UID}").is_dir()
        assert (path / "front.lock").read_text() == f"{front.pid}\n"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"9" * 1000])
def test_a_lock_file_that_says_nothing_useful_is_still_a_lock(path: Path, content: bytes) -> None:
    with _another(_FRONT, path):
        (path / "front.lock").write_bytes(content)
        assert "another skeyd (pid " in _why_not(path)


def test_the_pid_of_a_front_takes_the_place_of_a_longer_one(path: Path) -> None:
    path.mkdir(mode=0o700)
    (path / "front.lock").write_text("123456789012345\n")
    with RuntimeDirectory.open(path):
        assert (path / "front.lock").read_text() == f"{os.getpid()}\n"


# --- sweeping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f".new-{UID}", ".removed-0011223344556677"])
@pytest.mark.parametrize("files", [[], [RECORD + ".new"], [RECORD, LOCK, SOCKET, LOG]])
def test_what_a_dead_front_left_half_made_is_swept(path: Path, name: str, files: list[str]) -> None:
    left = path / "vms" / name
    left.mkdir(parents=True)
    for file in files:
        (left / file).touch()
    for directory in (path, path / "vms"):
        directory.chmod(0o700)
    with RuntimeDirectory.open(path) as runtime:
        assert list((path / "vms").iterdir()) == []
        assert runtime.vm_ids() == runtime.strangers() == []


def test_sweeping_touches_no_vm_and_no_file_that_is_not_skeyds(path: Path) -> None:
    with RuntimeDirectory.open(path) as runtime:
        runtime.create_vm(simulated((0, 4))).close()
    vms = path / "vms"
    outside = path.parent / "outside"
    outside.mkdir()
    (outside / RECORD).write_text("outside")
    (vms / ".removed-1").mkdir()
    (vms / ".removed-1" / "somebodys").write_text("file")
    (vms / ".removed-2").symlink_to(outside)
    (vms / ".new-3").write_text("a file")
    (vms / ".new-4" / RECORD).mkdir(parents=True)
    with RuntimeDirectory.open(path) as runtime:
        assert runtime.vm_ids() == ["web"]
        assert runtime.strangers() == [".new-3", ".new-4", ".removed-1", ".removed-2"]
    assert (vms / "web" / RECORD).exists()
    assert (vms / ".removed-1" / "somebodys").read_text() == "file"
    assert (outside / RECORD).read_text() == "outside"
    assert (vms / ".new-3").read_text() == "a file"


# --- names ---------------------------------------------------------------------------------------------------------


def test_vms_and_strangers_are_told_apart_by_name_and_both_are_in_order(path: Path, runtime: RuntimeDirectory) -> None:
    vms = ["a", "a-b", "web-1", "z9", "x" * 63]
    strangers = ["-a", "A", "a_b", "1a", "a-", "lost+found", "x" * 64, "ä", "a\n"]
    for name in [*vms, *strangers]:
        (path / "vms" / name).mkdir()
    assert runtime.vm_ids() == sorted(vms)
    assert runtime.strangers() == sorted(strangers)


def test_who_lists_vms_beside_another_misses_none(runtime: RuntimeDirectory) -> None:
    names = sorted(f"vm{number}" for number in range(20))
    for name in names:
        runtime.create_vm(simulated((0, 4), vm_id=name)).close()
    together = threading.Barrier(4)

    def listed(_: int) -> list[list[str]]:
        together.wait()
        return [runtime.vm_ids() for _ in range(200)]

    with ThreadPoolExecutor(4) as pool:
        assert all(found == names for lists in pool.map(listed, range(4)) for found in lists)


def test_evidence_stays_while_a_vm_is_the_same_and_changes_with_it(path: Path, runtime: RuntimeDirectory) -> None:
    assert runtime.evidence("web") is None
    runtime.create_vm(simulated((0, 4))).close()
    assert runtime.evidence("web") is None, "it has no socket yet"
    directory = path / "vms" / "web"
    (directory / SOCKET).touch()
    found = [runtime.evidence("web")]
    assert found[0] is not None
    (directory / LOG).touch()
    assert runtime.evidence("web") == found[0]
    for name in (SOCKET, RECORD):
        (directory / "new").write_bytes((directory / name).read_bytes())
        (directory / "new").rename(directory / name)
        found.append(runtime.evidence("web"))
    directory.rename(path / "vms" / "other")
    directory.symlink_to("other")
    found.append(runtime.evidence("web"))
    assert None not in found
    assert len(set(found)) == len(found)


def test_a_vm_that_is_not_there_is_not_found(runtime: RuntimeDirectory) -> None:
    with pytest.raises(SkeydError) as refused, runtime.open_vm("web"):
        pass
    assert refused.value.reason is Reason.VM_NOT_FOUND
    assert refused.value.metadata == {"vm": "vms/web"}


@pytest.mark.parametrize("what", ["file", "link"])
def test_what_has_a_vms_name_and_is_no_directory_is_quarantined(
    path: Path, runtime: RuntimeDirectory, what: str
) -> None:
    if what == "file":
        (path / "vms" / "web").write_text("x")
    else:
        (path / "vms" / "web").symlink_to(path)
    with pytest.raises(SkeydError) as refused, runtime.open_vm("web"):
        pass
    assert refused.value.reason is Reason.VM_QUARANTINED


# --- making and unmaking -------------------------------------------------------------------------------------------


def test_a_new_vm_has_its_record_and_nothing_else_and_is_its_owners_alone(path: Path, web: VmDirectory) -> None:
    assert [one.name for one in (path / "vms").iterdir()] == ["web"]
    assert [one.name for one in (path / "vms" / "web").iterdir()] == [RECORD]
    assert _mode(path / "vms" / "web") == 0o700
    assert _mode(path / "vms" / "web" / RECORD) == 0o600
    assert web.read_record() == simulated((0, 4))
    assert not os.get_inheritable(web.fd)


@pytest.mark.parametrize("there", ["a vm", "a dead vm", "a file", "a link", "somebody's directory"])
def test_a_name_that_is_taken_is_not_given_again_and_what_is_there_stays(
    path: Path, runtime: RuntimeDirectory, there: str
) -> None:
    taken = path / "vms" / "web"
    match there:
        case "a vm" | "a dead vm":
            runtime.create_vm(simulated((0, 4))).close()
        case "a file":
            taken.write_text("x")
        case "a link":
            taken.symlink_to(path)
        case _:
            taken.mkdir()
            (taken / "x").touch()
    before = sorted(taken.iterdir()) if taken.is_dir() else taken.read_text()
    with pytest.raises(SkeydError) as refused:
        runtime.create_vm(simulated((0, 8), uid=OTHER_UID))
    assert refused.value.reason is Reason.VM_EXISTS
    assert refused.value.metadata == {"vm": "vms/web"}
    assert (sorted(taken.iterdir()) if taken.is_dir() else taken.read_text()) == before
    assert runtime.strangers() == []


def test_a_record_that_cannot_be_written_down_leaves_nothing(runtime: RuntimeDirectory) -> None:
    slots = tuple(SlotSpec(number << 30, 1 << 20, "file", "x" * 4000) for number in range(32))
    with pytest.raises(ProtocolError):
        runtime.create_vm(Spec("web", UID, "owned", slots, 0))
    assert runtime.vm_ids() == runtime.strangers() == []


def test_a_vm_that_is_removed_is_gone_with_all_its_files_and_its_name_is_free(
    path: Path, runtime: RuntimeDirectory, web: VmDirectory
) -> None:
    for file in (LOCK, SOCKET, LOG, RECORD + ".new"):
        (path / "vms" / "web" / file).touch()
    runtime.remove_vm(web)
    assert list((path / "vms").iterdir()) == []
    runtime.create_vm(simulated((0, 4), uid=OTHER_UID)).close()


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "vm.json.old", "worker.lock/"])
def test_a_vm_with_files_that_are_not_skeyds_is_not_removed_and_keeps_all_of_them(
    path: Path, runtime: RuntimeDirectory, web: VmDirectory, name: str
) -> None:
    foreign = path / "vms" / "web" / name
    if name.endswith("/"):
        foreign.mkdir()
    else:
        foreign.write_text("somebody's")
    before = sorted((path / "vms" / "web").iterdir())
    for refuse in (runtime.remove_vm, runtime.require_own_files):
        with pytest.raises(SkeydError) as refused:
            refuse(web)
        assert refused.value.reason is Reason.VM_QUARANTINED
        assert foreign.name in refused.value.message
    assert sorted((path / "vms" / "web").iterdir()) == before
    assert runtime.vm_ids() == ["web"]


def test_a_directory_that_is_held_open_is_the_same_one_after_its_name_went_to_another(
    path: Path, runtime: RuntimeDirectory, web: VmDirectory
) -> None:
    (path / "vms" / "web").rename(path / "vms" / "other")
    with runtime.open_vm("other") as other:
        assert os.path.sameopenfile(web.fd, other.fd)
    runtime.create_vm(simulated((0, 8), uid=OTHER_UID)).close()
    assert web.read_record().uid == UID


# --- the record ----------------------------------------------------------------------------------------------------


def _record(path: Path) -> Path:
    return path / "vms" / "web" / RECORD


def _as_text(**changes: object) -> bytes:
    return json.dumps({**simulated((0, 4)).to_message(), **changes}).encode()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="half"),
        pytest.param(b"\0" * 100, id="zeros"),
        pytest.param(b"\xff" * 100, id="no text"),
        pytest.param(b"[]", id="no object"),
        pytest.param(b"[" * 60_000, id="deep"),
        pytest.param(_as_text(protocol=PROTOCOL + 1), id="of another version"),
        pytest.param(_as_text(uid=""), id="without a uid"),
        pytest.param(_as_text(slots=None), id="without slots"),
        pytest.param(_as_text() + b" " * MESSAGE_MAX, id="too long"),
    ],
)
def test_a_record_that_is_none_is_refused(path: Path, web: VmDirectory, content: bytes) -> None:
    _record(path).write_bytes(content)
    with pytest.raises(ProtocolError, match=RECORD):
        web.read_record()


@pytest.mark.parametrize("what", ["missing", "directory", "fifo", "link", "socket"])
def test_a_record_that_is_no_file_is_refused_and_holds_nobody_up(path: Path, web: VmDirectory, what: str) -> None:
    record = _record(path)
    good = path / "good"
    record.rename(good)
    match what:
        case "directory":
            record.mkdir()
        case "fifo":
            os.mkfifo(record)
        case "link":
            record.symlink_to(good)
        case "socket":
            os.mknod(record, 0o140600)
    with pytest.raises(ProtocolError, match=RECORD):
        web.read_record()


def test_a_record_as_long_as_can_be_is_read_whole(path: Path, web: VmDirectory) -> None:
    _record(path).write_bytes(_as_text() + b" " * (MESSAGE_MAX - len(_as_text())))
    assert web.read_record() == simulated((0, 4))


# --- lock and log --------------------------------------------------------------------------------------------------


def test_a_worker_lives_exactly_while_somebody_holds_its_lock(path: Path, web: VmDirectory) -> None:
    assert not web.worker_lives()
    with _another(_LOCKER, path / "vms" / "web" / LOCK) as worker:
        assert web.worker_lives()
        worker.kill()
        worker.wait(30)
        assert not web.worker_lives()
    assert (path / "vms" / "web" / LOCK).exists()


def test_a_lock_that_cannot_be_looked_at_is_no_sign_of_death(path: Path, web: VmDirectory) -> None:
    (path / "vms" / "web" / LOCK).symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        web.worker_lives()


def test_a_log_is_appended_to_and_its_owners_alone(path: Path, web: VmDirectory) -> None:
    for line in (b"one\n", b"two\n"):
        fd = web.open_log()
        os.write(fd, line)
        os.close(fd)
    log = path / "vms" / "web" / LOG
    assert log.read_bytes() == b"one\ntwo\n"
    assert _mode(log) == 0o600
    log.unlink()
    log.symlink_to(path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        web.open_log()


@pytest.mark.parametrize(
    ("content", "last"),
    [
        (None, ""),
        (b"", ""),
        (b"\n \n\t\n", ""),
        (b"only\n", "only"),
        (b"Traceback:\n  File x\nValueError: a\n\n \n", "ValueError: a"),
        (b"cut off in the middle", "cut off in the middle"),
        (b"\x1b[2Jred\x07\xff\n", "[2Jred\ufffd"),
        (b"x" * 100_000 + b"\nlast\n", "last"),
        (b"x" * 100_000, "x" * 1024),
    ],
)
def test_the_last_words_of_a_worker_are_one_printable_line_however_long_its_log(
    path: Path, web: VmDirectory, content: bytes | None, last: str
) -> None:
    if content is not None:
        (path / "vms" / "web" / LOG).write_bytes(content)
    assert web.log_end() == last


def test_a_log_that_is_a_symbolic_link_is_not_read(path: Path, web: VmDirectory) -> None:
    (path / "secret").write_text("secret\n")
    (path / "vms" / "web" / LOG).symlink_to(path / "secret")
    assert web.log_end() == ""
