"""What the client makes of GetSkeys: the keys that the daemon sent, all of them, or an error."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skeyd.client import Client, ClientError, Gap, Keys, StreamError, connect
from skeyd.client.reading import KeyStream, Position, get_skeys_response
from skeyd.gfn import GfnRange
from skeyd.limits import MAX_RANGES_BYTES
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.wire import ChunkMessage
from tests.client.lying_daemon import LyingDaemon, chunk, gap, header, trailer
from tests.daemon import DaemonProcess
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import SECONDS, Stubs, some_keys

ONE, TWO = b"\x10" * 4, b"\x20\x30"
GOOD = [header((0, 4), (8, 4)), chunk(0, ONE), chunk(8, TWO), gap(10, 2), trailer(ONE + TWO, 2)]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LyingDaemon]:
    """Serve lies."""
    with LyingDaemon(tmp_path) as lying:
        yield lying


@pytest.fixture
def client(daemon: LyingDaemon) -> Iterator[Client]:
    """Connect to it."""
    with connect(daemon.target) as connected:
        yield connected


def read(client: Client) -> list[Keys | Gap]:
    with client.get_skeys("vms/a") as stream:
        return list(stream)


def test_a_good_stream_is_taken(daemon: LyingDaemon, client: Client) -> None:
    """The fake above all: the lies below differ from this by one thing each."""
    daemon.says(*GOOD)
    with client.get_skeys("vms/a") as stream:
        assert stream.ranges == (GfnRange(0, 4), GfnRange(8, 4))
        assert stream.frames() == 8
        assert stream.uses_storage_keys
        assert list(stream) == [Keys(GfnRange(0, 4), ONE), Keys(GfnRange(8, 2), TWO), Gap(GfnRange(10, 2))]


def test_a_guest_without_keys_has_no_frames_to_tell_of(daemon: LyingDaemon, client: Client) -> None:
    daemon.says(header((0, 4), uses_keys=False), trailer(b""))
    with client.get_skeys("vms/a") as stream:
        assert not stream.uses_storage_keys
        assert stream.frames() == 0
        assert list(stream) == []


MAX = 1 << 20
RUNS: dict[str, Any] = {"encoding": pb.ENCODING_RUNS, "data": b"\3\0\x10"}
"""What ONE is as runs."""
ENCODED = header((0, 4), (8, 4), encodings=[pb.ENCODING_RAW, pb.ENCODING_RUNS])


def test_a_chunk_may_have_any_encoding_that_the_header_tells_of(daemon: LyingDaemon, client: Client) -> None:
    daemon.says(ENCODED, chunk(0, ONE, **RUNS), *GOOD[2:])
    assert read(client) == [Keys(GfnRange(0, 4), ONE), Keys(GfnRange(8, 2), TWO), Gap(GfnRange(10, 2))]


def test_a_daemon_may_write_its_fields_in_any_order(daemon: LyingDaemon, client: Client) -> None:
    inner = pb.Chunk(start_gfn=0, count=4, encoding=pb.ENCODING_RAW, data=ONE, crc32=zlib.crc32(ONE))
    last_first = pb.Chunk(crc32=inner.crc32).SerializeToString()
    inner.ClearField("crc32")
    body = last_first + inner.SerializeToString()
    swapped = b"\x12" + bytes([len(body)]) + body
    assert pb.GetSkeysResponse.FromString(swapped) == GOOD[1]
    found = get_skeys_response(swapped)
    assert isinstance(found, pb.GetSkeysResponse)
    assert isinstance(get_skeys_response(GOOD[1].SerializeToString()), ChunkMessage)
    parts = [get_skeys_response(part.SerializeToString()) for part in GOOD]
    assert list(KeyStream(iter([parts[0], found, *parts[2:]]))) == list(KeyStream(iter(parts)))


def test_a_chunk_of_very_many_fields_is_refused_before_it_is_parsed() -> None:
    message = b"\x12\xc0\xcf\x24" + b"\x78\x01" * 300_000
    with pytest.raises(StreamError, match=str(len(message))):
        get_skeys_response(message)


def test_a_header_of_absurd_size_is_refused_before_it_is_parsed(daemon: LyingDaemon, client: Client) -> None:
    large = pb.GetSkeysResponse()
    large.header.CopyFrom(header((0, 4)).header)
    large.header.ranges.extend([large.header.ranges[0]] * (MAX_RANGES_BYTES // 2))
    size = len(large.SerializeToString())
    with pytest.raises(StreamError, match=str(size)):
        get_skeys_response(large.SerializeToString())
    daemon.says(large)
    with pytest.raises(ClientError):
        read(client)


# --- where it is ---------------------------------------------------------------------------------------------------


def _positions() -> list[Position]:
    crcs = [0, zlib.crc32(ONE), zlib.crc32(ONE + TWO), zlib.crc32(ONE + TWO)]
    return [
        Position(gfn, "", crc32, keys, gap_frames)
        for gfn, crc32, keys, gap_frames in zip([0, 8, 10, 12], crcs, [0, 4, 6, 6], [0, 0, 0, 2], strict=True)
    ]


def test_a_stream_knows_its_position_after_every_part(daemon: LyingDaemon, client: Client) -> None:
    daemon.says(*GOOD)
    with client.get_skeys("vms/a") as stream:
        found = [stream.position, *(stream.position for _ in stream)]
    assert found == _positions()


@pytest.mark.parametrize("parts", [0, 1, 2, 3])
def test_a_stream_goes_on_at_any_position_and_its_trailer_is_that_of_all(
    daemon: LyingDaemon, client: Client, parts: int
) -> None:
    daemon.says(*GOOD)
    whole = read(client)
    daemon.says(GOOD[0], *GOOD[1 + parts :])
    with client.get_skeys("vms/a", resume=_positions()[parts]) as stream:
        assert stream.frames() == 8 - [0, 4, 6, 8][parts]
        assert stream.ranges == (GfnRange(0, 4), GfnRange(8, 4))
        assert list(stream) == whole[parts:]
        assert stream.position == _positions()[-1]


@pytest.mark.parametrize(
    ("position", "parts"),
    [
        (1, [GOOD[0], *GOOD[1:]]),
        (1, [GOOD[0], *GOOD[3:]]),
        (2, [GOOD[0], *GOOD[2:]]),
        (3, [GOOD[0], GOOD[3], GOOD[4]]),
        (1, [header((0, 4), (8, 4), incarnation="f" * 32), *GOOD[2:]]),
        (1, [*GOOD[:1], *GOOD[2:4], trailer(ONE + TWO, 3)]),
        (1, [*GOOD[:1], *GOOD[2:4], trailer(TWO, 2)]),
    ],
    ids=[
        "from-the-beginning",
        "later",
        "too-early",
        "after-the-end",
        "of-another-vm",
        "wrong-gaps",
        "of-the-rest-only",
    ],
)
def test_a_stream_that_does_not_go_on_where_it_should_is_an_error(
    daemon: LyingDaemon, client: Client, position: int, parts: list[pb.GetSkeysResponse]
) -> None:
    daemon.says(*parts)
    with pytest.raises(StreamError), client.get_skeys("vms/a", resume=_positions()[position]) as stream:
        list(stream)


LIES = {
    "nothing": [],
    "no-header": GOOD[1:],
    "an-empty-message-first": [pb.GetSkeysResponse(), *GOOD],
    "a-trailer-alone": [trailer(b"")],
    "header-with-an-empty-range": [header((0, 4), (8, 0)), *GOOD[1:]],
    "header-with-an-impossible-range": [header((0, 4), (2**64 - 1, 2)), *GOOD[1:]],
    "no-trailer": GOOD[:-1],
    "header-only": GOOD[:1],
    "a-chunk-left-out": [GOOD[0], *GOOD[2:]],
    "the-last-chunk-left-out": [*GOOD[:2], *GOOD[3:]],
    "the-gap-left-out": [*GOOD[:3], GOOD[4]],
    # with a trailer that fits what came
    "everything-left-out": [GOOD[0], trailer(b"")],
    "the-first-range-left-out": [GOOD[0], *GOOD[2:4], trailer(TWO, 2)],
    "the-last-range-left-out": [*GOOD[:2], trailer(ONE)],
    "the-end-of-a-range-left-out": [*GOOD[:3], trailer(ONE + TWO)],
    "a-chunk-twice": [*GOOD[:2], *GOOD[1:4], trailer(ONE + ONE + TWO, 2)],
    "chunks-the-wrong-way-round": [GOOD[0], *GOOD[2:4], GOOD[1], trailer(TWO + ONE, 2)],
    "a-chunk-of-a-frame-too-many": [GOOD[0], chunk(0, ONE + b"\x10"), *GOOD[2:4], trailer(ONE + b"\x10" + TWO, 2)],
    "a-chunk-before-the-range": [header((1, 3), (8, 4)), *GOOD[1:]],
    "a-chunk-of-the-wrong-frames": [GOOD[0], chunk(1, ONE), *GOOD[2:]],
    "a-chunk-without-frames": [*GOOD[:2], chunk(4, b""), *GOOD[2:]],
    "an-impossible-chunk": [header((2**64 - 1, 1)), chunk(2**64 - 1, b"\x10\x10"), trailer(b"\x10\x10")],
    "a-gap-out-of-its-range": [*GOOD[:3], gap(10, 3), trailer(ONE + TWO, 3)],
    "a-gap-in-no-range": [*GOOD[:2], gap(4, 4), *GOOD[2:4], trailer(ONE + TWO, 6)],
    "a-gap-without-frames": [*GOOD[:3], gap(10, 0), *GOOD[3:]],
    "an-impossible-gap": [*GOOD[:3], gap(10, 2**64 - 1), *GOOD[3:]],
    "a-wrong-checksum": [GOOD[0], chunk(0, ONE, crc32=0), *GOOD[2:]],
    "keys-changed-on-the-way": [GOOD[0], chunk(0, ONE, data=b"\x10\x10\x18\x10"), *GOOD[2:]],
    "keys-cut-off": [GOOD[0], chunk(0, ONE, data=ONE[:3]), *GOOD[2:]],
    "keys-left-over": [GOOD[0], chunk(0, ONE, data=ONE + b"\x10"), *GOOD[2:]],
    "too-many-keys": [
        header((0, 1 << 21)),
        chunk(0, bytes(MAX + 1)),
        chunk(MAX + 1, bytes(MAX - 1)),
        trailer(bytes(1 << 21)),
    ],
    "runs-of-which-the-header-says-nothing": [GOOD[0], chunk(0, ONE, **RUNS), *GOOD[2:]],
    "runs-of-too-few": [ENCODED, chunk(0, ONE, **RUNS, count=5), *GOOD[2:]],
    "runs-of-too-many": [ENCODED, chunk(0, ONE, encoding=pb.ENCODING_RUNS, data=b"\xff\xff\x10"), *GOOD[2:]],
    "runs-of-other-keys": [ENCODED, chunk(0, ONE, encoding=pb.ENCODING_RUNS, data=b"\3\0\x30"), *GOOD[2:]],
    "runs-with-a-reserved-bit": [
        ENCODED,
        chunk(0, b"\x11" * 4, encoding=pb.ENCODING_RUNS, data=b"\3\0\x11"),
        *GOOD[2:4],
        trailer(b"\x11" * 4 + TWO, 2),
    ],
    "no-encoding": [GOOD[0], chunk(0, ONE, encoding=0), *GOOD[2:]],
    "an-unknown-encoding": [GOOD[0], chunk(0, ONE, encoding=77), *GOOD[2:]],
    "a-reserved-bit": [GOOD[0], chunk(0, b"\x10\x11\x10\x10"), *GOOD[2:4], trailer(b"\x10\x11\x10\x10" + TWO, 2)],
    "wrong-count-of-keys": [*GOOD[:4], trailer(ONE + TWO, 2, keys=7)],
    "wrong-count-of-gaps": [*GOOD[:4], trailer(ONE + TWO, 3)],
    "a-wrong-checksum-of-all": [*GOOD[:4], trailer(ONE + TWO, 2, crc32=1)],
    "a-second-header": [*GOOD[:2], GOOD[0], *GOOD[2:]],
    "an-empty-message": [*GOOD[:2], pb.GetSkeysResponse(), *GOOD[2:]],
    "more-after-all-ranges": [*GOOD[:4], chunk(12, b"\x10"), trailer(ONE + TWO + b"\x10", 2)],
    "more-after-the-trailer": [*GOOD, chunk(12, b"\x10")],
    "a-second-trailer": [*GOOD, GOOD[4]],
    "keys-of-a-guest-without": [header((0, 4), uses_keys=False), chunk(0, ONE), trailer(ONE)],
    "a-count-of-keys-of-a-guest-without": [header((0, 4), uses_keys=False), trailer(ONE)],
}


@pytest.mark.parametrize("parts", LIES.values(), ids=LIES)
def test_a_stream_that_is_not_whole_and_in_order_is_an_error(
    daemon: LyingDaemon, client: Client, parts: list[pb.GetSkeysResponse]
) -> None:
    daemon.says(*parts)
    with pytest.raises(StreamError) as caught:
        read(client)
    assert str(caught.value)


@settings(deadline=None)
@example([0, 1, 2, 3, 4], [], 0)
@given(st.permutations(range(len(GOOD))), st.lists(st.integers(0, len(GOOD) - 1), max_size=2), st.integers(0, 5))
def test_no_reordering_repetition_or_loss_of_parts_goes_unseen(order: list[int], again: list[int], cut: int) -> None:
    parts = [*order, *again][: len(order) + len(again) - cut]
    try:
        list(KeyStream(get_skeys_response(GOOD[number].SerializeToString()) for number in parts))
    except StreamError:
        assert parts != [0, 1, 2, 3, 4]
    else:
        assert parts == [0, 1, 2, 3, 4]


def test_what_came_before_the_lie_was_given_out_and_nothing_after_it(daemon: LyingDaemon, client: Client) -> None:
    daemon.says(*GOOD[:2], chunk(8, TWO, crc32=0), *GOOD[3:])
    taken: list[Keys | Gap] = []
    with client.get_skeys("vms/a") as stream, pytest.raises(StreamError):
        taken.extend(stream)
    assert taken == [Keys(GfnRange(0, 4), ONE)]


def test_a_stream_can_be_read_once_only(daemon: LyingDaemon, client: Client) -> None:
    daemon.says(*GOOD)
    with client.get_skeys("vms/a") as stream:
        list(stream)
        with pytest.raises(StreamError):
            list(stream)


def test_an_error_in_the_middle_of_a_stream_is_a_client_error(daemon: LyingDaemon, client: Client) -> None:
    def reading(context: grpc.ServicerContext) -> Iterator[pb.GetSkeysResponse]:
        yield from GOOD[:3]
        context.abort(grpc.StatusCode.UNAVAILABLE, "the worker was lost")

    daemon.reading = reading
    with pytest.raises(ClientError) as caught:
        read(client)
    assert (caught.value.code, caught.value.message) == (grpc.StatusCode.UNAVAILABLE, "the worker was lost")


def test_an_error_after_the_trailer_is_one_still(daemon: LyingDaemon, client: Client) -> None:
    def reading(context: grpc.ServicerContext) -> Iterator[pb.GetSkeysResponse]:
        yield from GOOD
        context.abort(grpc.StatusCode.DATA_LOSS, "not so")

    daemon.reading = reading
    with pytest.raises(ClientError):
        read(client)


def test_leaving_a_stream_early_ends_the_call(shared_daemon: DaemonProcess, stubs: Stubs, new_vm: NewVm) -> None:
    vm = new_vm((0, 4 << 20))
    stubs.set(vm, [(0, b"\x10")])
    with shared_daemon.connect() as client, client.get_skeys(vm) as stream:
        assert next(iter(stream)) == Keys(GfnRange(0, 262_144), b"\x10" + bytes(262_143))
    method = "/skeyd.v1.StorageKeyService/GetSkeys"
    assert shared_daemon.wait_for_line("rpc", SECONDS, method=method, vm=vm)["code"] == "CANCELLED"


def test_ranges_and_chunk_size_are_passed_on(shared_daemon: DaemonProcess, stubs: Stubs, new_vm: NewVm) -> None:
    vm = new_vm((0, 1), (2, 1))
    keys = some_keys(256)
    stubs.set(vm, [(0, keys)])
    with shared_daemon.connect() as client:
        with client.get_skeys(vm, [GfnRange(1, 3), GfnRange(255, 258)], max_chunk_keys=2) as stream:
            parts = list(stream)
        assert client.get_vm(vm).uses_storage_keys
    assert parts == [
        Keys(GfnRange(1, 2), keys[1:3]),
        Keys(GfnRange(3, 1), keys[3:4]),
        Keys(GfnRange(255, 1), keys[255:]),
        Gap(GfnRange(256, 256)),
        Keys(GfnRange(512, 1), b"\0"),
    ]
