"""The memory slots of a VM that another process owns: those that a caller names, or that are found."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.injection.vm import ForeignVm
from skeyd.kvm.errors import KvmError
from skeyd.storage_key import FRAME_SIZE
from skeyd.worker import refusals
from skeyd.worker.probing import find_memory, unknown
from skeyd.worker.protocol import SlotSpec


def slots(vm: ForeignVm, named: tuple[SlotSpec, ...]) -> tuple[SlotSpec, ...]:
    """Return the slots that are named, or find them where none is.

    SkeydError VMM_MEMORY_UNKNOWN: they can't be found. MEMORY_INVALID: the first or the last frame of one that is named
    is in none of the VM's, as far as that can be known.
    """
    probed = _Probed(vm)
    if not probed.tells:
        if not named:
            raise unknown("its guest uses no storage keys, and so to ask for them tells nothing")
        return named
    for number, slot in enumerate(named):
        first = slot.guest_phys_addr // FRAME_SIZE
        for gfn in (first, first + slot.size // FRAME_SIZE - 1):
            if not probed.holds(GfnRange(gfn, 1)):
                raise SkeydError(
                    Reason.MEMORY_INVALID,
                    f"memory slot {number} has the frame {gfn:#x}, and the VM has none there",
                    {"gfn": hex(gfn)},
                )
    return named or find_memory(probed)


class _Probed:
    """skeyd.worker.probing.Probed."""

    def __init__(self, vm: ForeignVm) -> None:
        self._vm = vm
        self.tells = self._get(GfnRange(0, 1)) is not False
        """Whether the guest uses storage keys. Otherwise every GET succeeds, wherever its frames are."""

    def holds(self, frames: GfnRange) -> bool:
        """As Probed has it."""
        return self._get(frames) is not None

    def first_held(self, gfns: Sequence[int]) -> int | None:
        """As Probed has it."""
        try:
            return self._vm.first_of(gfns)
        except KvmError as error:
            raise refusals.of_key_call(error, GfnRange(gfns[0], 1)) from error

    def _get(self, frames: GfnRange) -> bool | None:
        # None: some of the frames aren't there.
        try:
            return self._vm.look_at_skeys(frames.start, frames.count)
        except KvmError as error:
            if error.errno == errno.EFAULT:
                return None
            raise refusals.of_key_call(error, frames) from error
