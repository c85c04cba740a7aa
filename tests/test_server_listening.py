"""The daemon's command line, its runtime directory, and where it listens."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from skeyd import server
from tests.daemon import DaemonProcess, start_in_vain
from tests.rpc.standard_services import SERVING, check
from tests.rpc.stubs import SECONDS, Stubs


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# The command line


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:50051",
        "[::]:50051",
        "192.0.2.1:50051",
        "[2001:db8::1]:50051",
        "8.8.8.8:0",
        "localhost:50051",
        "skeyd.example:50051",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:http",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "127.1:50051",
        "[127.0.0.1]:50051",
        "::1:50051",
        "::1:5051",
        "[::1:50051",
        "::1]:50051",
        "[::1]",
        ":50051",
        "50051",
        "",
        "unix:/tmp/a",
        "127.0.0.1:50051,0.0.0.0:50051",
    ],
)
def test_plaintext_is_for_loopback_addresses_and_nothing_else(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        server.parse(["--runtime-dir", str(tmp_path / "r"), "--insecure-tcp", address])
    assert caught.value.code == 2
    assert "--insecure-tcp" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("127.0.0.1:50051", "127.0.0.1:50051"),
        ("127.8.9.10:1", "127.8.9.10:1"),
        ("[::1]:50051", "[::1]:50051"),
        ("[0:0:0:0:0:0:0:1]:0", "[::1]:0"),
        ("127.0.0.1:00080", "127.0.0.1:80"),
        ("127.0.0.1: 80", "127.0.0.1:80"),
    ],
)
def test_what_grpc_is_given_is_the_address_that_was_checked(address: str, target: str) -> None:
    assert server.parse(["--insecure-tcp", address]).insecure_tcp == target


def test_a_wrong_command_line_ends_the_process_with_its_own_status(runtime_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "skeyd.server", "--runtime-dir", runtime_dir, "--insecure-tcp", "0.0.0.0:0"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 2
    assert "0.0.0.0 is not a loopback address" in done.stderr
    assert not list(runtime_dir.iterdir())


@pytest.mark.parametrize("what", ["nothing", "a-file"])
def test_a_memory_dir_has_to_be_a_directory(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "memory"
    if what == "a-file":
        path.touch()
    with pytest.raises(SystemExit) as caught:
        server.parse(["--memory-dir", str(path)])
    assert caught.value.code == 2
    assert str(path) in capsys.readouterr().err


def test_a_memory_dir_stays_the_same_whatever_the_current_directory_becomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory").mkdir()
    monkeypatch.chdir(tmp_path)
    assert server.parse(["--memory-dir", "memory"]).memory_dir == tmp_path / "memory"


# Beginning


def test_the_socket_and_all_directories_are_for_the_owner_only_whatever_the_umask(runtime_dir: Path) -> None:
    daemon = DaemonProcess(runtime_dir / "made" / "by-itself")
    before = os.umask(0)
    try:
        daemon.start()
    finally:
        os.umask(before)
    try:
        with Stubs(daemon.target) as stubs:
            stubs.create("web", (0, 1))
        assert mode_of(daemon.runtime_dir) == 0o700
        found = {path.relative_to(daemon.runtime_dir): path.lstat().st_mode for path in daemon.runtime_dir.rglob("*")}
        assert stat.S_ISSOCK(found[Path("skeyd.sock")])
        assert Path("vms/web/worker.sock") in found
        directories = {Path("vms"), Path("vms/web")}
        assert {path: stat.S_IMODE(found[path]) for path in directories} == dict.fromkeys(directories, 0o700)
        sockets_and_files = {
            Path("skeyd.sock"),
            Path("front.lock"),
            Path("vms/web/vm.json"),
            Path("vms/web/worker.log"),
        }
        assert {path: stat.S_IMODE(found[path]) for path in sockets_and_files} == dict.fromkeys(
            sockets_and_files, 0o600
        )
    finally:
        daemon.end_everything()


def test_a_second_daemon_names_the_first_and_harms_nothing(daemon: DaemonProcess) -> None:
    with Stubs(daemon.target) as stubs:
        vm = stubs.create("web", (0, 1))
        stubs.set(vm.name, [(0, b"\x10")])
        socket_before = (daemon.runtime_dir / "skeyd.sock").stat().st_ino
        status, line = start_in_vain("--runtime-dir", str(daemon.runtime_dir))
        assert status == server.EXIT_UNUSABLE
        assert f"pid {daemon.pid}" in line["error"]
        assert (daemon.runtime_dir / "skeyd.sock").stat().st_ino == socket_before
        assert int((daemon.runtime_dir / "front.lock").read_text()) == daemon.pid
        with Stubs(daemon.target) as anew:
            assert check(anew.channel) == SERVING
            assert anew.look_at(vm.name).worker_pid == vm.worker_pid
            assert anew.get(vm.name, (0, 1)).keys == b"\x10"


@pytest.mark.parametrize("mode", [0o755, 0o701])
def test_a_runtime_directory_that_is_open_to_others_is_refused(runtime_dir: Path, mode: int) -> None:
    runtime_dir.chmod(mode)
    status, line = start_in_vain("--runtime-dir", str(runtime_dir))
    assert status == server.EXIT_UNUSABLE
    assert f"{mode:04o}" in line["error"]
    assert str(runtime_dir) in line["error"]
    assert mode_of(runtime_dir) == mode, "it is reported, not put right"
    assert not list(runtime_dir.iterdir())


def a_file(path: Path) -> None:
    path.touch()


def a_link_to_a_good_one(path: Path) -> None:
    (path.parent / "good").mkdir(mode=0o700)
    path.symlink_to(path.parent / "good")


@pytest.mark.parametrize("make", [a_file, a_link_to_a_good_one])
def test_what_is_no_directory_is_refused_as_runtime_directory(runtime_dir: Path, make: Any) -> None:
    (runtime_dir / "parent").mkdir()
    path = runtime_dir / "parent" / "r"
    make(path)
    status, line = start_in_vain("--runtime-dir", str(path))
    assert status == server.EXIT_UNUSABLE
    assert str(path) in line["error"]


def test_a_path_too_long_for_a_socket_is_refused_with_the_length_that_fits(runtime_dir: Path) -> None:
    fits = 107 - len("/skeyd.sock") - len(str(runtime_dir)) - 1
    status, line = start_in_vain("--runtime-dir", str(runtime_dir / ("x" * (fits + 1))))
    assert status == server.EXIT_UNUSABLE
    assert "107 bytes" in line["error"]
    daemon = DaemonProcess(runtime_dir / ("x" * fits))
    try:
        daemon.start()
        with Stubs(daemon.target) as stubs:
            assert check(stubs.channel) == SERVING
    finally:
        daemon.end_everything()


def test_what_is_no_socket_in_the_sockets_place_is_left_there(runtime_dir: Path) -> None:
    (runtime_dir / "skeyd.sock").touch()
    status, line = start_in_vain("--runtime-dir", str(runtime_dir))
    assert status == server.EXIT_UNUSABLE
    assert "skeyd.sock" in line["error"]
    assert (runtime_dir / "skeyd.sock").exists()


def test_a_port_that_another_daemon_has_is_not_shared_with_it(shared_daemon: DaemonProcess, runtime_dir: Path) -> None:
    status, line = start_in_vain("--runtime-dir", str(runtime_dir), "--insecure-tcp", shared_daemon.tcp)
    assert status == server.EXIT_UNUSABLE
    assert shared_daemon.tcp in line["error"]
    with Stubs(shared_daemon.tcp) as stubs:
        assert check(stubs.channel) == SERVING


def test_tcp_over_ipv6_is_loopback_too(runtime_dir: Path) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            there = False
        else:
            there = True
    daemon = DaemonProcess(runtime_dir)
    if not there:  # a container without IPv6: it has to be said, then
        status, line = start_in_vain("--runtime-dir", str(runtime_dir), "--insecure-tcp", "[::1]:0")
        assert (status, "[::1]:0" in line["error"]) == (server.EXIT_UNUSABLE, True)
        return
    try:
        daemon.start("--insecure-tcp", "[::1]:0")
        assert daemon.tcp.startswith("[::1]:")
        with Stubs(daemon.tcp) as stubs:
            assert check(stubs.channel) == SERVING
    finally:
        daemon.end_everything()
