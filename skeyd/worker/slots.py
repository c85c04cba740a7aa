"""Which memory slots a VM may be asked to have: the rules of every supported kernel, checked before one sees them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, MemoryMap, MemorySlot
from skeyd.storage_key import FRAME_SIZE
from skeyd.worker.protocol import MAX_MEMORY, MAX_MEMORY_SLOTS, SlotSpec

ALIGNMENT = 1 << 20
"""Bytes. The kernel's rule up to 6.19 (skeyd.kvm.abi.MEMORY_ALIGNMENT; a test holds the two together)."""

ADDRESS_LIMIT = 1 << 64
"""Bytes: the end of a guest's address space."""


def check_slots(slots: Sequence[SlotSpec]) -> None:
    """Refuse with MEMORY_INVALID what some supported kernel would; the message names the slot and the rule."""
    if not 1 <= len(slots) <= MAX_MEMORY_SLOTS:
        raise _invalid(f"a VM has 1 to {MAX_MEMORY_SLOTS} memory slots, not {len(slots)}")
    for number, slot in enumerate(slots):
        if not 0 < slot.size <= MAX_MEMORY or slot.size % ALIGNMENT:
            raise _invalid(
                f"memory slot {number}: a size is a multiple of 1 MiB up to {MAX_MEMORY} bytes, not {slot.size}"
            )
        if slot.guest_phys_addr % ALIGNMENT:
            raise _invalid(
                f"memory slot {number}: a guest address is a multiple of 1 MiB, not {slot.guest_phys_addr:#x}"
            )
        if slot.guest_phys_addr + slot.size > ADDRESS_LIMIT:
            raise _invalid(f"memory slot {number}: {slot.size} bytes at {slot.guest_phys_addr:#x} end beyond 2^64")
    order = sorted(range(len(slots)), key=lambda number: slots[number].guest_phys_addr)
    for one, other in itertools.pairwise(order):
        if slots[one].guest_phys_addr + slots[one].size > slots[other].guest_phys_addr:
            raise _invalid(f"memory slots {one} and {other} overlap")


def memory_map(slots: Sequence[SlotSpec], backing: str | None = None) -> MemoryMap:
    """Lay checked slots out in frames. `backing`: what is really behind them, if not what was asked for."""
    return MemoryMap(
        MemorySlot(
            number,
            GfnRange(slot.guest_phys_addr // FRAME_SIZE, slot.size // FRAME_SIZE),
            backing or slot.backing,
        )
        for number, slot in enumerate(slots)
    )


def _invalid(message: str) -> SkeydError:
    return SkeydError(Reason.MEMORY_INVALID, message)
