"""What the client makes of SummarizeSkeys: numbers that fit together, or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skeyd.client import Client, ClientError, StreamError, VmSummary, connect
from skeyd.gfn import GfnRange
from skeyd.summary import Run, Summary
from skeyd.v1 import storage_key_service_pb2 as pb
from tests.client.lying_daemon import LyingDaemon
from tests.daemon import DaemonProcess
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import Stubs, ranges


def good() -> pb.SummarizeSkeysResponse:
    """Say what an honest daemon may say."""
    return pb.SummarizeSkeysResponse(
        uses_storage_keys=True,
        keys=10,
        gap_frames=5,
        counts=[
            pb.SummarizeSkeysResponse.KeyCount(key=0, count=3),
            pb.SummarizeSkeysResponse.KeyCount(key=0x36, count=7),
        ],
        runs=3,
        longest_run=pb.SummarizeSkeysResponse.Run(start_gfn=4, count=5, key=0x36),
        incarnation="1",
    )


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


def test_a_good_answer_is_taken(daemon: LyingDaemon, client: Client) -> None:
    """The fake above all: the lies below differ from this by one thing each."""
    daemon.summary = good()
    summary = Summary({0: 3, 0x36: 7}, 3, Run(GfnRange(4, 5), 0x36))
    assert client.summarize_skeys("vms/a", [GfnRange(3, 4)], slice_seconds=0.5) == VmSummary(True, summary, 5, "1")
    (request,) = daemon.summaries_asked
    assert (request.vm, list(request.ranges)) == ("vms/a", ranges((3, 4)))
    assert (request.max_slice_time.seconds, request.max_slice_time.nanos) == (0, 500_000_000)


def test_a_guest_without_keys_is_an_answer(daemon: LyingDaemon, client: Client) -> None:
    daemon.summary = pb.SummarizeSkeysResponse(incarnation="1")
    assert client.summarize_skeys("vms/a") == VmSummary(False, Summary({}, 0, None), 0, "1")


def _changed(change: Callable[[pb.SummarizeSkeysResponse], object]) -> pb.SummarizeSkeysResponse:
    response = good()
    change(response)
    return response


LIES: dict[str, pb.SummarizeSkeysResponse] = {
    "uses no keys and has some": _changed(lambda one: one.ClearField("uses_storage_keys")),
    "uses keys and has none": pb.SummarizeSkeysResponse(uses_storage_keys=True),
    "another sum": _changed(lambda one: setattr(one, "keys", 11)),
    "a count of 0": _changed(lambda one: one.counts.add(key=0x40, count=0)),
    "counts in disorder": _changed(lambda one: one.counts.reverse()),
    "a count twice": _changed(lambda one: one.counts.append(one.counts[-1])),
    "a key with the reserved bit": _changed(lambda one: setattr(one.counts[1], "key", 0x37)),
    "a key that is no byte": _changed(lambda one: setattr(one.counts[1], "key", 0x136)),
    "fewer runs than keys differ": _changed(lambda one: setattr(one, "runs", 1)),
    "more runs than frames": _changed(lambda one: setattr(one, "runs", 11)),
    "no longest run": _changed(lambda one: one.ClearField("longest_run")),
    "a run of no frames": _changed(lambda one: setattr(one.longest_run, "count", 0)),
    "a run beyond the end": _changed(lambda one: setattr(one.longest_run, "start_gfn", 2**64 - 1)),
    "a run of a key that there is not": _changed(lambda one: setattr(one.longest_run, "key", 0x40)),
    "a run longer than its key's frames": _changed(lambda one: setattr(one.longest_run, "count", 8)),
    "a longest run shorter than most": _changed(lambda one: setattr(one.longest_run, "count", 3)),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_does_not_fit_together_is_an_error(daemon: LyingDaemon, client: Client, lie: str) -> None:
    daemon.summary = LIES[lie]
    with pytest.raises(StreamError, match=r"do not fit together|impossible keys"):
        client.summarize_skeys("vms/a")


def test_the_daemons_own_summary_is_taken_and_its_refusal_is_an_error(
    shared_daemon: DaemonProcess, new_vm: NewVm, stubs: Stubs
) -> None:
    name = new_vm((0, 1), (2, 1))
    stubs.set(name, [(0, b"\x36" * 3)])
    with connect(shared_daemon.target) as client:
        found = client.summarize_skeys(name)
        assert found.summary == Summary({0: 509, 0x36: 3}, 3, Run(GfnRange(512, 256), 0))
        assert (found.gap_frames, found.incarnation) == (256, stubs.look_at(name).incarnation)
        assert client.summarize_skeys(name, [GfnRange(1, 3)]).summary == Summary(
            {0: 1, 0x36: 2}, 2, Run(GfnRange(1, 2), 0x36)
        )
        with pytest.raises(ClientError) as refused:
            client.summarize_skeys(name, [GfnRange(256, 1)])
        assert refused.value.reason == "GFN_NOT_MAPPED"
