"""The worker as a real process: how it starts, what it survives, how it ends."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import skeyd
from skeyd.worker.candidates import Found
from skeyd.worker.packets import MESSAGE_MAX, Fields, encode
from skeyd.worker.protocol import LOCK, PROTOCOL, SOCKET
from tests.worker.processes import SECONDS, WORKER, WorkerProcess, hung_up
from tests.worker.specs import UID, owned, simulated, slot

Start = Callable[..., WorkerProcess]


def _run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-I", "-S", *arguments], input=stdin, capture_output=True, env={}, timeout=SECONDS, check=False
    )


def _imported(importtime: str) -> set[str]:
    # Lines of -X importtime: "import time: self [us] | cumulative | name".
    return {line.rpartition("|")[2].strip() for line in importtime.splitlines() if line.startswith("import time:")}


# --- starting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["probe", "candidates", "vm"])
def test_a_worker_loads_the_standard_library_and_its_own_part_of_skeyd_and_nothing_else(way: str, start: Start) -> None:
    allowed = r"skeyd(\.(capabilities|errors|gfn|linux|storage_key)|\.kvm(\.\w+)?|\.worker(\.\w+)?)?"
    if way == "candidates":
        allowed += r"|skeyd\.injection(\.\w+)?"
    if way != "vm":
        loaded = _imported(_run("-X", "importtime", WORKER, way).stderr.decode())
    else:
        worker = start(import_time=True)
        worker.first_line()
        worker.process.terminate()
        loaded = _imported(worker.process.communicate(timeout=SECONDS)[1].decode())
    own = {name for name in loaded if name.partition(".")[0] == "skeyd"}
    assert "skeyd.worker.service" in own
    assert {name for name in own if not re.fullmatch(allowed, name)} == set()
    others = {name.partition(".")[0] for name in loaded - own} - {
        "imported package",  # the heading
        "org",  # pickle looks for Jython's org.python.core, in vain
    }
    assert {name for name in others if name not in sys.stdlib_module_names and not name.startswith("_")} == set()


def test_a_probe_says_what_the_host_can_do_in_one_line() -> None:
    done = _run(WORKER, "probe")
    assert (done.returncode, done.stderr) == (0, b"")
    (line,) = done.stdout.splitlines()
    report = json.loads(line)["ok"]
    assert report["can_own_vms"] in (True, False, None)
    assert [one["name"] for one in report["findings"]] == ["kvm_device", "cap_s390_skeys", "cap_s390_keyop", "pgste"]
    for finding in report["findings"]:
        assert finding.keys() == {"name", "answer", "detail", "remedy"}
        assert finding["answer"] in (True, False, None)
        assert finding["detail"]


def test_a_search_for_vms_says_in_one_line_what_it_found() -> None:
    done = _run(WORKER, "candidates")
    assert (done.returncode, done.stderr) == (0, b"")
    (line,) = done.stdout.splitlines()
    Found.from_message(Fields(json.loads(line)["ok"], "answer"))


@pytest.mark.parametrize("arguments", [[], ["vm"], ["vm", "3", "4"], ["probe", "x"], ["candidates", "x"], ["serve"]])
def test_a_worker_that_is_started_wrongly_says_how_it_is_done(arguments: list[str]) -> None:
    done = _run(WORKER, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(b"usage: ")
    assert done.stdout == b""


def test_a_worker_says_who_it_is_to_everybody_who_connects(start: Start) -> None:
    worker = start(simulated((4, 2), (0, 1), kernel="4.19"))
    assert worker.first_line() == {"ok": {}}
    with worker.connect() as one, worker.connect() as other:
        hello = one.hello()
        assert other.hello() == hello
    assert re.fullmatch("[0-9a-f]{32}", hello.pop("incarnation"))
    assert hello == {
        "protocol": PROTOCOL,
        "id": "web",
        "uid": UID,
        "keyop": False,
        "kind": "simulated",
        "kernel": "simulated Linux 4.19 to 6.19",
        "version": skeyd.__version__,
        "pid": worker.pid,
        "created": 1_700_000_000,
        "vmm": None,
        "freezes": True,
        "slots": [
            {"slot": 1, "start": 0, "count": 256, "backing": "none"},
            {"slot": 0, "start": 4 * 256, "count": 512, "backing": "none"},
        ],
    }


def test_a_worker_that_starts_again_is_another_incarnation(start: Start, runtime_dir: Path) -> None:
    incarnations = set()
    for _ in range(2):
        worker = start(directory=runtime_dir)
        worker.first_line()
        with worker.connect() as front:
            incarnations.add(front.hello()["incarnation"])
        worker.process.kill()
        worker.process.wait(SECONDS)
        (runtime_dir / SOCKET).unlink()
    assert len(incarnations) == 2


@pytest.mark.parametrize(
    "spec",
    [
        b"",
        b"{",
        b"{}",
        b"null",
        encode({**simulated((0, 1)).to_message(), "protocol": PROTOCOL + 1}),
        encode({**simulated((0, 1)).to_message(), "id": "../web"}),
        b"{}" + b" " * MESSAGE_MAX,
    ],
)
def test_a_spec_that_is_none_is_refused_and_nothing_of_the_worker_stays(spec: bytes, start: Start) -> None:
    worker = start(spec)
    assert worker.reason() == "WORKER_FAILED"
    assert list(worker.directory.iterdir()) == []


def test_slots_that_no_kernel_takes_are_refused_with_their_reason(start: Start) -> None:
    worker = start(simulated((0, 2), (1, 2)))
    assert worker.reason() == "MEMORY_INVALID"
    assert not worker.holds_its_lock()
    assert not (worker.directory / SOCKET).exists()


def test_a_vm_that_the_host_has_no_room_for_is_refused_with_its_reason(start: Start) -> None:
    worker = start(simulated((0, 1 << 22)), address_space=1 << 29)
    assert worker.reason() == "OUT_OF_MEMORY"


def test_an_owned_vm_where_none_can_be_is_refused_with_its_reason(start: Start, tmp_path: Path) -> None:
    # On any host, since the file is looked at even where the kernel has the calls.
    worker = start(owned(slot(0, 1, "file", str(tmp_path / "missing"))))
    assert worker.reason() in ("CAP_S390_SKEYS_MISSING", "KVM_UNAVAILABLE", "MEMORY_FILE_UNUSABLE")


def test_a_second_worker_of_the_same_directory_is_refused_and_the_first_serves_on(
    start: Start, worker: WorkerProcess
) -> None:
    second = start(directory=worker.directory)
    assert second.reason() == "VM_EXISTS"
    assert worker.holds_its_lock()
    assert worker.serves()


def test_a_socket_that_is_already_there_is_an_error_and_is_left_alone(start: Start, runtime_dir: Path) -> None:
    (runtime_dir / SOCKET).write_text("not a socket")
    assert start(directory=runtime_dir).reason() == "WORKER_FAILED"
    assert (runtime_dir / SOCKET).read_text() == "not a socket"


def test_a_lock_that_is_a_symbolic_link_is_not_followed(start: Start, runtime_dir: Path) -> None:
    directory = runtime_dir / "vm"
    directory.mkdir()
    (directory / LOCK).symlink_to(runtime_dir / "elsewhere")
    assert start(directory=directory).reason() == "WORKER_FAILED"
    assert not (runtime_dir / "elsewhere").exists()


def test_a_worker_serves_though_nobody_reads_that_it_is_ready(start: Start) -> None:
    ours, its = socket.socketpair()
    with ours:
        # What it says then is EPIPE, as from a pipe whose reader died.
        ours.shutdown(socket.SHUT_RD)
        with its:
            worker = start(stdout=its)
        # It lets go of its standard output once it has tried.
        assert hung_up(ours)
        assert worker.serves()


def test_a_worker_lets_go_of_its_standard_streams_once_it_is_ready(worker: WorkerProcess) -> None:
    assert worker.process.stdout is not None
    assert worker.process.stdout.read() == b""
    for number in (0, 1):
        assert str(Path(f"/proc/{worker.pid}/fd/{number}").readlink()) == "/dev/null"


def test_a_worker_has_nothing_open_but_its_own(worker: WorkerProcess) -> None:
    with worker.meet():
        links = worker.open_files()
    # libffi, which is in ctypes, has itself open since 3.5 on s390x, to map the code of its closures.
    others = r"socket:.*|pipe:.*|anon_inode:\[eventpoll\]|/dev/null|/.*/libffi\.so\.[0-9.]+"
    own = [link for link in links if not re.fullmatch(others, link)]
    assert own == [str(worker.directory), str(worker.directory / LOCK)]
    # The listener, the pair that signals go through, this connection; and standard error.
    assert sum(link.startswith("socket:") for link in links) == 4
    assert sum(link.startswith("pipe:") for link in links) == 1


# --- the lock ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_the_lock_is_held_exactly_as_long_as_the_worker_lives(start: Start, number: signal.Signals) -> None:
    worker = start()
    worker.first_line()
    assert worker.holds_its_lock()
    worker.process.send_signal(number)
    worker.process.wait(SECONDS)
    assert (worker.directory / LOCK).exists()
    assert not worker.holds_its_lock()


# --- ending --------------------------------------------------------------------------------------------------------


def test_sigterm_ends_a_worker_in_order(worker: WorkerProcess) -> None:
    with worker.meet() as front:
        worker.process.terminate()
        assert worker.process.wait(SECONDS) == 0
        assert front.is_hung_up_on()
    assert worker.process.stderr is not None
    assert worker.process.stderr.read() == b""
    with pytest.raises(ConnectionRefusedError):
        worker.connect()


def test_sigterm_ends_a_worker_that_nobody_talks_with(worker: WorkerProcess) -> None:
    worker.process.terminate()
    assert worker.process.wait(SECONDS) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGPIPE])
def test_signals_that_are_meant_for_the_front_do_not_reach_the_vm(
    shared_worker: WorkerProcess, number: signal.Signals
) -> None:
    with shared_worker.meet() as front:
        shared_worker.process.send_signal(number)
        # A signal that is ignored is gone when kill() returns; the second answer is from after the first.
        for _ in range(2):
            assert front.ok(op="status") == {"uses_keys": False}


def test_a_shutdown_ends_the_worker_after_its_answer(worker: WorkerProcess) -> None:
    with worker.meet() as front:
        assert front.ok(op="shutdown", uid=UID) == {}
        assert worker.process.wait(SECONDS) == 0
        assert front.is_hung_up_on()


@pytest.mark.parametrize("uid", [UID[:-1] + "8", "", None, 7, UID.upper()])
def test_a_shutdown_that_is_meant_for_another_vm_is_refused(shared_worker: WorkerProcess, uid: object) -> None:
    with shared_worker.meet() as front:
        front.say(op="shutdown", uid=uid)
        assert front.is_hung_up_on()
    assert shared_worker.serves()
