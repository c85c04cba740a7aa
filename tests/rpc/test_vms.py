"""VmService and HostService over the real daemon."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

import skeyd
from skeyd import limits
from skeyd.v1 import host_service_pb2 as host_pb
from skeyd.v1 import storage_key_service_pb2, vm_pb2
from skeyd.v1 import vm_service_pb2 as pb
from tests.daemon import DaemonProcess
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import GENERATIONS, MIB, SECONDS, Stubs, header, new_id, refusal, refused

INVALID: Final = grpc.StatusCode.INVALID_ARGUMENT
PRECONDITION: Final = grpc.StatusCode.FAILED_PRECONDITION


def request(vm_id: str | None = None, **other: Any) -> pb.CreateVmRequest:
    """Ask for a simulated VM of 1 MiB; `other` replaces fields."""
    fields: dict[str, Any] = {
        "vm_id": new_id() if vm_id is None else vm_id,
        "kind": vm_pb2.VM_KIND_SIMULATED,
        "memory_slots": [pb.MemorySlotSpec(memory_size=MIB)],
    }
    return pb.CreateVmRequest(**{**fields, **other})


def slot(address: int, size: int, **other: Any) -> pb.MemorySlotSpec:
    return pb.MemorySlotSpec(guest_phys_addr=address, memory_size=size, **other)


@pytest.mark.parametrize("kernel", GENERATIONS, ids=vm_pb2.SimulatedKernel.Name)
def test_a_vm_is_what_was_asked_for(stubs: Stubs, new_vm: NewVm, kernel: vm_pb2.SimulatedKernel.ValueType) -> None:
    vm = stubs.look_at(new_vm((16, 1), (0, 2), kernel=kernel))
    assert vm.state == vm_pb2.VM_STATE_READY
    assert vm.state_reason == ""
    assert vm.kind == vm_pb2.VM_KIND_SIMULATED
    assert vm.kernel == f"simulated Linux {('4.19 to 6.19', '7.0 and 7.1', '7.2')[kernel - 1]}"
    assert not vm.uses_storage_keys
    assert vm.worker_version == skeyd.__version__
    assert len(vm.incarnation) == 32
    assert vm.create_time.seconds > 0
    slots = [(one.slot, one.start_gfn, one.count, one.backing) for one in vm.memory_slots]
    none = vm_pb2.MEMORY_BACKING_NONE
    assert slots == [(1, 0, 512, none), (0, 0x1000, 256, none)], "ascending, numbered in the order given"


def test_the_newest_generation_is_simulated_where_none_is_named(stubs: Stubs, new_vm: NewVm) -> None:
    assert stubs.look_at(new_vm((0, 1))).kernel == "simulated Linux 7.2"


def test_vms_are_listed_in_order_of_name(stubs: Stubs) -> None:
    ids = [f"{new_id()}-{end}" for end in ("c", "a", "b")]
    for vm_id in ids:
        stubs.create(vm_id, (0, 1))
    try:
        names = stubs.names()
        assert names == sorted(names)
        assert {f"vms/{vm_id}" for vm_id in ids} <= set(names)
    finally:
        for vm_id in ids:
            stubs.delete(f"vms/{vm_id}")


def test_a_deleted_vm_is_gone_and_its_name_is_free_for_another(stubs: Stubs, new_vm: NewVm) -> None:
    name = new_vm((0, 1))
    first = stubs.look_at(name)
    stubs.set(name, [(0, b"\x10")])
    stubs.delete(name)
    assert name not in stubs.names()
    assert refused(lambda: stubs.look_at(name)).reason == "VM_NOT_FOUND"
    second = stubs.create(name.removeprefix("vms/"), (0, 1))
    assert second.uid != first.uid
    assert second.incarnation != first.incarnation
    assert second.worker_pid != first.worker_pid
    assert not second.uses_storage_keys


def test_an_id_that_is_taken_is_refused_and_its_vm_goes_on(stubs: Stubs, new_vm: NewVm) -> None:
    name = new_vm((0, 1))
    before = stubs.look_at(name)
    found = refused(lambda: stubs.create(name.removeprefix("vms/"), (0, 2)))
    assert (found.code, found.reason) == (grpc.StatusCode.ALREADY_EXISTS, "VM_EXISTS")
    assert name in found.message
    assert stubs.look_at(name) == before


def test_the_longest_id_that_is_allowed_is_allowed(stubs: Stubs) -> None:
    vm_id = "a" + "b-" * 30 + "cd"
    assert len(vm_id) == 63
    name = stubs.create(vm_id, (0, 1)).name
    stubs.delete(name)


@pytest.mark.parametrize(
    "vm_id",
    ["", "A", "1a", "a_b", "a-", "-a", "a" * 64, "a/b", "vms/a", "ä", "a\n", "..", ".new-a", "a\0", "a b", "A" * 1000],
)
def test_a_bad_id_is_refused_and_named(stubs: Stubs, vm_id: str) -> None:
    found = refused(lambda: stubs.vms.CreateVm(request(vm_id), timeout=SECONDS))
    assert (found.code, found.reason, found.domain) == (INVALID, "VM_ID_INVALID", "skeyd")
    assert repr(vm_id[:80]) in found.message


BAD_NAMES: Final = (
    "",
    "vms",
    "vms/",
    "web",
    "vm/a",
    "/vms/a",
    "vms/A",
    "vms/a/b",
    "vms/../a",
    "vms/a ",
    "VMS/a",
    "vms/a\n",
)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_malformed_name_is_refused_by_every_method_and_named(stubs: Stubs, name: str) -> None:
    read = storage_key_service_pb2.GetSkeysRequest(vm=name)
    _, written = stubs.send(header(name, (0, 1)))
    assert written is not None
    for found in (
        refused(lambda: stubs.look_at(name)),
        refused(lambda: stubs.delete(name)),
        refused(lambda: next(stubs.keys.GetSkeys(read, timeout=SECONDS))),
        written,
    ):
        assert (found.code, found.reason, found.domain) == (INVALID, "VM_ID_INVALID", "skeyd")
        assert repr(name) in found.message


def test_a_vm_that_is_not_there_is_not_found_by_any_method(stubs: Stubs) -> None:
    name = f"vms/{new_id()}"
    read = storage_key_service_pb2.GetSkeysRequest(vm=name)
    _, written = stubs.send(header(name, (0, 1)))
    assert written is not None
    for found in (
        refused(lambda: stubs.look_at(name)),
        refused(lambda: stubs.delete(name)),
        refused(lambda: next(stubs.keys.GetSkeys(read, timeout=SECONDS))),
        written,
    ):
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "VM_NOT_FOUND")
        assert name in found.message
        assert found.metadata["vm"] == name


BAD_REQUESTS: Final[dict[str, tuple[dict[str, Any], grpc.StatusCode, str, list[str]]]] = {
    "no-kind": ({"kind": 0}, INVALID, "REQUEST_INVALID", ["kind", "0"]),
    "unknown-kind": ({"kind": 99}, INVALID, "REQUEST_INVALID", ["kind", "99"]),
    "unknown-simulated-kernel": ({"simulated_kernel": 99}, INVALID, "REQUEST_INVALID", ["99"]),
    "simulated-kernel-of-an-owned-vm": (
        {"kind": vm_pb2.VM_KIND_OWNED, "simulated_kernel": vm_pb2.SIMULATED_KERNEL_LINUX_7_2},
        INVALID,
        "REQUEST_INVALID",
        ["simulated_kernel"],
    ),
    "no-slots": ({"memory_slots": []}, INVALID, "MEMORY_INVALID", ["32", "not 0"]),
    "33-slots": ({"memory_slots": [slot(n * MIB, MIB) for n in range(33)]}, INVALID, "MEMORY_INVALID", ["32", "33"]),
    "5000-slots": ({"memory_slots": [slot(0, MIB)] * 5_000}, INVALID, "MEMORY_INVALID", ["5000"]),
    "50000-slots": ({"memory_slots": [slot(0, MIB)] * 50_000}, INVALID, "REQUEST_INVALID", ["65536"]),
    "size-0": ({"memory_slots": [slot(0, 0)]}, INVALID, "MEMORY_INVALID", ["slot 0", "not 0"]),
    "size-of-a-frame": ({"memory_slots": [slot(0, 4096)]}, INVALID, "MEMORY_INVALID", ["slot 0", "1 MiB", "4096"]),
    "size-a-byte-too-many": ({"memory_slots": [slot(0, MIB + 1)]}, INVALID, "MEMORY_INVALID", ["1048577"]),
    "size-over-what-a-slot-can-be": (
        {"memory_slots": [slot(0, 1 << 43)]},
        INVALID,
        "MEMORY_INVALID",
        ["slot 0", str(1 << 43)],
    ),
    "size-2^64-1MiB": ({"memory_slots": [slot(0, 2**64 - MIB)]}, INVALID, "MEMORY_INVALID", [str(2**64 - MIB)]),
    "address-of-a-frame": ({"memory_slots": [slot(4096, MIB)]}, INVALID, "MEMORY_INVALID", ["slot 0", "0x1000"]),
    "second-address-odd": (
        {"memory_slots": [slot(0, MIB), slot(2 * MIB + 1, MIB)]},
        INVALID,
        "MEMORY_INVALID",
        ["slot 1", "0x200001"],
    ),
    "ends-beyond-2^64": (
        {"memory_slots": [slot(2**64 - MIB, 2 * MIB)]},
        INVALID,
        "MEMORY_INVALID",
        ["slot 0", "0xfffffffffff00000", "2^64"],
    ),
    "overlapping": (
        {"memory_slots": [slot(4 * MIB, MIB), slot(0, MIB), slot(0, 2 * MIB)]},
        INVALID,
        "MEMORY_INVALID",
        ["1 and 2", "overlap"],
    ),
    "overlapping-by-a-mib": (
        {"memory_slots": [slot(MIB, 2 * MIB), slot(0, 2 * MIB)]},
        INVALID,
        "MEMORY_INVALID",
        ["1 and 0", "overlap"],
    ),
    "unknown-backing": ({"memory_slots": [slot(0, MIB, backing=77)]}, INVALID, "REQUEST_INVALID", ["slot 0", "77"]),
    "file-without-memory-dir": (
        {
            "kind": vm_pb2.VM_KIND_OWNED,
            "memory_slots": [slot(0, MIB), slot(MIB, MIB, backing=vm_pb2.MEMORY_BACKING_FILE, file="a")],
        },
        PRECONDITION,
        "MEMORY_FILE_UNUSABLE",
        ["slot 1", "--memory-dir"],
    ),
    **{
        f"{vm_pb2.MemoryBacking.Name(backing)}-of-a-simulated-vm": (
            {
                "kind": vm_pb2.VM_KIND_SIMULATED,
                "memory_slots": [slot(0, MIB), slot(MIB, MIB, backing=backing, file=file)],
            },
            INVALID,
            "REQUEST_INVALID",
            ["slot 1", "simulated"],
        )
        for backing, file in (
            (vm_pb2.MEMORY_BACKING_ANONYMOUS, ""),
            (vm_pb2.MEMORY_BACKING_MEMFD, ""),
            (vm_pb2.MEMORY_BACKING_FILE, "a"),
        )
    },
    "no-memory-of-an-owned-vm": (
        {"kind": vm_pb2.VM_KIND_OWNED, "memory_slots": [slot(0, MIB, backing=vm_pb2.MEMORY_BACKING_NONE)]},
        INVALID,
        "REQUEST_INVALID",
        ["slot 0", "simulated"],
    ),
    "file-of-anonymous-memory": (
        {"memory_slots": [slot(0, MIB, file="a")]},
        INVALID,
        "REQUEST_INVALID",
        ["slot 0", "MEMORY_BACKING_FILE"],
    ),
}


@pytest.mark.parametrize("bad", BAD_REQUESTS.values(), ids=BAD_REQUESTS)
@pytest.mark.parametrize("kind", [vm_pb2.VM_KIND_SIMULATED, vm_pb2.VM_KIND_OWNED], ids=["simulated", "owned"])
def test_a_vm_that_no_kernel_would_make_is_refused_and_leaves_nothing(
    stubs: Stubs,
    shared_daemon: DaemonProcess,
    kind: int,
    bad: tuple[dict[str, Any], grpc.StatusCode, str, list[str]],
) -> None:
    fields, code, reason, named = bad
    asked = request(**{"kind": kind, **fields})
    found = refused(lambda: stubs.vms.CreateVm(asked, timeout=SECONDS))
    assert (found.code, found.reason, found.domain) == (code, reason, "skeyd")
    for word in named:
        assert word in found.message
    vms = shared_daemon.runtime_dir / "vms"
    assert not [path.name for path in vms.iterdir() if path.name.startswith((".", asked.vm_id))]


def test_all_32_slots_may_be_used(stubs: Stubs, new_vm: NewVm) -> None:
    # Touching, apart, and the largest one there can be.
    vm = new_vm(*((2 * n, 1 + n % 2) for n in range(31)), (1 << 22, (1 << 23) - 1))
    found = stubs.look_at(vm)
    assert len(found.memory_slots) == 32
    assert found.memory_slots[31].count == ((1 << 23) - 1) * 256


@pytest.mark.parametrize("file", ["", ".", "..", "/", "a/b", "../a", "/etc/passwd", "a\0b", "x" * 256, "é" * 128])
def test_a_memory_file_is_a_name_and_never_a_path(daemon_with_memory_dir: Stubs, file: str) -> None:
    slots = [slot(0, MIB, backing=vm_pb2.MEMORY_BACKING_FILE, file=file)]
    asked = request(kind=vm_pb2.VM_KIND_OWNED, memory_slots=slots)
    found = refused(lambda: daemon_with_memory_dir.vms.CreateVm(asked, timeout=SECONDS))
    assert (found.code, found.reason) == (INVALID, "REQUEST_INVALID")
    assert repr(file[:80]) in found.message
    assert "slot 0" in found.message


@pytest.fixture(scope="module")
def daemon_with_memory_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stubs]:
    """Start a daemon that lets files back memory."""
    runtime = Path(tempfile.mkdtemp(prefix="skeyd-"))
    daemon = DaemonProcess(runtime)
    try:
        daemon.start("--memory-dir", str(tmp_path_factory.mktemp("memory")))
        with Stubs(daemon.target) as made:
            yield made
    finally:
        daemon.end_everything()
        shutil.rmtree(runtime)


def test_an_owned_vm_is_made_or_refused_as_get_host_says(stubs: Stubs) -> None:
    host = stubs.hosts.GetHost(host_pb.GetHostRequest(), timeout=SECONDS).host
    answers = {one.name: one.answer for one in host.findings}
    asked = request(kind=vm_pb2.VM_KIND_OWNED)
    expected: tuple[grpc.StatusCode, str] | None = None
    if answers["kvm_device"] != host_pb.ANSWER_YES:
        expected = PRECONDITION, "KVM_UNAVAILABLE"
    elif answers["cap_s390_skeys"] == host_pb.ANSWER_NO:
        expected = grpc.StatusCode.UNIMPLEMENTED, "CAP_S390_SKEYS_MISSING"
    elif answers["pgste"] == host_pb.ANSWER_NO:
        expected = PRECONDITION, "PGSTE_UNAVAILABLE"
    try:
        vm = stubs.vms.CreateVm(asked, timeout=SECONDS).vm
    except grpc.RpcError as error:
        found = refusal(error)
        assert (found.code, found.reason) == expected
        assert host.can_own_vms != host_pb.ANSWER_YES
        assert f"vms/{asked.vm_id}" not in stubs.names()
    else:
        stubs.delete(vm.name)
        assert vm.kind == vm_pb2.VM_KIND_OWNED
        assert vm.kernel == platform.release()
        assert expected is None
        assert host.can_own_vms == host_pb.ANSWER_YES


def test_get_host_says_what_runs_and_which_limits_hold(stubs: Stubs) -> None:
    host = stubs.hosts.GetHost(host_pb.GetHostRequest(), timeout=SECONDS).host
    assert host.kernel_release == platform.release()
    assert host.machine == platform.machine()
    assert host.skeyd_version == skeyd.__version__
    assert host.python_version == platform.python_version()
    assert host.grpc_version == grpc.__version__
    assert [one.name for one in host.findings] == ["kvm_device", "cap_s390_skeys", "cap_s390_keyop", "pgste"]
    assert all(one.detail for one in host.findings)
    assert host.limits == host_pb.Limits(
        max_chunk_keys=limits.MAX_CHUNK_KEYS,
        default_chunk_keys=limits.DEFAULT_CHUNK_KEYS,
        max_ranges=limits.MAX_RANGES,
        max_memory_slots=32,
        max_vms=limits.MAX_VMS,
        max_key_streams=limits.MAX_KEY_STREAMS,
    )
    assert limits.MAX_CHUNK_KEYS == 1_048_576, "KVM_S390_SKEYS_MAX"


def test_what_the_front_may_not_do_get_host_leaves_to_a_worker(stubs: Stubs, shared_daemon: DaemonProcess) -> None:
    stubs.hosts.GetHost(host_pb.GetHostRequest(), timeout=SECONDS)
    held = set()
    for fd in Path(f"/proc/{shared_daemon.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            held.add(str(fd.readlink()))
    assert held
    assert "/dev/kvm" not in held
