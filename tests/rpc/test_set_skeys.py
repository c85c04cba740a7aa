"""SetSkeys over the real daemon: the main job, and every way in which a stream can be wrong."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

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
    KEEP,
    SECONDS,
    Refusal,
    SetStream,
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

INVALID = grpc.StatusCode.INVALID_ARGUMENT
APPLIED = vm_pb2.WRITE_OUTCOME_APPLIED


# The main job


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


# What is wrong. The VM's frames are 0x100-0x2ff and 0x500-0x5ff, a gap between.


BEFORE = some_keys(0x300, 7)


@pytest.fixture(scope="module")
def old_vm(stubs: Stubs) -> Iterator[str]:
    """Make a VM; each test has its keys put back to BEFORE."""
    name = stubs.create(new_id(), (1, 2), (5, 1)).name
    yield name
    stubs.delete(name)


@pytest.fixture
def vm(stubs: Stubs, old_vm: str) -> str:
    stubs.set(old_vm, [(0x100, BEFORE[:0x200]), (0x500, BEFORE[0x200:])])
    return old_vm


class Bad(NamedTuple):
    """What is sent, and how it is refused."""

    wanted: list[tuple[int, int]]
    code: grpc.StatusCode
    reason: str
    named: list[str]


BAD_HEADERS = {
    "no-ranges": Bad([], INVALID, "REQUEST_INVALID", ["no ranges"]),
    "count-0": Bad([(0x100, 0)], INVALID, "RANGE_EMPTY", ["0x100"]),
    "overflow": Bad([(2**64 - 1, 2)], INVALID, "RANGE_OVERFLOW", ["0xffffffffffffffff"]),
    "last-gfn-of-all": Bad([(2**64 - 1, 1)], grpc.StatusCode.OUT_OF_RANGE, "GFN_NOT_MAPPED", ["0xffffffffffffffff"]),
    "begins-outside": Bad([(0xFF, 2)], grpc.StatusCode.OUT_OF_RANGE, "GFN_NOT_MAPPED", ["gfn 0xff "]),
    "ends-outside": Bad([(0x2FF, 2)], grpc.StatusCode.OUT_OF_RANGE, "GFN_NOT_MAPPED", ["gfn 0x300 "]),
    "wholly-outside": Bad([(0x310, 4)], grpc.StatusCode.OUT_OF_RANGE, "GFN_NOT_MAPPED", ["gfn 0x310 "]),
    "across-the-gap": Bad([(0x2F0, 0x240)], grpc.StatusCode.OUT_OF_RANGE, "GFN_NOT_MAPPED", ["gfn 0x300 "]),
    "second-outside": Bad([(0x100, 1), (0x600, 1)], grpc.StatusCode.OUT_OF_RANGE, "GFN_NOT_MAPPED", ["gfn 0x600 "]),
    "descending": Bad([(0x500, 1), (0x100, 1)], INVALID, "RANGES_NOT_ASCENDING", ["0x100", "0x500"]),
    "overlapping": Bad([(0x100, 4), (0x103, 1)], INVALID, "RANGES_NOT_ASCENDING", ["0x100-0x103", "0x103-0x103"]),
    "too-many": Bad([(0x100, 1)] * 16_385, INVALID, "REQUEST_INVALID", ["16385", "16384"]),
}


@pytest.mark.parametrize("bad", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_bad_header_is_refused_and_no_chunk_after_it_is_looked_at(stubs: Stubs, vm: str, bad: Bad) -> None:
    start, count = bad.wanted[0] if bad.wanted else (0x100, 1)
    answers, error = stubs.send(header(vm, *bad.wanted), chunk(start, b"\xf0" * min(count, 8)), commit())
    assert error is not None
    assert (error.code, error.reason, error.domain) == (bad.code, bad.reason, "skeyd")
    for word in bad.named:
        assert word in error.message
    assert answers == []
    assert stubs.get(vm).keys == BEFORE


class BadChunk(NamedTuple):
    """A message in the place of the second chunk, which should be 0x108-0x10f, and how it is refused."""

    message: pb.SetSkeysRequest
    code: grpc.StatusCode
    reason: str
    named: list[str]


GOOD = b"\xe8" * 8
DATA_LOSS = grpc.StatusCode.DATA_LOSS
BAD_CHUNKS = {
    "reserved-bit": BadChunk(
        chunk(0x108, b"\x10\x20\x30\x41\x51\x60\x70\x80"), INVALID, "KEY_RESERVED_BIT", ["0x41", "gfn 0x10b "]
    ),
    "reserved-bit-last": BadChunk(
        chunk(0x108, b"\x10" * 7 + b"\x01"), INVALID, "KEY_RESERVED_BIT", ["0x01", "gfn 0x10f "]
    ),
    "count-0": BadChunk(chunk(0x108, b""), INVALID, "RANGE_EMPTY", ["0x108"]),
    "count-0-with-keys": BadChunk(chunk(0x108, GOOD, count=0), INVALID, "RANGE_EMPTY", ["0x108"]),
    "too-large": BadChunk(chunk(0x108, b"\x10" * ((1 << 20) + 1)), INVALID, "REQUEST_INVALID", ["1048577", "1048576"]),
    "count-too-large": BadChunk(chunk(0x108, GOOD, count=2**32 - 1), INVALID, "REQUEST_INVALID", ["4294967295"]),
    "overflow": BadChunk(chunk(2**64 - 1, b"\x10\x10"), INVALID, "RANGE_OVERFLOW", ["0xffffffffffffffff"]),
    "leaves-a-frame-out": BadChunk(chunk(0x109, GOOD[1:]), INVALID, "CHUNK_OUT_OF_ORDER", ["0x108", "0x109"]),
    "comes-again": BadChunk(chunk(0x100, GOOD), INVALID, "CHUNK_OUT_OF_ORDER", ["0x108", "0x100"]),
    "overlaps": BadChunk(chunk(0x107, GOOD), INVALID, "CHUNK_OUT_OF_ORDER", ["0x108", "0x107"]),
    "before-the-range": BadChunk(chunk(0xFF, GOOD), INVALID, "CHUNK_OUT_OF_ORDER", ["0x108", "0xff"]),
    "of-the-next-range": BadChunk(chunk(0x500, GOOD), INVALID, "CHUNK_OUT_OF_ORDER", ["0x108", "0x500"]),
    "across-the-end": BadChunk(
        chunk(0x108, GOOD + b"\x10"), INVALID, "CHUNK_OUT_OF_ORDER", ["0x108-0x110", "0x100-0x10f"]
    ),
    "checksum": BadChunk(chunk(0x108, GOOD, crc32=1), DATA_LOSS, "CHUNK_CHECKSUM_MISMATCH", ["0x108", "0x00000001"]),
    "checksum-left-out": BadChunk(chunk(0x108, GOOD, crc32=0), DATA_LOSS, "CHUNK_CHECKSUM_MISMATCH", ["0x00000000"]),
    "checksum-of-other-keys": BadChunk(
        chunk(0x108, GOOD, data=b"\xe8" * 7 + b"\xe0"), DATA_LOSS, "CHUNK_CHECKSUM_MISMATCH", ["0x108"]
    ),
    "keys-missing": BadChunk(chunk(0x108, GOOD, data=GOOD[1:]), INVALID, "CHUNK_SIZE_MISMATCH", ["7 keys", "of 8"]),
    "keys-left-over": BadChunk(
        chunk(0x108, GOOD, data=GOOD + b"\x10"), INVALID, "CHUNK_SIZE_MISMATCH", ["9 keys", "of 8"]
    ),
    "no-encoding": BadChunk(chunk(0x108, GOOD, encoding=0), INVALID, "ENCODING_UNSUPPORTED", ["0"]),
    "unknown-encoding": BadChunk(chunk(0x108, GOOD, encoding=77), INVALID, "ENCODING_UNSUPPORTED", ["77"]),
    "header-again": BadChunk(header("vms/x", (0x108, 8)), INVALID, "REQUEST_INVALID", ["chunks and one commit"]),
    "empty-message": BadChunk(pb.SetSkeysRequest(), INVALID, "REQUEST_INVALID", ["chunks and one commit"]),
    "commit-too-early": BadChunk(
        commit(), grpc.StatusCode.ABORTED, "STREAM_INCOMPLETE", ["8 keys came", "16 are missing", "gfn 0x108 "]
    ),
}


both_ways = pytest.mark.parametrize("keep", [False, True], ids=["roll-back", "keep"])


def how(keep: bool) -> dict[str, Any]:
    """Header fields of a stream that is to be kept, or of one that says nothing of it."""
    return {"on_interrupt": KEEP} if keep else {}


def assert_told(error: Refusal, keep: bool, next_gfn: int, keys: bytes) -> None:
    """Check that the metadata says that these keys, all of them before next_gfn, are kept or gone."""
    told = {name: error.metadata.get(name) for name in ("outcome", "next_gfn", "keys_set", "crc32", "dirty", "enabled")}
    kept = {"next_gfn": hex(next_gfn), "keys_set": str(len(keys)), "crc32": f"{zlib.crc32(keys):#010x}"}
    empty = dict.fromkeys(told)
    assert told == {**empty, "outcome": "KEPT", **kept} if keep else {**empty, "outcome": "ROLLED_BACK"}


@both_ways
@pytest.mark.parametrize("bad", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_a_bad_message_after_a_good_chunk_sets_nothing_and_says_what_became_of_the_chunk(
    stubs: Stubs, vm: str, bad: BadChunk, keep: bool
) -> None:
    answers, error = stubs.send(
        header(vm, (0x100, 16), (0x500, 8), **how(keep)),
        chunk(0x100, GOOD),
        bad.message,
        chunk(0x108, GOOD),
        chunk(0x500, GOOD),
        commit(),
    )
    assert error is not None
    assert (error.code, error.reason, error.domain) == (bad.code, bad.reason, "skeyd")
    for word in bad.named:
        assert word in error.message
    assert_told(error, keep, 0x108, GOOD)
    assert parts(answers) == ["begun", "progress"]
    assert stubs.get(vm).keys == (GOOD + BEFORE[8:] if keep else BEFORE)


@both_ways
@pytest.mark.parametrize("bad", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_a_bad_message_in_the_place_of_the_first_chunk_changes_no_key(
    stubs: Stubs, vm: str, bad: BadChunk, keep: bool
) -> None:
    before = stubs.look_at(vm).last_write
    answers, error = stubs.send(header(vm, (0x108, 8), **how(keep)), bad.message, chunk(0x108, GOOD), commit())
    assert error is not None
    told = dict(error.metadata)
    told.pop("gfn", None)
    assert told == {"outcome": "UNCHANGED"}
    assert parts(answers) == ["begun"]
    assert stubs.get(vm).keys == BEFORE
    assert stubs.look_at(vm).last_write == before, "a call that set nothing is no write"


@both_ways
def test_a_chunk_after_all_ranges_are_covered_is_refused(stubs: Stubs, vm: str, keep: bool) -> None:
    answers, error = stubs.send(header(vm, (0x100, 8), **how(keep)), chunk(0x100, GOOD), chunk(0x108, GOOD), commit())
    assert error is not None
    assert (error.code, error.reason) == (INVALID, "CHUNK_OUT_OF_ORDER")
    assert "0x108" in error.message
    assert_told(error, keep, 0x108, GOOD)
    assert parts(answers) == ["begun", "progress"]
    assert stubs.get(vm).keys == (GOOD + BEFORE[8:] if keep else BEFORE)


@both_ways
@pytest.mark.parametrize(
    ("chunks", "keys_set", "next_gfn"),
    [([], 0, 0x100), ([chunk(0x100, GOOD)], 8, 0x500), ([chunk(0x100, GOOD), chunk(0x500, GOOD)], 16, 0x508)],
    ids=["no-chunk", "half", "all-but-the-commit"],
)
def test_a_stream_that_ends_without_commit_is_incomplete_and_says_what_became_of_it(
    stubs: Stubs, vm: str, chunks: list[pb.SetSkeysRequest], keys_set: int, next_gfn: int, keep: bool
) -> None:
    _, error = stubs.send(header(vm, (0x100, 8), (0x500, 8), **how(keep)), *chunks)
    assert error is not None
    assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "STREAM_INCOMPLETE")
    assert f"{keys_set} keys came, {16 - keys_set} are missing" in error.message
    if chunks:
        assert_told(error, keep, next_gfn, GOOD * len(chunks))
    else:
        assert error.metadata == {"outcome": "UNCHANGED"}
    set_now = (GOOD if len(chunks) > 0 else b"", GOOD if len(chunks) > 1 else b"") if keep else (b"", b"")
    low, high = BEFORE[:0x200], BEFORE[0x200:]
    assert stubs.get(vm).keys == set_now[0] + low[len(set_now[0]) :] + set_now[1] + high[len(set_now[1]) :]


@pytest.mark.parametrize("kernel", GENERATIONS, ids=vm_pb2.SimulatedKernel.Name)
@pytest.mark.parametrize("rest", ["cut", "bad-chunk", "early-commit", "cancel"])
def test_a_call_that_is_not_committed_changes_no_bit_of_any_key_on_any_kernel(
    stubs: Stubs, new_vm: NewVm, kernel: vm_pb2.SimulatedKernel.ValueType, rest: str
) -> None:
    # Every value of ACC, F, R and C, and slices that fill several of the kernel's segments.
    vm = new_vm((0, 4), (8, 4), kernel=kernel)
    before = bytes(range(0, 256, 2)) * 16
    high = some_keys(1024, 11)
    stubs.set(vm, [(0, before[:1024]), (2048, high)])
    old = stubs.get(vm).keys
    assert old == before[:1024] + high
    new = bytes(key ^ 0xFE for key in old)
    with SetStream(stubs) as stream:
        stream.begin(vm, (0, 1024), (2048, 1024))
        stream.ask(chunk(0, new[:700]))
        stream.ask(chunk(700, new[700:1024]))
        stream.ask(chunk(2048, new[1024:1600]))
        assert stubs.get(vm).keys == new[:1600] + old[1600:], "reading sees what is set so far"
        if rest == "cancel":
            stream.call.cancel()
            end = time.monotonic() + SECONDS
            while stubs.settled(vm).outcome == APPLIED:  # the daemon hasn't noticed
                assert time.monotonic() < end
        else:
            if rest == "cut":
                stream.finish()
            else:
                stream.send(commit() if rest == "early-commit" else chunk(0, b"\x10"))
            with pytest.raises(grpc.RpcError) as caught:
                next(stream.call)
            assert_told(refusal(caught.value), False, 0, b"")
    assert stubs.get(vm).keys == old
    last = stubs.look_at(vm).last_write
    assert (last.outcome, last.keys_set) == (vm_pb2.WRITE_OUTCOME_ROLLED_BACK, 1600)


@pytest.mark.parametrize("kernel", GENERATIONS, ids=vm_pb2.SimulatedKernel.Name)
@both_ways
def test_a_guest_that_was_made_to_use_keys_uses_them_for_good_and_is_told_so(
    stubs: Stubs, new_vm: NewVm, kernel: vm_pb2.SimulatedKernel.ValueType, keep: bool
) -> None:
    vm = new_vm((0, 1), kernel=kernel)
    _, error = stubs.send(header(vm, (0, 16), allow_enable=True, **how(keep)), chunk(0, GOOD))
    assert error is not None
    assert (error.metadata["outcome"], error.metadata["enabled"]) == ("KEPT" if keep else "ROLLED_BACK", "true")
    assert stubs.look_at(vm).uses_storage_keys
    assert stubs.get(vm).keys == (GOOD if keep else bytes(8)) + bytes(248)


# What is only validated, sent again, or gone on with


def test_what_is_only_validated_is_checked_and_not_set(stubs: Stubs, vm: str) -> None:
    before = stubs.look_at(vm).last_write
    answers, error = stubs.send(
        header(vm, (0x100, 8), (0x500, 8), validate_only=True), chunk(0x100, GOOD), chunk(0x500, GOOD), commit()
    )
    assert error is None
    assert parts(answers) == ["begun", "progress", "progress", "result"]
    assert answers[-1].result == pb.SetSkeysResponse.Result(
        keys_set=16, outcome=pb.SetSkeysResponse.OUTCOME_VALIDATED, crc32=zlib.crc32(GOOD * 2)
    )
    assert stubs.get(vm).keys == BEFORE
    assert stubs.look_at(vm).last_write == before


@pytest.mark.parametrize("bad", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_what_is_only_validated_is_refused_as_it_would_be_set(stubs: Stubs, vm: str, bad: BadChunk) -> None:
    answers, error = stubs.send(
        header(vm, (0x100, 16), (0x500, 8), validate_only=True), chunk(0x100, GOOD), bad.message
    )
    assert error is not None
    assert (error.code, error.reason) == (bad.code, bad.reason)
    assert error.metadata["outcome"] == "UNCHANGED"
    assert parts(answers) == ["begun", "progress"]
    assert stubs.get(vm).keys == BEFORE


def test_validating_waits_for_nobody_and_nobody_for_it(stubs: Stubs, vm: str) -> None:
    with SetStream(stubs) as validating, SetStream(stubs) as setting:
        validating.begin(vm, (0x100, 8), validate_only=True)
        setting.begin(vm, (0x100, 8))
        validating.ask(chunk(0x100, GOOD))
        setting.ask(chunk(0x100, GOOD))
        assert validating.ask(commit()).result.outcome == pb.SetSkeysResponse.OUTCOME_VALIDATED
        assert setting.ask(commit()).result.outcome == pb.SetSkeysResponse.OUTCOME_APPLIED


def test_a_request_that_was_applied_is_answered_again_and_not_applied_again(stubs: Stubs, vm: str) -> None:
    name = f"again-{new_id()}"
    first = stubs.set(vm, [(0x100, GOOD)], request_id=name)
    stubs.set(vm, [(0x100, BEFORE[:8])])
    request = header(vm, (0x100, 8), allow_enable=True, request_id=name)
    for rest in ([], [chunk(0x100, GOOD), commit()]):
        answers, error = stubs.send(request, *rest)
        assert error is None
        assert parts(answers) == ["result"]
        assert answers[0].result == first
    assert stubs.get(vm).keys == BEFORE
    answers, error = stubs.send(header(vm, (0x100, 9), allow_enable=True, request_id=name))
    assert error is not None
    assert (error.code, error.reason) == (INVALID, "REQUEST_ID_REUSED")
    assert name in error.message
    assert error.metadata["outcome"] == "UNCHANGED"


@pytest.mark.parametrize("validate_only", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        {"ranges": [(0x100, 9)]},
        {"ranges": [(0x100, 4), (0x104, 4)]},
        {"allow_enable": False},
        {"on_interrupt": KEEP},
        {"on_interrupt": pb.ON_INTERRUPT_ROLL_BACK},
        {"expected_digest": pb.KeysDigest(sha256=bytes(32))},
        {"resulting_digest": pb.KeysDigest(sha256=bytes(32))},
    ],
    ids=lambda other: "-".join(f"{name}" for name in other),
)
def test_a_request_id_of_another_header_is_refused_whether_it_is_validated_or_set(
    stubs: Stubs, vm: str, other: dict[str, Any], validate_only: bool
) -> None:
    name = f"reused-{new_id()}"
    stubs.set(vm, [(0x100, GOOD)], request_id=name)
    last = stubs.look_at(vm).last_write
    fields = {"ranges": [(0x100, 8)], "allow_enable": True, **other}
    wanted = fields.pop("ranges")
    request = header(vm, *wanted, request_id=name, validate_only=validate_only, **fields)
    answers, error = stubs.send(request, chunk(0x100, GOOD), commit())
    assert error is not None
    assert (error.code, error.reason) == (INVALID, "REQUEST_ID_REUSED")
    assert error.metadata["outcome"] == "UNCHANGED"
    assert answers == []
    assert stubs.look_at(vm).last_write == last


def test_what_is_only_validated_is_never_answered_as_if_it_were_applied(stubs: Stubs, vm: str) -> None:
    name = f"validated-{new_id()}"
    rehearsal = header(vm, (0x100, 8), allow_enable=True, request_id=name, validate_only=True)

    def rehearse() -> None:
        answers, error = stubs.send(rehearsal, chunk(0x100, GOOD), commit())
        assert error is None
        assert parts(answers) == ["begun", "progress", "result"]
        assert answers[-1].result.outcome == pb.SetSkeysResponse.OUTCOME_VALIDATED

    rehearse()
    assert stubs.get(vm).keys == BEFORE
    # It is not remembered, and does not keep the same request from being applied.
    assert stubs.set(vm, [(0x100, GOOD)], request_id=name).outcome == pb.SetSkeysResponse.OUTCOME_APPLIED
    assert stubs.get(vm).keys == GOOD + BEFORE[8:]
    rehearse()
    _, error = stubs.send(rehearsal, chunk(0x100, GOOD[:7] + b"\x01"))
    assert error is not None
    assert error.reason == "KEY_RESERVED_BIT"


def test_how_a_request_is_made_is_no_part_of_what_its_id_stands_for(stubs: Stubs, vm: str) -> None:
    name = f"slower-{new_id()}"
    first = stubs.set(vm, [(0x100, GOOD)], request_id=name)
    for milliseconds in (1, 5):
        again = header(vm, (0x100, 8), allow_enable=True, request_id=name)
        again.header.max_slice_time.FromMilliseconds(milliseconds)
        answers, error = stubs.send(again)
        assert error is None
        assert [one.result for one in answers] == [first]


def test_a_request_that_was_rolled_back_is_applied_when_it_is_sent_again(stubs: Stubs, vm: str) -> None:
    name = f"rolled-back-{new_id()}"
    _, error = stubs.send(header(vm, (0x100, 8), request_id=name), chunk(0x100, GOOD))
    assert error is not None
    last = stubs.look_at(vm).last_write
    assert (last.request_id, last.outcome) == (name, vm_pb2.WRITE_OUTCOME_ROLLED_BACK)
    assert stubs.set(vm, [(0x100, GOOD)], allow_enable=False, request_id=name).keys_set == 8
    assert stubs.get(vm).keys == GOOD + BEFORE[8:]


@pytest.mark.parametrize("cuts", [1, 2])
def test_a_call_that_was_kept_goes_on_where_it_was_cut(stubs: Stubs, vm: str, cuts: int) -> None:
    fields: dict[str, Any] = {"on_interrupt": KEEP, "request_id": f"resumed-{new_id()}"}
    wanted = ((0x100, 12), (0x500, 8))
    keys = some_keys(20, 5)
    _, error = stubs.send(header(vm, *wanted, **fields), chunk(0x100, keys[:8]))
    assert error is not None
    for _ in range(cuts):
        # Cut at once: nothing more is set, and what was kept is kept.
        _, again = stubs.send(header(vm, *wanted, resume=True, **fields))
        assert again is not None
        assert_told(again, True, 0x108, keys[:8])
        last = stubs.look_at(vm).last_write
        assert (last.outcome, last.next_gfn, last.keys_set) == (vm_pb2.WRITE_OUTCOME_KEPT, 0x108, 8)
    answers, error = stubs.send(
        header(vm, *wanted, resume=True, **fields), chunk(0x108, keys[8:12]), chunk(0x500, keys[12:]), commit()
    )
    assert error is None
    assert parts(answers) == ["begun", "progress", "progress", "result"]
    begun = answers[0].begun
    assert (begun.next_gfn, begun.keys_set, begun.crc32) == (0x108, 8, zlib.crc32(keys[:8]))
    result = answers[-1].result
    assert (result.keys_set, result.crc32) == (20, zlib.crc32(keys))
    assert stubs.get(vm).keys == keys[:12] + BEFORE[12:0x200] + keys[12:] + BEFORE[0x208:]
    # Applied: it is answered, and there is nothing to go on with.
    answers, error = stubs.send(header(vm, *wanted, resume=True, **fields))
    assert error is None
    assert answers[-1].result == result


def test_a_call_that_had_set_all_keys_goes_on_with_its_commit(stubs: Stubs, vm: str) -> None:
    fields: dict[str, Any] = {"on_interrupt": KEEP, "request_id": f"resumed-{new_id()}"}
    _, error = stubs.send(header(vm, (0x100, 8), **fields), chunk(0x100, GOOD))
    assert error is not None
    assert_told(error, True, 0x108, GOOD)
    answers, error = stubs.send(header(vm, (0x100, 8), resume=True, **fields), commit())
    assert error is None
    assert parts(answers) == ["begun", "result"]
    assert (answers[0].begun.next_gfn, answers[0].begun.keys_set) == (0x108, 8)
    last = stubs.look_at(vm).last_write
    assert (last.outcome, last.keys_set, last.request_id) == (APPLIED, 8, fields["request_id"])


def test_there_is_nothing_to_go_on_with_once_somebody_else_has_set_keys(stubs: Stubs, vm: str) -> None:
    fields: dict[str, Any] = {"on_interrupt": KEEP, "request_id": f"resumed-{new_id()}"}

    def assert_nothing() -> None:
        _, error = stubs.send(header(vm, (0x100, 16), resume=True, **fields))
        assert error is not None
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOTHING_TO_RESUME")
        assert error.metadata["outcome"] == "UNCHANGED"

    def cut() -> None:
        _, error = stubs.send(header(vm, (0x100, 16), **fields), chunk(0x100, GOOD))
        assert error is not None

    assert_nothing()
    cut()
    _, error = stubs.send(header(vm, (0x100, 17), resume=True, **fields))
    assert error is not None
    assert error.reason == "REQUEST_ID_REUSED"
    stubs.keys.SetSkey(pb.SetSkeyRequest(vm=vm, gfn=0x500, key=0x10), timeout=SECONDS)
    assert_nothing()
    cut()
    stubs.send(header(vm, (0x500, 8)), chunk(0x500, GOOD))  # rolled back, and all the same
    assert_nothing()


BAD_OPTIONS: dict[str, dict[str, Any]] = {
    "on-interrupt": {"on_interrupt": 3},
    "request-id-space": {"request_id": "a b"},
    "request-id-long": {"request_id": "a" * 129},
    "request-id-text": {"request_id": "ä"},
    "request-id-line": {"request_id": "a\n"},
    "resume-rolled-back": {"request_id": "a", "resume": True},
    "resume-nameless": {"on_interrupt": KEEP, "resume": True},
    "resume-validate": {"on_interrupt": KEEP, "request_id": "a", "resume": True, "validate_only": True},
}


@pytest.mark.parametrize("options", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_a_header_that_asks_for_what_there_isnt_is_refused(stubs: Stubs, vm: str, options: dict[str, Any]) -> None:
    answers, error = stubs.send(header(vm, (0x100, 8), **options), chunk(0x100, GOOD), commit())
    assert error is not None
    assert (error.code, error.reason) == (INVALID, "REQUEST_INVALID")
    assert answers == []
    assert stubs.get(vm).keys == BEFORE


@pytest.mark.parametrize(
    "first",
    [[], [pb.SetSkeysRequest()], [chunk(0x100, GOOD)], [commit()]],
    ids=["nothing", "an-empty-message", "a-chunk", "a-commit"],
)
def test_what_does_not_begin_with_a_header_is_refused(stubs: Stubs, vm: str, first: list[pb.SetSkeysRequest]) -> None:
    answers, error = stubs.send(*first, header(vm, (0x100, 8)), chunk(0x100, GOOD), commit()) if first else stubs.send()
    assert error is not None
    assert (error.code, error.reason) == (INVALID, "REQUEST_INVALID")
    assert "header" in error.message
    assert answers == []
    assert stubs.get(vm).keys == BEFORE


def test_a_message_longer_than_four_mebibytes_never_reaches_the_daemon_whole(stubs: Stubs, vm: str) -> None:
    requests = [header(vm, (0x100, 8)), chunk(0x100, GOOD, data=bytes(5 << 20))]
    with pytest.raises(grpc.RpcError) as caught:
        list(stubs.keys.SetSkeys(iter(requests), timeout=SECONDS))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stubs.get(vm).keys == BEFORE


def test_a_message_that_is_no_protobuf_is_refused_and_changes_nothing(stubs: Stubs, vm: str) -> None:
    raw: grpc.StreamStreamMultiCallable[bytes, bytes] = stubs.channel.stream_stream(
        "/skeyd.v1.StorageKeyService/SetSkeys"
    )
    requests = [header(vm, (0x100, 8)).SerializeToString(), b"\xff\xff\xff\xff"]
    with pytest.raises(grpc.RpcError) as caught:
        list(raw(iter(requests), timeout=SECONDS))
    found = refusal(caught.value)
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
    assert "4 bytes" in found.message
    assert stubs.get(vm).keys == BEFORE


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
