"""The main job on a real s390x kernel: the daemon runs there on Debian's grpcio, its client is this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from grpc import StatusCode

from skeyd.client import Client, ClientError, Keys, OneKey, OneKeySet
from skeyd.gfn import GfnRange
from skeyd.kvm.probe import SYSCTL_PGSTE
from skeyd.storage_key import SEGMENT_FRAMES
from skeyd.v1 import host_service_pb2, vm_pb2
from tests.contract.kernels import GENERATION_OF_SUITE
from tests.emulated.daemon import MEMORY_DIR, DaemonInside
from tests.emulated.fixtures import EmulatedHosts, host_suites
from tests.emulated.host import EmulatedHost
from tests.vm_requests import fill, owned, pattern

pytestmark = [pytest.mark.emulated, pytest.mark.timeout(600)]

MIB_OF_GUEST = 1024
FRAMES = MIB_OF_GUEST * 256


LOSES_KEYS = {"4.19": True, "7.2": False}
HAS_KEYOP = {"4.19": False, "7.2": True}
"""By generation, as docs/kernel.md has it."""


@pytest.fixture(scope="module", params=host_suites())
def suite(request: pytest.FixtureRequest) -> str:
    """Name the host."""
    return str(request.param)


@pytest.fixture(scope="module")
def generation(suite: str) -> str:
    """Say whose rules its kernel follows."""
    return GENERATION_OF_SUITE[suite]


@pytest.fixture(scope="module")
def host(emulated_hosts: EmulatedHosts, suite: str) -> EmulatedHost:
    """Boot it, with skeyd in it."""
    host = emulated_hosts(suite)
    DaemonInside.install(host)
    return host


@pytest.fixture(scope="module")
def with_pgste(host: EmulatedHost) -> Iterator[DaemonInside]:
    """Run a daemon whose workers get PGSTE page tables, by the sysctl where there is one."""
    has_sysctl = not host.run(["test", "-e", SYSCTL_PGSTE], check=False).returncode
    if has_sysctl:
        host.run(["sysctl", "-w", "vm.allocate_pgste=1"])
    daemon = DaemonInside(host)
    daemon.start()
    yield daemon
    daemon.kill()
    if has_sysctl:
        host.run(["sysctl", "-w", "vm.allocate_pgste=0"])


@pytest.fixture
def client(with_pgste: DaemonInside) -> Iterator[Client]:
    """Connect from outside."""
    with with_pgste.connect() as client:
        yield client


def read(client: Client, vm: str) -> bytes:
    """Return all keys of a VM without holes."""
    with client.get_skeys(vm) as stream:
        return b"".join(part.keys for part in stream if isinstance(part, Keys))


def answers(client: Client) -> dict[str, host_service_pb2.Finding]:
    """Return what the host says of itself."""
    return {one.name: one for one in client.host().findings}


def test_keys_set_through_skeyd_are_read_back_equal(client: Client, host: EmulatedHost, generation: str) -> None:
    """A whole GiB that nobody ever touched, where Linux up to 6.19 would lose one key in every segment."""
    vm = client.create_vm(owned("whole", MIB_OF_GUEST))
    assert vm.kernel == host.kernel
    assert vm.kind == vm_pb2.VM_KIND_OWNED
    assert not vm.uses_storage_keys
    keys, frames = pattern(FRAMES), GfnRange(0, FRAMES)
    result = client.set_skeys(vm.name, [frames], [Keys(frames, keys)], allow_enable=True)
    assert read(client, vm.name) == keys
    assert result.keys_set == FRAMES
    assert result.enabled
    assert result.keys_repaired == 0
    client.delete_vm(vm.name)


@pytest.mark.parametrize("backing", [vm_pb2.MEMORY_BACKING_ANONYMOUS, vm_pb2.MEMORY_BACKING_MEMFD])
def test_keys_that_are_lost_all_the_same_are_set_again(
    client: Client, generation: str, backing: vm_pb2.MemoryBacking.ValueType
) -> None:
    """Of a segment whose keys are not all set no frame is touched, for that would change the keys of the others."""
    request = owned("edges", 4)
    request.memory_slots[0].backing = backing
    vm = client.create_vm(request).name
    frames = GfnRange(SEGMENT_FRAMES - 6, 2 * SEGMENT_FRAMES)
    keys = b"\x38" * frames.count
    result = client.set_skeys(vm, [frames], [Keys(frames, keys)], allow_enable=True)
    assert result.keys_repaired == LOSES_KEYS[generation] * 2
    assert read(client, vm) == bytes(frames.start) + keys + bytes(4 * SEGMENT_FRAMES - frames.end)
    client.delete_vm(vm)


def test_a_keyless_guest_stays_keyless_unless_it_is_allowed(client: Client) -> None:
    vm = client.create_vm(owned("keyless", 1))
    frames = GfnRange(0, 256)
    with pytest.raises(ClientError) as refused:
        client.set_skeys(vm.name, [frames], [Keys(frames, bytes(256))])
    assert refused.value.reason == "SKEYS_NOT_ENABLED"
    with client.get_skeys(vm.name) as stream:
        assert not stream.uses_storage_keys
        assert list(stream) == []
    client.delete_vm(vm.name)


@pytest.mark.parametrize(
    "backing", [vm_pb2.MEMORY_BACKING_ANONYMOUS, vm_pb2.MEMORY_BACKING_MEMFD, vm_pb2.MEMORY_BACKING_FILE]
)
def test_two_slots_with_a_hole_between_them(
    host: EmulatedHost, client: Client, backing: vm_pb2.MemoryBacking.ValueType
) -> None:
    request = owned("holey", 2)
    request.memory_slots[0].backing = backing
    request.memory_slots.add(guest_phys_addr=4 << 30, memory_size=1 << 20, backing=backing)
    if backing == vm_pb2.MEMORY_BACKING_FILE:
        for slot, name in zip(request.memory_slots, ("low", "high"), strict=True):
            host.run(["truncate", "-s", str(slot.memory_size), f"{MEMORY_DIR}/{name}"])
            slot.file = name
    vm = client.create_vm(request)
    ranges = [GfnRange(0, 512), GfnRange(1 << 20, 256)]
    keys = pattern(768)
    chunks = [Keys(ranges[0], keys[:512]), Keys(ranges[1], keys[512:])]
    client.set_skeys(vm.name, ranges, chunks, allow_enable=True)
    with client.get_skeys(vm.name) as stream:
        parts = list(stream)
    assert [part.frames for part in parts] == [ranges[0], GfnRange(512, (1 << 20) - 512), ranges[1]]
    assert read(client, vm.name) == keys
    with pytest.raises(ClientError) as refused:
        client.set_skeys(vm.name, [GfnRange(500, 20)], [])
    assert refused.value.reason == "GFN_NOT_MAPPED"
    assert refused.value.metadata["gfn"] == hex(512)
    client.delete_vm(vm.name)


def test_a_killed_front_finds_its_owned_vms_again_with_their_keys(with_pgste: DaemonInside) -> None:
    with with_pgste.connect() as client:
        client.create_vm(owned("survivor", 4))
        client.create_vm(owned("other", 1))
        keys = fill(client, "survivor", 1024)
        before = client.list_vms()
    with_pgste.kill()
    with_pgste.start()
    with with_pgste.connect() as client:
        assert client.list_vms() == before
        assert read(client, "vms/survivor") == keys
        for vm in before:
            client.delete_vm(vm.name)
        assert list(client.list_vms()) == []


def test_one_frames_key_is_set_read_and_reset(client: Client, generation: str) -> None:
    has_keyop = HAS_KEYOP[generation]
    call = "keyop" if has_keyop else "skeys"
    vm = client.create_vm(owned("single", 2)).name
    # On no kernel is KEYOP asked of a guest that uses no keys.
    assert client.get_skey(vm, 0x100) == OneKey(None, "skeys")
    # The guest's first key is one in an untouched segment: the one that is lost.
    first = OneKeySet(None, repaired=LOSES_KEYS[generation], enabled=True, call="skeys")
    assert client.set_skey(vm, 0x100, 0x36, allow_enable=True) == first
    assert client.get_skey(vm, 0x100) == OneKey(0x36, call)
    assert client.get_skey(vm, 0x101) == OneKey(0, call)
    assert client.set_skey(vm, 0x100, 0xFE) == OneKeySet(0x36, repaired=False, enabled=False, call=call)
    if has_keyop:
        assert [client.reset_referenced(vm, 0x100) for _ in range(2)] == [(True, True), (False, True)]
    else:
        with pytest.raises(ClientError) as refused:
            client.reset_referenced(vm, 0x100)
        assert (refused.value.code, refused.value.reason) == (StatusCode.UNIMPLEMENTED, "CAP_S390_KEYOP_MISSING")
    expected = bytearray(512)
    expected[0x100] = 0xFA if has_keyop else 0xFE
    assert read(client, vm) == expected
    client.delete_vm(vm)


def test_the_host_says_what_it_can_before_anybody_tries(client: Client, generation: str) -> None:
    found = answers(client)
    assert found["cap_s390_skeys"].answer == host_service_pb2.ANSWER_YES
    keyop = host_service_pb2.ANSWER_YES if HAS_KEYOP[generation] else host_service_pb2.ANSWER_NO
    assert found["cap_s390_keyop"].answer == keyop
    assert found["pgste"].answer == host_service_pb2.ANSWER_YES
    assert client.host().can_own_vms == host_service_pb2.ANSWER_YES


def test_memory_that_the_kernel_would_refuse_is_refused_by_name(client: Client) -> None:
    request = owned("odd", 1)
    request.memory_slots[0].memory_size += 4096
    with pytest.raises(ClientError) as refused:
        client.create_vm(request)
    assert refused.value.reason == "MEMORY_INVALID"
    assert list(client.list_vms()) == []
