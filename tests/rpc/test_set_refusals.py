"""SetSkeys over the real daemon: every way in which a stream can be wrong, and what becomes of the keys then."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import grpc
import pytest

from skeyd.encoding import codec
from skeyd.errors import Reason, SkeydError
from skeyd.rpc import set_skeys
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2
from tests.rpc.fixtures import NewVm
from tests.rpc.setting import APPLIED, BAD_CHUNKS, BEFORE, GOOD, INVALID, BadChunk, assert_told, both_ways, how
from tests.rpc.stubs import (
    GENERATIONS,
    KEEP,
    SECONDS,
    SetStream,
    Stubs,
    chunk,
    commit,
    header,
    parts,
    refusal,
    some_keys,
)
from tests.vms.fake_session import FakeSession
from tests.vms.writings import begin


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


@pytest.mark.parametrize(
    "misplaced",
    [chunk(0x109, GOOD[1:]), chunk(0x107, GOOD), chunk(0x108, GOOD + GOOD[:1]), chunk(0x500, GOOD)],
    ids=["leaves-a-frame-out", "overlaps", "across-the-end", "elsewhere"],
)
def test_a_misplaced_chunk_is_refused_before_its_data_is_decoded(
    monkeypatch: pytest.MonkeyPatch, misplaced: pb.SetSkeysRequest
) -> None:
    # Nothing is spent on what is refused whatever it holds; and a client is told that it is out of step, and not that
    # its data is bad.
    decoded: list[int] = []
    decode = codec.decode

    def watched(encoding: int, data: bytes | memoryview, count: int) -> bytes | memoryview:
        decoded.append(count)
        return decode(encoding, data, count)

    monkeypatch.setattr(codec, "decode", watched)
    writing = begin(FakeSession((0x100, 16)), (0x100, 16))
    set_skeys._set(writing, chunk(0x100, GOOD).chunk)
    assert decoded == [8]
    with pytest.raises(SkeydError) as caught:
        set_skeys._set(writing, misplaced.chunk)
    assert caught.value.reason is Reason.CHUNK_OUT_OF_ORDER
    assert decoded == [8]


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
