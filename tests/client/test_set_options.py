"""What a Python program can ask of a SetSkeys: to keep, to go on, to be applied once, to check only, to fit digests."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from skeyd.client import Client, ClientError, Keys, KeysDigest, OtherKeysError, SetOptions, StreamError, connect
from skeyd.encoding import codec
from skeyd.gfn import GfnRange
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2
from tests.client.lying_daemon import LyingDaemon
from tests.daemon import DaemonProcess
from tests.vm_requests import fill, simulated

FRAMES = GfnRange(0, 512)
NEW = bytes(range(0, 256, 2)) * 4
CHUNKS = [Keys(GfnRange(at, 128), NEW[at : at + 128]) for at in range(0, 512, 128)]


class _Cut(Exception):  # noqa: N818 (says what happened)
    pass


class _Cutting:
    """Gives some chunks, and raises when the daemon has said that they are set."""

    def __init__(self, chunks: list[Keys]) -> None:
        self._chunks = chunks
        self._set = threading.Event()

    def progress(self, keys_set: int) -> None:
        if keys_set == sum(chunk.frames.count for chunk in self._chunks):
            self._set.set()

    def __iter__(self) -> Iterator[Keys]:
        yield from self._chunks
        assert self._set.wait(30)
        raise _Cut


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.connect() as connected:
        connected.create_vm(simulated("web", 2))
        yield connected


def _keys(client: Client) -> bytes:
    with client.get_skeys("vms/web") as stream:
        return b"".join(bytes(part.keys) for part in stream if isinstance(part, Keys))


def test_chunks_that_raise_leave_the_old_keys(client: Client) -> None:
    old = fill(client, "web", 512)
    cutting = _Cutting(CHUNKS[:2])
    with pytest.raises(_Cut):
        client.set_skeys("vms/web", [FRAMES], cutting, progress=cutting.progress)
    # The call is over here before the daemon knows of it.
    end = time.monotonic() + 30
    while client.get_vm("vms/web").last_write.outcome != vm_pb2.WRITE_OUTCOME_ROLLED_BACK:
        assert time.monotonic() < end
    assert _keys(client) == old


@pytest.mark.parametrize("more", [(128, 128), (128, 128, 100, 28)])
def test_a_call_that_was_kept_goes_on_with_the_keys_that_are_left(client: Client, more: tuple[int, ...]) -> None:
    old = fill(client, "web", 512)
    options = SetOptions(keep=True, request_id="job")
    cutting = _Cutting(CHUNKS[:2])
    with pytest.raises(_Cut):
        client.set_skeys("vms/web", [FRAMES], cutting, options, progress=cutting.progress)
    seen: list[int] = []
    chunks, at = [], 0
    for count in (*more, *[32] * ((512 - sum(more)) // 32)):  # cut otherwise than before
        chunks.append(Keys(GfnRange(at, count), NEW[at : at + count]))
        at += count
    resumed = SetOptions(keep=True, request_id="job", resume=True)
    end = time.monotonic() + 30
    while True:
        assert time.monotonic() < end
        try:
            result = client.set_skeys("vms/web", [FRAMES], chunks, resumed, progress=seen.append)
            break
        except ClientError as error:
            # The first call is over here before the daemon knows of it.
            if error.reason != "VM_BUSY":
                raise
    assert (result.keys_set, result.validated_only) == (512, False)
    assert seen[0] == 256
    assert _keys(client) == NEW != old


def test_a_call_does_not_go_on_with_other_keys(client: Client) -> None:
    fill(client, "web", 512)
    short = [Keys(GfnRange(0, 512), NEW), Keys(GfnRange(0, 1), b"\x10")]
    with pytest.raises(ClientError) as refused:
        client.set_skeys("vms/web", [FRAMES], short, SetOptions(keep=True, request_id="job"))
    assert refused.value.metadata["outcome"] == "KEPT"
    other = [Keys(FRAMES, b"\x10" + NEW[1:])]
    with pytest.raises(StreamError, match="not those"):
        client.set_skeys("vms/web", [FRAMES], other, SetOptions(keep=True, request_id="job", resume=True))
    with pytest.raises(StreamError, match="512 keys more"):
        client.set_skeys("vms/web", [FRAMES], [], SetOptions(keep=True, request_id="job", resume=True))
    mine = SetOptions(keep=True, request_id="job", resume=True)
    assert client.set_skeys("vms/web", [FRAMES], CHUNKS, mine).keys_set == 512


def test_there_is_nothing_to_go_on_with_and_the_client_says_so_at_once(client: Client) -> None:
    with pytest.raises(ClientError) as refused:
        client.set_skeys("vms/web", [FRAMES], CHUNKS, SetOptions(True, keep=True, request_id="job", resume=True))
    assert refused.value.reason == "NOTHING_TO_RESUME"


def test_the_same_request_is_applied_once(client: Client) -> None:
    fill(client, "web", 512)
    options = SetOptions(request_id="0b5c7f0e-7f55-4c1e-9d0b-3d6fb2b3c111")
    first = client.set_skeys("vms/web", [FRAMES], CHUNKS, options)
    client.set_skey("vms/web", 5, 0x40)
    assert client.set_skeys("vms/web", [FRAMES], CHUNKS, options) == first
    assert _keys(client)[5] == 0x40


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "chunks",
    [
        [Keys(FRAMES, NEW[:-1] + b"\x10")],
        [*CHUNKS[:3], Keys(GfnRange(384, 128), b"\x10" * 128)],
        CHUNKS[:3],
        [*CHUNKS, Keys(GfnRange(512, 1), b"\x10")],
        [],
    ],
    ids=["the last key", "the last chunk", "fewer", "more", "none"],
)
def test_other_keys_under_the_same_request_id_are_not_said_to_be_set(
    client: Client, chunks: list[Keys], resume: bool
) -> None:
    fill(client, "web", 512)
    options = SetOptions(keep=resume, request_id="job")
    client.set_skeys("vms/web", [FRAMES], CHUNKS, options)
    with pytest.raises(OtherKeysError, match="'job' was applied before with other keys") as caught:
        client.set_skeys("vms/web", [FRAMES], chunks, replace(options, resume=resume))
    assert isinstance(caught.value, StreamError)
    assert _keys(client) == NEW
    # Cut otherwise they are the same keys.
    assert client.set_skeys("vms/web", [FRAMES], [Keys(FRAMES, NEW)], replace(options, resume=resume)).keys_set == 512


def test_what_the_source_raises_is_raised_where_the_request_was_applied_before_too(client: Client) -> None:
    fill(client, "web", 512)
    options = SetOptions(request_id="job")
    client.set_skeys("vms/web", [FRAMES], CHUNKS, options)

    def chunks() -> Iterator[Keys]:
        yield CHUNKS[0]
        raise _Cut

    with pytest.raises(_Cut):
        client.set_skeys("vms/web", [FRAMES], chunks(), options)


def test_what_is_only_validated_is_not_set(client: Client) -> None:
    old = fill(client, "web", 512)
    result = client.set_skeys("vms/web", [FRAMES], CHUNKS, SetOptions(validate_only=True))
    assert (result.keys_set, result.validated_only) == (512, True)
    with pytest.raises(ClientError) as refused:
        client.set_skeys("vms/web", [FRAMES], [Keys(FRAMES, NEW[:-1] + b"\x01")], SetOptions(validate_only=True))
    assert (refused.value.reason, refused.value.metadata["outcome"]) == ("KEY_RESERVED_BIT", "UNCHANGED")
    assert _keys(client) == old


def test_digests_say_which_keys_there_must_be(client: Client) -> None:
    fill(client, "web", 512)
    before = client.digest_skeys("vms/web").node
    assert before is not None
    ours = KeysDigest(before.sha256)
    with pytest.raises(ClientError) as refused:
        client.set_skeys("vms/web", [FRAMES], CHUNKS, SetOptions(expected=ours, resulting=ours))
    assert (refused.value.reason, refused.value.metadata["outcome"]) == ("RESULT_DIGEST_MISMATCH", "ROLLED_BACK")
    assert client.digest_skeys("vms/web").node == before
    client.set_skeys("vms/web", [FRAMES], CHUNKS, SetOptions(expected=ours))
    with pytest.raises(ClientError) as refused:
        client.set_skeys("vms/web", [FRAMES], CHUNKS, SetOptions(expected=ours))
    assert refused.value.reason == "EXPECTED_DIGEST_MISMATCH"


@pytest.mark.parametrize("validate_only", [False, True])
def test_a_daemon_that_did_the_other_of_setting_and_checking_is_told_apart(tmp_path: Path, validate_only: bool) -> None:
    response = pb.SetSkeysResponse
    outcome = response.OUTCOME_APPLIED if validate_only else response.OUTCOME_VALIDATED
    with LyingDaemon(tmp_path) as lying, connect(lying.target) as client:
        result = response.Result(keys_set=512, outcome=outcome, crc32=zlib.crc32(NEW))
        lying.writing = lambda *_: iter([response(result=result)])
        with pytest.raises(StreamError, match="set" if validate_only else "only checked"):
            client.set_skeys("vms/web", [FRAMES], CHUNKS, SetOptions(validate_only=validate_only))


# --- how the keys are sent -----------------------------------------------------------------------------------------


def _sent(tmp_path: Path, keys: bytes, options: SetOptions, offered: list[int]) -> list[pb.SetSkeysRequest]:
    """Set keys at a daemon that takes `offered`, and return what came there."""
    sent: list[pb.SetSkeysRequest] = []
    response = pb.SetSkeysResponse
    done = response.OUTCOME_VALIDATED if options.validate_only else response.OUTCOME_APPLIED

    def writing(requests: Iterator[pb.SetSkeysRequest], _: object) -> Iterator[pb.SetSkeysResponse]:
        sent.append(next(requests))
        yield response(begun=response.Begun(encodings=offered))  # type: ignore[arg-type]  # one that isn't there too
        sent.extend(requests)
        yield response(result=response.Result(keys_set=len(keys), outcome=done, crc32=zlib.crc32(keys)))

    with LyingDaemon(tmp_path) as lying, connect(lying.target) as client:
        lying.writing = writing
        frames = GfnRange(5, len(keys))
        client.set_skeys("vms/web", [frames], [Keys(frames, keys)], options)
    assert [one.WhichOneof("part") for one in sent] == ["header", "chunk", "commit"]
    return sent


RUNS_OF_KEYS = b"\x10" * 5000 + b"\x26" * 7000 + b"\x30"


@pytest.mark.parametrize(
    ("ours", "offered", "used"),
    [
        (codec.KNOWN, [codec.RAW], codec.RAW),
        (codec.KNOWN, [codec.RAW, codec.RUNS], codec.RUNS),
        (codec.KNOWN, [], codec.RAW),
        (codec.KNOWN, [codec.RAW, 77], codec.RAW),
        ((), [codec.RAW, codec.RUNS, codec.ZSTD], codec.RAW),
        ((codec.RAW,), [codec.RAW, codec.RUNS, codec.ZSTD], codec.RAW),
        ((codec.RUNS,), [codec.RAW, codec.RUNS, codec.ZSTD], codec.RUNS),
    ],
)
@pytest.mark.parametrize("keys", [RUNS_OF_KEYS, b"\x38" * 9000], ids=["runs", "one key"])
def test_chunks_are_encoded_as_both_sides_will_have_it(
    tmp_path: Path, keys: bytes, ours: tuple[int, ...], offered: list[int], used: int
) -> None:
    chunk = _sent(tmp_path, keys, SetOptions(encodings=ours), offered)[1].chunk
    assert (chunk.encoding, chunk.start_gfn, chunk.count, chunk.crc32) == (used, 5, len(keys), zlib.crc32(keys))
    assert codec.decode(chunk.encoding, chunk.data, chunk.count) == keys
    assert (len(chunk.data) < 100) == (used != codec.RAW)


@pytest.mark.parametrize("encodings", [codec.KNOWN, (codec.RAW,), (codec.RUNS,)])
def test_encoded_keys_arrive_as_they_were(client: Client, encodings: tuple[int, ...]) -> None:
    client.create_vm(simulated("large", 64))
    keys = (RUNS_OF_KEYS * 2)[: 64 * 256] + b""
    frames = GfnRange(0, len(keys))
    options = SetOptions(allow_enable=True, encodings=encodings)
    assert client.set_skeys("vms/large", [frames], [Keys(frames, keys)], options).keys_set == len(keys)
    with client.get_skeys("vms/large") as stream:
        assert b"".join(bytes(part.keys) for part in stream if isinstance(part, Keys)) == keys


@pytest.mark.parametrize(
    ("seconds", "sent"), [(None, None), (0.004, (0, 4_000_000)), (1.5, (1, 500_000_000)), (0.0, (0, 0))]
)
def test_how_long_an_ioctl_may_take_is_what_was_asked_for(
    tmp_path: Path, seconds: float | None, sent: tuple[int, int] | None
) -> None:
    header = _sent(tmp_path, b"\x10", SetOptions(slice_seconds=seconds), [])[0].header
    asked = (header.max_slice_time.seconds, header.max_slice_time.nanos) if header.HasField("max_slice_time") else None
    assert asked == sent
