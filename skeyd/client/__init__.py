"""What Python programs import to talk with skeyd: `with skeyd.client.connect() as client: …`."""

from skeyd.client.connection import Client, connect
from skeyd.client.errors import ClientError, StreamError
from skeyd.client.keys import Gap, Keys, KeyStream, OneKey, OneKeySet, SetResult
from skeyd.client.snapshot import Snapshot, SnapshotError, write_snapshot

__all__ = [
    "Client",
    "ClientError",
    "Gap",
    "KeyStream",
    "Keys",
    "OneKey",
    "OneKeySet",
    "SetResult",
    "Snapshot",
    "SnapshotError",
    "StreamError",
    "connect",
    "write_snapshot",
]
