"""skeyctl vm create, list, show, delete; and skeyctl host."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, Final

import pytest

import skeyd
from skeyd.cli.options import vm_name
from skeyd.v1 import vm_pb2, vm_service_pb2
from tests.cli.noting_daemon import NotingDaemon
from tests.cli.running import NOBODY, skeyctl
from tests.daemon import DaemonProcess
from tests.processes import wait_for_end
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import MIB, Stubs, new_id

GIB: Final = 1 << 30
NOTHING_KNOWN: Final[dict[str, Any]] = {
    "incarnation": None,
    "memory_slots": [],
    "uses_storage_keys": None,
    "kernel": None,
    "worker_version": None,
    "worker_pid": None,
    "vmm": None,
    "last_write": None,
}


def id_of(name: str) -> str:
    return name.removeprefix("vms/")


def test_a_vm_is_created_and_said_to_be(shared_daemon: DaemonProcess, stubs: Stubs) -> None:
    vm_id = new_id()
    done = skeyctl(shared_daemon.target, "vm", "create", vm_id, "--kind", "simulated", "--memory", "3M")
    try:
        assert done.out == f"vms/{vm_id} created: simulated Linux 7.2, 3 MiB\n"
        assert (done.status, done.err) == (0, "")
        assert stubs.look_at(f"vms/{vm_id}").kind == vm_pb2.VM_KIND_SIMULATED
    finally:
        stubs.delete(f"vms/{vm_id}")


@pytest.mark.parametrize(
    ("generation", "kernel"),
    [("4.19", "simulated Linux 4.19 to 6.19"), ("7.0", "simulated Linux 7.0 and 7.1"), ("7.2", "simulated Linux 7.2")],
)
def test_a_simulated_vm_follows_the_kernel_that_is_named(
    shared_daemon: DaemonProcess, stubs: Stubs, generation: str, kernel: str
) -> None:
    vm_id = new_id()
    arguments = ("--kind", "simulated", "--memory", "1M", "--simulated-kernel", generation)
    done = skeyctl(shared_daemon.target, "vm", "create", vm_id, *arguments, "--json")
    try:
        assert done.value["kernel"] == kernel
    finally:
        stubs.delete(f"vms/{vm_id}")


@pytest.mark.parametrize(
    ("memories", "expected"),
    [
        (["1M"], [(0, MIB, "UNSPECIFIED", "")]),
        (["1048576"], [(0, MIB, "UNSPECIFIED", "")]),
        (["0x100000"], [(0, MIB, "UNSPECIFIED", "")]),
        (["1024k"], [(0, MIB, "UNSPECIFIED", "")]),
        (["1g"], [(0, GIB, "UNSPECIFIED", "")]),
        (["2T"], [(0, 2048 * GIB, "UNSPECIFIED", "")]),
        (["1G@4G"], [(4 * GIB, GIB, "UNSPECIFIED", "")]),
        (["1G@0"], [(0, GIB, "UNSPECIFIED", "")]),
        (["1M@0x100000000"], [(4 * GIB, MIB, "UNSPECIFIED", "")]),
        (["1M:anonymous"], [(0, MIB, "ANONYMOUS", "")]),
        (["1M:none"], [(0, MIB, "NONE", "")]),
        (["64M@8G:memfd"], [(8 * GIB, 64 * MIB, "MEMFD", "")]),
        (["1G:file=guest.mem"], [(0, GIB, "FILE", "guest.mem")]),
        (["1G@2G:file=a=b:c@d é"], [(2 * GIB, GIB, "FILE", "a=b:c@d é")]),
        # without an address a slot follows the one before it on the command line, wherever that is
        (["1G", "1M"], [(0, GIB, "UNSPECIFIED", ""), (GIB, MIB, "UNSPECIFIED", "")]),
        (["1M@4G", "1M:memfd"], [(4 * GIB, MIB, "UNSPECIFIED", ""), (4 * GIB + MIB, MIB, "MEMFD", "")]),
        (
            ["1M@8M", "1M@2M", "1M"],
            [(8 * MIB, MIB, "UNSPECIFIED", ""), (2 * MIB, MIB, "UNSPECIFIED", ""), (3 * MIB, MIB, "UNSPECIFIED", "")],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else "",
)
def test_memory_reaches_the_daemon_as_it_was_written(
    runtime_dir: Path, memories: list[str], expected: list[tuple[int, int, str, str]]
) -> None:
    with NotingDaemon(runtime_dir) as daemon:
        options = [f"--memory={one}" for one in memories]
        assert skeyctl(daemon.target, "vm", "create", "a", "--kind", "owned", *options).status == 0
        (asked,) = daemon.created
    assert asked.vm_id == "a"
    assert asked.kind == vm_pb2.VM_KIND_OWNED
    assert asked.simulated_kernel == vm_pb2.SIMULATED_KERNEL_UNSPECIFIED
    found = [
        (
            one.guest_phys_addr,
            one.memory_size,
            vm_pb2.MemoryBacking.Name(one.backing).removeprefix("MEMORY_BACKING_"),
            one.file,
        )
        for one in asked.memory_slots
    ]
    assert found == expected


@pytest.mark.parametrize(
    "memory",
    [
        *("@4G", "1G@", "1G@:memfd", "1G@1M@2M", "1G4G", "1G 4G", "0xffffffffffffffffffff", "1M@16777216T"),
        *("1G:", "1G:disk", "1G:MEMFD", "1G: memfd", "1G:memfd:memfd", ":memfd", "1G:memfd=", "1G:memfd=x", "1G:=x"),
        *("1G:file", "1G:file=", "1G:file:x", "1G:anonymous=x", "1G:none=x", "1G:=", "1G@4G:file"),
        "1G:file=\udcff",
    ],
)
def test_memory_that_makes_no_sense_is_refused_before_any_daemon_is_asked(memory: str) -> None:
    done = skeyctl(NOBODY, "vm", "create", "a", "--kind", "simulated", f"--memory={memory}", "--json")
    assert done.status == 2
    error = done.error
    assert error["reason"] == "USAGE"
    assert "--memory" in error["message"]


def test_a_slot_that_would_follow_the_end_of_all_addresses_is_refused() -> None:
    memories = ("--memory", "1M@0xfffffffffff00000", "--memory", "1M")
    done = skeyctl(NOBODY, "vm", "create", "a", "--kind", "simulated", *memories)
    assert done.status == 2
    assert "--memory" in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("create",),
        ("create", "a"),
        ("create", "a", "--kind", "simulated"),
        ("create", "a", "--memory", "1M"),
        ("create", "a", "--kind", "adopted", "--memory", "1M"),
        ("create", "a", "--kind", "simulated", "--memory", "1M", "--simulated-kernel", "5.4"),
        ("create", "a", "b", "--kind", "simulated", "--memory", "1M"),
        ("show",),
        ("show", "a", "b"),
        ("list", "a"),
        ("candidates", "a"),
        ("delete",),
        ("delete", "--yes"),
        ("rename", "a", "b"),
        ("show", "a", "--yaml"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_refused_before_any_daemon_is_asked(arguments: tuple[str, ...]) -> None:
    done = skeyctl(NOBODY, "vm", *arguments)
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("Usage: skeyctl vm")
    as_json = skeyctl(NOBODY, "vm", *arguments, "--json")
    assert as_json.status == 2
    assert as_json.error["reason"] == "USAGE"


@pytest.mark.parametrize("vm_id", ["Web", "1", "web-", "a/b", "vms/a", "", "ü", "x" * 64, "a b", "..", "a\nb"])
def test_an_id_that_is_none_is_refused_by_the_daemon(shared_daemon: DaemonProcess, vm_id: str) -> None:
    arguments = ("vm", "create", "--kind", "simulated", "--memory", "1M", "--json", "--", vm_id)
    done = skeyctl(shared_daemon.target, *arguments)
    assert done.status == 1
    assert done.error["reason"] == "VM_ID_INVALID"


def test_an_id_that_is_taken_is_refused(shared_daemon: DaemonProcess, new_vm: NewVm) -> None:
    name = new_vm((0, 1))
    arguments = ("vm", "create", id_of(name), "--kind", "simulated", "--memory", "1M")
    done = skeyctl(shared_daemon.target, *arguments)
    assert (done.status, done.out) == (1, "")
    assert done.err == f"skeyctl: {name} exists [VM_EXISTS]\n"
    error = skeyctl(shared_daemon.target, *arguments, "--json").error
    assert (error["reason"], error["metadata"]) == ("VM_EXISTS", {"vm": name})


def test_a_vm_has_its_row_in_the_list(shared_daemon: DaemonProcess, new_vm: NewVm, stubs: Stubs) -> None:
    unused, used, large = new_vm((0, 3)), new_vm((0, 1), (4, 1)), new_vm((0, 1024), (2048, 1 << 20))
    stubs.set(used, [(0, b"\x10")])
    done = skeyctl(shared_daemon.target, "vm", "list")
    assert (done.status, done.err) == (0, "")
    head, *lines = done.out.splitlines()
    assert head.split("  ")[0] == "ID"
    at = [head.index(name) for name in ("ID", "KIND", "STATE", "MEMORY", "USES KEYS", "KERNEL")]
    rows = {
        line.split()[0]: [line[start:end].strip() for start, end in zip(at, [*at[1:], None], strict=True)]
        for line in lines
    }
    kernel = "simulated Linux 7.2"
    assert rows[id_of(unused)] == [id_of(unused), "simulated", "ready", "3 MiB", "no", kernel]
    assert rows[id_of(used)] == [id_of(used), "simulated", "ready", "2 MiB", "yes", kernel]
    assert rows[id_of(large)][3] == "1025 GiB"


def test_a_host_without_vms_has_an_empty_list(runtime_dir: Path) -> None:
    with NotingDaemon(runtime_dir) as daemon:
        assert skeyctl(daemon.target, "vm", "list", "--json").value == []
        assert skeyctl(daemon.target, "vm", "list").out == (
            "ID  KIND  STATE  MEMORY  USES KEYS  KERNEL, OR WHAT IS WRONG\n"
        )


def test_a_vm_of_another_process_is_asked_for_as_the_options_say(runtime_dir: Path) -> None:
    with NotingDaemon(runtime_dir) as daemon:
        options = ["--pid", "4711", "--memory", "1G", "--memory=2G@4G"]
        told = skeyctl(daemon.target, "vm", "adopt", "a", *options)
        assert told.out == "vms/a adopted from pid 4711, unknown, uid 0, VM descriptor 0: , 0 MiB\n"
        more = ["--fd", "0", "--max-hold-ms=1500", "--start-time=815", "--json"]
        assert skeyctl(daemon.target, "vm", "adopt", "b", *options, *more).value["vmm"] == {
            "pid": 4711,
            "start_time": 0,
            "uid": 0,
            "executable": None,
            "vm_fd": 0,
            "name": None,
            "memory_source": None,
            "access": None,
        }
        named = ["vm", "adopt", "c", "--name=web,1", "--memory=1G"]
        assert "adopted from pid 0 (web,1), unknown" in skeyctl(daemon.target, *named).out
        assert skeyctl(daemon.target, *named, "--json").value["vmm"]["name"] == "web,1"
        over_qmp = ["vm", "adopt", "d", "--qmp-socket=/run/vm/qmp", "--access=qmp"]
        assert "adopted from pid 0, unknown, uid 0, keys over QMP: " in skeyctl(daemon.target, *over_qmp).out
        shown = skeyctl(daemon.target, *over_qmp, "--pid=5", "--json").value["vmm"]
        assert (shown["access"], shown["vm_fd"]) == ("qmp", None)
        skeyctl(daemon.target, *over_qmp[:4], "--access=injection")
        first, second, third, _, fourth, fifth, sixth = daemon.adopted
    assert (fourth.qmp_socket, fourth.access, fourth.pid) == ("/run/vm/qmp", vm_pb2.ACCESS_QMP, 0)
    assert (fifth.pid, sixth.access) == (5, vm_pb2.ACCESS_INJECTION)
    assert (first.qmp_socket, first.access) == ("", vm_pb2.ACCESS_UNSPECIFIED)
    assert (first.name, third.name, third.pid) == ("", "web,1", 0)
    slots = [(one.guest_phys_addr, one.memory_size, one.backing, one.file) for one in first.memory_slots]
    assert slots == [(0, GIB, 0, ""), (4 * GIB, 2 * GIB, 0, "")]
    assert (first.vm_id, first.pid, first.start_time) == ("a", 4711, 0)
    assert not first.HasField("vm_fd")
    assert not first.HasField("max_hold_time")
    assert second.HasField("vm_fd")
    assert second.max_hold_time.ToMilliseconds() == 1500
    assert second.start_time == 815


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--memory=1G"],
        ["--name=web", "--pid=1"],
        ["--pid=1", "--name=", "--memory=1G"],
        ["--name=web", "--qmp-socket=/q"],
        ["--qmp-socket=/\udcff"],
        ["--qmp-socket=/q", "--access=ptrace"],
        ["--name=\udcff", "--memory=1G"],
        ["--pid=0", "--memory=1G"],
        ["--pid=1", "--start-time=0"],
        [f"--pid={1 << 63}"],
        ["--pid=1", f"--start-time={1 << 64}"],
        ["--pid=1", f"--fd={1 << 32}"],
        ["--pid=1", f"--max-hold-ms={1 << 70}"],
        ["--pid=1", "--memory=1G:memfd"],
        ["--pid=1", "--memory=x"],
    ],
)
def test_what_is_no_vm_of_another_process_is_a_usage_error(options: list[str]) -> None:
    assert skeyctl(NOBODY, "vm", "adopt", "a", *options).status == 2


CANDIDATES: Final = vm_service_pb2.ListVmCandidatesResponse(
    candidates=[
        vm_service_pb2.VmCandidate(
            pid=812,
            start_time=4711,
            uid=64055,
            executable="/usr/bin/qemu-system-s390x",
            name="web",
            vm_fds=[13],
            vcpu_fds=4,
            mapped_bytes=5 * GIB + 1,
            resident_bytes=3 * MIB - 1,
            adopted_as="vms/web",
        ),
        vm_service_pb2.VmCandidate(pid=77777, vm_fds=[4, 5], refusal="VMM_TRACED", refusal_detail="7 is traced"),
        vm_service_pb2.VmCandidate(pid=77778, vm_fds=[9], executable="/x", name="a b"),
    ],
    unreadable_processes=3,
    left_out=2,
    skeyd_workers=1,
)


def test_candidates_are_shown_with_what_was_not_seen(runtime_dir: Path) -> None:
    with NotingDaemon(runtime_dir) as daemon:
        daemon.candidates = CANDIDATES
        done = skeyctl(daemon.target, "vm", "candidates")
        assert (done.status, done.err) == (0, "")
        assert done.out == (
            "PID    NAME  UID    VM FDS  VCPUS  MAPPED    RESIDENT  EXECUTABLE                  ADOPTED\n"
            "812    web   64055  13      4      5120 MiB  2 MiB     /usr/bin/qemu-system-s390x  as vms/web\n"
            "77777  -     0      4,5     0      0 MiB     0 MiB     unknown                     "
            "no, and can't be now: 7 is traced [VMM_TRACED]\n"
            "77778  a b   0      9       0      0 MiB     0 MiB     /x                          no\n"
            "\nprocesses that skeyd has no right to look at, each of which may have a VM: 3\n"
            "\nprocesses left out, since there are too many of them or of their descriptors: 2\n"
            "\nprocesses with a VM that are workers of skeyd, and so no candidates: 1\n"
        )
        daemon.candidates = vm_service_pb2.ListVmCandidatesResponse()
        assert skeyctl(daemon.target, "vm", "candidates").out == (
            "PID  NAME  UID  VM FDS  VCPUS  MAPPED  RESIDENT  EXECUTABLE  ADOPTED\n"
        )


@pytest.mark.parametrize("form", ["{id}", "vms/{id}"])
def test_a_vm_is_shown_by_its_id_or_its_name(
    shared_daemon: DaemonProcess, new_vm: NewVm, stubs: Stubs, form: str
) -> None:
    name = new_vm((8192, 1), (0, 2048))
    vm = stubs.look_at(name)
    done = skeyctl(shared_daemon.target, "vm", "show", form.format(id=id_of(name)))
    assert (done.status, done.err) == (0, "")
    assert done.out == (
        f"name:        {name}\n"
        "state:       ready\n"
        "kind:        simulated\n"
        "kernel:      simulated Linux 7.2\n"
        "uses keys:   no\n"
        f"uid:         {vm.uid}\n"
        f"incarnation: {vm.incarnation}\n"
        f"created:     {vm.create_time.ToJsonString()}\n"
        f"worker:      pid {vm.worker_pid}, skeyd {skeyd.__version__}\n"
        "\n"
        "SLOT  FRAMES             SIZE   BACKING\n"
        "1     0x0-0x7ffff        2 GiB  none\n"
        "0     0x200000-0x2000ff  1 MiB  none\n"
    )


def test_what_isnt_known_of_a_dead_vm_is_not_said(shared_daemon: DaemonProcess, new_vm: NewVm, stubs: Stubs) -> None:
    name = new_vm((0, 1))
    stubs.set(name, [(0, b"\x10")])
    vm = stubs.look_at(name)
    worker = os.pidfd_open(vm.worker_pid)
    try:
        os.kill(vm.worker_pid, signal.SIGKILL)
        wait_for_end(worker)
    finally:
        os.close(worker)

    found = skeyctl(shared_daemon.target, "vm", "show", name, "--json").value
    assert found == {
        **NOTHING_KNOWN,
        "name": name,
        "uid": vm.uid,
        "kind": "simulated",
        "state": "dead",
        "state_reason": "its worker is gone",
        "create_time": vm.create_time.ToJsonString(),
    }
    assert skeyctl(shared_daemon.target, "vm", "show", name).out == (
        f"name:        {name}\n"
        "state:       dead: its worker is gone\n"
        "kind:        simulated\n"
        f"uid:         {vm.uid}\n"
        f"created:     {vm.create_time.ToJsonString()}\n"
    )
    (row,) = [
        line for line in skeyctl(shared_daemon.target, "vm", "list").out.splitlines() if id_of(name) in line.split()
    ]
    assert row.split(maxsplit=5) == [id_of(name), "simulated", "dead", "-", "-", "its worker is gone"]

    keys = skeyctl(shared_daemon.target, "keys", "get", name, "--json")
    assert keys.status == 1
    assert keys.error["reason"] == "VM_DEAD"


def test_what_a_newer_daemon_says_is_unknown_and_no_crash(runtime_dir: Path) -> None:
    number: Any = 99  # of a kind and a state that this version has no word for
    vm = vm_pb2.Vm(name="vms/a", kind=number, state=number, memory_slots=[vm_pb2.MemorySlot(count=256, backing=number)])
    with NotingDaemon(runtime_dir) as daemon:
        daemon.looking = lambda _: vm
        daemon.vms = [vm]
        found = skeyctl(daemon.target, "vm", "show", "a", "--json").value
        assert (found["kind"], found["state"], found["uses_storage_keys"]) == (None, None, None)
        assert skeyctl(daemon.target, "vm", "list", "--json").value == [found]
        shown = skeyctl(daemon.target, "vm", "show", "a")
        assert shown.out.startswith("name:        vms/a\nstate:       unknown\nkind:        unknown\n\nSLOT")
        assert "unknown  unknown  1 MiB" in skeyctl(daemon.target, "vm", "list").out


@pytest.mark.parametrize("verb", ["show", "delete"])
@pytest.mark.parametrize(
    ("vm", "reason"),
    [("nope", "VM_NOT_FOUND"), ("a/b", "VM_ID_INVALID"), ("", "VM_ID_INVALID"), ("vms/../x", "VM_ID_INVALID")],
)
def test_a_vm_that_isnt_there_is_refused(shared_daemon: DaemonProcess, verb: str, vm: str, reason: str) -> None:
    yes = ["--yes"] if verb == "delete" else []
    done = skeyctl(shared_daemon.target, "vm", verb, *yes, "--json", vm)
    assert done.status == 1
    assert done.error["reason"] == reason


@pytest.mark.parametrize("command", [("vm", "show"), ("vm", "delete", "--yes"), ("keys", "get"), ("vm", "create")])
def test_a_name_that_is_no_utf_8_is_a_wrong_command_line(
    shared_daemon: DaemonProcess, command: tuple[str, ...]
) -> None:
    more = ["--kind", "simulated", "--memory", "1M"] if "create" in command else []
    done = skeyctl(shared_daemon.target, *command, *more, "--json", os.fsdecode(b"\xff"))
    assert done.status == 2
    assert done.error["reason"] == "USAGE"


def test_a_name_that_is_no_utf_8_is_found_before_protobuf_sees_it() -> None:
    # What protobuf raises on it depends on which of its implementations is there.
    with pytest.raises(UnicodeEncodeError):
        vm_name(os.fsdecode(b"\xff"))


def test_a_deleted_vm_is_gone(shared_daemon: DaemonProcess, new_vm: NewVm, stubs: Stubs) -> None:
    first, second = new_vm((0, 1)), new_vm((0, 1))
    done = skeyctl(shared_daemon.target, "vm", "delete", id_of(first), "--yes")
    assert (done.status, done.out, done.err) == (0, f"{first} deleted\n", "")
    assert first not in stubs.names()
    assert second in stubs.names()
    assert skeyctl(shared_daemon.target, "vm", "delete", second, "--yes", "--json").value == {"deleted": second}
    assert second not in stubs.names()


def test_off_a_terminal_nothing_is_deleted_without_yes(
    shared_daemon: DaemonProcess, new_vm: NewVm, stubs: Stubs
) -> None:
    name = new_vm((0, 1))
    done = skeyctl(shared_daemon.target, "vm", "delete", name)
    assert (done.status, done.out) == (2, "")
    assert "--yes" in done.err
    as_json = skeyctl(shared_daemon.target, "vm", "delete", name, "--json")
    assert as_json.status == 2
    assert as_json.error["reason"] == "USAGE"
    assert name in stubs.names()


def test_the_host_says_what_it_can_do_and_what_to_do_about_the_rest(shared_daemon: DaemonProcess) -> None:
    done = skeyctl(shared_daemon.target, "host")
    assert (done.status, done.err) == (0, "")
    found = skeyctl(shared_daemon.target, "host", "--json").value
    lines = done.out.splitlines()
    versions = found["versions"]
    assert lines[0] == (
        f"Linux {found['kernel_release']} on {found['machine']}; skeyd {versions['skeyd']}, "
        f"Python {versions['python']}, grpcio {versions['grpc']}, protobuf {versions['protobuf']}"
    )
    assert lines[0].startswith(f"Linux {os.uname().release} on {os.uname().machine}; skeyd {skeyd.__version__}, ")
    words = {"yes": "yes", "no": "no", None: "don't know"}
    assert lines[1] == f"owned VMs can be created here: {words[found['can_own_vms']]}"
    assert found["findings"]
    for one in found["findings"]:
        assert any(line.split()[0] == one["name"] and words[one["answer"]] in line for line in lines if line)
        remedy = f"{one['name']}: {one['remedy']}"
        assert (remedy in lines) == bool(one["remedy"] and one["answer"] != "yes")


def test_what_goes_together_is_the_daemons_to_say(runtime_dir: Path) -> None:
    with NotingDaemon(runtime_dir) as daemon:
        arguments = ("--kind", "owned", "--memory", "1M", "--memory", "1M@1G", "--simulated-kernel", "7.0")
        assert skeyctl(daemon.target, "vm", "create", "a", *arguments).status == 0
        (asked,) = daemon.created
    assert asked == vm_service_pb2.CreateVmRequest(
        vm_id="a",
        kind=vm_pb2.VM_KIND_OWNED,
        memory_slots=[
            vm_service_pb2.MemorySlotSpec(memory_size=MIB),
            vm_service_pb2.MemorySlotSpec(guest_phys_addr=GIB, memory_size=MIB),
        ],
        simulated_kernel=vm_pb2.SIMULATED_KERNEL_LINUX_7_0,
    )
