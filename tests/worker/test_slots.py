"""Which memory slots a VM may have, rule by rule."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.kvm import abi
from skeyd.worker import slots
from skeyd.worker.protocol import MAX_MEMORY, MAX_MEMORY_SLOTS, SlotSpec
from skeyd.worker.slots import check_slots, memory_map
from tests.examples import examples
from tests.worker.specs import MIB, slot

TOP = 1 << 64


def _refusal(*asked: SlotSpec) -> str:
    with pytest.raises(SkeydError) as refused:
        check_slots(asked)
    assert refused.value.reason is Reason.MEMORY_INVALID
    return refused.value.message


def test_the_alignment_asked_for_is_the_kernels() -> None:
    assert slots.ALIGNMENT == abi.MEMORY_ALIGNMENT == MIB


@pytest.mark.parametrize(
    "asked",
    [
        [slot(0, 1)],
        [SlotSpec(0, MAX_MEMORY, "anonymous")],
        [SlotSpec(TOP - MIB, MIB, "anonymous")],  # ends exactly at 2^64
        [slot(0, 1), slot(1, 1), slot(2, 1)],  # touching
        [slot(9, 1), slot(0, 9)],  # in any order
        [slot(2 * number, 1) for number in range(MAX_MEMORY_SLOTS)],
    ],
)
def test_slots_that_every_kernel_takes_are_taken(asked: list[SlotSpec]) -> None:
    check_slots(asked)


@pytest.mark.parametrize("count", [0, MAX_MEMORY_SLOTS + 1])
def test_a_vm_has_at_least_one_slot_and_not_too_many(count: int) -> None:
    assert f"not {count}" in _refusal(*(slot(2 * number, 1) for number in range(count)))


@pytest.mark.parametrize("size", [0, -MIB, 1, MIB - 1, MIB + 1, MIB + 4096, MAX_MEMORY + MIB])
def test_a_size_is_whole_mebibytes_and_not_too_many(size: int) -> None:
    assert f"memory slot 1: a size is a multiple of 1 MiB up to {MAX_MEMORY} bytes, not {size}" in _refusal(
        slot(0, 1), SlotSpec(4 * MIB, size, "anonymous")
    )


@pytest.mark.parametrize("address", [1, 4096, MIB - 1, MIB + 4096, TOP - 1])
def test_a_guest_address_is_whole_mebibytes(address: int) -> None:
    message = _refusal(slot(100, 1), SlotSpec(address, MIB, "anonymous"))
    assert f"memory slot 1: a guest address is a multiple of 1 MiB, not {address:#x}" in message


@pytest.mark.parametrize(("address", "size"), [(TOP - MIB, 2 * MIB), (TOP - 5 * MIB, 6 * MIB), (TOP, MIB)])
def test_a_slot_does_not_end_beyond_two_to_the_64(address: int, size: int) -> None:
    assert "memory slot 0" in (message := _refusal(SlotSpec(address, size, "anonymous")))
    assert "end beyond 2^64" in message


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ([slot(0, 2), slot(1, 2)], "0 and 1"),
        ([slot(1, 2), slot(0, 2)], "1 and 0"),
        ([slot(0, 1), slot(0, 1)], "0 and 1"),
        ([slot(0, 9), slot(20, 1), slot(3, 1)], "0 and 2"),  # one inside the other, not neighbours in the request
    ],
)
def test_slots_that_overlap_are_refused_by_number(asked: list[SlotSpec], named: str) -> None:
    assert _refusal(*asked) == f"memory slots {named} overlap"


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 4)), min_size=1, max_size=5))
@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_slots_are_taken_exactly_where_no_mebibyte_is_in_two_of_them(asked: list[tuple[int, int]]) -> None:
    covered = [mib for start, size in asked for mib in range(start, start + size)]
    specs = [slot(*one) for one in asked]

    if len(covered) == len(set(covered)):
        check_slots(specs)
        assert memory_map(specs).mapped.frames() == 256 * len(covered)
    else:
        assert "overlap" in _refusal(*specs)


def test_slots_become_frames_and_keep_their_numbers_and_backings() -> None:
    found = memory_map([slot(4, 2, "memfd"), slot(0, 1, "file", "/x")]).slots

    assert [(one.slot, one.frames, one.backing) for one in found] == [
        (1, GfnRange(0, 256), "file"),
        (0, GfnRange(1024, 512), "memfd"),
    ]


def test_what_is_really_behind_slots_can_be_said() -> None:
    assert [one.backing for one in memory_map([slot(0, 1, "memfd")], backing="none").slots] == ["none"]
