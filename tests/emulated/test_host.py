"""The emulated host itself: what its users rely on, and that it leaves nothing behind."""

import contextlib
import hashlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.emulated import cache, compiler, qemu
from tests.emulated.cache import CachedDirectory
from tests.emulated.fixtures import EmulatedHosts, host_suites, require_image
from tests.emulated.host import BootFailed, EmulatedHost, HostDied
from tests.emulated.image import EVIDENCE, Image
from tests.emulated.machine import Machine

pytestmark = pytest.mark.timeout(400)  # longer than any boot may take: BootFailed tells more than a timeout

LARGE = 12 << 20  # bytes
INSIDE = "/root/test-host"  # this module's own directory in the shared host

ECHO_SERVER = """
import os, socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as listener:
    with open(sys.argv[2], "w") as ready: ready.write("ready")
    while True:
        with listener.accept()[0] as connection:
            while data := connection.recv(1 << 20):
                connection.sendall(data)
"""


@pytest.fixture(scope="module", params=host_suites())
def host(emulated_hosts: EmulatedHosts, request: pytest.FixtureRequest) -> EmulatedHost:
    host = emulated_hosts(request.param)
    host.run(["sh", "-c", 'rm -rf "$1"; mkdir "$1"', "-", INSIDE])
    return host


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def own_processes() -> set[int]:
    return {
        int(child)
        for thread in Path("/proc/self/task").iterdir()
        for child in (thread / "children").read_text().split()
    }


def own_traces() -> tuple[set[int], set[str], set[str], set[str]]:
    """Tell what this process holds: children, threads, descriptors by what they are, temporary files."""
    descriptors = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            descriptors.add(f"{link.name} {link.readlink()}")
    threads = {thread.name for thread in threading.enumerate()}
    return own_processes(), threads, descriptors, set(names(Path(tempfile.gettempdir())))


@pytest.fixture
def leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = own_traces()
    yield
    assert own_traces() == before


# --- commands


@pytest.mark.emulated
def test_a_command_gives_its_outputs_apart_and_its_status(host: EmulatedHost) -> None:
    finished = host.run(["sh", "-c", "cat; echo bad >&2; exit 7"], input=b"good\0", check=False)
    assert (finished.returncode, finished.stdout, finished.stderr) == (7, b"good\0", b"bad\n")


@pytest.mark.emulated
def test_a_failed_command_raises_and_the_note_has_its_stderr(host: EmulatedHost) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        host.run(["sh", "-c", "echo why >&2; kill -9 $$"])
    assert caught.value.returncode == -9
    assert caught.value.__notes__ == ["why\n"]


@pytest.mark.emulated
def test_a_command_gets_environment_and_directory_in_addition(host: EmulatedHost) -> None:
    finished = host.run(["sh", "-c", 'echo "$PWD $A $HOME"'], env={"A": "b c"}, cwd="/usr")
    assert finished.stdout == b"/usr b c /root\n"


@pytest.mark.emulated
def test_a_command_that_is_not_there_raises_what_subprocess_does(host: EmulatedHost) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-command"):
        host.run(["no-such-command"])
    with pytest.raises(PermissionError):
        host.start(["/etc/passwd"])


@pytest.mark.emulated
def test_a_command_that_takes_too_long_is_killed_with_what_it_started(host: EmulatedHost) -> None:
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        host.run(["sh", "-c", "busybox sleep 1000 & echo $! $$; wait"], timeout=1)
    assert caught.value.stdout is not None
    child, parent = caught.value.stdout.split()
    for pid in (child, parent):
        # Nobody's any more: gone, or dead and not yet buried.
        assert host.run(["sh", "-c", f"cat /proc/{int(pid)}/cmdline"], check=False).stdout == b""


@pytest.mark.emulated
def test_large_transfers_are_exact(host: EmulatedHost) -> None:
    data = os.urandom(LARGE)
    assert host.run(["busybox", "cat"], input=data).stdout == data
    host.put(f"{INSIDE}/there/data", data, mode=0o600)
    told = host.run(["sh", "-c", f"cd {INSIDE}/there; stat -c %a data; sha256sum data"]).stdout.split()
    assert told[:2] == [b"600", hashlib.sha256(data).hexdigest().encode()]
    assert host.get(f"{INSIDE}/there/data") == data


@pytest.mark.emulated
def test_several_commands_run_at_once(host: EmulatedHost) -> None:
    host.run(["sh", "-c", "mkfifo one two"], cwd=INSIDE)
    with ThreadPoolExecutor(2) as pool:
        # Each waits for the other: one after the other they would never end.
        first = pool.submit(host.run, ["sh", "-c", "read x <one; echo $x >two"], cwd=INSIDE)
        second = pool.submit(host.run, ["sh", "-c", "echo both >one; cat two"], cwd=INSIDE)
        assert second.result().stdout == b"both\n"
        assert first.result().returncode == 0


@pytest.mark.emulated
def test_orphans_are_buried(host: EmulatedHost) -> None:
    orphan = int(host.run(["sh", "-c", "busybox true >/dev/null 2>&1 & echo $!"]).stdout)
    host.run(["busybox", "sh", "-c", f"while [ -e /proc/{orphan} ]; do usleep 10000; done"], timeout=20)


@pytest.mark.emulated
def test_a_directory_is_copied_without_what_is_excluded(host: EmulatedHost, tmp_path: Path) -> None:
    (tmp_path / "package" / "__pycache__").mkdir(parents=True)
    (tmp_path / "package" / "__pycache__" / "x.pyc").touch()
    (tmp_path / "package" / "run").write_text("#!/bin/sh\necho it runs\n")
    (tmp_path / "package" / "run").chmod(0o755)
    (tmp_path / "link").symlink_to("package/run")
    (tmp_path / "secret").touch()
    host.put_tree(tmp_path, f"{INSIDE}/copied", exclude=["__pycache__", "secret"])
    found = host.run(["find", ".", "-mindepth", "1"], cwd=f"{INSIDE}/copied").stdout.split()
    assert set(found) == {b"./link", b"./package", b"./package/run"}
    assert host.run([f"{INSIDE}/copied/link"]).stdout == b"it runs\n"


@pytest.mark.emulated
def test_a_started_process_takes_signals_and_tells_its_status(host: EmulatedHost) -> None:
    host.run(["sh", "-c", "mkfifo trapped"], cwd=INSIDE)
    script = "trap 'echo bye; exit 5' TERM; echo up >trapped; while :; do busybox usleep 1000; done"
    process = host.start(["sh", "-c", script], cwd=INSIDE, stdout_path=f"{INSIDE}/started.log")
    assert host.get(f"{INSIDE}/trapped") == b"up\n"  # a fifo: this waits
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    process.signal(signal.SIGTERM)
    assert process.wait(20) == 5
    assert process.wait(0) == 5
    assert host.get(f"{INSIDE}/started.log") == b"bye\n"
    with pytest.raises(ProcessLookupError):
        process.signal(signal.SIGTERM)


@pytest.mark.emulated
def test_closing_a_started_process_kills_it(host: EmulatedHost) -> None:
    process = host.start(["busybox", "sleep", "1000"])
    process.close()
    process.close()
    with pytest.raises(ProcessLookupError):
        process.wait(1)
    host.run(["busybox", "sh", "-c", f"while [ -e /proc/{process.pid} ]; do usleep 10000; done"], timeout=20)


# --- the network, the kernel


@pytest.mark.emulated
def test_a_forwarded_port_reaches_the_loopback_address_inside(host: EmulatedHost) -> None:
    host.run(["sh", "-c", "mkfifo listening"], cwd=INSIDE)
    server = host.start(["python3", "-c", ECHO_SERVER, "50051", f"{INSIDE}/listening"])
    assert host.get(f"{INSIDE}/listening") == b"ready"
    port = host.forward(50051)
    assert host.forward(50051) == port
    assert host.forward(50052) != port
    data = os.urandom(1 << 20)
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            sender = threading.Thread(target=lambda it=connection: (it.sendall(data), it.shutdown(socket.SHUT_WR)))
            sender.start()
            with connection.makefile("rb") as stream:
                assert stream.read() == data
            sender.join()
    server.close()


@pytest.mark.emulated
def test_kvm_is_there_and_nothing_else_is_reachable(host: EmulatedHost) -> None:
    assert host.run(["uname", "-r"]).stdout.decode().strip() == host.kernel
    host.run(["test", "-c", "/dev/kvm"])
    assert host.run(["ip", "route"]).stdout.splitlines() == [
        b"10.0.2.0/24 dev eth0 proto kernel scope link src 10.0.2.15 "
    ]
    assert "emulated host is ready" in host.console


@pytest.fixture(scope="module", params=host_suites())
def systemd_host(emulated_hosts: EmulatedHosts, request: pytest.FixtureRequest) -> EmulatedHost:
    return emulated_hosts(request.param, systemd=True)


@pytest.mark.emulated
def test_systemd_boots_and_nothing_in_it_has_failed(systemd_host: EmulatedHost) -> None:
    waited = systemd_host.run(["systemctl", "is-system-running", "--wait"], check=False, timeout=200)
    assert waited.stdout == b"running\n", systemd_host.run(["systemctl", "--failed"]).stdout.decode()
    systemd_host.run(["test", "-c", "/dev/kvm"])


# --- boots that fail, hosts that die


@pytest.mark.emulated
def test_a_boot_without_a_first_process_fails_with_the_console(leaves_nothing: None) -> None:
    image = require_image(host_suites()[0])
    with pytest.raises(BootFailed, match=r"(?s)QEMU ended.*Kernel panic"), EmulatedHost(image, append="rdinit=/no"):
        pass


@pytest.mark.emulated
def test_a_boot_that_takes_too_long_fails(leaves_nothing: None) -> None:
    image = require_image(host_suites()[0])
    with pytest.raises(BootFailed, match="did not appear within"), EmulatedHost(image, boot_timeout=0.2):
        pass


@pytest.mark.emulated
def test_a_host_that_dies_says_so_and_leaves_nothing(leaves_nothing: None) -> None:
    others = own_processes()
    with EmulatedHost(require_image(host_suites()[0])) as host:
        process = host.start(["busybox", "sleep", "1000"])
        (guard,) = own_processes() - others
        (running_qemu,) = Path(f"/proc/{guard}/task/{guard}/children").read_text().split()
        os.kill(int(running_qemu), signal.SIGKILL)
        with pytest.raises(HostDied):
            process.wait(30)
        with pytest.raises(HostDied):
            host.run(["true"])
        with pytest.raises(HostDied):
            host.forward(1)
    assert not host.is_running()
    with pytest.raises(HostDied):
        host.run(["true"])


# --- QEMU's process, without a kernel: there in a tenth of a second

NO_KERNEL = ["-machine", "s390-ccw-virtio", "-nodefaults", "-display", "none", "-S"]
WITH_NETWORK = [*NO_KERNEL, "-netdev", "user,id=net0,restrict=on"]


@pytest.fixture
def idle_command() -> list[str]:
    return [*qemu.command(require_image(host_suites()[0]).suite), *WITH_NETWORK]


@pytest.mark.emulated
def test_a_machine_outlives_the_thread_that_started_it_and_stops_twice(
    idle_command: list[str], leaves_nothing: None
) -> None:
    with ThreadPoolExecutor(1) as pool:
        machine = pool.submit(Machine, idle_command).result()
    assert machine.forward("10.0.2.15", 1) > 0
    machine.stop()
    machine.stop()
    assert not machine.is_running()


@pytest.mark.emulated
def test_a_refused_argument_is_on_the_console(idle_command: list[str], leaves_nothing: None) -> None:
    machine = Machine([*idle_command, "-no-such-option"])
    with pytest.raises(HostDied):
        machine.forward("10.0.2.15", 1)
    assert "no-such-option" in machine.console
    machine.stop()


@pytest.mark.emulated
def test_qemu_ends_with_an_owner_that_is_killed(idle_command: list[str]) -> None:
    script = (
        "import sys; from tests.emulated.machine import Machine; machine = Machine(sys.argv[1:]);"
        "print(machine.forward('10.0.2.15', 1), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, *idle_command],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline()
        guard = Path(f"/proc/{owner.pid}/task/{owner.pid}/children").read_text().strip()
        running_qemu = Path(f"/proc/{guard}/task/{guard}/children").read_text().strip()
        watched = [os.pidfd_open(int(guard)), os.pidfd_open(int(running_qemu))]
        owner.kill()
    for process in watched:
        ended, _, _ = select.select([process], [], [], 20)
        with contextlib.suppress(ChildProcessError):  # whoever adopts orphans buries them
            os.waitid(os.P_PIDFD, process, os.WEXITED)
        os.close(process)
        assert ended


# --- the cache


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache.cache_directory()


def writes(text: str) -> Callable[[Path, int], None]:
    def make(directory: Path, lock: int) -> None:
        (directory / "made").write_text(text)

    return make


def test_a_cached_directory_is_made_once_unless_it_is_wanted_again(own_cache: Path) -> None:
    cached = CachedDirectory("kind", "recipe")
    assert not cached.is_finished()
    for text, again, there in (("1", False, "1"), ("2", False, "1"), ("3", True, "3")):
        path = cached.obtain(writes(text), again=again)
        assert (path / "made").read_text() == there
    assert names(own_cache) == [".kind.lock", "kind-recipe"]


def test_a_build_that_fails_leaves_nothing_and_one_that_died_is_cleaned_up(own_cache: Path) -> None:
    cached = CachedDirectory("kind", "recipe")
    own_cache.mkdir(parents=True)
    (own_cache / ".kind.died").mkdir()
    (own_cache / ".other.building").mkdir()

    def fail(directory: Path, lock: int) -> None:
        (directory / "half").touch()
        raise RuntimeError("no disk")

    with pytest.raises(RuntimeError, match="no disk"):
        cached.obtain(fail)
    assert names(own_cache) == [".kind.lock", ".other.building"]


def test_of_builders_at_once_one_builds_and_the_others_wait(own_cache: Path) -> None:
    made: list[Path] = []
    building, go_on = threading.Event(), threading.Event()

    def make(directory: Path, lock: int) -> None:
        made.append(directory)
        building.set()
        assert go_on.wait(20)

    with ThreadPoolExecutor(3) as pool:
        builders = [pool.submit(CachedDirectory("kind", "recipe").obtain, make) for _ in range(3)]
        assert building.wait(20)
        assert not any(builder.done() for builder in builders)
        go_on.set()
        assert {builder.result() for builder in builders} == {own_cache / "kind-recipe"}
    assert len(made) == 1


def test_the_cache_keeps_the_last_two_recipes(own_cache: Path) -> None:
    for age, recipe in enumerate(("oldest", "older", "newest")):
        path = CachedDirectory("kind", recipe).obtain(writes(recipe))
        os.utime(path, (age, age))
    CachedDirectory("kindred", "stays").obtain(writes(""))
    assert [name for name in names(own_cache) if not name.startswith(".")] == [
        "kind-newest",
        "kind-older",
        "kindred-stays",
    ]


def test_what_is_missing_is_named_with_its_remedy(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(own_cache))
    reason = Image("bookworm").missing()
    assert reason is not None
    assert "qemu-system-s390x mmdebstrap" in reason
    assert not own_cache.exists()


def test_what_is_looked_for_is_what_the_list_installs() -> None:
    lines = Path(__file__).with_name("debian-packages").read_text().splitlines()
    assert [line.partition("#")[0].strip() for line in lines if not line.startswith("#") and line] == [
        *EVIDENCE,
        *compiler.PACKAGES.split(),
    ]


def test_a_suite_that_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="bookworm, trixie, forky"):
        Image("sid")
