"""How what clients send is parsed: chunks without a copy of their keys, and nothing that is far larger than need be.

A message of many small parts takes 20 to 30 times its bytes when it is parsed, so its size is looked at before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from skeyd.errors import Reason, SkeydError
from skeyd.limits import MAX_RANGES_BYTES, MAX_REQUEST_BYTES
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.wire import ChunkMessage, is_one_chunk, read_chunk_message

Parser = Callable[[bytes], Any]
"""From a message's bytes to the message."""


def bounded(parser: Parser, most: int = MAX_REQUEST_BYTES) -> Parser:
    """Return a parser that refuses messages of more than so many bytes. REQUEST_INVALID."""

    def parse(message: bytes) -> Any:
        require_size(message, most)
        return parser(message)

    return parse


def require_size(message: bytes, most: int) -> None:
    """REQUEST_INVALID for a message of more than so many bytes."""
    if len(message) > most:
        raise SkeydError(
            Reason.REQUEST_INVALID,
            f"a message of {len(message)} bytes is over the {most} that any of its kind has use for",
        )


def set_skeys_request(message: bytes) -> pb.SetSkeysRequest | ChunkMessage:
    """Parse a SetSkeysRequest; one that is a chunk, as any sane client writes it, is a ChunkMessage.

    Both have WhichOneof("part") and `chunk`, whose `data` is a memoryview of the message in the latter.
    REQUEST_INVALID for one without keys that is too large. DecodeError, of one kind or another, for what is no message.
    """
    chunk = read_chunk_message(message)
    if chunk is not None:
        return chunk
    if not is_one_chunk(message):
        require_size(message, MAX_RANGES_BYTES)
    return pb.SetSkeysRequest.FromString(message)


PARSERS: Final[Mapping[str, Parser]] = {
    "SetSkeys": set_skeys_request,
    "GetSkeys": bounded(pb.GetSkeysRequest.FromString, MAX_RANGES_BYTES),
    "DigestSkeys": bounded(pb.DigestSkeysRequest.FromString, MAX_RANGES_BYTES),
    "SummarizeSkeys": bounded(pb.SummarizeSkeysRequest.FromString, MAX_RANGES_BYTES),
}
"""By method of StorageKeyService, where it isn't `bounded` of what the generated code has."""
