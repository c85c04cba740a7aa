"""SetSkeys over the real daemon: the main job."""

from __future__ import annotations

import zlib

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skeyd.encoding import codec
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2
from tests.examples import examples
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import (
    FRAMES_A_MIB,
    GENERATIONS,
    Stubs,
    chunk,
    commit,
    header,
    new_id,
    parts,
    refusal,
    refused,
    some_keys,
)


@pytest.mark.parametrize("kernel", GENERATIONS, ids=vm_pb2.SimulatedKernel.Name)
def test_what_was_set_is_what_is_read_and_no_key_of_an_untouched_guest_is_lost(
    stubs: Stubs, new_vm: NewVm, kernel: vm_pb2.SimulatedKernel.ValueType
) -> None:
    vm = new_vm((0, 32), (64, 8), kernel=kernel)
    # No key is zero, so that the kernels that lose the first one of a segment lose one of each.
    low, high = bytes(key or 0x10 for key in some_keys(32 * 256, 1)), b"\x38" * (8 * 256)

    result = stubs.set(vm, [(0, low), (64 * 256, high)])

    assert result.keys_set == 40 * 256
    assert result.enabled
    assert result.keys_repaired == (40 if kernel == vm_pb2.SIMULATED_KERNEL_LINUX_4_19 else 0)
    read = stubs.get(vm)
    assert read.header.uses_storage_keys
    assert read.keys == low + high
    assert read.layout == [("chunk", 0, 32 * 256), ("gap", 32 * 256, 32 * 256), ("chunk", 64 * 256, 8 * 256)]


@pytest.mark.parametrize("kernel", GENERATIONS, ids=vm_pb2.SimulatedKernel.Name)
def test_a_second_set_repairs_and_enables_nothing(
    stubs: Stubs, new_vm: NewVm, kernel: vm_pb2.SimulatedKernel.ValueType
) -> None:
    vm = new_vm((0, 4), kernel=kernel)
    stubs.set(vm, [(0, b"\x10" * 1024)])
    again = stubs.set(vm, [(0, b"\x28" * 1024)], allow_enable=False)
    assert (again.keys_set, again.keys_repaired, again.enabled) == (1024, 0, False)
    assert stubs.get(vm).keys == b"\x28" * 1024


def test_each_chunk_is_answered_by_how_far_it_came(stubs: Stubs, new_vm: NewVm) -> None:
    vm = new_vm((0, 1), (4, 1), kernel=vm_pb2.SIMULATED_KERNEL_LINUX_4_19)
    answers, error = stubs.send(
        header(vm, (0, 8), (1024, 8), allow_enable=True),
        chunk(0, b"\x10" * 5),
        chunk(5, b"\x10" * 3),
        chunk(1024, b"\x10" * 8),
        commit(),
    )
    assert error is None
    assert parts(answers) == ["begun", "progress", "progress", "progress", "result"]
    begun = pb.SetSkeysResponse.Begun(incarnation=stubs.look_at(vm).incarnation, encodings=codec.KNOWN)
    begun.max_slice_time.FromMilliseconds(10)
    assert answers[0].begun == begun
    first, second, whole = (zlib.crc32(b"\x10" * count) for count in (5, 8, 16))
    assert [one.progress for one in answers[1:4]] == [
        pb.SetSkeysResponse.Progress(next_gfn=5, keys_set=5, keys_repaired=1, enabled=True, crc32=first),
        pb.SetSkeysResponse.Progress(next_gfn=1024, keys_set=8, keys_repaired=1, enabled=True, crc32=second),
        pb.SetSkeysResponse.Progress(next_gfn=1032, keys_set=16, keys_repaired=2, enabled=True, crc32=whole),
    ]
    assert answers[4].result == pb.SetSkeysResponse.Result(
        keys_set=16, keys_repaired=2, enabled=True, outcome=pb.SetSkeysResponse.OUTCOME_APPLIED, crc32=whole
    )


def test_the_largest_chunk_that_is_allowed_is_set_whole(stubs: Stubs, new_vm: NewVm) -> None:
    vm = new_vm((0, 4096))
    keys = some_keys(1 << 20)
    assert stubs.set(vm, [(0, keys)]).keys_set == 1 << 20
    assert stubs.get(vm).keys == keys


def test_frames_beside_the_ranges_keep_their_keys(stubs: Stubs, new_vm: NewVm) -> None:
    vm = new_vm((0, 1))
    before = some_keys(256, 1)
    stubs.set(vm, [(0, before)])
    stubs.set(vm, [(10, b"\xf8"), (20, b"\xf0\xf0")])
    assert stubs.get(vm).keys == before[:10] + b"\xf8" + before[11:20] + b"\xf0\xf0" + before[22:]


@settings(max_examples=examples(15), deadline=None)
@given(kernel=st.sampled_from(GENERATIONS), data=st.data())
def test_however_it_is_cut_into_ranges_and_chunks_every_key_arrives(
    stubs: Stubs, kernel: vm_pb2.SimulatedKernel.ValueType, data: st.DataObject
) -> None:
    vm = stubs.create(new_id(), (0, 1), (1, 1), (5, 1), kernel=kernel).name
    try:
        model = {gfn: 0 for start, count in ((0, 512), (5 * 256, 256)) for gfn in range(start, start + count)}
        for _ in range(data.draw(st.integers(1, 3))):
            edges = data.draw(st.lists(st.sampled_from(sorted(model)), min_size=2, max_size=8, unique=True).map(sorted))
            ends = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False) if not a < 512 <= b]
            if not ends:
                continue
            wanted = [(first, last + 1 - first) for first, last in ends]
            requests = [header(vm, *wanted, allow_enable=True)]
            for start, count in wanted:
                at, end = start, start + count
                while at < end:
                    size = data.draw(st.integers(1, end - at))
                    keys = data.draw(st.binary(min_size=size, max_size=size)).translate(bytes(range(0, 256, 2)) * 2)
                    requests.append(chunk(at, keys))
                    model.update(enumerate(keys, at))
                    at += size
            answers, error = stubs.send(*requests, commit())
            assert error is None
            assert answers[-1].result.keys_set == sum(count for _, count in wanted)
            assert stubs.get(vm).keys == bytes(model.values())
    finally:
        stubs.delete(vm)


def test_keys_are_not_enabled_for_a_guest_unless_that_is_allowed(stubs: Stubs, new_vm: NewVm) -> None:
    vm = new_vm((0, 1))
    answers, error = stubs.send(header(vm, (0, 1)), chunk(0, b"\x10"), commit())
    assert error is not None
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SKEYS_NOT_ENABLED")
    assert vm in error.message
    assert error.metadata == {"outcome": "UNCHANGED"}
    assert answers == []
    assert not stubs.look_at(vm).uses_storage_keys


def test_allowing_to_enable_keys_enables_nothing_before_the_first_chunk(stubs: Stubs, new_vm: NewVm) -> None:
    vm = new_vm((0, 1))
    _, error = stubs.send(header(vm, (0, 1), allow_enable=True))
    assert error is not None
    assert error.reason == "STREAM_INCOMPLETE"
    assert error.metadata == {"outcome": "UNCHANGED"}
    assert not stubs.look_at(vm).uses_storage_keys


def test_a_first_chunk_that_is_wrong_enables_nothing(stubs: Stubs, new_vm: NewVm) -> None:
    vm = new_vm((0, 1))
    _, error = stubs.send(header(vm, (0, 2), allow_enable=True), chunk(0, b"\x10\x11"), commit())
    assert error is not None
    assert error.reason == "KEY_RESERVED_BIT"
    assert error.metadata == {"gfn": "0x1", "outcome": "UNCHANGED"}
    assert not stubs.look_at(vm).uses_storage_keys


def test_the_range_of_a_whole_guest_ends_where_the_number_of_its_last_frame_says(stubs: Stubs, new_vm: NewVm) -> None:
    # The last slot that there can be: its end is 2^52 frames, an address of 2^64.
    vm = new_vm((2**44 - 1, 1))
    first = (2**44 - 1) * FRAMES_A_MIB
    stubs.set(vm, [(first, b"\x10" * 256)])
    assert stubs.get(vm).layout == [("chunk", first, 256)]
    found = refused(lambda: stubs.get(vm, (first + 255, 2)))
    assert (found.reason, found.metadata["gfn"]) == ("GFN_NOT_MAPPED", hex(2**52))


def test_refusal_reads_what_the_daemon_sends(stubs: Stubs) -> None:
    """The helper above all: a reader that accepts anything would prove nothing."""
    with pytest.raises(grpc.RpcError) as caught:
        stubs.look_at("vms/nobody")
    found = refusal(caught.value)
    assert (found.code, found.reason, found.domain) == (grpc.StatusCode.NOT_FOUND, "VM_NOT_FOUND", "skeyd")
    assert found.metadata == {"vm": "vms/nobody"}
    assert found.retry_seconds is None
