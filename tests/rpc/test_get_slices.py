"""What GetSkeys asks a worker for, slice by slice, and what it makes of answers that contradict each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration

from skeyd.errors import Reason, SkeydError
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.vms.pacing import FIRST_KEYS
from skeyd.worker.protocol import SLICE_KEYS
from tests.rpc.one_vm import GetCall
from tests.rpc.stubs import ranges
from tests.vms.fake_worker import FakeWorker, Slow

FRAMES = 4 * SLICE_KEYS
CHUNK_KEYS = SLICE_KEYS


def request(slice_time: Duration | None = None) -> pb.GetSkeysRequest:
    """Ask for all keys of the guest."""
    return pb.GetSkeysRequest(
        vm="vms/web", ranges=ranges((0, FRAMES)), max_chunk_keys=CHUNK_KEYS, max_slice_time=slice_time
    )


@pytest.mark.parametrize(
    ("slice_time", "most"),
    [
        (Duration(seconds=1), SLICE_KEYS),
        (Duration(nanos=20_000_000), 133_120),
        (None, 66_560),
        (Duration(nanos=1_000_000), 6_656),
    ],
    ids=["1s", "20ms", "unsaid", "1ms"],
)
def test_slices_are_as_long_as_the_request_lets_the_kernel_be_kept(
    runtime_dir: Path, slice_time: Duration | None, most: int
) -> None:
    worker = Slow(150)
    with FakeWorker(runtime_dir, worker):
        list(GetCall(runtime_dir, request(slice_time)).parts)
    assert sum(worker.asked) == FRAMES
    assert worker.asked[0] == FIRST_KEYS
    assert max(worker.asked[1:]) == most


@pytest.mark.parametrize("keyless", [0, 1, 2], ids=["first", "second", "third"])
def test_a_chunk_of_which_a_slice_is_said_to_be_keyless_is_no_chunk(runtime_dir: Path, keyless: int) -> None:
    # The worker wrote nothing there: the keys would be whatever the ring had.
    parts: list[pb.GetSkeysResponse | bytes] = []
    with FakeWorker(runtime_dir, worker := Slow(1, keyless={keyless})):
        call = GetCall(runtime_dir, request())
        with pytest.raises(SkeydError, match="said to use none") as failed:
            parts += iter(call.parts)
    assert failed.value.reason is Reason.WORKER_FAILED
    assert sum(worker.asked[:3]) < CHUNK_KEYS, "all three are of the first chunk, and not its last"
    assert [isinstance(part, bytes) or part.WhichOneof("part") for part in parts] == ["header"]
