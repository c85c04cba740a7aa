"""SetSkeys with a digest of the keys before, and of those after: what doesn't fit changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import grpc
import pytest

from skeyd.digest import Digester
from skeyd.gfn import GfnRange
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2
from tests.rpc.stubs import (
    FRAMES_A_MIB,
    GENERATIONS,
    SetStream,
    Stubs,
    chunk,
    commit,
    header,
    new_id,
    parts,
    some_keys,
)

FIRST, SECOND = (0x100, 0x200), (0x500, 0x80)
OLD = some_keys(0x280, 1)
NEW = some_keys(0x280, 2)
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def digest(keys: bytes, *, rc: bool = False) -> pb.KeysDigest:
    """Digest the keys of FIRST and SECOND as docs/digest.md says."""
    digester = Digester(with_referenced_changed=rc)
    digester.add(GfnRange(*FIRST), keys[:0x200])
    digester.add(GfnRange(*SECOND), keys[0x200:])
    root = digester.tree().root
    assert root is not None
    return pb.KeysDigest(sha256=root.sha256, with_referenced_changed=rc)


@pytest.fixture(scope="module", params=GENERATIONS, ids=vm_pb2.SimulatedKernel.Name)
def vm(stubs: Stubs, request: pytest.FixtureRequest) -> Iterator[str]:
    name = stubs.create(new_id(), (1, 2), (5, 1), kernel=request.param).name
    yield name
    stubs.delete(name)


@pytest.fixture(autouse=True)
def old_keys(stubs: Stubs, vm: str) -> None:
    stubs.set(vm, [(FIRST[0], OLD[:0x200]), (SECOND[0], OLD[0x200:])])


def new_keys(vm: str, **options: object) -> list[pb.SetSkeysRequest]:
    """Write down a stream that sets NEW."""
    return [
        header(vm, FIRST, SECOND, **options),  # type: ignore[arg-type]  # fields of a header
        chunk(FIRST[0], NEW[:0x200]),
        chunk(SECOND[0], NEW[0x200:]),
        commit(),
    ]


def keys_of(stubs: Stubs, vm: str) -> bytes:
    return stubs.get(vm, FIRST, SECOND).keys


@pytest.mark.parametrize("rc", [False, True])
def test_keys_that_are_as_expected_are_replaced_by_those_that_are_to_result(stubs: Stubs, vm: str, rc: bool) -> None:
    options = {"expected_digest": digest(OLD, rc=rc), "resulting_digest": digest(NEW, rc=rc)}
    answers, error = stubs.send(*new_keys(vm, **options))
    assert error is None
    assert parts(answers) == ["begun", "progress", "progress", "result"]
    assert keys_of(stubs, vm) == NEW


@pytest.mark.parametrize("validate_only", [False, True])
@pytest.mark.parametrize(("bit", "rc"), [(0x10, False), (0x08, False), (0x04, True), (0x02, True)])
def test_one_bit_that_is_not_as_expected_refuses_the_call_before_anything_is_set(
    stubs: Stubs, vm: str, bit: int, rc: bool, validate_only: bool
) -> None:
    other = OLD[:-1] + bytes([OLD[-1] ^ bit])
    _, error = stubs.send(*new_keys(vm, expected_digest=digest(other, rc=rc), validate_only=validate_only))
    assert error is not None
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "EXPECTED_DIGEST_MISMATCH")
    assert error.metadata["outcome"] == "UNCHANGED"
    assert error.metadata["sha256"] == digest(OLD, rc=rc).sha256.hex()
    assert keys_of(stubs, vm) == OLD


def test_r_and_c_are_no_part_of_a_digest_without_them(stubs: Stubs, vm: str) -> None:
    other = bytes(key ^ 0x06 for key in OLD)
    _, error = stubs.send(*new_keys(vm, expected_digest=digest(other)))
    assert error is None


@pytest.mark.parametrize(("bit", "rc"), [(0x80, False), (0x08, False), (0x04, True), (0x02, True)])
def test_keys_that_are_not_those_that_were_to_result_are_rolled_back(stubs: Stubs, vm: str, bit: int, rc: bool) -> None:
    other = bytes([NEW[0] ^ bit]) + NEW[1:]
    answers, error = stubs.send(*new_keys(vm, resulting_digest=digest(other, rc=rc)))
    assert error is not None
    assert (error.code, error.reason) == (grpc.StatusCode.DATA_LOSS, "RESULT_DIGEST_MISMATCH")
    assert error.metadata["outcome"] == "ROLLED_BACK"
    assert error.metadata["sha256"] == digest(NEW, rc=rc).sha256.hex()
    assert parts(answers) == ["begun", "progress", "progress"]
    assert keys_of(stubs, vm) == OLD


@pytest.mark.parametrize("right", [False, True])
def test_what_is_only_validated_is_digested_as_it_comes(stubs: Stubs, vm: str, right: bool) -> None:
    _, error = stubs.send(*new_keys(vm, resulting_digest=digest(NEW if right else OLD), validate_only=True))
    assert (error is None) == right
    if error is not None:
        assert (error.reason, error.metadata["outcome"]) == ("RESULT_DIGEST_MISMATCH", "UNCHANGED")
    assert keys_of(stubs, vm) == OLD


def test_a_call_that_goes_on_expects_nothing_of_what_it_has_changed_itself(stubs: Stubs, vm: str) -> None:
    options = {
        "on_interrupt": pb.ON_INTERRUPT_KEEP,
        "request_id": "goes-on",
        "expected_digest": digest(OLD),
    }
    _, error = stubs.send(*new_keys(vm, **options)[:2])
    assert error is not None
    assert error.metadata["outcome"] == "KEPT"
    first, _, *rest = new_keys(vm, **options)
    first.header.resume = True
    answers, error = stubs.send(first, *rest)
    assert error is None
    assert answers[0].begun.keys_set == 0x200
    assert keys_of(stubs, vm) == NEW
    # And what was applied is answered again, though nothing is as was expected any more.
    first.header.resume = False
    answers, error = stubs.send(first)
    assert error is None
    assert parts(answers) == ["result"]


@pytest.mark.parametrize(
    "more",
    [{}, {"validate_only": True}, {"request_id": "x", "resume": True}, {"resulting_digest": pb.KeysDigest()}],
    ids=["plain", "validate", "resume", "empty"],
)
def test_keys_that_are_kept_whatever_comes_of_it_have_no_digest_to_result(
    stubs: Stubs, vm: str, more: dict[str, object]
) -> None:
    options = {"on_interrupt": pb.ON_INTERRUPT_KEEP, "resulting_digest": digest(OLD), **more}
    answers, error = stubs.send(*new_keys(vm, **options))
    assert error is not None
    assert (error.code, error.reason) == (INVALID, "REQUEST_INVALID")
    assert error.metadata["field"] == "resulting_digest"
    assert "resulting_digest" in error.message
    assert "ON_INTERRUPT_KEEP" in error.message
    assert answers == []
    assert keys_of(stubs, vm) == OLD


@pytest.mark.parametrize("field", ["expected_digest", "resulting_digest"])
@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_digest_has_32_bytes(stubs: Stubs, vm: str, field: str, length: int) -> None:
    _, error = stubs.send(*new_keys(vm, **{field: pb.KeysDigest(sha256=bytes(length))}))
    assert error is not None
    assert (error.code, error.reason) == (INVALID, "REQUEST_INVALID")
    assert field in error.message
    assert str(length) in error.message
    assert keys_of(stubs, vm) == OLD


def test_a_guest_without_keys_is_not_as_expected_and_stays_without(stubs: Stubs) -> None:
    name = stubs.create(new_id(), (1, 2), (5, 1)).name
    _, error = stubs.send(*new_keys(name, expected_digest=digest(bytes(0x280)), allow_enable=True))
    assert error is not None
    assert error.reason == "EXPECTED_DIGEST_MISMATCH"
    assert not stubs.look_at(name).uses_storage_keys
    stubs.delete(name)


def test_who_expects_has_the_vm_for_himself_while_he_looks(stubs: Stubs, vm: str) -> None:
    with SetStream(stubs) as one:
        one.begin(vm, FIRST, SECOND, expected_digest=digest(OLD))
        _, error = stubs.send(*new_keys(vm, expected_digest=digest(OLD)))
        assert error is not None
        assert error.reason == "VM_BUSY"


def test_the_digests_are_those_of_the_call_that_gives_them(stubs: Stubs, vm: str) -> None:
    request = pb.DigestSkeysRequest(vm=vm)
    request.ranges.add(start_gfn=FIRST[0], count=FIRST[1])
    request.ranges.add(start_gfn=SECOND[0], count=SECOND[1])
    for request.with_referenced_changed in (False, True):
        node = stubs.keys.DigestSkeys(request).node
        assert node.sha256 == digest(OLD, rc=request.with_referenced_changed).sha256


def test_a_large_guest_is_digested_slice_by_slice(stubs: Stubs) -> None:
    name = stubs.create(new_id(), (0, 2048)).name
    count = 2048 * FRAMES_A_MIB
    size = 1 << 18
    keys = list(itertools.repeat(b"\x30" * size, count // size))
    digester = Digester()
    for number, part in enumerate(keys):
        digester.add(GfnRange(number * size, size), part)
    root = digester.tree().root
    assert root is not None
    _, error = stubs.send(
        header(name, (0, count), allow_enable=True, resulting_digest=pb.KeysDigest(sha256=root.sha256)),
        *(chunk(number * size, part) for number, part in enumerate(keys)),
        commit(),
    )
    assert error is None
    stubs.delete(name)
