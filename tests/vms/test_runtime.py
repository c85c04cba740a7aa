"""The runtime directory: private, one front at a time, and what a dead one left is swept."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.vms.runtime import LOG, RECORD, RuntimeDirectory, RuntimeDirectoryError
from skeyd.worker.protocol import LOCK, SOCKET
from tests.vms.directories import FRONT, another, mode_of
from tests.vms.directories import path as path
from tests.vms.directories import runtime as runtime
from tests.worker.specs import UID, simulated


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
        assert (mode_of(path), mode_of(path / "vms"), mode_of(path / "front.lock")) == (0o700, 0o700, 0o600)


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
    assert mode_of(open_one) == mode


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
    with another(FRONT, path) as front:
        why = _why_not(path)
        assert f"another skeyd (pid {front.pid})" in why
        assert "--runtime-dir" in why


def test_a_front_that_was_killed_leaves_the_directory_free(path: Path) -> None:
    with another(FRONT, path) as front:
        front.kill()
        front.wait(30)
        with RuntimeDirectory.open(path):
            assert (path / "front.lock").read_text() == f"{os.getpid()}\n"


def test_a_front_that_is_refused_changes_nothing_for_the_first(path: Path) -> None:
    with another(FRONT, path) as front:
        (path / "vms" / f".new-{UID}").mkdir()  # the first one's, in the middle of its work
        for _ in range(2):
            assert f"pid {front.pid}" in _why_not(path)
        assert (path / "vms" / f".new-{UID}").is_dir()
        assert (path / "front.lock").read_text() == f"{front.pid}\n"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"9" * 1000])
def test_a_lock_file_that_says_nothing_useful_is_still_a_lock(path: Path, content: bytes) -> None:
    with another(FRONT, path):
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
