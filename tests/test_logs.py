"""What the daemon writes to standard error, as systemd's journal or a person gets it."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from skeyd import limits, server
from tests.daemon import DaemonProcess
from tests.rpc.fixtures import new_vm, stubs
from tests.rpc.standard_services import SERVING, check
from tests.rpc.stubs import SECONDS, Stubs, chunk, commit, header, new_id, refused

__all__ = ["new_vm", "stubs"]


def test_every_call_leaves_one_line_with_what_it_was_about(shared_daemon: DaemonProcess, stubs: Stubs) -> None:
    vm_id = new_id()
    name = stubs.create(vm_id, (0, 1), (2, 1)).name
    stubs.send(header(name, (0, 256), allow_enable=True), chunk(0, b"\x10" * 256), commit())
    stubs.get(name)
    stubs.look_at(name)
    stubs.delete(name)
    lines: list[dict[str, Any]] = []
    while not lines or not lines[-1]["method"].endswith("/DeleteVm"):
        lines.append(shared_daemon.wait_for_line("rpc", vm=name))
    assert [line["method"] for line in lines] == [
        "/skeyd.v1.VmService/CreateVm",
        "/skeyd.v1.StorageKeyService/SetSkeys",
        "/skeyd.v1.StorageKeyService/GetSkeys",
        "/skeyd.v1.VmService/GetVm",
        "/skeyd.v1.VmService/DeleteVm",
    ]
    for line in lines:
        assert (line["level"], line["code"], line["peer"]) == ("info", "OK", "unix:")
        assert 0 <= line["ms"] < SECONDS * 1000
        assert datetime.now(UTC) - datetime.fromisoformat(line["timestamp"]) < timedelta(seconds=SECONDS)
    assert (lines[1]["keys"], lines[1]["repaired"]) == (256, 0)
    assert lines[2]["keys"] == 512


def test_a_refused_call_is_a_warning_with_its_reason_and_what_became_of_it(
    shared_daemon: DaemonProcess, stubs: Stubs
) -> None:
    name = stubs.create(new_id(), (0, 1)).name
    try:
        stubs.send(header(name, (0, 16), allow_enable=True), chunk(0, b"\x10" * 8), chunk(0, b"\x10"))
        line = shared_daemon.wait_for_line("rpc", vm=name, code="INVALID_ARGUMENT")
        assert (line["level"], line["reason"], line["keys"]) == ("warning", "CHUNK_OUT_OF_ORDER", 8)
        assert line["metadata"] == {"gfn": "0x0", "outcome": "ROLLED_BACK", "enabled": "true"}
        assert "0x8" in line["error"]
    finally:
        stubs.delete(name)


def test_a_call_over_tcp_is_logged_with_its_peers_address(shared_daemon: DaemonProcess) -> None:
    with Stubs(shared_daemon.tcp) as over_tcp:
        refused(lambda: over_tcp.look_at("vms/over-tcp"))
    line = shared_daemon.wait_for_line("rpc", vm="vms/over-tcp")
    assert line["peer"].startswith("ipv4:127.0.0.1:")


def test_gRPCs_own_calls_are_logged_too(shared_daemon: DaemonProcess, stubs: Stubs) -> None:  # noqa: N802
    with pytest.raises(grpc.RpcError):
        check(stubs.channel, "no-such-service")
    line = shared_daemon.wait_for_line("rpc", method="/grpc.health.v1.Health/Check", code="NOT_FOUND")
    assert line["level"] == "warning"


def test_keys_are_never_in_the_log(shared_daemon: DaemonProcess, stubs: Stubs) -> None:
    # They tell of a guest's inside. A marker that is no word of anything else, as bytes, as text and as numbers.
    marker = b"pzxvpzxv"
    name = stubs.create(new_id(), (0, 1)).name
    try:
        stubs.send(header(name, (0, 8), allow_enable=True), chunk(0, marker), commit())
        stubs.get(name)
        for wrong in (chunk(0, marker, crc32=1), chunk(0, marker + b"q"), chunk(1, marker)):
            stubs.send(header(name, (0, 8)), wrong)
        shared_daemon.wait_for_line("rpc", vm=name, reason="CHUNK_OUT_OF_ORDER")
        assert "pzxv" not in json.dumps(shared_daemon.log)
    finally:
        stubs.delete(name)


def test_an_internal_error_leaves_a_traceback_and_tells_the_client_nothing(daemon: DaemonProcess) -> None:
    # The directory of VMs goes away below the daemon, as a cleaner of temporary files might do.
    (daemon.runtime_dir / "vms").rmdir()
    with Stubs(daemon.target) as stubs, pytest.raises(grpc.RpcError) as caught:
        stubs.create("web", (0, 1))
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert caught.value.details() == "skeyd failed; its log says how"
    line = daemon.wait_for_line("rpc", code="INTERNAL")
    assert (line["level"], line["vm"]) == ("error", "vms/web")
    assert line["exception"].startswith("Traceback")
    assert "FileNotFoundError" in line["exception"]
    with Stubs(daemon.target) as stubs:
        assert stubs.names() == [], "and it goes on"


@contextmanager
def a_daemon(runtime_dir: Path, stderr: int, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-m", "skeyd.server", "--runtime-dir", str(runtime_dir), *arguments],
        stdin=subprocess.DEVNULL,
        stderr=stderr,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def lines_until(fd: int, word: bytes) -> bytes:
    """Read until a word has come."""
    read = b""
    while word not in read:
        part = os.read(fd, 65536)
        assert part, read
        read += part
    return read


HOSTILE_IDS = ["\x1b[31mred", "a\nlevel=error event=forged", "\x9b31mred", "\u202etxt", "\x00"]


def test_the_console_format_is_for_people_and_no_client_can_forge_or_colour_it(runtime_dir: Path) -> None:
    with a_daemon(runtime_dir, subprocess.PIPE, "--log-format", "console") as process:
        assert process.stderr is not None
        begin = lines_until(process.stderr.fileno(), b"serving")
        with Stubs(f"unix:{runtime_dir}/skeyd.sock") as stubs:
            for vm_id in HOSTILE_IDS:
                refused(partial(stubs.create, vm_id, (0, 1)))
                refused(partial(stubs.look_at, f"vms/{vm_id}"))
                refused(partial(stubs.get, vm_id))
                stubs.send(header(vm_id, (0, 1)))
        process.send_signal(signal.SIGTERM)
        text = (begin + process.stderr.read()).decode()
        assert process.wait() == 0
    lines = text.splitlines()
    assert len(lines) == 1 + 4 * len(HOSTILE_IDS) + 2
    assert all("rpc" in line and "VM_ID_INVALID" in line for line in lines[1:-2])
    assert text.replace("\n", "").isprintable()
    assert not text.startswith("{")


def test_on_a_terminal_the_log_is_in_colour(runtime_dir: Path) -> None:
    ours, theirs = pty.openpty()
    try:
        with a_daemon(runtime_dir, theirs) as process:
            os.close(theirs)
            theirs = -1
            text = lines_until(ours, b"serving")
            process.send_signal(signal.SIGTERM)
            text += lines_until(ours, b"stopped")
            assert process.wait() == 0
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)
    assert b"\x1b[" in text
    assert b"serving" in text


def test_json_can_be_asked_for_on_a_terminal(runtime_dir: Path) -> None:
    ours, theirs = pty.openpty()
    try:
        with a_daemon(runtime_dir, theirs, "--log-format", "json") as process:
            os.close(theirs)
            theirs = -1
            text = lines_until(ours, b"\n")
            process.send_signal(signal.SIGTERM)
            lines_until(ours, b"stopped")
            assert process.wait() == 0
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)
    assert json.loads(text)["event"] == "serving"


# Where nobody reads it

A_LONG_ID = "\U000e0001" * 80
"""An id that makes some kilobyte of a line."""
REFUSED = 1_500
"""Calls that are logged with it: more lines than wait, with those of 2,000 health checks."""


def lines_in(text: bytes) -> list[dict[str, Any]]:
    assert text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


def rest_of(process: subprocess.Popen[bytes], so_far: bytes) -> list[dict[str, Any]]:
    """Read until the end, and wait for it."""
    assert process.stderr is not None
    text = so_far + process.stderr.read()
    assert process.wait(SECONDS) == 0
    return lines_in(text)


def a_socket() -> tuple[int, int]:
    """As systemd's journal has it."""
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def test_a_log_that_nobody_reads_keeps_no_call_waiting_and_tells_what_is_lost_when_it_is_read_again(
    runtime_dir: Path,
) -> None:
    with a_daemon(runtime_dir, subprocess.PIPE) as process:
        assert process.stderr is not None
        text = lines_until(process.stderr.fileno(), b"serving")
        with Stubs(f"unix:{runtime_dir}/skeyd.sock") as stubs:
            for _ in range(2_000):
                assert check(stubs.channel) == SERVING
            for _ in range(REFUSED):
                refused(partial(stubs.create, A_LONG_ID, (0, 1)))
            text += lines_until(process.stderr.fileno(), b"log lines lost")
            for _ in range(3):
                assert check(stubs.channel) == SERVING
        process.send_signal(signal.SIGTERM)
        lines = rest_of(process, text)
    (gap,) = (number for number, line in enumerate(lines) if line["event"] == "log lines lost")
    assert lines[gap]["level"] == "error"
    before, after = lines[1:gap], lines[gap + 1 :]
    assert len(before) + lines[gap]["lines"] == 2_000 + REFUSED
    assert [line["code"] for line in before[:2_001]] == ["OK"] * 2_000 + ["INVALID_ARGUMENT"]
    assert [line["event"] for line in after] == ["rpc"] * 3 + ["draining", "stopped"]
    times = [line["timestamp"] for line in before]
    assert times == sorted(times)


@pytest.mark.parametrize("make", [os.pipe, a_socket], ids=["pipe", "socket"])
def test_sigterm_ends_a_daemon_whose_log_nobody_reads(make: Callable[[], tuple[int, int]], runtime_dir: Path) -> None:
    reader, stderr = make()
    with os.fdopen(reader, "rb") as log, a_daemon(runtime_dir, stderr) as process:
        os.close(stderr)
        text = lines_until(reader, b"serving")
        with Stubs(f"unix:{runtime_dir}/skeyd.sock") as stubs:
            for _ in range(2_000):
                assert check(stubs.channel) == SERVING
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(limits.DRAIN_SECONDS + SECONDS) == 0
        assert time.monotonic() - began < limits.DRAIN_SECONDS + limits.LOG_FLUSH_SECONDS
        # What there was room for is there, and is whole but for its end.
        text += log.read()
    assert lines_in(text[: text.rindex(b"\n") + 1])[-1]["code"] == "OK"


def test_what_waits_at_the_end_is_written_where_it_is_read_then(runtime_dir: Path) -> None:
    with a_daemon(runtime_dir, subprocess.PIPE) as process:
        assert process.stderr is not None
        text = lines_until(process.stderr.fileno(), b"serving")
        with Stubs(f"unix:{runtime_dir}/skeyd.sock") as stubs:
            for _ in range(2_000):
                assert check(stubs.channel) == SERVING
        process.send_signal(signal.SIGTERM)
        lines = rest_of(process, text)
    assert [line["event"] for line in lines] == ["serving", *["rpc"] * 2_000, "draining", "stopped"]


def test_a_daemon_whose_log_cant_be_written_goes_on_and_ends_in_order(runtime_dir: Path) -> None:
    # As a file on a full disk, and as a pipe or a socket whose reader is gone.
    reader, broken = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        for stderr in (full, broken):
            with a_daemon(runtime_dir, stderr) as process:
                with grpc.insecure_channel(f"unix:{runtime_dir}/skeyd.sock") as channel:
                    grpc.channel_ready_future(channel).result(SECONDS)
                    assert [check(channel) for _ in range(20)] == [SERVING] * 20
                process.send_signal(signal.SIGTERM)
                assert process.wait(limits.DRAIN_SECONDS + SECONDS) == 0
    finally:
        os.close(full)
        os.close(broken)


def run(program: str, stderr: int = subprocess.PIPE) -> tuple[int, list[dict[str, Any]]]:
    """Run a program that logs; its exit status and its lines."""
    done = subprocess.run(
        [sys.executable, "-c", program], stdin=subprocess.DEVNULL, stderr=stderr, timeout=SECONDS, check=False
    )
    return done.returncode, lines_in(done.stderr) if done.stderr else []


def write_for_ever(fd: int) -> None:
    while True:
        os.write(fd, bytes(4096))


CRASH = """
from skeyd import logs
log = logs.configure("json")
log.info("before")
raise LookupError("a mistake")
"""


def test_an_exception_that_ends_the_process_is_the_last_line() -> None:
    status, lines = run(CRASH)
    assert status == 1
    assert [line["event"] for line in lines] == ["before", "failed"]
    assert lines[1]["level"] == "critical"
    assert lines[1]["exception"].startswith("Traceback")
    assert lines[1]["exception"].endswith("LookupError: a mistake")


def test_a_process_that_fails_ends_whoever_reads_its_log(runtime_dir: Path) -> None:
    reader, full = os.pipe()
    try:
        os.set_blocking(full, False)
        with pytest.raises(BlockingIOError):
            write_for_ever(full)
        os.set_blocking(full, True)
        assert run(CRASH, full) == (1, [])
        (runtime_dir / "skeyd.sock").touch()
        main = f"from skeyd import server; server.main(['--runtime-dir', {str(runtime_dir)!r}])"
        assert run(main, full) == (server.EXIT_UNUSABLE, [])
    finally:
        os.close(reader)
        os.close(full)


def test_lines_of_python_and_its_libraries_go_the_same_way_in_the_same_order() -> None:
    status, lines = run("""
import logging, threading, warnings
from skeyd import logs
log = logs.configure("json")
logging.getLogger("grpc._server").error("of %s", "grpc", exc_info=ValueError("its own"))
log.warning("ours", lines=5)
warnings.warn("a warning")
thread = threading.Thread(target=lambda: 1 / 0, name="one")
thread.start()
thread.join()
class Unwritable:
    def __str__(self):
        raise OSError
logging.info(Unwritable())
logs.flush()
""")
    assert status == 0
    assert [line["level"] for line in lines] == ["error", "warning", "warning", "error", "error"]
    assert lines[0]["event"] == "of grpc"
    assert lines[0]["exception"] == "ValueError: its own"
    assert lines[1]["lines"] == 5
    assert "a warning" in lines[2]["event"]
    assert (lines[3]["event"], lines[3]["thread"]) == ("thread failed", "one")
    assert lines[3]["exception"].endswith("ZeroDivisionError: division by zero")
    assert (lines[4]["event"], lines[4]["lines"]) == ("log lines lost", 1), "it could not be made"


def test_a_line_has_an_end_whatever_it_is_about() -> None:
    status, lines = run("""
from skeyd import logs
log = logs.configure("json")
log.error("long", error="a" * 9_000 + "z", metadata={"path": "b" * 9_000}, number=5)
log.error("wide", **{f"field{number}": "\U0001f511" * 4_000 for number in range(5)})
log.error("wide", **{f"field{number}": "\U0001f511" * 4_000 for number in range(5)}, exc_info=ValueError("c" * 9_000))
""")
    assert status == 0
    assert lines[0]["error"] == "a" * 2048 + " […] " + "a" * 2047 + "z"
    assert lines[0]["metadata"]["path"] == "b" * 2048 + " […] " + "b" * 2048
    assert lines[0]["number"] == 5
    assert lines[1]["field4"] == "\U0001f511" * 64 + " […] " + "\U0001f511" * 64
    assert all(len(json.dumps(line)) < limits.MAX_LOG_LINE_BYTES for line in lines)
