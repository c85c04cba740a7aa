"""skeyctl key."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from skeyd.v1 import vm_pb2
from tests.cli.running import NOBODY, Done, skeyctl
from tests.daemon import DaemonProcess
from tests.rpc.fixtures import NewVm

HEAD = "GFN                 KEY   ACC  F  R  C\n"
HEAD_OF_TWO = "GFN                      KEY   ACC  F  R  C\n"
KEYLESS = {"uses_storage_keys": False}

Skeyctl = Callable[..., Done]


@pytest.fixture
def key(shared_daemon: DaemonProcess) -> Skeyctl:
    """Run `skeyctl key` on the shared daemon."""
    return lambda *arguments: skeyctl(shared_daemon.target, "key", *arguments)


def as_json(byte: int, acc: int, fetch: bool, referenced: bool, changed: bool) -> dict[str, object]:
    parts = {"access_control": acc, "fetch_protection": fetch, "referenced": referenced, "changed": changed}
    return {"uses_storage_keys": True, "key": byte, **parts}


def test_the_key_of_a_frame_is_set_and_shown(key: Skeyctl, new_vm: NewVm) -> None:
    name = new_vm((0, 1))
    vm = name.removeprefix("vms/")
    assert key("get", vm, "0x10") == Done(0, "the guest uses no storage keys\n", "")
    assert key("set", vm, "0x10", "--acc", "3", "--fetch", "--referenced", "--allow-enable") == Done(
        0,
        HEAD_OF_TWO + "0x10                is   0x3c    3  1  1  0\n"
        "set with the calls for ranges, and verified; the guest uses storage keys from now on\n",
        "",
    )
    assert key("get", vm, "16") == Done(0, HEAD + "0x10                0x3c    3  1  1  0\n", "")
    assert key("reset-referenced", vm, "0x10") == Done(0, "gfn 0x10 was referenced, and not changed\n", "")
    assert key("reset-referenced", vm, "0x10") == Done(0, "gfn 0x10 was not referenced, and not changed\n", "")
    assert key("set", name, "0x10", "--key", "0xf2") == Done(
        0,
        HEAD_OF_TWO + "0x10                was  0x38    3  1  0  0\n0x10                is   0xf2   15  0  0  1\n"
        "set with KVM_S390_KEYOP, and verified\n",
        "",
    )
    assert key("reset-referenced", vm, "0x10").out == "gfn 0x10 was not referenced, and changed\n"


def test_the_same_as_json(key: Skeyctl, new_vm: NewVm) -> None:
    name = new_vm((0, 1))
    assert key("get", name, "1", "--json").value == {"vm": name, "gfn": 1, "call": "skeys", **KEYLESS}
    done = {"vm": name, "gfn": 1, "repaired": False}
    assert key("set", name, "1", "--key", "0x36", "--allow-enable", "--json").value == {
        **done,
        "old": KEYLESS,
        "enabled": True,
        "call": "skeys",
    }
    found = as_json(0x36, 3, fetch=False, referenced=True, changed=True)
    assert key("get", name, "1", "--json").value == {"vm": name, "gfn": 1, "call": "keyop", **found}
    assert key("reset-referenced", name, "1", "--json").value == {
        "vm": name,
        "gfn": 1,
        "was_referenced": True,
        "was_changed": True,
    }
    old = as_json(0x32, 3, fetch=False, referenced=False, changed=True)
    assert key("set", name, "1", "--acc", "0", "--json").value == {
        **done,
        "old": old,
        "enabled": False,
        "call": "keyop",
    }


def test_a_key_that_the_kernel_lost_at_first_is_told_of(key: Skeyctl, new_vm: NewVm) -> None:
    name = new_vm((0, 1), kernel=vm_pb2.SIMULATED_KERNEL_LINUX_4_19)
    done = key("set", name, "0", "--acc", "1", "--allow-enable")
    assert done.out.splitlines()[-1] == (
        "set with the calls for ranges, and verified; the kernel had lost it, set again; "
        "the guest uses storage keys from now on"
    )


def test_a_kernel_without_keyop_is_named_as_the_reason(key: Skeyctl, new_vm: NewVm) -> None:
    name = new_vm((0, 1), kernel=vm_pb2.SIMULATED_KERNEL_LINUX_4_19)
    done = key("reset-referenced", name, "0", "--json")
    assert (done.status, done.error["reason"]) == (1, "CAP_S390_KEYOP_MISSING")


@pytest.mark.parametrize(
    "arguments",
    [
        ("get", "a"),
        ("get", "a", "x"),
        ("get", "a", "-1"),
        ("get", "a", "0x0-0xf"),
        ("get", "a", "010"),
        ("get", "a", "0x10000000000000000"),
        ("set", "a", "0"),
        ("set", "a", "0", "--key", "0x31"),
        ("set", "a", "0", "--key", "0x30", "--acc", "3"),
        ("set", "a", "0", "--acc", "16"),
        ("reset-referenced", "a"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_refused_before_a_daemon_is_asked(arguments: tuple[str, ...]) -> None:
    assert skeyctl(NOBODY, "key", *arguments).status == 2
