"""A VM's directory: made whole or not at all, removed with what is skeyd's, and its record, lock and log."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.vms.runtime import LOG, RECORD, RuntimeDirectory, VmDirectory
from skeyd.worker.packets import MESSAGE_MAX, ProtocolError
from skeyd.worker.protocol import LOCK, PROTOCOL, SOCKET, SlotSpec, Spec
from tests.vms.directories import LOCKER, another, mode_of
from tests.vms.directories import path as path
from tests.vms.directories import runtime as runtime
from tests.vms.directories import web as web
from tests.worker.specs import UID, simulated

OTHER_UID = "11111111-2222-3333-4444-555555555555"


# --- making and unmaking -------------------------------------------------------------------------------------------


def test_a_new_vm_has_its_record_and_nothing_else_and_is_its_owners_alone(path: Path, web: VmDirectory) -> None:
    assert [one.name for one in (path / "vms").iterdir()] == ["web"]
    assert [one.name for one in (path / "vms" / "web").iterdir()] == [RECORD]
    assert mode_of(path / "vms" / "web") == 0o700
    assert mode_of(path / "vms" / "web" / RECORD) == 0o600
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
    with another(LOCKER, path / "vms" / "web" / LOCK) as worker:
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
    assert mode_of(log) == 0o600
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
