"""What the daemon writes to standard error, as systemd's journal or a person gets it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.daemon import DaemonProcess
from tests.rpc.fixtures import new_vm, stubs
from tests.rpc.standard_services import check
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
