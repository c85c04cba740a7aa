"""Kind "simulated": no kernel, only its rules, those of one generation at a time, the lost key included.

Each rule is a fact of docs/kernel.md; the comments give its short name there. Nothing above the Backend knows that
it isn't talking to a kernel.
"""

from __future__ import annotations

import enum
import errno
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.kvm import abi
from skeyd.kvm.errors import KvmError
from skeyd.linux import MAP_NORESERVE
from skeyd.storage_key import CHANGED, REFERENCED, RESERVED, SEGMENT_FRAMES, first_reserved
from skeyd.worker.own_capture import OwnCapture
from skeyd.worker.protocol import Spec
from skeyd.worker.slots import check_slots, memory_map


@dataclass(frozen=True, slots=True)
class _Rules:
    releases: str
    loses_keys: bool
    """SET skips the first non-zero key of a segment whose page table does not exist yet."""
    checks_keys_first: bool
    """SET looks for reserved bits before it sets anything; else it stops at the bad key, the ones before it set."""
    hole_returns: int | None
    """What both calls return for a frame in no slot; None: EFAULT."""
    host_page_tables: bool
    """Keys live in the process's own page tables: whether they are used is the process's property and not the VM's,
    and R and C tell of the process's accesses. Else the VM has tables of its own, which no access of the host's meets.
    """
    has_keyop: bool


class Generation(enum.Enum):
    """A span of Linux releases that follow the same rules; the value is the first of them."""

    LINUX_4_19 = "4.19"
    LINUX_7_0 = "7.0"
    LINUX_7_2 = "7.2"


_RULES: Final = {
    Generation.LINUX_4_19: _Rules(
        "4.19 to 6.19",
        loses_keys=True,
        checks_keys_first=False,
        hole_returns=None,
        host_page_tables=True,
        has_keyop=False,
    ),
    Generation.LINUX_7_0: _Rules(
        "7.0 and 7.1",
        loses_keys=False,
        checks_keys_first=True,
        hole_returns=abi.PGM_ADDRESSING,
        host_page_tables=False,
        has_keyop=True,
    ),
    Generation.LINUX_7_2: _Rules(
        "7.2", loses_keys=False, checks_keys_first=True, hole_returns=None, host_page_tables=False, has_keyop=True
    ),
}

_GET: Final = abi.NAMES[abi.KVM_S390_GET_SKEYS]
_SET: Final = abi.NAMES[abi.KVM_S390_SET_SKEYS]
_KEYOP: Final = abi.NAMES[abi.KVM_S390_KEYOP]


class _Slot:
    # Keys and page tables lie in untouched anonymous memory, a byte each: a guest of 1 TiB costs what of it was set.
    def __init__(self, frames: GfnRange) -> None:
        self.frames = frames
        self.keys = _untouched(frames.count)
        self.has_page_table = _untouched(-(-frames.count // SEGMENT_FRAMES))
        self.touched_keyless: set[int] = set()
        """Segments that got a page table before keys were enabled."""
        self.set_keyless: set[int] = set()
        """Frames that KEYOP gave a key before keys were enabled."""

    def enable(self) -> None:
        # Up to 6.19 the walk over the process's memory that enables keys gives R and C to each frame of a page table.
        for segment in self.touched_keyless:
            first = segment * SEGMENT_FRAMES
            self.keys[first : first + SEGMENT_FRAMES] = bytes([REFERENCED | CHANGED]) * SEGMENT_FRAMES
        self.touched_keyless.clear()
        # Since 7.0 it gives all frames a zero key.
        for frame in self.set_keyless:
            self.keys[frame] = 0
        self.set_keyless.clear()

    def close(self) -> None:
        self.keys.close()
        self.has_page_table.close()


def _untouched(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)


class SimulatedProcess:
    """The process that makes VMs, and keeps them: up to Linux 6.19 they all use storage keys once one does."""

    def __init__(self) -> None:
        self.uses_keys = False
        self.slots: list[_Slot] = []
        """Of all its VMs."""

    def enable(self) -> None:
        """Use storage keys from now on."""
        if not self.uses_keys:
            self.uses_keys = True
            for slot in self.slots:
                slot.enable()


class SimulatedVm:
    """A Backend that keeps keys in memory and answers as a kernel of its generation would.

    `process` is the one that it is in; alone in one of its own where none is given.

    Synchronization: none; one thread owns it, and all of the process's.
    """

    def __init__(self, spec: Spec, process: SimulatedProcess | None = None) -> None:
        check_slots(spec.slots)
        generation = Generation(spec.simulated_kernel)
        self._rules = _RULES[generation]
        self.kernel = f"simulated Linux {self._rules.releases}"
        self.memory_map = memory_map(spec.slots, backing="none")
        self.has_keyop = self._rules.has_keyop
        try:
            self._slots = [_Slot(slot.frames) for slot in self.memory_map.slots]
        except OSError as error:
            raise SkeydError(
                Reason.OUT_OF_MEMORY, f"there is no room for the guest's keys: {error.strerror}"
            ) from error
        # Since 7.0 a VM is as good as in a process of its own.
        self._process = process if process and self._rules.host_page_tables else SimulatedProcess()
        self._process.slots.extend(self._slots)

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """As the ioctl: all or nothing."""
        if not self._process.uses_keys:
            return False  # whatever count and start are
        self._check_count(_GET, buffer)
        parts, reached = self._parts(start_gfn, buffer.nbytes)
        if reached < buffer.nbytes:
            raise self._hole(_GET)
        for slot, first, at, count in parts:
            with memoryview(slot.keys) as keys:  # a bytearray's slice would be a copy more
                buffer[at : at + count] = keys[first : first + count]
        return True

    def prepare_set(self, start_gfn: int, keys: bytes | bytearray) -> None:
        """Do nothing: there is no memory to touch, and so keys are lost, and repaired, as nowhere else so often."""

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
        """As the ioctl: enables keys for good, applies what comes before the key or frame it stops at."""
        self._check_count(_SET, buffer)
        keys = bytes(buffer)
        self._process.enable()  # even if it then fails
        parts, reached = self._parts(start_gfn, len(keys))
        bad = first_reserved(keys)
        if bad is not None and self._rules.checks_keys_first:
            raise KvmError(_SET, errno.EINVAL)
        # Up to 6.19 the frame is looked up before its key is looked at, so at one index the hole wins.
        stop = reached if bad is None else min(bad, reached)
        for slot, first, at, count in parts:
            if at < stop:
                self._store(slot, first, keys[at : min(at + count, stop)])
        if stop < len(keys):
            raise self._hole(_SET) if stop == reached else KvmError(_SET, errno.EINVAL)

    def keyop(self, operation: int, gfn: int, key: int = 0) -> int:
        """As the ioctl: needs no guest that uses keys, and makes none."""
        if not self._rules.has_keyop:
            raise KvmError(_KEYOP, errno.ENOTTY)
        if operation not in (abi.KVM_S390_KEYOP_ISKE, abi.KVM_S390_KEYOP_RRBE, abi.KVM_S390_KEYOP_SSKE):
            raise KvmError(_KEYOP, errno.EINVAL)
        parts, _ = self._parts(gfn, 1)
        if not parts:
            return self._keyop_in_hole(operation, key)
        slot, frame, _, _ = parts[0]
        old = slot.keys[frame]
        if operation == abi.KVM_S390_KEYOP_ISKE:
            return old
        if not self._process.uses_keys:
            slot.set_keyless.add(frame)
        if operation == abi.KVM_S390_KEYOP_RRBE:
            slot.keys[frame] = old & ~REFERENCED
            return old & (REFERENCED | CHANGED)
        slot.keys[frame] = key & ~RESERVED
        return old

    def _keyop_in_hole(self, operation: int, key: int) -> int:
        leaked = self._rules.hole_returns
        if leaked is None:
            raise KvmError(_KEYOP, errno.EFAULT)
        # 7.0 and 7.1 take the number of the program interruption for what the operation found.
        return {abi.KVM_S390_KEYOP_ISKE: leaked, abi.KVM_S390_KEYOP_RRBE: leaked << 1}.get(operation, key)

    def touch(self, gfn: int, write: bool) -> None:
        """Read or write guest memory as the host process may. KeyError for a frame in no slot."""
        parts, _ = self._parts(gfn, 1)
        if not parts:
            raise KeyError(gfn)
        if not self._rules.host_page_tables:
            return
        slot, frame, _, _ = parts[0]
        segment = frame // SEGMENT_FRAMES
        slot.has_page_table[segment] = 1
        if self._process.uses_keys:
            slot.keys[frame] |= REFERENCED | CHANGED if write else REFERENCED
        else:
            slot.touched_keyless.add(segment)

    def capture(self, frames: Sequence[GfnRange], into: memoryview, seconds: float, slice_seconds: float) -> OwnCapture:
        """Read slice by slice."""
        return OwnCapture(self, frames, into, seconds, slice_seconds)

    def close(self) -> None:
        """Forget the keys."""
        for slot in self._slots:
            self._process.slots.remove(slot)
            slot.close()
        self._slots = []

    def _parts(self, start_gfn: int, count: int) -> tuple[list[tuple[_Slot, int, int, int]], int]:
        # (slot, first frame in it, index in the buffer, frames) up to the first frame in no slot, and that index.
        parts: list[tuple[_Slot, int, int, int]] = []
        at = 0
        for slot in self._slots:
            gfn = start_gfn + at
            if at < count and slot.frames.start <= gfn < slot.frames.end:
                here = min(count - at, slot.frames.end - gfn)
                parts.append((slot, gfn - slot.frames.start, at, here))
                at += here
        return parts, at

    def _store(self, slot: _Slot, first: int, keys: bytes) -> None:
        if not self._rules.loses_keys:
            slot.keys[first : first + len(keys)] = keys
            return
        at = 0
        while at < len(keys):
            segment = (first + at) // SEGMENT_FRAMES
            here = min(len(keys) - at, (segment + 1) * SEGMENT_FRAMES - first - at)
            part = keys[at : at + here]
            if not slot.has_page_table[segment]:
                # A zero key needs no page table and makes none; the first other one makes it and is lost.
                zeros = len(part) - len(part.lstrip(b"\0"))
                if zeros < len(part):
                    slot.has_page_table[segment] = 1
                    lost = first + at + zeros
                    part = part[:zeros] + slot.keys[lost : lost + 1] + part[zeros + 1 :]
            slot.keys[first + at : first + at + here] = part
            at += here

    def _check_count(self, call: str, buffer: memoryview) -> None:
        if not 1 <= buffer.nbytes <= abi.KVM_S390_SKEYS_MAX:
            raise KvmError(call, errno.EINVAL)

    def _hole(self, call: str) -> KvmError:
        return KvmError(call, errno.EFAULT, returned=self._rules.hole_returns)
