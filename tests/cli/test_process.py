"""skeyctl as a process: where it finds its daemon, pipes that break, streams that are missing, signals."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

import skeyd
from skeyd.cli import interrupts
from skeyd.client import Snapshot
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2
from tests.cli.running import NOBODY, PROGRAM, SECONDS, Done, Terminal, environment, names_in, skeyctl_process
from tests.client.lying_daemon import LyingDaemon, chunk, header
from tests.daemon import DaemonProcess
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import Stubs

OLD = b"what was there before"
MANY = bytes(range(0, 256, 2)) * 32
"""Keys of 16 MiB, each another run: 4,096 lines, some 250 kB, which no pipe takes at once."""


@pytest.fixture
def many(new_vm: NewVm, stubs: Stubs) -> str:
    """Make a VM with many runs."""
    name = new_vm((0, 16))
    stubs.set(name, [(0, MANY)])
    return name


def names(done: Done) -> list[str]:
    return [vm["name"] for vm in done.value]


def test_the_daemon_is_the_one_of_the_environment_unless_the_command_line_names_another(
    shared_daemon: DaemonProcess, new_vm: NewVm
) -> None:
    name = new_vm((0, 1))
    here, nowhere = {"SKEYD_TARGET": shared_daemon.target}, {"SKEYD_TARGET": NOBODY}
    assert name in names(skeyctl_process("vm", "list", "--json", more=here))
    assert skeyctl_process("vm", "list", more=nowhere).status == 3
    option = ("--target", shared_daemon.target)
    assert name in names(skeyctl_process(*option, "vm", "list", "--json", more=nowhere))
    assert skeyctl_process("--target", NOBODY, "vm", "list", more=here).status == 3


def test_a_daemon_on_tcp_is_reached_past_any_proxy(shared_daemon: DaemonProcess, new_vm: NewVm) -> None:
    name = new_vm((0, 1))
    proxy = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), "http://127.0.0.1:1")
    done = skeyctl_process("--target", shared_daemon.tcp, "vm", "list", "--json", more={**proxy, "no_proxy": ""})
    assert name in names(done)


def test_the_version_is_skeyds() -> None:
    assert skeyctl_process("--version") == Done(0, f"skeyctl, version {skeyd.__version__}\n", "")


def test_an_error_is_all_that_a_program_finds_on_standard_error() -> None:
    # grpc's own log says something of such a target, too.
    done = skeyctl_process("--target", "unix:/" + "n" * 200, "vm", "list", "--json")
    assert done.status == 3
    assert done.error["reason"]


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
def test_who_reads_only_the_head_sees_no_traceback(shared_daemon: DaemonProcess, many: str, as_json: list[str]) -> None:
    arguments = ["--target", shared_daemon.target, "keys", "get", many, *as_json]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment()}
    with subprocess.Popen([*PROGRAM, *arguments], **streams) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(SECONDS) == 5


@pytest.mark.parametrize("command", ["vm list", "vm list --json", "vm list --help", "vm delete {vm} --yes"])
def test_who_reads_nothing_sees_no_traceback_either(shared_daemon: DaemonProcess, new_vm: NewVm, command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    arguments = command.format(vm=new_vm((0, 1))).split()
    try:
        done = skeyctl_process("--target", shared_daemon.target, *arguments, stdout=writer)
    finally:
        os.close(writer)
    assert done == Done(5, "", "")


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
def test_output_that_cant_be_written_is_a_trouble_with_files(
    shared_daemon: DaemonProcess, many: str, as_json: list[str]
) -> None:
    arguments = ("--target", shared_daemon.target, "keys", "get", many, *as_json)
    done = skeyctl_process(*arguments, script='exec "$@" > /dev/full')
    assert (done.status, done.out) == (5, "")
    message = "[Errno 28] No space left on device"
    if as_json:
        assert json.loads(done.err) == {"error": {"reason": "FILE", "message": message, "metadata": {}}}
    else:
        assert done.err == f"skeyctl: {message} [FILE]\n"


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- >&- 2>&-"])
def test_a_dump_is_whole_whichever_standard_streams_are_closed(
    shared_daemon: DaemonProcess, many: str, tmp_path: Path, closed: str
) -> None:
    file = tmp_path / "a.skeys"
    arguments = ("--target", shared_daemon.target, "keys", "dump", many, str(file))
    done = skeyctl_process(*arguments, script=f'exec "$@" {closed}')
    said = "" if " >&-" in closed else f"{len(MANY)} keys of {many} saved in {file}\n"
    assert done == Done(0, said, "")
    with Snapshot(file) as snapshot:
        assert b"".join(part.keys for part in list(snapshot.keys())) == MANY


def test_without_a_standard_input_nothing_is_deleted_without_yes(
    shared_daemon: DaemonProcess, new_vm: NewVm, stubs: Stubs
) -> None:
    name = new_vm((0, 1))
    arguments = ("--target", shared_daemon.target, "vm", "delete", name, "--json")
    done = skeyctl_process(*arguments, script='exec "$@" <&-')
    assert done.status == 2
    assert done.error["reason"] == "USAGE"
    assert name in stubs.names()


def _at_its_end(context: grpc.ServicerContext, event: threading.Event) -> None:
    if not context.add_callback(event.set):  # it has ended
        event.set()


class Stalled:
    """A stream that says half of what it has to say, and nothing more until it is cut."""

    def __init__(self) -> None:
        self.cut = threading.Event()

    def __call__(self, context: grpc.ServicerContext) -> Iterator[pb.GetSkeysResponse]:
        _at_its_end(context, self.cut)
        yield header((0, 512))
        yield chunk(0, bytes(256))
        assert self.cut.wait(SECONDS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda one: one.name)
@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
def test_a_dump_that_is_interrupted_leaves_what_was_there(
    runtime_dir: Path, tmp_path: Path, as_json: list[str], number: signal.Signals
) -> None:
    file, stalled = tmp_path / "a.skeys", Stalled()
    file.write_bytes(OLD)
    with LyingDaemon(runtime_dir) as daemon:
        daemon.reading = stalled
        with Terminal("--target", daemon.target, "keys", "dump", "a", str(file), *as_json) as terminal:
            terminal.wait_for("50%")
            assert len(names_in(tmp_path)) == 2, "half of it is in a file that has another name yet"
            assert file.read_bytes() == OLD
            terminal.process.send_signal(number)
            done = terminal.end()
        assert stalled.cut.wait(SECONDS), "the daemon was told"
    assert (done.status, done.out) == (128 + number, "")
    last = done.err.splitlines()[-1]
    if as_json:
        error = {"reason": "INTERRUPTED", "message": "interrupted", "metadata": {}}
        assert json.loads(last) == {"error": error}
    else:
        assert last == "skeyctl: interrupted [INTERRUPTED]"
    assert "Traceback" not in done.err
    assert names_in(tmp_path) == ["a.skeys"]
    assert file.read_bytes() == OLD


def test_a_dump_that_is_interrupted_leaves_no_file_where_there_was_none(runtime_dir: Path, tmp_path: Path) -> None:
    with LyingDaemon(runtime_dir) as daemon:
        daemon.reading = Stalled()
        file = tmp_path / "a.skeys"
        with Terminal("--target", daemon.target, "keys", "dump", "a", str(file)) as terminal:
            terminal.wait_for("50%")
            terminal.process.send_signal(signal.SIGINT)
            assert terminal.end().status == 130
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("command", ["vm show a", "keys get a", "keys set a 0 --acc 1"])
def test_a_wait_for_the_daemon_can_be_interrupted(runtime_dir: Path, command: str) -> None:
    over = threading.Event()

    def hang(context: grpc.ServicerContext) -> None:
        _at_its_end(context, over)
        assert over.wait(SECONDS)

    def look(context: grpc.ServicerContext) -> vm_pb2.Vm:
        hang(context)
        return vm_pb2.Vm()

    def read(context: grpc.ServicerContext) -> Iterator[pb.GetSkeysResponse]:
        hang(context)
        return iter(())

    def write(_: Iterator[pb.SetSkeysRequest], context: grpc.ServicerContext) -> Iterator[pb.SetSkeysResponse]:
        hang(context)
        return iter(())

    with LyingDaemon(runtime_dir) as daemon:
        daemon.looking, daemon.reading, daemon.writing = look, read, write
        arguments = ["--target", daemon.target, *command.split(), "--json"]
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment()}
        with subprocess.Popen([*PROGRAM, *arguments], **streams) as process:
            assert daemon.called.wait(SECONDS)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=SECONDS)
        assert over.wait(SECONDS), "the daemon was told"
    assert (process.returncode, out) == (130, b"")
    assert json.loads(err)["error"]["reason"] == "INTERRUPTED"


def test_a_command_that_stands_still_and_has_no_connection_ends_at_once(runtime_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.skeys"
    os.mkfifo(file)
    with LyingDaemon(runtime_dir) as daemon:
        arguments = ["--target", daemon.target, "keys", "load", "a", str(file)]
        with Terminal(*arguments) as terminal:
            # It stands still where it opens the FIFO, before it has said a word, and has no connection yet.
            writer = os.open(file, os.O_WRONLY)
            try:
                terminal.process.send_signal(signal.SIGTERM)
                done = terminal.end()
            finally:
                os.close(writer)
    assert (done.status, done.err) == (143, "\nskeyctl: interrupted [INTERRUPTED]\n")


def wait_until_full(pipe: int) -> None:
    """Wait until who writes to a pipe has to wait, for less is left in it than a line takes."""
    size, until = fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ), time.monotonic() + SECONDS
    while int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder) < size - mmap.PAGESIZE:
        assert time.monotonic() < until
        os.sched_yield()


def test_a_command_that_cant_end_is_ended_by_a_second_interrupt(runtime_dir: Path) -> None:
    cut = threading.Event()

    def read(context: grpc.ServicerContext) -> Iterator[pb.GetSkeysResponse]:
        _at_its_end(context, cut)
        yield header((0, 1 << 20))
        yield chunk(0, MANY)
        assert cut.wait(SECONDS)  # it doesn't end by itself

    with LyingDaemon(runtime_dir) as daemon:
        daemon.reading = read
        arguments = ["--target", daemon.target, "keys", "get", "a"]
        with subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.PIPE, env=environment()) as process:
            assert process.stdout is not None
            wait_until_full(process.stdout.fileno())
            process.send_signal(signal.SIGINT)
            assert cut.wait(SECONDS), "the daemon was told"
            # One signal after the other, until one comes late enough to be one of its own.
            until = time.monotonic() + SECONDS
            while process.poll() is None:
                assert time.monotonic() < until
                process.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(interrupts.ONE_EVENT_SECONDS / 4)
            assert process.returncode == 143


def test_two_signals_of_one_event_leave_nothing_behind(runtime_dir: Path, tmp_path: Path) -> None:
    with LyingDaemon(runtime_dir) as daemon:
        daemon.reading = Stalled()
        with Terminal("--target", daemon.target, "keys", "dump", "a", str(tmp_path / "a.skeys")) as terminal:
            terminal.wait_for("50%")
            terminal.process.send_signal(signal.SIGHUP)
            terminal.process.send_signal(signal.SIGTERM)
            assert terminal.end().status in (129, 143), "whichever was first"
    assert names_in(tmp_path) == []


def test_an_error_that_cant_be_written_leaves_the_exit_code() -> None:
    assert skeyctl_process("--target", NOBODY, "vm", "list", script='exec "$@" 2>/dev/full').status == 3


def test_a_command_that_is_done_is_not_interrupted_any_more(shared_daemon: DaemonProcess, new_vm: NewVm) -> None:
    arguments = ["--target", shared_daemon.target, "key", "set", new_vm((0, 1)), "0", "--acc", "1", "--allow-enable"]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment()}
    for _ in range(8):  # whichever step of its end the signal meets
        with subprocess.Popen([*PROGRAM, *arguments, "--json"], bufsize=0, **streams) as process:
            assert process.stdout is not None
            first = process.stdout.read(1)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=SECONDS)
        assert (process.returncode, err) == (0, b"")
        assert json.loads(first + out)["gfn"] == 0


def test_who_ignores_interrupts_goes_on(runtime_dir: Path) -> None:
    with LyingDaemon(runtime_dir) as daemon:
        answer = threading.Event()

        def look(_: grpc.ServicerContext) -> vm_pb2.Vm:
            assert answer.wait(SECONDS)
            return vm_pb2.Vm(name="vms/a")

        daemon.looking = look
        arguments = [*PROGRAM, "--target", daemon.target, "vm", "show", "a", "--json"]
        command = ["/bin/sh", "-c", 'trap "" HUP; exec "$@"', "sh", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
            assert daemon.called.wait(SECONDS)
            process.send_signal(signal.SIGHUP)
            answer.set()
            out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert json.loads(out)["name"] == "vms/a"


def test_a_daemon_that_dies_in_the_middle_of_a_stream_cant_be_reached(daemon: DaemonProcess) -> None:
    with Stubs(daemon.target) as stubs:
        # Lines for a full pipe first, so that the stream stands still, and keys far beyond what is read ahead then.
        vm = stubs.create("large", (0, 4 << 20)).name
        stubs.set(vm, [(0, MANY)])
    arguments = ["--target", daemon.target, "keys", "get", vm]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment()}
    with subprocess.Popen([*PROGRAM, *arguments], bufsize=0, **streams) as process:
        assert process.stdout is not None
        assert b"FRAMES" in process.stdout.readline()
        assert b"0x0-0x0" in process.stdout.readline()  # the first keys came
        daemon.kill()
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 3
    assert len(out.splitlines()) >= len(MANY) - 2, "what came was shown"
    (line,) = err.decode().splitlines()
    assert line.startswith("skeyctl: ")
    assert line.endswith(" [UNAVAILABLE]")
