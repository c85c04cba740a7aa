"""Where a VM's memory is, found by asking for keys: GET is all or nothing, and fails where a frame is in no slot.

What is found is certain: each frame of it has answered. That there is no more is not: a gap is looked through at the
places below only, since a guest's address space has more frames than anybody can ask for one by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Final, Protocol

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.storage_key import FRAME_SIZE, GFN_LIMIT
from skeyd.worker.protocol import MAX_MEMORY, MAX_MEMORY_SLOTS, SLICE_KEYS, SlotSpec

MIB_FRAMES: Final = (1 << 20) // FRAME_SIZE
GIB_FRAMES: Final = (1 << 30) // FRAME_SIZE
NEAR: Final = 64
"""MiB behind a part of memory that are looked at one by one."""
FAR: Final = 64
"""And then so many multiples of 1 GiB."""
HIGHEST: Final = 47
"""And then the powers of two. All of it below 2^47 bytes: from there on the kernel takes no slot (docs/kernel.md)."""

LONG_SECONDS: Final = 0.005
"""A GET that takes so long isn't made any longer: it keeps the guest from the kernel's lock."""


PROBING_SECONDS: Final = 20.0
"""How long it is looked for memory: less than a front waits for a worker to begin, with what there is to do before and
after that. Whoever is killed for having been too slow leaves its buffer in the process."""


class Probed(Protocol):
    """A VM that can be asked whether frames are in its memory slots. SkeydErrors are its own."""

    def holds(self, frames: GfnRange) -> bool:
        """Whether all of the frames are; at most SLICE_KEYS."""

    def first_held(self, gfns: Sequence[int]) -> int | None:
        """Return the first of these frames that is; None where none is."""


class _Timed:
    # A Probed that is asked for so many seconds.
    def __init__(self, vm: Probed, seconds: float) -> None:
        self._vm = vm
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def holds(self, frames: GfnRange) -> bool:
        self._require_time()
        return self._vm.holds(frames)

    def first_held(self, gfns: Sequence[int]) -> int | None:
        self._require_time()
        return self._vm.first_held(gfns)

    def _require_time(self) -> None:
        if time.monotonic() >= self._end:
            raise unknown(f"it was not all found in {self._seconds:g} s")


def find_memory(vm: Probed, seconds: float = PROBING_SECONDS) -> tuple[SlotSpec, ...]:
    """Find the memory slots of a guest that uses storage keys. Slots that touch are one here.

    SkeydError VMM_MEMORY_UNKNOWN where there is none, it is in more parts than a VM may have, or it takes too long.
    """
    vm = _Timed(vm, seconds)
    found: list[GfnRange] = []
    start = 0 if vm.holds(GfnRange(0, 1)) else _next(vm, 0)
    while start is not None:
        if len(found) == MAX_MEMORY_SLOTS:
            raise unknown(f"its memory is in more than {MAX_MEMORY_SLOTS} parts")
        found.append(GfnRange(start, _end(vm, start) - start))
        start = _next(vm, found[-1].end)
    slots = tuple(chain.from_iterable(map(_slots, found)))
    if not slots:
        raise unknown("no memory was found in it")
    return slots


def unknown(why: str) -> SkeydError:
    """Say that memory can't be found, and why."""
    return SkeydError(
        Reason.VMM_MEMORY_UNKNOWN,
        f"where the VM has memory is unknown: {why}; name its memory slots",
        {"remedy": "name the memory slots"},
    )


def _slots(frames: GfnRange) -> Iterator[SlotSpec]:
    left = frames.count * FRAME_SIZE
    while left:
        size = min(left, MAX_MEMORY)
        yield SlotSpec(frames.end * FRAME_SIZE - left, size, "vmm")
        left -= size


def _next(vm: Probed, end: int) -> int | None:
    """Return the first frame of the next part of memory behind a frame that is in none."""
    places = list(_places(end))
    held = vm.first_held(places)
    if held is None:
        return None
    before = places[places.index(held) - 1] if held != places[0] else end
    # Of the frames between the last that isn't held and this one it has some, perhaps.
    return held - _reach(lambda first, count: vm.holds(GfnRange(held - first - count, count)), held - before - 1)


def _places(end: int) -> Iterator[int]:
    near_from = (end // MIB_FRAMES + 1) * MIB_FRAMES
    near = range(near_from, near_from + NEAR * MIB_FRAMES, MIB_FRAMES)
    far_from = (near[-1] // GIB_FRAMES + 1) * GIB_FRAMES
    far = range(far_from, far_from + FAR * GIB_FRAMES, GIB_FRAMES)
    powers = [(1 << bits) // FRAME_SIZE for bits in range(30, HIGHEST)]
    last = -1
    for gfn in chain(near, far, powers):
        if last < gfn < (1 << HIGHEST) // FRAME_SIZE:
            last = gfn
            yield gfn


def _end(vm: Probed, start: int) -> int:
    """Return the frame behind those that follow a held one without a gap."""
    return start + 1 + _reach(lambda first, count: vm.holds(GfnRange(start + 1 + first, count)), GFN_LIMIT - start - 1)


def _reach(holds: Callable[[int, int], bool], most: int) -> int:
    """Return how many frames are held one after another, `most` at most.

    `holds` is asked of the frames from the first-th on, `count` of them, and answers for all at once: in longer and
    longer steps until one fails, and then by halves.
    """
    reached, step, growing = 0, MIB_FRAMES, True
    while step and reached < most:
        count = min(step, most - reached)
        began = time.monotonic()
        if holds(reached, count):
            reached += count
            if growing:
                quick = time.monotonic() - began < LONG_SECONDS
                step = min(2 * step, SLICE_KEYS) if quick else step
                continue
        growing = False
        # The largest power of two below: what is left is less than `count`, and than twice that.
        step = 1 << (count - 1).bit_length() >> 1 if count > 1 else 0
    return reached
