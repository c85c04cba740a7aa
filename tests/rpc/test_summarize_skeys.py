"""SummarizeSkeys over the real daemon."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2
from tests.examples import examples
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import GENERATIONS, MIB, SECONDS, Stubs, new_id, ranges, some_keys

# Three slots: 1-3 MiB and 3-4 MiB touch, 8-9 MiB lies apart. In frames: 0x100-0x3ff, a gap, 0x800-0x8ff.
SLOTS = ((1, 2), (3, 1), (8, 1))
FIRST, FIRST_COUNT, SECOND, SECOND_COUNT = 0x100, 0x300, 0x800, 0x100
RUNS = b"".join(bytes([key]) * (1 + key % 37) for key in some_keys(100, 4))
KEYS = dict(enumerate(RUNS[:FIRST_COUNT], FIRST)) | dict(enumerate(RUNS[FIRST_COUNT:][:SECOND_COUNT], SECOND))
LAST_MIB = (1 << 64) // MIB - 1


def summary(stubs: Stubs, vm: str, *wanted: tuple[int, int]) -> pb.SummarizeSkeysResponse:
    """Ask for a summary."""
    return stubs.keys.SummarizeSkeys(pb.SummarizeSkeysRequest(vm=vm, ranges=ranges(*wanted)), timeout=SECONDS)


def expected(keys: dict[int, int], wanted: list[tuple[int, int]]) -> pb.SummarizeSkeysResponse:
    """Count frame by frame."""
    response = pb.SummarizeSkeysResponse(uses_storage_keys=True, consistency=pb.CONSISTENCY_LIVE)
    runs: list[list[tuple[int, int]]] = []
    for start, count in wanted:
        frames = [(gfn, keys.get(gfn, -1)) for gfn in range(start, start + count)]
        runs += [list(run) for _, run in groupby(frames, lambda frame: frame[1])]
    keyed = [run for run in runs if run[0][1] >= 0]
    response.keys = sum(map(len, keyed))
    response.gap_frames = sum(map(len, runs)) - response.keys
    for key, number in sorted(Counter(key for run in keyed for _, key in run).items()):
        response.counts.add(key=key, count=number)
    response.runs = len(keyed)
    longest = max(keyed, key=len)
    gfn, key = longest[0]
    response.longest_run.CopyFrom(pb.SummarizeSkeysResponse.Run(start_gfn=gfn, count=len(longest), key=key))
    return response


@pytest.fixture(scope="module")
def vm(stubs: Stubs) -> Iterator[str]:
    """Make a VM whose keys are KEYS."""
    name = stubs.create(new_id(), *SLOTS).name
    stubs.set(name, [(FIRST, RUNS[:FIRST_COUNT]), (SECOND, RUNS[FIRST_COUNT:][:SECOND_COUNT])])
    yield name
    stubs.delete(name)


def test_without_ranges_everything_is_counted(stubs: Stubs, vm: str) -> None:
    found = summary(stubs, vm)
    assert found.incarnation == stubs.look_at(vm).incarnation
    found.ClearField("incarnation")
    assert found == expected(KEYS, [(FIRST, SECOND + SECOND_COUNT - FIRST)])
    assert (found.keys, found.gap_frames) == (FIRST_COUNT + SECOND_COUNT, SECOND - FIRST - FIRST_COUNT)


@settings(max_examples=examples(40), deadline=None)
@given(st.data())
def test_any_ranges_are_counted_as_frame_by_frame(stubs: Stubs, vm: str, data: st.DataObject) -> None:
    edges = data.draw(st.lists(st.sampled_from(sorted(KEYS)), min_size=2, max_size=12, unique=True).map(sorted))
    if data.draw(st.booleans()):  # ranges that touch
        wanted = [(first, last - first) for first, last in pairwise(edges)]
        wanted = [(first, count) for first, count in wanted if first + count - 1 in KEYS]
    else:
        wanted = [(first, last + 1 - first) for first, last in zip(edges[::2], edges[1::2], strict=False)]
    if not wanted:
        wanted = [(edges[0], 1)]
    found = summary(stubs, vm, *wanted)
    found.ClearField("incarnation")
    assert found == expected(KEYS, wanted)


@pytest.mark.parametrize("kernel", GENERATIONS, ids=vm_pb2.SimulatedKernel.Name)
def test_every_generation_counts_alike(stubs: Stubs, new_vm: NewVm, kernel: vm_pb2.SimulatedKernel.ValueType) -> None:
    name = new_vm((0, 2), kernel=kernel)
    stubs.set(name, [(0, b"\x36" * 200 + b"\x40" * 312)])
    keys = dict(enumerate(stubs.get(name).keys))
    found = summary(stubs, name)
    found.ClearField("incarnation")
    assert found == expected(keys, [(0, 512)])
    acc = Counter[int]()
    for one in found.counts:
        acc[one.key >> 4] += one.count
    assert acc == {3: 200, 4: 312}


def test_a_run_goes_on_over_slices_and_slots_that_touch_and_ends_at_the_edge_of_a_range(
    stubs: Stubs, new_vm: NewVm
) -> None:
    name = new_vm((0, 1536), (1536, 512))  # 512 Ki frames, two slices
    stubs.set(name, [(0, b"\x10")])
    frames = 512 * 1024
    found = summary(stubs, name, (1, frames - 1))
    assert found.runs == 1
    assert found.longest_run == pb.SummarizeSkeysResponse.Run(start_gfn=1, count=frames - 1, key=0)
    assert summary(stubs, name, (1, 100), (101, frames - 101)).runs == 2


def test_of_a_guest_without_storage_keys_nothing_is_counted(stubs: Stubs, new_vm: NewVm) -> None:
    name = new_vm((0, 4), (8, 1))
    incarnation = stubs.look_at(name).incarnation
    assert summary(stubs, name) == pb.SummarizeSkeysResponse(incarnation=incarnation, consistency=pb.CONSISTENCY_LIVE)


def test_frames_at_the_end_of_the_address_space_are_counted(stubs: Stubs, new_vm: NewVm) -> None:
    name = new_vm((0, 1), (LAST_MIB, 1))
    top = LAST_MIB * 256
    stubs.set(name, [(0, b"\x20" * 256), (top, b"\x10" * 256)])
    found = summary(stubs, name)
    assert found.gap_frames == top - 256
    assert [(one.key, one.count) for one in found.counts] == [(0x10, 256), (0x20, 256)]
    assert found.longest_run == pb.SummarizeSkeysResponse.Run(start_gfn=0, count=256, key=0x20)
    assert summary(stubs, name, (top + 1, 255)).longest_run.start_gfn == top + 1
