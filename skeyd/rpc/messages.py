"""Messages that carry keys, past the generated classes: parsed without a copy of the keys."""

from __future__ import annotations

from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.wire import ChunkMessage, read_chunk_message


def set_skeys_request(message: bytes) -> pb.SetSkeysRequest | ChunkMessage:
    """Parse a SetSkeysRequest; one that is a chunk, as any sane client writes it, is a ChunkMessage.

    Both have WhichOneof("part") and `chunk`, whose `data` is a memoryview of the message in the latter.
    DecodeError, of one kind or another, for what is no message.
    """
    return read_chunk_message(message) or pb.SetSkeysRequest.FromString(message)
