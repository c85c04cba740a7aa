"""GetSkeys that goes on where another was cut: what comes is what would have come."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skeyd import limits
from skeyd.client import Gap, Keys, Position
from skeyd.gfn import GfnRange
from skeyd.v1 import storage_key_service_pb2 as pb
from tests.daemon import DaemonProcess
from tests.examples import examples
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import SECONDS, Stubs, new_id, ranges, refused, some_keys

# In frames: 0x100-0x3ff in two slots that touch, a gap, 0x800-0x8ff.
SLOTS = ((1, 2), (3, 1), (8, 1))
FIRST, FIRST_COUNT = 0x100, 0x300
SECOND, SECOND_COUNT = 0x800, 0x100
RUNS = b"\x06" * 200 + b"\x00" * 56
KEYS = {
    **dict(enumerate(some_keys(FIRST_COUNT - 256, 1) + RUNS, FIRST)),
    **dict(enumerate(some_keys(SECOND_COUNT, 2), SECOND)),
}


@pytest.fixture(scope="module")
def vm(stubs: Stubs) -> Iterator[str]:
    """Make a VM whose keys are KEYS."""
    name = stubs.create(new_id(), *SLOTS).name
    keys = bytes(KEYS.values())
    stubs.set(name, [(FIRST, keys[:FIRST_COUNT]), (SECOND, keys[FIRST_COUNT:])])
    yield name
    stubs.delete(name)


def _request(vm: str, wanted: list[tuple[int, int]], chunk_keys: int) -> pb.GetSkeysRequest:
    return pb.GetSkeysRequest(
        vm=vm,
        ranges=ranges(*wanted),
        max_chunk_keys=chunk_keys,
        encodings=[pb.ENCODING_RUNS, pb.ENCODING_ZSTD],
    )


def _stream(stubs: Stubs, request: pb.GetSkeysRequest) -> list[pb.GetSkeysResponse]:
    return list(stubs.keys.GetSkeys(request, timeout=SECONDS))


def _frames(part: pb.GetSkeysResponse) -> tuple[int, int]:
    what = part.chunk if part.WhichOneof("part") == "chunk" else part.gap
    return what.start_gfn, what.start_gfn + what.count


def _crc_before(wanted: list[tuple[int, int]], gfn: int) -> int:
    frames = [one for start, count in wanted for one in range(start, start + count)]
    return zlib.crc32(bytes(KEYS[one] for one in frames if one < gfn and one in KEYS))


ALL = [(FIRST, SECOND + SECOND_COUNT - FIRST)]


@settings(max_examples=examples(40), deadline=None)
@given(st.data())
def test_a_stream_that_is_cut_after_any_message_goes_on_byte_for_byte(
    stubs: Stubs, vm: str, data: st.DataObject
) -> None:
    edges = data.draw(st.lists(st.sampled_from(sorted(KEYS)), min_size=2, max_size=8, unique=True).map(sorted))
    wanted = [(first, last + 1 - first) for first, last in zip(edges[::2], edges[1::2], strict=False)]
    request = _request(vm, wanted, data.draw(st.integers(60, 1500)))
    header, *parts, trailer = _stream(stubs, request)
    for cut in range(len(parts) + 1):
        # Where the next part begins, and where the last one ended, which is another frame between two ranges.
        begins = [_frames(parts[cut])[0]] if cut < len(parts) else []
        ended = [_frames(parts[cut - 1])[1]] if cut else []
        for gfn in {*begins, *ended}:
            request.resume.gfn = gfn
            request.resume.incarnation = header.header.incarnation
            request.resume.crc32 = _crc_before(wanted, gfn)
            assert [one.SerializeToString() for one in _stream(stubs, request)] == [
                one.SerializeToString() for one in (header, *parts[cut:], trailer)
            ]


@pytest.mark.parametrize("encodings", [[pb.ENCODING_ZSTD], [pb.ENCODING_RUNS], [pb.ENCODING_RUNS, pb.ENCODING_ZSTD]])
def test_a_chunk_that_is_read_into_another_place_has_the_same_encoding(
    stubs: Stubs, new_vm: NewVm, encodings: list[pb.Encoding.ValueType]
) -> None:
    # The second chunk is read past the end of the front's memory when it comes after the first. Whether it is worth an
    # encoding depends on where one looks.
    chunk = limits.MAX_CHUNK_KEYS
    keys = bytes(chunk) + b"\x10" * 600_000 + some_keys(chunk - 600_000)
    vm = new_vm((0, len(keys) // 256))
    stubs.set(vm, [(at, keys[at : at + chunk]) for at in range(0, len(keys), chunk)])
    request = pb.GetSkeysRequest(vm=vm, max_chunk_keys=chunk, encodings=encodings)
    header, _, second, trailer = _stream(stubs, request)
    request.resume.gfn = chunk
    request.resume.incarnation = header.header.incarnation
    request.resume.crc32 = zlib.crc32(keys[:chunk])
    assert _stream(stubs, request) == [header, second, trailer]


@pytest.mark.parametrize("second", [0x104, 0x110, FIRST + FIRST_COUNT - 1, SECOND])
def test_a_stream_goes_on_at_the_end_of_a_range_with_the_next(stubs: Stubs, vm: str, second: int) -> None:
    # 0x104: the ranges touch, so that the frame is also the first of the other.
    wanted = [(0x100, 4), (second, 1), (SECOND + 8, 2)]
    request = _request(vm, wanted, 0)
    header, *parts, trailer = _stream(stubs, request)
    request.resume.incarnation = header.header.incarnation
    for done in range(1, 4):
        request.resume.gfn = sum(wanted[done - 1])
        request.resume.crc32 = _crc_before(wanted, request.resume.gfn)
        assert _stream(stubs, request) == [header, *parts[done:], trailer]


def test_the_client_goes_on_at_the_end_of_a_range_with_the_next(shared_daemon: DaemonProcess, vm: str) -> None:
    wanted = [GfnRange(0x100, 4), GfnRange(0x110, 4)]
    with shared_daemon.connect() as client:
        with client.get_skeys(vm, wanted) as stream:
            first, second = stream
            assert isinstance(first, Keys)
            incarnation, end = stream.header.incarnation, stream.position
        position = Position(first.frames.end, incarnation, zlib.crc32(first.keys), 4, 0)
        with client.get_skeys(vm, wanted, resume=position) as stream:
            assert list(stream) == [second]
            assert stream.position == end


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(FIRST, SECOND + SECOND_COUNT), st.integers(1, 400))
def test_a_stream_can_go_on_in_the_middle_of_a_part_and_comes_back_to_the_others(
    stubs: Stubs, vm: str, gfn: int, chunk_keys: int
) -> None:
    request = _request(vm, ALL, chunk_keys)
    header, *parts, trailer = _stream(stubs, request)
    request.resume.gfn = gfn
    request.resume.incarnation = header.header.incarnation
    request.resume.crc32 = _crc_before(ALL, gfn)
    again, *rest, end = _stream(stubs, request)
    assert (again, end) == (header, trailer)
    following = [part for part in parts if _frames(part)[0] >= gfn]
    cut = [part for part in parts if _frames(part)[0] < gfn < _frames(part)[1]]
    assert rest[len(cut) :] == following
    for whole, left in zip(cut, rest, strict=False):
        assert left.WhichOneof("part") == whole.WhichOneof("part")
        assert _frames(left) == (gfn, _frames(whole)[1])
        if left.WhichOneof("part") == "chunk":
            assert left.chunk.crc32 == zlib.crc32(bytes(KEYS[one] for one in range(*_frames(left))))


def test_a_vm_that_was_made_again_is_not_taken_for_the_one_before(stubs: Stubs) -> None:
    vm_id = new_id()
    before = stubs.create(vm_id, (0, 1)).incarnation
    stubs.delete(f"vms/{vm_id}")
    after = stubs.create(vm_id, (0, 1)).incarnation
    request = pb.GetSkeysRequest(vm=f"vms/{vm_id}", resume=pb.GetSkeysRequest.Resume(gfn=0, incarnation=before))
    found = refused(lambda: _stream(stubs, request))
    assert (found.code, found.reason) == (grpc.StatusCode.ABORTED, "VM_REPLACED")
    assert found.metadata == {"vm": f"vms/{vm_id}", "incarnation": after}
    assert before in found.message
    stubs.delete(f"vms/{vm_id}")


def test_without_an_incarnation_nothing_is_resumed(stubs: Stubs, vm: str) -> None:
    request = pb.GetSkeysRequest(vm=vm, resume=pb.GetSkeysRequest.Resume(gfn=FIRST))
    assert refused(lambda: _stream(stubs, request)).reason == "VM_REPLACED"


@pytest.mark.parametrize(
    ("wanted", "gfn", "crc32", "named"),
    [
        ([], FIRST - 1, 0, "0xff"),
        ([], SECOND + SECOND_COUNT + 1, 0, "0x901"),
        ([], 2**64 - 1, 0, "0xffffffffffffffff"),
        ([(0x100, 4), (0x110, 4)], 0x105, 0, "0x105"),
        ([(0x100, 4), (0x110, 4)], 0x10F, 0, "0x10f"),
        ([(0x100, 4), (0x110, 4)], 0x115, 0, "0x115"),
        ([(0x100, 4)], 0x100, 1, "crc32"),
    ],
)
def test_a_frame_at_which_there_is_nothing_to_resume_is_refused_and_named(
    stubs: Stubs, vm: str, wanted: list[tuple[int, int]], gfn: int, crc32: int, named: str
) -> None:
    resume = pb.GetSkeysRequest.Resume(gfn=gfn, incarnation=stubs.look_at(vm).incarnation, crc32=crc32)
    request = pb.GetSkeysRequest(vm=vm, ranges=ranges(*wanted), resume=resume)
    found = refused(lambda: _stream(stubs, request))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
    assert named in found.message


def test_a_guest_without_keys_is_the_same_answer_when_it_is_resumed(stubs: Stubs, new_vm: NewVm) -> None:
    vm = new_vm((0, 1))
    request = pb.GetSkeysRequest(vm=vm)
    whole = _stream(stubs, request)
    request.resume.incarnation = stubs.look_at(vm).incarnation
    assert _stream(stubs, request) == whole


@settings(max_examples=examples(25), deadline=None)
@given(st.integers(40, 900), st.integers(0, 200), st.integers(0, 200))
def test_the_client_goes_on_at_its_position_as_often_as_it_is_cut(
    shared_daemon: DaemonProcess, vm: str, chunk_keys: int, first: int, second: int
) -> None:
    with shared_daemon.connect() as client:
        with client.get_skeys(vm, max_chunk_keys=chunk_keys) as stream:
            whole = list(stream)
            end = stream.position
        found: list[Keys | Gap] = []
        position: Position | None = None
        for parts in (first, second, None):
            with client.get_skeys(vm, max_chunk_keys=chunk_keys, resume=position) as stream:
                found += itertools.islice(stream, parts)
                position = stream.position
        assert found == whole
        assert position == end
        assert position.gfn == SECOND + SECOND_COUNT
        assert sum(part.frames.count for part in found) == GfnRange(*ALL[0]).count
