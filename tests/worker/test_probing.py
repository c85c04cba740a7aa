"""Memory that is found by asking for it: whatever lies where it is looked for, frame by frame, and nothing else."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, Ranges
from skeyd.injection.vm import ForeignVm
from skeyd.kvm.errors import KvmError
from skeyd.limits import WORKER_START_SECONDS
from skeyd.worker import probing, vmm_memory
from skeyd.worker.adopting import ADOPT_SECONDS
from skeyd.worker.adoption import HOLD_MAX_MS
from skeyd.worker.probing import FAR, GIB_FRAMES, HIGHEST, MIB_FRAMES, NEAR, PROBING_SECONDS, find_memory
from skeyd.worker.protocol import MAX_MEMORY, MAX_MEMORY_SLOTS, SLICE_KEYS, SlotSpec
from tests.examples import examples

Parts = list[tuple[int, int]]
"""(first frame, frames)."""


class Space:
    """A VM with memory in these parts, which counts what it is asked."""

    def __init__(self, parts: Parts) -> None:
        self.parts = Ranges(GfnRange(*part) for part in parts)
        self.calls = 0
        self.frames = 0

    def holds(self, frames: GfnRange) -> bool:
        """As Probed has it."""
        assert frames.count <= SLICE_KEYS
        self.calls += 1
        held = any(part.start <= frames.start and frames.end <= part.end for part in self.parts)
        if held:
            self.frames += frames.count
        return held

    def first_held(self, gfns: Sequence[int]) -> int | None:
        """As Probed has it."""
        assert list(gfns) == sorted(set(gfns))
        self.calls += len(gfns)
        return next((gfn for gfn in gfns if any(part.start <= gfn < part.end for part in self.parts)), None)


def found(parts: Parts) -> Parts:
    return [(slot.guest_phys_addr >> 12, slot.size >> 12) for slot in find_memory(Space(parts))]


def test_what_is_not_found_in_time_is_unknown_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    space = Space([(0, GIB_FRAMES)])
    clock = iter(range(10_000))
    monkeypatch.setattr("skeyd.worker.probing.time.monotonic", lambda: next(clock))
    with pytest.raises(SkeydError, match="it was not all found in 9 s; name its memory slots") as refused:
        find_memory(space, 9)
    assert refused.value.reason is Reason.VMM_MEMORY_UNKNOWN
    assert 0 < space.calls < 9


def test_a_worker_that_looks_for_memory_ends_before_it_is_ended() -> None:
    # With QEMU's word beforehand, and a slice at the end of the time, held for as long as it may.
    assert ADOPT_SECONDS + PROBING_SECONDS + HOLD_MAX_MS / 1000 < WORKER_START_SECONDS


@st.composite
def _reachable(draw: st.DrawFn) -> Parts:
    # Parts of any frames: each of them has a place at which is looked behind the one before.
    parts: Parts = []
    end = 0
    for _ in range(draw(st.integers(1, 6))):
        if not parts and draw(st.booleans()):
            start = 0
        else:
            places = list(probing._places(end))
            index = draw(st.integers(0, len(places) - 1))
            before = places[index - 1] if index else end
            start = draw(st.integers(max(before, places[index] - 3 * MIB_FRAMES) + 1, places[index]))
            count = places[index] - start + draw(st.integers(1, 5000))
            parts.append((start, count))
            end = start + count
            continue
        count = draw(st.integers(1, 5000))
        parts.append((start, count))
        end = count
    return [part for part in parts if sum(part) < 1 << HIGHEST - 12]


@given(_reachable())
@settings(max_examples=examples(200), deadline=None)
def test_what_lies_where_it_is_looked_for_is_found_to_the_frame(parts: Parts) -> None:
    if parts:
        assert found(parts) == parts


@pytest.mark.parametrize(
    "parts",
    [
        [(0, 1)],
        [(0, 255)],
        [(0, MIB_FRAMES)],
        [(0, 64 * MIB_FRAMES)],
        [(0, 1025 * GIB_FRAMES + 7)],
        [(0, MIB_FRAMES), (2 * MIB_FRAMES, MIB_FRAMES)],
        [(0, MIB_FRAMES), ((NEAR + 1) * MIB_FRAMES - 1, 2)],
        [(0, MIB_FRAMES), (FAR * GIB_FRAMES, 1)],
        [(0, MIB_FRAMES), (1 << 46 - 12, MIB_FRAMES)],
        [(5 * MIB_FRAMES, 300)],
        [(MIB_FRAMES - 1, 2)],
        [(number * 2 * MIB_FRAMES, MIB_FRAMES) for number in range(MAX_MEMORY_SLOTS)],
    ],
)
def test_memory_is_found(parts: Parts) -> None:
    assert found(parts) == parts


def test_what_is_larger_than_a_slot_may_be_is_two() -> None:
    frames = MAX_MEMORY // 4096
    assert found([(0, frames + 3)]) == [(0, frames), (frames, 3)]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([(70 * GIB_FRAMES + 1, 5)], "no memory was found"),
        ([(number * 2 * MIB_FRAMES, MIB_FRAMES) for number in range(MAX_MEMORY_SLOTS + 1)], "more than 32 parts"),
    ],
)
def test_what_cant_be_found_is_unknown(parts: Parts, said: str) -> None:
    with pytest.raises(SkeydError, match=said) as caught:
        find_memory(Space(parts))
    assert caught.value.reason is Reason.VMM_MEMORY_UNKNOWN
    assert caught.value.metadata["remedy"]


def test_a_guest_of_a_tebibyte_is_asked_for_each_frame_about_once() -> None:
    space = Space([(0, 1024 * GIB_FRAMES)])
    find_memory(space)
    assert space.calls <= NEAR + FAR + 20 + 1024 + 2 * 18
    assert space.frames <= 1.1 * 1024 * GIB_FRAMES


def test_a_get_that_takes_long_is_not_made_any_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1 << 20))
    monkeypatch.setattr("skeyd.worker.probing.time.monotonic", lambda: next(clock))
    asked: list[int] = []

    class Slow(Space):
        def holds(self, frames: GfnRange) -> bool:
            asked.append(frames.count)
            return super().holds(frames)

    find_memory(Slow([(0, 100 * MIB_FRAMES)]), seconds=1 << 20)
    assert max(asked) == MIB_FRAMES


class Vm(Space):
    """As a ForeignVm answers: a guest without keys says 1 to everything."""

    uses_keys = True

    def look_at_skeys(self, start_gfn: int, count: int) -> bool:
        """As ForeignVm has it."""
        if self.uses_keys and not self.holds(GfnRange(start_gfn, count)):
            raise KvmError("KVM_S390_GET_SKEYS", errno.EFAULT)
        return self.uses_keys

    def first_of(self, gfns: Sequence[int]) -> int | None:
        """As ForeignVm has it."""
        return self.first_held(gfns) if self.uses_keys else gfns[0]


def slots(vm: Vm, *named: tuple[int, int]) -> Parts:
    specs = tuple(SlotSpec(start << 20, size << 20, "vmm") for start, size in named)
    known = vmm_memory.slots(cast(ForeignVm, vm), specs)
    return [(one.guest_phys_addr >> 20, one.size >> 20) for one in known]


@pytest.mark.parametrize("first", [0, 3])
def test_slots_are_found_where_none_is_named_and_else_are_those_that_are_named(first: int) -> None:
    vm = Vm([(first * MIB_FRAMES, 8 * MIB_FRAMES)])
    assert slots(vm) == [(first, 8)]
    assert slots(vm, (first, 4), (first + 4, 4)) == [(first, 4), (first + 4, 4)]


def test_of_a_guest_without_keys_slots_are_those_that_are_named_or_unknown() -> None:
    vm = Vm([(0, 8 * MIB_FRAMES)])
    vm.uses_keys = False
    assert slots(vm, (0, 4), (900, 1)) == [(0, 4), (900, 1)]
    with pytest.raises(SkeydError, match="uses no storage keys") as caught:
        slots(vm)
    assert caught.value.reason is Reason.VMM_MEMORY_UNKNOWN


@pytest.mark.parametrize("wrong", [(0, 9), (7, 2), (8, 1)])
def test_a_slot_that_the_vm_does_not_have_is_refused(wrong: tuple[int, int]) -> None:
    with pytest.raises(SkeydError, match="memory slot 1 has the frame") as caught:
        slots(Vm([(0, 8 * MIB_FRAMES)]), (0, 4), wrong)
    assert caught.value.reason is Reason.MEMORY_INVALID


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL])
def test_what_says_nothing_of_memory_is_told_as_it_is(number: int) -> None:
    class Broken(Vm):
        def look_at_skeys(self, start_gfn: int, count: int) -> bool:
            raise KvmError("KVM_S390_GET_SKEYS", number)

    with pytest.raises(SkeydError) as caught:
        slots(Broken([]))
    assert caught.value.reason is {errno.EIO: Reason.VM_DEAD, errno.EINVAL: Reason.KERNEL_REFUSED}[number]
