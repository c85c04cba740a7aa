"""What Python programs import to talk with skeyd: `with skeyd.client.connect() as client: …`."""

from skeyd.client.compare import Comparison, Difference, FileSide, VmSide
from skeyd.client.connection import Client, connect
from skeyd.client.digesting import Digest
from skeyd.client.errors import ClientError, OtherKeysError, StreamError
from skeyd.client.reading import Gap, Keys, KeyStream, Position
from skeyd.client.single import OneKey, OneKeySet
from skeyd.client.snapshot import Snapshot, SnapshotError, write_snapshot
from skeyd.client.summary import VmSummary
from skeyd.client.writing import KeysDigest, SetOptions, SetResult

__all__ = [
    "Client",
    "ClientError",
    "Comparison",
    "Difference",
    "Digest",
    "FileSide",
    "Gap",
    "KeyStream",
    "Keys",
    "KeysDigest",
    "OneKey",
    "OneKeySet",
    "OtherKeysError",
    "Position",
    "SetOptions",
    "SetResult",
    "Snapshot",
    "SnapshotError",
    "StreamError",
    "VmSide",
    "VmSummary",
    "connect",
    "write_snapshot",
]
