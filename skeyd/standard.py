"""gRPC's standard messages: status details, health, reflection.

Their contracts are in third_party/proto; `make proto` compiles them into standard.binpb. They live in a descriptor pool
of their own, so that a program that imports skeyd beside googleapis-common-protos, grpcio-status or another version
of them never meets "duplicate file name in the descriptor pool"; and skeyd needs none of those packages, whose newest
versions force the newest grpcio and protobuf.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory


def _load() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    data = resources.files(__package__).joinpath("standard.binpb").read_bytes()
    for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL = _load()
"""Where these messages and services are described."""


def message(name: str) -> Any:
    """Return the class of a message by its full name, "google.rpc.Status" and so on."""
    descriptor = POOL.FindMessageTypeByName(name)
    if hasattr(message_factory, "GetMessageClass"):
        return message_factory.GetMessageClass(descriptor)
    # protobuf 4.21, Debian 12's and 13's
    old: Any = message_factory
    return old.MessageFactory(POOL).GetPrototype(descriptor)
