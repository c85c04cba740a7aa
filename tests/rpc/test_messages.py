"""Messages that carry keys are taken apart without a copy, and are what the generated class makes of them."""

from __future__ import annotations

import pytest

from skeyd.rpc.messages import set_skeys_request
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.wire import ChunkMessage
from tests.rpc.stubs import chunk, commit, header


def test_a_chunk_is_taken_apart_and_its_keys_are_the_messages_own_bytes() -> None:
    message = chunk(0x100, b"\x10\x20").SerializeToString()
    found = set_skeys_request(message)
    assert isinstance(found, ChunkMessage)
    assert found.WhichOneof("part") == "chunk"
    assert (found.chunk.start_gfn, found.chunk.count, bytes(found.chunk.data)) == (0x100, 2, b"\x10\x20")
    assert found.chunk.data.obj is message


@pytest.mark.parametrize("request_", [header("vms/a", (0, 4)), commit(), pb.SetSkeysRequest()])
def test_all_else_is_a_message_of_the_generated_class(request_: pb.SetSkeysRequest) -> None:
    assert set_skeys_request(request_.SerializeToString()) == request_


def test_a_chunk_that_is_written_in_another_way_is_the_same_chunk() -> None:
    twice = chunk(1, b"\x10").SerializeToString() + chunk(2, b"\x20\x30").SerializeToString()
    assert set_skeys_request(twice) == pb.SetSkeysRequest.FromString(twice)


def test_what_is_no_message_is_an_error() -> None:
    with pytest.raises(Exception, match=r"[Pp]ars|[Dd]ecod"):
        set_skeys_request(b"\xff\xff\xff")
