"""A QEMU's VM that skeyd adopts, and what is seen of it."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Final

from google.protobuf.duration_pb2 import Duration

from skeyd.client.connection import Client
from skeyd.injection.buffer import MARK
from skeyd.injection.maps import mappings
from skeyd.v1 import vm_pb2, vm_service_pb2
from skeyd.worker.adoption import HOLD_MAX_MS
from tests.injection.qemu import SANDBOX, Qemu
from tests.injection.victims import look_at_process, peek

MIB: Final = 1 << 20
NAME: Final = "vms/guest"
LONG: Final = Duration(seconds=HOLD_MAX_MS // 1000)
"""A host that is emulated may take a second where a real one takes a millisecond."""
KINDS: Final = {
    "plain": (),
    "sandboxed": ("-sandbox", SANDBOX),
    "memfd": ("-object", "memory-backend-memfd,id=ram,size=64M", "-machine", "memory-backend=ram"),
}


def some_keys(seed: int, count: int) -> bytes:
    """Make keys whose ACC and F differ from frame to frame; R and C may be given by the kernel to any."""
    rng = random.Random(seed)  # noqa: S311  no secret
    return bytes(rng.randrange(32) << 3 for _ in range(count))


def acc_and_f(keys: bytes) -> bytes:
    """Return them without R and C."""
    return bytes(key & 0xF8 for key in keys)


def adopt(client: Client, qemu: Qemu, memory_mib: int | None = 64) -> vm_pb2.Vm:
    """Adopt a QEMU's VM as NAME; None: it is not said where its memory is."""
    slots = []
    if memory_mib is not None:
        slots = [vm_service_pb2.MemorySlotSpec(guest_phys_addr=0, memory_size=memory_mib * MIB)]
    return client.adopt_vm(
        vm_service_pb2.AdoptVmRequest(vm_id="guest", pid=qemu.pid, memory_slots=slots, max_hold_time=LONG)
    )


def look(pid: int) -> dict[str, object]:
    """Return what is QEMU's alone; its heap grows with what it is asked for itself, to dump its keys for one."""
    found = look_at_process(pid)
    return {name: found[name] for name in found if name != "maps" and not name.startswith("Vm")}


def buffers_in(pid: int) -> list[int]:
    """Return where a worker's buffers are."""
    found = []
    for one in mappings(pid):
        if one.access == "rw-p" and not one.path:
            with suppress(OSError):  # pages that aren't there to be read, KVM's for one
                if peek(pid, one.start, len(MARK)) == MARK:
                    found.append(one.start)
    return found
