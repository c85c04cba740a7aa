"""SetSkeys over the real daemon: what is only validated, sent again, or gone on with."""

from __future__ import annotations

import zlib
from typing import Any

import grpc
import pytest

from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2, vm_service_pb2
from tests.rpc.fixtures import NewVm
from tests.rpc.setting import APPLIED, BAD_CHUNKS, BEFORE, GOOD, INVALID, BadChunk, assert_told
from tests.rpc.stubs import (
    KEEP,
    SECONDS,
    SetStream,
    Stubs,
    chunk,
    commit,
    header,
    new_id,
    parts,
    some_keys,
)


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


@pytest.mark.parametrize(
    ("kernel", "call"),
    [
        pytest.param(vm_pb2.SIMULATED_KERNEL_LINUX_4_19, pb.KEY_CALL_SKEYS, id="4.19"),
        pytest.param(vm_pb2.SIMULATED_KERNEL_LINUX_7_2, pb.KEY_CALL_KEYOP, id="7.2"),
    ],
)
def test_there_is_nothing_to_go_on_with_once_somebody_else_has_set_keys(
    stubs: Stubs, new_vm: NewVm, kernel: vm_pb2.SimulatedKernel.ValueType, call: pb.KeyCall.ValueType
) -> None:
    vm = new_vm((1, 2), (5, 1), kernel=kernel)
    stubs.set(vm, [(0x100, BEFORE[:0x200]), (0x500, BEFORE[0x200:])])
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
    assert stubs.keys.SetSkey(pb.SetSkeyRequest(vm=vm, gfn=0x500, key=0x10), timeout=SECONDS).call == call
    assert_nothing()
    cut()
    stubs.send(header(vm, (0x500, 8)), chunk(0x500, GOOD))  # rolled back, and all the same
    assert_nothing()


def test_a_header_that_says_what_holds_where_nothing_is_said_is_the_same_request(stubs: Stubs, vm: str) -> None:
    name = f"said-{new_id()}"
    first = stubs.set(vm, [(0x100, GOOD)], request_id=name)
    incarnation = stubs.look_at(vm).incarnation
    request = header(
        vm,
        (0x100, 8),
        allow_enable=True,
        request_id=name,
        on_interrupt=pb.ON_INTERRUPT_ROLL_BACK,
        incarnation=incarnation,
    )
    answers, error = stubs.send(request, chunk(0x100, GOOD), commit())
    assert error is None
    assert [answer.result for answer in answers] == [first]


@pytest.mark.parametrize("validate_only", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_what_is_sent_again_is_never_applied_to_another_vm_of_that_name(
    stubs: Stubs, keep: bool, validate_only: bool
) -> None:
    vm_id = new_id()
    made = stubs.create(vm_id, (0, 4))
    vm, meant = made.name, made.incarnation
    fields: dict[str, Any] = {"allow_enable": True, "request_id": "again", "incarnation": meant}
    if keep:
        fields["on_interrupt"] = KEEP
    answers, error = stubs.send(header(vm, (0, 8), **fields), chunk(0, GOOD), commit())
    assert error is None
    assert answers[-1].WhichOneof("part") == "result"
    stubs.vms.DeleteVm(vm_service_pb2.DeleteVmRequest(name=vm))
    again = stubs.create(vm_id, (0, 4)).incarnation
    assert again != meant
    answers, error = stubs.send(header(vm, (0, 8), validate_only=validate_only, **fields), chunk(0, GOOD), commit())
    assert error is not None
    assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "VM_REPLACED")
    assert error.metadata["outcome"] == "UNCHANGED"
    assert error.metadata["incarnation"] == again
    assert answers == []
    assert not stubs.look_at(vm).uses_storage_keys
    stubs.vms.DeleteVm(vm_service_pb2.DeleteVmRequest(name=vm))
