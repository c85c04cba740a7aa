"""The option --worker-launcher: which launcher is taken, which is refused, and what it means when it breaks later."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from skeyd import server
from skeyd.client import ClientError
from skeyd.kvm.probe import PGSTE_REMEDY
from skeyd.v1 import vm_pb2
from skeyd.vms import launcher as launcher_module
from skeyd.vms.launcher import DEFAULT, LauncherError, find_launcher
from tests.daemon import DaemonProcess, start_in_vain
from tests.rpc.stubs import Stubs, refused

SCRIPT = """#!/bin/sh
echo "$*" >>"${0%/*}/seen"
exec "$@"
"""


@pytest.fixture
def launcher(runtime_dir: Path) -> Path:
    """Make a stand-in for skeyd-pgste that notes what it starts, beside the runtime directory of a test's daemon."""
    path = runtime_dir / "launcher"
    path.write_text(SCRIPT)
    path.chmod(0o755)
    return path


@pytest.fixture
def launching(runtime_dir: Path, launcher: Path) -> Iterator[DaemonProcess]:
    """Run a daemon that starts its workers through it."""
    daemon = DaemonProcess(runtime_dir / "r")
    try:
        daemon.start("--worker-launcher", str(launcher))
        yield daemon
    finally:
        daemon.end_everything()


# --- the daemon ------------------------------------------------------------------------------------------------------


def test_workers_and_looks_at_the_host_go_through_the_launcher(launching: DaemonProcess, launcher: Path) -> None:
    with Stubs(launching.target) as stubs:
        vm = stubs.create("web", (0, 1))
        assert vm.state == vm_pb2.VM_STATE_READY
        stubs.set(vm.name, [(0, b"\x30")])
        assert stubs.get(vm.name, (0, 1)).keys == b"\x30"
        # The launcher became the worker: there is no process between it and the daemon.
        assert Path(f"/proc/{vm.worker_pid}/stat").read_text().rpartition(")")[2].split()[1] == str(launching.pid)
    with launching.connect() as client:
        assert client.host().findings
    seen = [line.split() for line in launcher.with_name("seen").read_text().splitlines()]
    assert [line[:3] for line in seen] == [[sys.executable, "-I", "-S"]] * 2
    assert (seen[0][4], seen[1][4:]) == ("vm", ["probe"])


def test_the_log_says_which_launcher_is_used(launching: DaemonProcess, launcher: Path, runtime_dir: Path) -> None:
    assert launching.log[0]["worker_launcher"] == str(launcher)
    other = DaemonProcess(runtime_dir / "other")
    try:
        other.start("--worker-launcher", "none")
        assert other.log[0]["worker_launcher"] is None
    finally:
        other.end_everything()


def test_a_launcher_that_breaks_later_is_named_and_no_half_of_a_vm_is_left(
    launching: DaemonProcess, launcher: Path
) -> None:
    with Stubs(launching.target) as stubs, launching.connect() as client:
        launcher.write_text("#!/bin/sh\necho 'no python here' >&2\nexit 127\n")
        broken = refused(lambda: stubs.create("web", (0, 1)))
        assert (broken.code, broken.reason) == (grpc.StatusCode.INTERNAL, "WORKER_FAILED")
        assert f"the launcher {launcher} ended with status 127: it could not run {sys.executable}" in broken.message
        assert broken.metadata["worker_log"] == "no python here"

        launcher.unlink()
        gone = refused(lambda: stubs.create("web", (0, 1)))
        assert (gone.code, gone.reason) == (grpc.StatusCode.INTERNAL, "WORKER_FAILED")
        with pytest.raises(ClientError) as asked:
            client.host()
        assert asked.value.reason == "WORKER_FAILED"
        for message in (gone.message, asked.value.message):
            assert f"through the launcher {launcher}: No such file or directory" in message
        assert stubs.names() == []
        assert launching.worker_pids() == []

        launcher.write_text(SCRIPT)
        launcher.chmod(0o755)
        assert stubs.create("web", (0, 1)).state == vm_pb2.VM_STATE_READY


def test_a_launcher_that_cannot_be_used_stops_the_daemon_from_beginning(runtime_dir: Path, launcher: Path) -> None:
    launcher.chmod(0o775)
    status, line = start_in_vain("--runtime-dir", str(runtime_dir / "r"), "--worker-launcher", str(launcher))
    assert status == server.EXIT_UNUSABLE
    assert line["event"] == "cannot start"
    assert f"others may write to {launcher} (mode 0775)" in line["error"]
    assert not (runtime_dir / "r" / "skeyd.sock").exists()


# --- which launcher, and whether -------------------------------------------------------------------------------------


def test_a_launcher_that_is_the_users_own_is_taken(launcher: Path) -> None:
    assert find_launcher(str(launcher)) == launcher
    launcher.chmod(0o500)
    assert find_launcher(str(launcher)) == launcher


def test_a_launcher_of_roots_is_taken_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Path("/bin/true").resolve()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert program.stat().st_uid == 0
    assert find_launcher(str(program)) == program


def test_a_link_is_followed_once_and_for_all(launcher: Path) -> None:
    link = launcher.with_name("link")
    link.symlink_to("launcher")
    assert find_launcher(str(link)) == launcher


@pytest.mark.parametrize("given", ["launcher", "./launcher", "", "None"])
def test_a_launchers_path_is_absolute(given: str, launcher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(launcher.parent)
    with pytest.raises(LauncherError, match="has to be an absolute path, or none"):
        find_launcher(given)


def _removed(path: Path) -> None:
    path.unlink()


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir(mode=0o755)


def _a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o755)


def _a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _a_link_to_what_all_may_write(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to("real")
    path.chmod(0o777)


def _below_a_file(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.parent.joinpath("file").touch()
    path.symlink_to("file/launcher")


def _for_nobody(path: Path) -> None:
    path.chmod(0o644)


def _for_the_group_to_write(path: Path) -> None:
    path.chmod(0o775)


def _for_all_to_write(path: Path) -> None:
    path.chmod(0o757)


def _sticky_for_all_to_write(path: Path) -> None:
    path.chmod(0o1777)


def _in_a_folder_for_all(path: Path) -> None:
    path.parent.chmod(0o777)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_removed, "{path}: the worker launcher can't be used: No such file or directory"),
        (_a_folder, "{path}: the worker launcher is no regular file"),
        (_a_fifo, "{path}: the worker launcher is no regular file"),
        (_a_link_to_itself, "{path}: the worker launcher can't be used: Too many levels of symbolic links"),
        (_below_a_file, "{path}: the worker launcher can't be used: Not a directory"),
        (_for_nobody, "{path}: the worker launcher may not be executed by uid {uid}"),
        (_for_the_group_to_write, "can't be trusted: others may write to {path} (mode 0775)"),
        (_for_all_to_write, "can't be trusted: others may write to {path} (mode 0757)"),
        (_sticky_for_all_to_write, "can't be trusted: others may write to {path} (mode 1777)"),
        (_a_link_to_what_all_may_write, "{path} (which is {parent}/real): the worker launcher can't be trusted"),
        (_in_a_folder_for_all, "can't be trusted: others may write to {parent} (mode 0777)"),
    ],
)
def test_a_launcher_that_cannot_be_run_or_trusted_is_refused_with_the_reason(
    launcher: Path, spoil: Callable[[Path], None], why: str
) -> None:
    spoil(launcher)
    with pytest.raises(LauncherError) as refusal:
        find_launcher(str(launcher))
    assert why.format(path=launcher, parent=launcher.parent, uid=os.geteuid()) in str(refusal.value)


# --- the links on the way to it --------------------------------------------------------------------------------------


@pytest.fixture
def between(launcher: Path) -> Path:
    """Make a folder beside the launcher, for a link on the way to it."""
    made = launcher.with_name("between")
    made.mkdir(mode=0o755)
    return made


def _a_link_to_a_link(launcher: Path, between: Path) -> Path:
    first = launcher.with_name("first")
    first.symlink_to(between / "second")
    (between / "second").symlink_to(launcher)
    return first


def _a_link_to_a_relative_link(launcher: Path, between: Path) -> Path:
    first = launcher.with_name("first")
    first.symlink_to("between/second")
    (between / "second").symlink_to("../launcher")
    return first


def _a_folder_that_is_a_link_in_a_folder_that_is_a_link(launcher: Path, between: Path) -> Path:
    (between / "inner").symlink_to(launcher.parent)
    launcher.with_name("outer").symlink_to(between)
    return launcher.with_name("outer") / "inner" / launcher.name


def _a_way_through(launcher: Path, between: Path) -> Path:
    return between / ".." / launcher.name


WAYS = [
    _a_link_to_a_link,
    _a_link_to_a_relative_link,
    _a_folder_that_is_a_link_in_a_folder_that_is_a_link,
    _a_way_through,
]
LINKS = WAYS[:3]


@pytest.mark.parametrize("lay", WAYS)
def test_whoever_may_change_a_link_on_the_way_chooses_the_launcher(
    launcher: Path, between: Path, lay: Callable[[Path, Path], Path]
) -> None:
    given = lay(launcher, between)
    assert find_launcher(str(given)) == launcher
    for mode in (0o777, 0o775, 0o757):
        between.chmod(mode)
        with pytest.raises(LauncherError) as refusal:
            find_launcher(str(given))
        assert str(refusal.value) == (
            f"{given} (which is {launcher}): the worker launcher can't be trusted: "
            f"others may write to {between} (mode {mode:04o}); chmod go-w"
        )
    between.chmod(0o1777)  # the link is the user's own, and nobody else can replace it
    assert find_launcher(str(given)) == launcher


@pytest.mark.parametrize("lay", LINKS)
def test_a_link_of_another_user_is_refused_though_its_folder_is_sticky(
    launcher: Path, between: Path, lay: Callable[[Path, Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = lay(launcher, between)
    between.chmod(0o1777)
    (link,) = between.iterdir()
    _another_users(link, monkeypatch)
    with pytest.raises(LauncherError) as refusal:
        find_launcher(str(given))
    assert f"can't be trusted: {link} belongs to uid 4242, neither root's nor {os.geteuid()}" in str(refusal.value)


@pytest.mark.parametrize("lay", WAYS)
def test_a_folder_of_another_user_on_the_way_is_refused(
    launcher: Path, between: Path, lay: Callable[[Path, Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = lay(launcher, between)
    _another_users(between, monkeypatch)
    with pytest.raises(LauncherError) as refusal:
        find_launcher(str(given))
    assert f"can't be trusted: {between} belongs to uid 4242, neither root's nor {os.geteuid()}" in str(refusal.value)


def _another_users(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only root can give files away. For others the answer of lstat() is another: user, the fifth of its fields.
    if os.geteuid() == 0:
        os.chown(path, 4242, 4242, follow_symlinks=False)
        return
    real = os.lstat

    def lstat(asked: Path) -> os.stat_result:
        found = real(asked)
        return os.stat_result([*found[:4], 4242, *found[5:]]) if Path(asked) == path else found

    monkeypatch.setattr(os, "lstat", lstat)


def test_links_that_lead_on_and_on_are_refused(launcher: Path) -> None:
    """As many as the kernel itself follows are followed."""
    last = launcher
    for number in range(41):
        if number == 40:
            assert find_launcher(str(last)) == launcher
        link = launcher.with_name(f"link{number}")
        link.symlink_to(last.name)
        last = link
    with pytest.raises(LauncherError, match="can't be used: Too many levels of symbolic links"):
        find_launcher(str(last))


def test_a_launcher_of_another_user_is_refused(launcher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only root can give files away: here it's the process that is another's.
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    if mine == 0:
        os.chown(launcher, 4242, 4242)
    with pytest.raises(LauncherError) as refusal:
        find_launcher(str(launcher))
    owner = mine or 4242
    assert f"{launcher} belongs to uid {owner}, neither root's nor {mine + 1}" in str(refusal.value)


def test_a_sticky_folder_for_all_is_safe_as_it_is_for_others(launcher: Path) -> None:
    launcher.parent.chmod(0o1777)
    assert find_launcher(str(launcher)) == launcher


def test_without_the_option_the_installed_launcher_is_used_if_there_is_one(
    launcher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher_module, "DEFAULT", launcher)
    assert find_launcher(None) == launcher
    assert find_launcher("none") is None
    launcher.chmod(0o777)
    with pytest.raises(LauncherError, match="others may write"):
        find_launcher(None)
    assert find_launcher("none") is None
    launcher.unlink()
    assert find_launcher(None) is None
    launcher.symlink_to("nowhere")
    with pytest.raises(LauncherError, match="No such file"):
        find_launcher(None)


def test_the_remedy_of_the_errors_names_the_option_and_the_installed_launcher() -> None:
    (option,) = [word.rstrip(",") for word in PGSTE_REMEDY.split() if word.startswith("--worker-launcher")]
    assert server.parse([option]).worker_launcher == str(DEFAULT)
