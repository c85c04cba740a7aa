"""GetSkeys over the real daemon."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skeyd import limits
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2
from tests.daemon import DaemonProcess
from tests.examples import examples
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import FRAMES_A_MIB, SECONDS, Stubs, new_id, ranges, refused, some_keys

# Three slots: 1-3 MiB and 3-4 MiB touch, 8-9 MiB lies apart. In frames: 0x100-0x3ff, a gap, 0x800-0x8ff.
SLOTS = ((1, 2), (3, 1), (8, 1))
FIRST, FIRST_COUNT = 0x100, 0x300
SECOND, SECOND_COUNT = 0x800, 0x100
GAP, GAP_COUNT = 0x400, 0x400
KEYS = dict(enumerate(some_keys(FIRST_COUNT, 1), FIRST)) | dict(enumerate(some_keys(SECOND_COUNT, 2), SECOND))


@pytest.fixture(scope="module")
def vm(stubs: Stubs) -> Iterator[str]:
    """Make a VM whose keys are KEYS."""
    name = stubs.create(new_id(), *SLOTS).name
    stubs.set(name, [(FIRST, some_keys(FIRST_COUNT, 1)), (SECOND, some_keys(SECOND_COUNT, 2))])
    yield name
    stubs.delete(name)


@pytest.fixture(scope="module")
def big_vm(stubs: Stubs) -> Iterator[str]:
    """Make a VM of BIG frames with keys: as many as the largest chunk holds, and two segments more."""
    name = stubs.create(new_id(), (0, 4096 + 2)).name
    keys = some_keys(BIG, 3)
    stubs.set(name, [(0, keys[: 1 << 20]), (1 << 20, keys[1 << 20 :])])
    yield name
    stubs.delete(name)


BIG = (1 << 20) + 512


def test_the_header_says_what_is_being_read(stubs: Stubs, vm: str) -> None:
    found, about = stubs.get(vm).header, stubs.look_at(vm)
    assert (found.vm, found.uid, found.incarnation) == (vm, about.uid, about.incarnation)
    assert found.frame_size == 4096
    assert found.kind == vm_pb2.VM_KIND_SIMULATED
    assert found.kernel == about.kernel == "simulated Linux 7.2"
    assert found.uses_storage_keys
    slots = [(slot.slot, slot.start_gfn, slot.count) for slot in found.memory_slots]
    assert slots == [(0, 0x100, 0x200), (1, 0x300, 0x100), (2, 0x800, 0x100)]


def test_without_ranges_everything_comes_from_the_first_slot_to_the_last_with_the_gap_between(
    stubs: Stubs, vm: str
) -> None:
    read = stubs.get(vm)
    assert list(read.header.ranges) == ranges((FIRST, SECOND + SECOND_COUNT - FIRST))
    assert read.layout == [("chunk", FIRST, FIRST_COUNT), ("gap", GAP, GAP_COUNT), ("chunk", SECOND, SECOND_COUNT)]
    assert read.keys == bytes(KEYS.values())


def test_several_ranges_come_one_after_the_other_and_nothing_else_does(stubs: Stubs, vm: str) -> None:
    read = stubs.get(vm, (0x102, 3), (0x3FF, 0x402), (0x8FF, 1))
    assert list(read.header.ranges) == ranges((0x102, 3), (0x3FF, 0x402), (0x8FF, 1))
    assert read.layout == [
        ("chunk", 0x102, 3),
        ("chunk", 0x3FF, 1),
        ("gap", GAP, GAP_COUNT),
        ("chunk", 0x800, 1),
        ("chunk", 0x8FF, 1),
    ]


@pytest.mark.parametrize("chunk_keys", [0, 1000, limits.MAX_CHUNK_KEYS], ids=["default", "1000", "most"])
def test_every_chunk_but_the_last_has_as_many_keys_as_were_asked_for(
    stubs: Stubs, big_vm: str, chunk_keys: int
) -> None:
    read = stubs.get(big_vm, chunk_keys=chunk_keys)
    size = chunk_keys or limits.DEFAULT_CHUNK_KEYS
    assert [count for _, _, count in read.layout] == [size] * (BIG // size) + [BIG % size]
    assert read.keys == some_keys(BIG, 3)


def test_a_chunk_may_be_a_single_key(stubs: Stubs, big_vm: str) -> None:
    read = stubs.get(big_vm, (BIG - 600, 600), chunk_keys=1)
    assert read.layout == [("chunk", gfn, 1) for gfn in range(BIG - 600, BIG)]
    assert read.keys == some_keys(BIG, 3)[-600:]


def test_a_guest_without_storage_keys_is_an_answer_and_its_trailer_comes_at_once(stubs: Stubs, new_vm: NewVm) -> None:
    read = stubs.get(new_vm((0, 4), (8, 1)))
    assert not read.header.uses_storage_keys
    assert read.parts == []
    assert (read.trailer.keys, read.trailer.gap_frames, read.trailer.crc32) == (0, 0, 0)


def test_over_tcp_comes_the_same(shared_daemon: DaemonProcess, stubs: Stubs, vm: str) -> None:
    with Stubs(shared_daemon.tcp) as over_tcp:
        assert over_tcp.get(vm) == stubs.get(vm)


@settings(max_examples=examples(40), deadline=None)
@given(st.data())
def test_any_ranges_in_any_chunks_bring_exactly_the_keys_of_their_frames(
    stubs: Stubs, vm: str, data: st.DataObject
) -> None:
    edges = data.draw(st.lists(st.sampled_from(sorted(KEYS)), min_size=1, max_size=12, unique=True).map(sorted))
    wanted = [(first, last + 1 - first) for first, last in zip(edges[::2], edges[1::2], strict=False)]
    wanted = wanted or [(edges[0], 1)]
    size = data.draw(st.integers(1, 1500))

    read = stubs.get(vm, *wanted, chunk_keys=size)

    frames = [gfn for start, count in wanted for gfn in range(start, start + count)]
    assert read.keys == bytes(KEYS[gfn] for gfn in frames if gfn in KEYS)
    told = [(kind == "chunk", gfn) for kind, start, count in read.layout for gfn in range(start, start + count)]
    assert told == [(gfn in KEYS, gfn) for gfn in frames]
    assert all(count <= size for kind, _, count in read.layout if kind == "chunk")


@pytest.mark.parametrize(
    ("wanted", "chunk_keys", "code", "reason", "named"),
    [
        ([(0x100, 0)], 0, grpc.StatusCode.INVALID_ARGUMENT, "RANGE_EMPTY", ["0x100"]),
        ([(2**64 - 1, 2)], 0, grpc.StatusCode.INVALID_ARGUMENT, "RANGE_OVERFLOW", ["0xffffffffffffffff", "2 frames"]),
        ([(2**64 - 1, 2**64 - 1)], 0, grpc.StatusCode.INVALID_ARGUMENT, "RANGE_OVERFLOW", ["0xffffffffffffffff"]),
        ([(2**64 - 1, 1)], 0, grpc.StatusCode.OUT_OF_RANGE, "GFN_NOT_MAPPED", ["0xffffffffffffffff"]),
        ([(0x800, 1), (0x100, 1)], 0, grpc.StatusCode.INVALID_ARGUMENT, "RANGES_NOT_ASCENDING", ["0x100", "0x800"]),
        ([(0x100, 4), (0x103, 1)], 0, grpc.StatusCode.INVALID_ARGUMENT, "RANGES_NOT_ASCENDING", ["0x103", "0x100"]),
        ([(0x100, 1), (0x100, 1)], 0, grpc.StatusCode.INVALID_ARGUMENT, "RANGES_NOT_ASCENDING", ["0x100"]),
        ([(0xFF, 2)], 0, grpc.StatusCode.OUT_OF_RANGE, "GFN_NOT_MAPPED", ["gfn 0xff ", "0x100-0x3ff"]),
        ([(0x3FF, 2)], 0, grpc.StatusCode.OUT_OF_RANGE, "GFN_NOT_MAPPED", ["gfn 0x400 "]),
        ([(0x400, 4)], 0, grpc.StatusCode.OUT_OF_RANGE, "GFN_NOT_MAPPED", ["gfn 0x400 "]),
        ([(0x100, 1), (0x8FF, 2)], 0, grpc.StatusCode.OUT_OF_RANGE, "GFN_NOT_MAPPED", ["gfn 0x900 "]),
        ([(2 * n, 1) for n in range(16_385)], 0, grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID", ["16385"]),
        ([], 1_048_577, grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID", ["1048577", "1048576"]),
        ([], 2**32 - 1, grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID", ["4294967295"]),
    ],
    ids=[
        "count-0",
        "overflow",
        "overflow-by-most",
        "last-gfn-of-all",
        "descending",
        "overlapping",
        "twice-the-same",
        "begins-before-a-slot",
        "ends-behind-a-slot",
        "wholly-in-a-gap",
        "second-range-outside",
        "too-many-ranges",
        "chunk-too-large",
        "chunk-far-too-large",
    ],
)
def test_a_bad_request_is_refused_before_anything_comes_and_named(
    stubs: Stubs,
    vm: str,
    wanted: list[tuple[int, int]],
    chunk_keys: int,
    code: grpc.StatusCode,
    reason: str,
    named: list[str],
) -> None:
    request = pb.GetSkeysRequest(vm=vm, ranges=ranges(*wanted), max_chunk_keys=chunk_keys)
    found = refused(lambda: next(stubs.keys.GetSkeys(request, timeout=SECONDS)))
    assert (found.code, found.reason, found.domain) == (code, reason, "skeyd")
    for word in named:
        assert word in found.message


def test_16_384_ranges_are_not_too_many(stubs: Stubs, new_vm: NewVm) -> None:
    # A guest without keys: only the question is long.
    wanted = [(2 * n, 1) for n in range(16_384)]
    read = stubs.get(new_vm((0, 2 * 16_384 // FRAMES_A_MIB)), *wanted)
    assert list(read.header.ranges) == ranges(*wanted)


def test_chunks_ascend_and_leave_nothing_out_even_where_slots_touch(stubs: Stubs, vm: str) -> None:
    layout = stubs.get(vm, chunk_keys=7).layout
    assert all(start + count == following for (_, start, count), (_, following, _) in pairwise(layout))
    assert layout[0][1] == FIRST
    assert sum(layout[-1][1:]) == SECOND + SECOND_COUNT
