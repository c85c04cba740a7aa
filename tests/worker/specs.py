"""Specs of VMs to test with."""

from __future__ import annotations

from skeyd.worker.protocol import SlotSpec, Spec

MIB = 1 << 20
UID = "0c54ab32-5d11-4a3c-9b3e-6d1b2f0c9a77"


def slot(start: int, size: int, backing: str = "anonymous", path: str = "") -> SlotSpec:
    """Make a slot; start and size in MiB."""
    return SlotSpec(start * MIB, size * MIB, backing, path)


def simulated(*slots: tuple[int, int], kernel: str = "7.2", vm_id: str = "web", uid: str = UID) -> Spec:
    """Make a simulated VM's spec; slots are (start, size) in MiB."""
    return Spec(vm_id, uid, "simulated", tuple(slot(*one) for one in slots), 1_700_000_000, kernel)


def owned(*slots: SlotSpec) -> Spec:
    """Make an owned VM's spec."""
    return Spec("web", UID, "owned", slots, 1_700_000_000)
