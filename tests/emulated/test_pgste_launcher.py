"""PGSTE page tables for owned VMs: what is said without them, the three remedies, and the launcher itself."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from skeyd.client import Client, ClientError, Keys
from skeyd.v1 import host_service_pb2
from skeyd.vms.launcher import DEFAULT
from tests.emulated.compiler import PROGRAM, require_compiler
from tests.emulated.daemon import ROOT, DaemonInside
from tests.emulated.fixtures import EmulatedHosts, host_suites
from tests.emulated.host import EmulatedHost
from tests.vm_requests import fill, owned

pytestmark = [pytest.mark.emulated, pytest.mark.timeout(600)]

SOURCE = ROOT / "deploy/launcher"
LAUNCHER = "/srv/launcher/skeyd-pgste"
SYSCTL = "/proc/sys/vm/allocate_pgste"
PT_S390_PGSTE = bytes.fromhex("70000000")  # arch/s390/include/asm/elf.h @ v6.12
NEEDS_PGSTE = {"bookworm": True, "trixie": True, "forky": False}
YES, NO = host_service_pb2.ANSWER_YES, host_service_pb2.ANSWER_NO
FRAMES = 4 * 256

up_to_6_19 = pytest.mark.parametrize("host", [suite for suite in host_suites() if NEEDS_PGSTE[suite]], indirect=True)
since_7_0 = pytest.mark.parametrize("host", [suite for suite in host_suites() if not NEEDS_PGSTE[suite]], indirect=True)
every_kernel = pytest.mark.parametrize("host", host_suites(), indirect=True)


def make(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Have the launcher's own Makefile do something, in a copy of its folder."""
    shutil.copytree(SOURCE, directory, ignore=shutil.ignore_patterns("skeyd-pgste"), dirs_exist_ok=True)
    return subprocess.run(
        ["make", "-C", str(directory), *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Build the launcher as the package does."""
    require_compiler()
    directory = tmp_path_factory.mktemp("launcher")
    done = make(directory, f"CC={PROGRAM}")
    assert done.returncode == 0, done.stdout + done.stderr
    return (directory / "skeyd-pgste").read_bytes()


# A module's, so that a boot is no test's own.
@pytest.fixture(scope="module")
def host(emulated_hosts: EmulatedHosts, request: pytest.FixtureRequest, launcher: bytes) -> Iterator[EmulatedHost]:
    """Give the host of a suite, with skeyd and the launcher in it, and the sysctl at 0."""
    host = emulated_hosts(request.param)
    DaemonInside.install(host)
    host.put(LAUNCHER, launcher, mode=0o755)
    # Other tests of the session share the host, and leave the sysctl as they like it.
    before = host.get(SYSCTL).decode() if has_sysctl(host) else ""
    set_sysctl(host, "0")
    yield host
    set_sysctl(host, before)


def has_sysctl(host: EmulatedHost) -> bool:
    """Tell whether the kernel has the sysctl."""
    return not host.run(["test", "-e", SYSCTL], check=False).returncode


def set_sysctl(host: EmulatedHost, value: str) -> None:
    """Set it where the kernel has it."""
    if has_sysctl(host):
        host.run(["sh", "-c", f"echo {value} >{SYSCTL}"])


@contextmanager
def running(
    host: EmulatedHost, name: str, port: int, *arguments: str, through: tuple[str, ...] = ()
) -> Iterator[DaemonInside]:
    """Run a daemon with its own runtime directory."""
    daemon = DaemonInside(host, f"/run/skeyd-{name}", port)
    daemon.start(*arguments, through=through)
    try:
        yield daemon
    finally:
        daemon.kill()


# One for several tests: a daemon takes ten seconds to start there.
@pytest.fixture(scope="module")
def plain(host: EmulatedHost) -> Iterator[DaemonInside]:
    """Run a daemon that has neither the sysctl nor a launcher."""
    with running(host, "plain", 50053) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def launching(host: EmulatedHost) -> Iterator[DaemonInside]:
    """Run a daemon with --worker-launcher and no sysctl."""
    with running(host, "launching", 50054, "--worker-launcher", LAUNCHER) as daemon:
        # It has looked at its launcher then, which tests replace.
        daemon.connect().close()
        yield daemon


def launcher_of(daemon: DaemonInside) -> str | None:
    """Return which launcher the daemon uses, by its own word."""
    (line,) = (line for line in daemon.log() if line["event"] == "serving")
    path: str | None = line["worker_launcher"]
    return path


def pgste(client: Client) -> host_service_pb2.Finding:
    """Return what the host says of PGSTE."""
    (found,) = (one for one in client.host().findings if one.name == "pgste")
    return found


def works(client: Client) -> None:
    """Create an owned VM, set its keys and read them back."""
    vm = client.create_vm(owned("web", FRAMES // 256))
    keys = fill(client, "web", FRAMES)
    with client.get_skeys(vm.name) as stream:
        assert b"".join(part.keys for part in stream if isinstance(part, Keys)) == keys
    client.delete_vm(vm.name)


# --- refused, and the three remedies ---------------------------------------------------------------------------------


@up_to_6_19
def test_without_sysctl_and_launcher_the_host_says_no_and_a_vm_is_refused_with_both_remedies(
    plain: DaemonInside,
) -> None:
    with plain.connect() as client:
        beforehand = pgste(client)
        assert beforehand.answer == NO
        assert "vm.allocate_pgste is 0" in beforehand.detail
        assert client.host().can_own_vms == NO
        with pytest.raises(ClientError) as refused:
            client.create_vm(owned("web", 1))
        assert refused.value.reason == "PGSTE_UNAVAILABLE"
        assert list(client.list_vms()) == []
        for said in (beforehand.remedy, refused.value.message, refused.value.metadata["remedy"]):
            assert "vm.allocate_pgste=1" in said
            assert f"--worker-launcher={DEFAULT}" in said
            assert "--s390-pgste" in said


@up_to_6_19
def test_the_sysctl_helps_a_daemon_that_runs_already(host: EmulatedHost, plain: DaemonInside) -> None:
    with plain.connect() as client:
        assert pgste(client).answer == NO
        set_sysctl(host, "1")
        try:
            found = pgste(client)
            assert found.answer == YES
            assert found.detail == "a VM can be created; vm.allocate_pgste is 1"
            works(client)
        finally:
            set_sysctl(host, "0")


@since_7_0
def test_since_7_0_nothing_is_needed(host: EmulatedHost, plain: DaemonInside) -> None:
    assert not has_sysctl(host)
    with plain.connect() as client:
        found = pgste(client)
        assert (found.answer, found.remedy) == (YES, "")
        works(client)


@every_kernel
def test_workers_that_are_started_through_the_launcher_need_no_sysctl(
    host: EmulatedHost, launching: DaemonInside
) -> None:
    with launching.connect() as client:
        found = pgste(client)
        assert (found.answer, found.remedy) == (YES, "")
        assert ("from its launcher" in found.detail) is has_sysctl(host)
        assert client.host().can_own_vms == YES
        works(client)
    assert launcher_of(launching) == LAUNCHER


@up_to_6_19
def test_a_daemon_that_was_itself_started_through_the_launcher_needs_neither_option_nor_sysctl(
    host: EmulatedHost,
) -> None:
    with running(host, "through", 50055, through=(LAUNCHER,)) as daemon:
        with daemon.connect() as client:
            assert pgste(client).answer == YES
            works(client)
        assert launcher_of(daemon) is None


@every_kernel
def test_an_installed_launcher_is_used_without_a_word(host: EmulatedHost, launcher: bytes) -> None:
    host.put(str(DEFAULT), launcher, mode=0o755)
    try:
        with running(host, "installed", 50056) as daemon:
            with daemon.connect() as client:
                assert pgste(client).answer == YES
                works(client)
            assert launcher_of(daemon) == str(DEFAULT)
    finally:
        host.run(["rm", "-r", str(DEFAULT.parent)])


# --- launchers that are none -----------------------------------------------------------------------------------------


@contextmanager
def replaced(host: EmulatedHost, launcher: bytes, content: bytes | None) -> Iterator[None]:
    """Have something else, or nothing, in the launcher's place."""
    assert content != launcher
    host.run(["rm", LAUNCHER])
    try:
        if content is not None:
            host.put(LAUNCHER, content, mode=0o755)
        yield
    finally:
        host.put(LAUNCHER, launcher, mode=0o755)


def without_segment(program: bytes) -> bytes:
    """Return an s390x program without what --s390-pgste has put into it: an entry in its table of segments."""
    (table,) = struct.unpack_from(">Q", program, 0x20)  # e_phoff
    size, count = struct.unpack_from(">HH", program, 0x36)  # e_phentsize, e_phnum
    changed = bytearray(program)
    places = [at for at in range(table, table + size * count, size) if program[at : at + 4] == PT_S390_PGSTE]
    assert len(places) == 1
    changed[places[0] : places[0] + 4] = bytes(4)  # PT_NULL, which the kernel takes no notice of
    return bytes(changed)


@up_to_6_19
def test_it_is_the_linkers_option_and_nothing_else_that_helps(
    host: EmulatedHost, launching: DaemonInside, launcher: bytes
) -> None:
    with replaced(host, launcher, without_segment(launcher)), launching.connect() as client:
        assert pgste(client).answer == NO
        with pytest.raises(ClientError) as refused:
            client.create_vm(owned("web", 1))
        assert refused.value.reason == "PGSTE_UNAVAILABLE"


@every_kernel
@pytest.mark.parametrize("broken", ["gone", "no program", "no dynamic linker"])
def test_a_launcher_that_is_gone_or_broken_is_named(
    host: EmulatedHost, launching: DaemonInside, launcher: bytes, broken: str
) -> None:
    content, why = {
        "gone": (None, "No such file or directory"),
        "no program": (b"not a program\n", "Exec format error"),
        "no dynamic linker": (launcher.replace(b"/lib/ld64.so.1", b"/lib/ld00.so.0"), "No such file or directory"),
    }[broken]
    with replaced(host, launcher, content), launching.connect() as client:
        for call in (client.host, lambda: client.create_vm(owned("web", 1))):
            with pytest.raises(ClientError) as refused:
                call()
            assert refused.value.reason == "WORKER_FAILED"
            assert refused.value.message == f"no worker could be started through the launcher {LAUNCHER}: {why}"
        assert list(client.list_vms()) == []


# --- the program -----------------------------------------------------------------------------------------------------


@every_kernel
def test_the_launcher_becomes_the_program_with_its_arguments_descriptors_and_status(host: EmulatedHost) -> None:
    script = 'echo "$# $1 $2"; echo "$A" >&2; cat; readlink /proc/self/fd/7; exit 42'
    command = f'exec 7</etc/passwd; exec {LAUNCHER} sh -c "$0" sh "a  b" ""'
    done = host.run(["sh", "-c", command, script], input=b"given\n", env={"A": "environment"}, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (42, b"2 a  b \ngiven\n/etc/passwd\n", b"environment\n")


@every_kernel
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 125, "usage: skeyd-pgste PROGRAM [ARGUMENT...]\n"),
        (["/no/such/program"], 127, "skeyd-pgste: can't run /no/such/program: No such file or directory\n"),
        (["no-such-program"], 127, "skeyd-pgste: can't run no-such-program: No such file or directory\n"),
        ([""], 127, "skeyd-pgste: can't run : No such file or directory\n"),
        (["/etc/passwd"], 126, "skeyd-pgste: can't run /etc/passwd: Permission denied\n"),
        (["/etc"], 126, "skeyd-pgste: can't run /etc: Permission denied\n"),
    ],
)
def test_the_launcher_says_what_it_could_not_run(
    host: EmulatedHost, arguments: list[str], status: int, said: str
) -> None:
    done = host.run([LAUNCHER, *arguments], check=False)
    assert (done.returncode, done.stdout, done.stderr.decode()) == (status, b"", said)


# --- building it -----------------------------------------------------------------------------------------------------


def test_the_package_installs_it_where_skeyd_finds_it(tmp_path: Path) -> None:
    require_compiler()
    done = make(tmp_path / "build", "install", f"CC={PROGRAM}", f"DESTDIR={tmp_path}/root", "PREFIX=/usr")
    assert done.returncode == 0, done.stdout + done.stderr
    installed = tmp_path / "root" / DEFAULT.relative_to("/")
    assert installed.stat().st_mode & 0o7777 == 0o755
    assert [path for path in (tmp_path / "root").rglob("*") if path.is_file()] == [installed]
    assert sorted(path.name for path in (tmp_path / "build").iterdir()) == ["Makefile", "skeyd-pgste", "skeyd-pgste.c"]


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        # What GNU ld for x86 says and does.
        (
            'case "$*" in *--s390-pgste*) echo "ld: unrecognized option" >&2; exit 1;; *) echo >"$2";; esac',
            "doesn't know --s390-pgste: this program is for s390x only",
        ),
        ("exit 1", "builds no program at all"),
    ],
)
def test_a_linker_that_cannot_make_it_is_named_and_nothing_is_made(tmp_path: Path, compiler: str, said: str) -> None:
    stand_in = tmp_path / "cc"
    stand_in.write_text(f"#!/bin/sh\n{compiler}\n")
    stand_in.chmod(0o755)
    done = make(tmp_path / "build", f"CC={stand_in}")
    assert done.returncode == 2
    assert said in done.stderr
    assert f"{stand_in}" in done.stderr
    assert sorted(path.name for path in (tmp_path / "build").iterdir()) == ["Makefile", "skeyd-pgste.c"]
