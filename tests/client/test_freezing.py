"""Keys of one moment by skeyd.client: what it asks for, and that a daemon that overlooks it is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skeyd.client import Client, Keys, StreamError, connect
from skeyd.client.freezing import set_frozen
from skeyd.v1 import storage_key_service_pb2 as pb
from tests.client.lying_daemon import LyingDaemon, header, trailer
from tests.daemon import DaemonProcess
from tests.vm_requests import fill, simulated


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.connect() as client:
        yield client


@pytest.fixture
def lying(tmp_path: Path) -> Iterator[LyingDaemon]:
    with LyingDaemon(tmp_path) as lying:
        yield lying


def test_a_stream_says_that_it_is_of_one_moment(client: Client) -> None:
    client.create_vm(simulated("web", 1))
    keys = fill(client, "web", 256)
    with client.get_skeys("vms/web", frozen=True, freeze_seconds=2.5) as stream:
        told = [stream.frozen_seconds]
        assert b"".join(part.keys for part in stream if isinstance(part, Keys)) == keys
        assert (stream.frozen, *told, stream.frozen_seconds) == (True, None, 0.0)
    with client.get_skeys("vms/web") as stream:
        assert list(stream)
        assert (stream.frozen, stream.frozen_seconds) == (False, None)
    assert client.digest_skeys("vms/web", frozen=True).node == client.digest_skeys("vms/web").node
    frozen = client.summarize_skeys("vms/web", frozen=True, freeze_seconds=1)
    assert frozen == client.summarize_skeys("vms/web")
    client.delete_vm("vms/web")


def test_a_daemon_that_overlooks_it_is_noticed(lying: LyingDaemon) -> None:
    lying.says(header(uses_keys=False), trailer(b""))
    with connect(lying.target) as client:
        ask: dict[str, Any] = {"frozen": True}
        with pytest.raises(StreamError, match="were to be of one moment"), client.get_skeys("vms/a", **ask):
            pass
        with pytest.raises(StreamError, match="were to be of one moment"):
            client.digest_skeys("vms/a", **ask)
        with pytest.raises(StreamError, match="were to be of one moment"):
            client.summarize_skeys("vms/a", **ask)
        assert lying.summaries_asked[-1].consistency == pb.CONSISTENCY_FROZEN


def test_a_budget_without_anything_to_freeze_is_a_mistake() -> None:
    request = pb.GetSkeysRequest()
    with pytest.raises(ValueError, match="frozen"):
        set_frozen(request, False, 1.0)
    set_frozen(request, False, None)
    assert request == pb.GetSkeysRequest()
    set_frozen(request, True, 0.0)
    assert request.HasField("freeze_budget")
    set_frozen(request, True, 1.25)
    assert (request.freeze_budget.seconds, request.freeze_budget.nanos) == (1, 250_000_000)
