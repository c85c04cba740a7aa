"""Requests that many tests make."""

from __future__ import annotations

from skeyd.client import Client, Keys
from skeyd.gfn import GfnRange
from skeyd.v1 import vm_pb2, vm_service_pb2

MIB = 1 << 20


def simulated(vm_id: str, mib: int) -> vm_service_pb2.CreateVmRequest:
    """Ask for a simulated VM with one memory slot at 0."""
    request = vm_service_pb2.CreateVmRequest(vm_id=vm_id, kind=vm_pb2.VM_KIND_SIMULATED)
    request.memory_slots.add(memory_size=mib * MIB)
    return request


def owned(vm_id: str, mib: int) -> vm_service_pb2.CreateVmRequest:
    """Ask for an owned VM with one memory slot of anonymous memory at 0."""
    request = vm_service_pb2.CreateVmRequest(vm_id=vm_id, kind=vm_pb2.VM_KIND_OWNED)
    request.memory_slots.add(memory_size=mib * MIB)
    return request


def adopted(vm_id: str, mib: int) -> vm_service_pb2.AdoptVmRequest:
    """Ask for the only VM of process 1, with one memory slot at 0."""
    request = vm_service_pb2.AdoptVmRequest(vm_id=vm_id, pid=1)
    request.memory_slots.add(memory_size=mib * MIB)
    return request


def pattern(frames: int) -> bytes:
    """Make keys of which no two neighbours are alike and no 1 MiB is like the next; all 128 values occur."""
    return bytes((frame * 38 + frame // 256 * 2) & 0xFE for frame in range(frames))


def fill(client: Client, vm_id: str, frames: int) -> bytes:
    """Set the pattern over the first frames of a VM; returns it."""
    keys, where = pattern(frames), GfnRange(0, frames)
    client.set_skeys(f"vms/{vm_id}", [where], [Keys(where, keys)], allow_enable=True)
    return keys
