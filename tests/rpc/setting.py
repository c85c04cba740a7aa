"""A VM whose keys are to stay as they are, and streams that are no good for it.

Its frames are 0x100-0x2ff and 0x500-0x5ff, a gap between.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import grpc
import pytest

from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2
from tests.rpc.stubs import (
    KEEP,
    Refusal,
    Stubs,
    chunk,
    commit,
    header,
    new_id,
    some_keys,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
APPLIED = vm_pb2.WRITE_OUTCOME_APPLIED
BEFORE = some_keys(0x300, 7)


@pytest.fixture(scope="module")
def old_vm(stubs: Stubs) -> Iterator[str]:
    """Make a VM; each test has its keys put back to BEFORE."""
    name = stubs.create(new_id(), (1, 2), (5, 1)).name
    yield name
    stubs.delete(name)


@pytest.fixture
def vm(stubs: Stubs, old_vm: str) -> str:
    stubs.set(old_vm, [(0x100, BEFORE[:0x200]), (0x500, BEFORE[0x200:])])
    return old_vm


class BadChunk(NamedTuple):
    """A message in the place of the second chunk, which should be 0x108-0x10f, and how it is refused."""

    message: pb.SetSkeysRequest
    code: grpc.StatusCode
    reason: str
    named: list[str]


GOOD = b"\xe8" * 8
DATA_LOSS = grpc.StatusCode.DATA_LOSS
BAD_CHUNKS = {
    "reserved-bit": BadChunk(
        chunk(0x108, b"\x10\x20\x30\x41\x51\x60\x70\x80"), INVALID, "KEY_RESERVED_BIT", ["0x41", "gfn 0x10b "]
    ),
    "reserved-bit-last": BadChunk(
        chunk(0x108, b"\x10" * 7 + b"\x01"), INVALID, "KEY_RESERVED_BIT", ["0x01", "gfn 0x10f "]
    ),
    "count-0": BadChunk(chunk(0x108, b""), INVALID, "RANGE_EMPTY", ["0x108"]),
    "count-0-with-keys": BadChunk(chunk(0x108, GOOD, count=0), INVALID, "RANGE_EMPTY", ["0x108"]),
    "too-large": BadChunk(chunk(0x108, b"\x10" * ((1 << 20) + 1)), INVALID, "REQUEST_INVALID", ["1048577", "1048576"]),
    "count-too-large": BadChunk(chunk(0x108, GOOD, count=2**32 - 1), INVALID, "REQUEST_INVALID", ["4294967295"]),
    "overflow": BadChunk(chunk(2**64 - 1, b"\x10\x10"), INVALID, "RANGE_OVERFLOW", ["0xffffffffffffffff"]),
    "leaves-a-frame-out": BadChunk(chunk(0x109, GOOD[1:]), INVALID, "CHUNK_OUT_OF_ORDER", ["0x108", "0x109"]),
    "comes-again": BadChunk(chunk(0x100, GOOD), INVALID, "CHUNK_OUT_OF_ORDER", ["0x108", "0x100"]),
    "overlaps": BadChunk(chunk(0x107, GOOD), INVALID, "CHUNK_OUT_OF_ORDER", ["0x108", "0x107"]),
    "leaves-a-frame-out-and-is-undecodable": BadChunk(
        chunk(0x109, GOOD[1:], encoding=pb.ENCODING_RUNS, data=b"\xff\xff\x10"),
        INVALID,
        "CHUNK_OUT_OF_ORDER",
        ["0x108", "0x109"],
    ),
    "before-the-range": BadChunk(chunk(0xFF, GOOD), INVALID, "CHUNK_OUT_OF_ORDER", ["0x108", "0xff"]),
    "of-the-next-range": BadChunk(chunk(0x500, GOOD), INVALID, "CHUNK_OUT_OF_ORDER", ["0x108", "0x500"]),
    "across-the-end": BadChunk(
        chunk(0x108, GOOD + b"\x10"), INVALID, "CHUNK_OUT_OF_ORDER", ["0x108-0x110", "0x100-0x10f"]
    ),
    "checksum": BadChunk(chunk(0x108, GOOD, crc32=1), DATA_LOSS, "CHUNK_CHECKSUM_MISMATCH", ["0x108", "0x00000001"]),
    "checksum-left-out": BadChunk(chunk(0x108, GOOD, crc32=0), DATA_LOSS, "CHUNK_CHECKSUM_MISMATCH", ["0x00000000"]),
    "checksum-of-other-keys": BadChunk(
        chunk(0x108, GOOD, data=b"\xe8" * 7 + b"\xe0"), DATA_LOSS, "CHUNK_CHECKSUM_MISMATCH", ["0x108"]
    ),
    "keys-missing": BadChunk(chunk(0x108, GOOD, data=GOOD[1:]), INVALID, "CHUNK_SIZE_MISMATCH", ["7 keys", "of 8"]),
    "keys-left-over": BadChunk(
        chunk(0x108, GOOD, data=GOOD + b"\x10"), INVALID, "CHUNK_SIZE_MISMATCH", ["9 keys", "of 8"]
    ),
    "no-encoding": BadChunk(chunk(0x108, GOOD, encoding=0), INVALID, "ENCODING_UNSUPPORTED", ["0"]),
    "unknown-encoding": BadChunk(chunk(0x108, GOOD, encoding=77), INVALID, "ENCODING_UNSUPPORTED", ["77"]),
    "header-again": BadChunk(header("vms/x", (0x108, 8)), INVALID, "REQUEST_INVALID", ["chunks and one commit"]),
    "empty-message": BadChunk(pb.SetSkeysRequest(), INVALID, "REQUEST_INVALID", ["chunks and one commit"]),
    "commit-too-early": BadChunk(
        commit(), grpc.StatusCode.ABORTED, "STREAM_INCOMPLETE", ["8 keys came", "16 are missing", "gfn 0x108 "]
    ),
}


both_ways = pytest.mark.parametrize("keep", [False, True], ids=["roll-back", "keep"])


def how(keep: bool) -> dict[str, Any]:
    """Header fields of a stream that is to be kept, or of one that says nothing of it."""
    return {"on_interrupt": KEEP} if keep else {}


def assert_told(error: Refusal, keep: bool, next_gfn: int, keys: bytes) -> None:
    """Check that the metadata says that these keys, all of them before next_gfn, are kept or gone."""
    told = {name: error.metadata.get(name) for name in ("outcome", "next_gfn", "keys_set", "crc32", "dirty", "enabled")}
    kept = {"next_gfn": hex(next_gfn), "keys_set": str(len(keys)), "crc32": f"{zlib.crc32(keys):#010x}"}
    empty = dict.fromkeys(told)
    assert told == {**empty, "outcome": "KEPT", **kept} if keep else {**empty, "outcome": "ROLLED_BACK"}
