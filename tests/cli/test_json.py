"""The shapes that docs/skeyctl.md promises are those that are printed, field for field."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from skeyd.v1 import host_service_pb2
from tests.cli.noting_daemon import NotingDaemon
from tests.cli.running import skeyctl
from tests.cli.test_vm import CANDIDATES
from tests.daemon import DaemonProcess
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import Stubs, new_id

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "skeyctl.md"

Shape = Mapping[str, Sequence[str] | None]
"""Fields in order; for a list of objects the fields of those."""


def documented(command: str) -> Shape:
    """Read a command's row of the table."""
    for names, cell in re.findall(r"^\| (`[a-z].*?) \| (.*) \|$", PAGE.read_text(), re.MULTILINE):
        if command in re.findall(r"`([a-z ]+)`", names):
            nested = re.findall(r"`([a-z_]+)` \(a list of ([^)]*)\)", cell)
            inner = {name: re.findall(r"`([a-z_]+)`", fields) for name, fields in nested}
            outer = re.findall(r"`([a-z_]+)`", re.sub(r"\(.*?\)", "", cell))
            assert outer, f"the row of {command} has no fields"
            return {name: inner.get(name) for name in outer}
    raise AssertionError(f"{command} is not on the page")


def check(value: Any, command: str) -> None:
    """Hold a value to its row; every list that the row describes must have something in it to be held to."""
    shape = documented(command)
    assert list(value) == list(shape)
    for name, fields in shape.items():
        if fields is not None:
            assert value[name], f"{name} is empty: it shows nothing"
            for one in value[name]:
                assert list(one) == fields


@pytest.fixture
def name(new_vm: NewVm, stubs: Stubs) -> str:
    """Make a VM with something of everything: keys, and a gap between two slots."""
    made = new_vm((0, 1), (2, 1))
    stubs.set(made, [(0, b"\x3e" * 256)])
    return made


def test_every_command_that_does_something_is_on_the_page(shared_daemon: DaemonProcess) -> None:
    commands = {"host", "vm create", "vm adopt", "vm candidates", "vm show", "vm list", "vm delete"}
    commands |= {f"keys {verb}" for verb in ("get", "set", "dump", "load", "digest", "compare", "summary")}
    commands |= {f"key {verb}" for verb in ("get", "set", "reset-referenced")}
    rows = re.findall(r"^\| (`[a-z].*?) \| ", PAGE.read_text(), re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([a-z -]+)`", row)} == commands
    for command in commands:
        assert "--json " in skeyctl(shared_daemon.target, *command.split(), "--help").out


def test_host(shared_daemon: DaemonProcess) -> None:
    value = skeyctl(shared_daemon.target, "host", "--json").value
    check(value, "host")
    assert list(value["versions"]) == ["skeyd", "python", "grpc", "protobuf"]
    assert list(value["limits"]) == [field.name for field in host_service_pb2.Limits.DESCRIPTOR.fields]
    assert all(isinstance(limit, int) and limit > 0 for limit in value["limits"].values())
    answers = [value["can_own_vms"], *(one["answer"] for one in value["findings"])]
    assert set(answers) <= {"yes", "no", None}
    assert all(one["name"] and one["remedy"] != "" for one in value["findings"])


def test_vm_create_show_list_and_delete(shared_daemon: DaemonProcess, stubs: Stubs) -> None:
    vm_id = new_id()
    arguments = ("--kind", "simulated", "--memory", "1M", "--memory", "2M@4G", "--json")
    made = skeyctl(shared_daemon.target, "vm", "create", vm_id, *arguments).value
    try:
        check(made, "vm create")
        vm = stubs.look_at(f"vms/{vm_id}")
        assert made == {
            "name": vm.name,
            "uid": vm.uid,
            "incarnation": vm.incarnation,
            "kind": "simulated",
            "state": "ready",
            "state_reason": None,
            "memory_slots": [
                {"slot": 0, "start_gfn": 0, "count": 256, "backing": "none"},
                {"slot": 1, "start_gfn": 1 << 20, "count": 512, "backing": "none"},
            ],
            "uses_storage_keys": False,
            "kernel": "simulated Linux 7.2",
            "worker_version": vm.worker_version,
            "worker_pid": vm.worker_pid,
            "create_time": vm.create_time.ToJsonString(),
            "vmm": None,
            "last_write": None,
        }
        shown = skeyctl(shared_daemon.target, "vm", "show", vm_id, "--json").value
        check(shown, "vm show")
        assert shown == made
        listed = skeyctl(shared_daemon.target, "vm", "list", "--json").value
        assert made in listed
        for one in listed:
            assert list(one) == list(documented("vm show"))
    finally:
        deleted = skeyctl(shared_daemon.target, "vm", "delete", vm_id, "--yes", "--json").value
    check(deleted, "vm delete")
    assert deleted == {"deleted": f"vms/{vm_id}"}


def test_vm_candidates(runtime_dir: Path) -> None:
    with NotingDaemon(runtime_dir) as daemon:
        daemon.candidates = CANDIDATES
        value = skeyctl(daemon.target, "vm", "candidates", "--json").value
    check(value, "vm candidates")
    assert value["candidates"][0] == {
        "pid": 812,
        "start_time": 4711,
        "uid": 64055,
        "executable": "/usr/bin/qemu-system-s390x",
        "name": "web",
        "vm_fds": [13],
        "vcpu_fds": 4,
        "mapped_bytes": (5 << 30) + 1,
        "resident_bytes": (3 << 20) - 1,
        "adopted_as": "vms/web",
        "refusal": None,
        "refusal_detail": None,
    }
    traced = value["candidates"][1]
    assert (traced["executable"], traced["name"], traced["adopted_as"]) == (None, None, None)
    assert (traced["refusal"], traced["refusal_detail"]) == ("VMM_TRACED", "7 is traced")
    assert (value["unreadable_processes"], value["left_out"], value["skeyd_workers"]) == (3, 2, 1)


def test_keys_get(shared_daemon: DaemonProcess, name: str) -> None:
    value = skeyctl(shared_daemon.target, "keys", "get", name, "--json").value
    check(value, "keys get")
    assert value["vm"] == name


def test_keys_get_of_a_guest_without_keys_has_the_same_fields(shared_daemon: DaemonProcess, new_vm: NewVm) -> None:
    value = skeyctl(shared_daemon.target, "keys", "get", new_vm((0, 1)), "--json").value
    assert list(value) == list(documented("keys get"))
    assert value["uses_storage_keys"] is False


def test_keys_set_dump_and_load(shared_daemon: DaemonProcess, name: str, tmp_path: Path) -> None:
    file = str(tmp_path / "a.skeys")
    check(skeyctl(shared_daemon.target, "keys", "set", name, "0", "--acc", "1", "--json").value, "keys set")
    check(skeyctl(shared_daemon.target, "keys", "dump", name, file, "--json").value, "keys dump")
    check(skeyctl(shared_daemon.target, "keys", "load", name, file, "--json").value, "keys load")


def test_the_fields_of_an_error_are_those_of_the_page(shared_daemon: DaemonProcess) -> None:
    (fields,) = re.findall(r'`\{"error": \{(.*?)\}\}`', PAGE.read_text())
    error = skeyctl(shared_daemon.target, "vm", "show", "nope", "--json").error
    assert [f'"{name}"' for name in error] == fields.split(", ")
    assert error["metadata"] == {"vm": "vms/nope"}


def test_keys_digest(shared_daemon: DaemonProcess, name: str, new_vm: NewVm) -> None:
    value = skeyctl(shared_daemon.target, "keys", "digest", name, "--json").value
    check(value, "keys digest")
    keyless = skeyctl(shared_daemon.target, "keys", "digest", new_vm((0, 1)), "--json").value
    assert list(keyless) == list(value)


def test_keys_compare(shared_daemon: DaemonProcess, name: str, new_vm: NewVm, stubs: Stubs) -> None:
    other = new_vm((0, 1))
    stubs.set(other, [(0, b"\x40" * 256)])
    done = skeyctl(shared_daemon.target, "keys", "compare", name, other, "--json")
    assert (done.status, done.err) == (6, "")
    check(json.loads(done.out), "keys compare")
    same = skeyctl(shared_daemon.target, "keys", "compare", name, name, "--json").value
    assert list(same) == list(documented("keys compare"))


def test_keys_summary(shared_daemon: DaemonProcess, name: str, new_vm: NewVm) -> None:
    value = skeyctl(shared_daemon.target, "keys", "summary", name, "--json").value
    check(value, "keys summary")
    assert list(value["longest_run"]) == ["start_gfn", "count", "key"]
    keyless = skeyctl(shared_daemon.target, "keys", "summary", new_vm((0, 1)), "--json").value
    assert list(keyless) == list(value)
    assert keyless["longest_run"] is None
