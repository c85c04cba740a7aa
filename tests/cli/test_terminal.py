"""skeyctl at a terminal: it asks before it deletes, and it shows a bar, which is no part of the output."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from skeyd.v1 import vm_pb2
from tests.cli.noting_daemon import NotingDaemon
from tests.cli.running import Terminal, skeyctl_process
from tests.daemon import DaemonProcess
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import Stubs, some_keys

FRAMES = 256
END_OF_FILE = "\x04"


@pytest.mark.parametrize(("answer", "as_json"), [("y", []), (" YES ", []), ("yes", ["--json"])])
def test_a_vm_is_deleted_after_a_yes(
    shared_daemon: DaemonProcess, new_vm: NewVm, stubs: Stubs, answer: str, as_json: list[str]
) -> None:
    name = new_vm((0, 1))
    with Terminal("--target", shared_daemon.target, "vm", "delete", name, *as_json) as terminal:
        terminal.wait_for(f"Delete {name}, its memory and its keys? [y/N]: ")
        assert name in stubs.names()
        terminal.enter(f"{answer}\n")
        done = terminal.end()
    assert done.status == 0
    if as_json:
        assert done.out.startswith("{")
        assert json.loads(done.out) == {"deleted": name}
    else:
        assert done.out == f"{name} deleted\n", "nothing of the question"
    assert name not in stubs.names()


def test_of_an_adopted_vm_it_is_asked_what_is_done_to_it(runtime_dir: Path) -> None:
    with NotingDaemon(runtime_dir) as daemon:
        daemon.vms = [vm_pb2.Vm(name="vms/web", kind=vm_pb2.VM_KIND_ADOPTED)]
        with Terminal("--target", daemon.target, "vm", "delete", "web") as terminal:
            terminal.wait_for("Let go of vms/web? Its process keeps the guest, and the keys as they are. [y/N]: ")
            terminal.enter("n\n")
            assert terminal.end().status == 130


@pytest.mark.parametrize("answer", ["n\n", "\n", "yep\n", END_OF_FILE])
def test_a_vm_is_not_deleted_after_anything_else(
    shared_daemon: DaemonProcess, new_vm: NewVm, stubs: Stubs, answer: str
) -> None:
    name = new_vm((0, 1))
    with Terminal("--target", shared_daemon.target, "vm", "delete", name) as terminal:
        terminal.wait_for("[y/N]: ")
        terminal.enter(answer)
        done = terminal.end()
    assert (done.status, done.out) == (130, "")
    assert done.err.endswith("skeyctl: interrupted [INTERRUPTED]\n")
    assert name in stubs.names()


def test_a_vm_is_not_deleted_after_an_interrupt(shared_daemon: DaemonProcess, new_vm: NewVm, stubs: Stubs) -> None:
    name = new_vm((0, 1))
    with Terminal("--target", shared_daemon.target, "vm", "delete", name, "--json") as terminal:
        terminal.wait_for("[y/N]: ")
        terminal.process.send_signal(signal.SIGINT)
        done = terminal.end()
    assert (done.status, done.out) == (130, "")
    assert json.loads(done.err.splitlines()[-1])["error"]["reason"] == "INTERRUPTED"
    assert name in stubs.names()


def test_yes_is_not_asked_for_at_a_terminal_either(shared_daemon: DaemonProcess, new_vm: NewVm, stubs: Stubs) -> None:
    name = new_vm((0, 1))
    with Terminal("--target", shared_daemon.target, "vm", "delete", name, "--yes", pipe_stdout=False) as terminal:
        done = terminal.end()
    assert (done.status, done.err) == (0, f"{name} deleted\n")
    assert name not in stubs.names()


def test_a_bar_shows_how_far_it_is_and_nothing_of_it_is_output(
    shared_daemon: DaemonProcess, new_vm: NewVm, stubs: Stubs, tmp_path: Path
) -> None:
    name, file = new_vm((0, 1), (2, 1)), tmp_path / "a.skeys"
    target = ("--target", shared_daemon.target)
    for arguments, label, output in [
        (("set", name, "0-0xff", "0x200-0x2ff", "--acc", "3", "--allow-enable"), "setting", "512 keys of"),
        (("dump", name, str(file)), "dumping", f"512 keys of {name} saved in {file}\n"),
        (("load", name, str(file)), "setting", f"512 keys of {name} set and verified\n"),
    ]:
        with Terminal(*target, "keys", *arguments) as terminal:
            done = terminal.end()
        assert done.status == 0
        assert done.out.startswith(output)
        assert "%" not in done.out
        assert "\r" not in done.out
        assert label in done.err
        assert "100%" in done.err
        assert "keys of" not in done.err
    assert stubs.get(name).keys == b"\x30" * 2 * FRAMES


def test_a_bar_and_json_go_together(shared_daemon: DaemonProcess, new_vm: NewVm, stubs: Stubs, tmp_path: Path) -> None:
    name, file = new_vm((0, 1)), tmp_path / "a.skeys"
    stubs.set(name, [(0, some_keys(FRAMES))])
    with Terminal("--target", shared_daemon.target, "keys", "dump", name, str(file), "--json") as terminal:
        done = terminal.end()
    assert done.status == 0
    assert json.loads(done.out)["keys"] == FRAMES
    assert "100%" in done.err


def test_off_a_terminal_there_is_no_bar(
    shared_daemon: DaemonProcess, new_vm: NewVm, stubs: Stubs, tmp_path: Path
) -> None:
    name, file = new_vm((0, 1)), tmp_path / "a.skeys"
    stubs.set(name, [(0, some_keys(FRAMES))])
    done = skeyctl_process("--target", shared_daemon.target, "keys", "dump", name, str(file))
    assert (done.status, done.err) == (0, "")
    assert done.out == f"{FRAMES} keys of {name} saved in {file}\n"


def test_where_there_is_nothing_to_wait_for_there_is_no_bar(
    shared_daemon: DaemonProcess, new_vm: NewVm, tmp_path: Path
) -> None:
    name, file = new_vm((0, 1)), tmp_path / "a.skeys"
    with Terminal("--target", shared_daemon.target, "keys", "dump", name, str(file)) as terminal:
        done = terminal.end()
    assert (done.status, done.err) == (0, "")
    assert done.out == f"{name} uses no storage keys; {file} says so\n"


def test_a_refusal_under_a_bar_is_still_read(shared_daemon: DaemonProcess, new_vm: NewVm) -> None:
    # Nearly 2^64 frames: more than a bar's length is used to.
    name = new_vm((0, 1))
    arguments = ("keys", "set", name, "1-0xffffffffffffffff", "--acc", "1", "--allow-enable")
    with Terminal("--target", shared_daemon.target, *arguments) as terminal:
        done = terminal.end()
    assert (done.status, done.out) == (1, "")
    assert "Traceback" not in done.err
    assert done.err.endswith(" [GFN_NOT_MAPPED]\n  no key was changed\n")
