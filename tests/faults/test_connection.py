"""A connection between client and daemon that is cut at every message boundary and inside messages, or spoils bytes."""

from __future__ import annotations

import os
import random
import secrets
import zlib
from typing import Final

import grpc
import pytest

from skeyd.v1 import storage_key_service_pb2 as pb
from tests.faults.calls import CHUNK_KEYS, Connection, set_skeys
from tests.faults.cutter import Cutter, Place
from tests.faults.subjects import FRAMES, OLD
from tests.faults.world import World

KERNELS: Final = ("4.19", "7.0", "7.2")
CHUNKS: Final = 5
MESSAGES: Final = CHUNKS + 2
"""Header, chunks, Commit; and Begun, a Progress each, Result."""
PIECES: Final = 24
"""Of a GetSkeys stream, at whose ends it is cut."""
CUTS_A_RUN: Final = 40
"""Bytes of it, others each time, at which it is cut too."""

CUTS: Final = [
    Place(way, frame, nth, where, how)
    for way in ("up", "down")
    for frame, most in (("DATA", MESSAGES), ("HEADERS", 1 if way == "up" else 2))
    for nth in range(1, most + 1)
    for where in ("before", "header", "middle", "after")
    for how in ("reset", "end")
]


@pytest.mark.parametrize("place", CUTS, ids=str)
def test_a_set_skeys_that_is_cut_off(world: World, place: Place) -> None:
    keep = place.nth % 2 == 0
    guest = world.guest(KERNELS[(place.nth + len(place.where)) % 3])
    plan = world.plan(guest, keep=keep)
    with world.judged(guest, plan) as case, Cutter(world.front.tcp, place) as cutter:
        with Connection(cutter.target) as connection:
            case.told = set_skeys(connection, plan)
        assert cutter.found
    if place.frame == "DATA" and place.way == "up" and place.nth <= CHUNKS:
        # What came whole may be set, or the cut be noticed before it is looked at. Nothing after it is set.
        ended = "KEPT" if keep else "ROLLED_BACK"
        maybe = {1: {"UNCHANGED"}, 2: {"UNCHANGED", ended if place.where == "after" else "UNCHANGED"}}
        assert case.outcome in maybe.get(place.nth, {ended})
    if place.frame == "DATA" and place.way == "down" and place.nth == MESSAGES:
        assert case.outcome == "APPLIED"


@pytest.mark.parametrize("nth", range(2, CHUNKS + 2))
@pytest.mark.parametrize("keep", [False, True])
def test_a_key_that_is_another_on_its_way_is_never_set(world: World, nth: int, keep: bool) -> None:
    guest = world.guest("7.0")
    plan = world.plan(guest, keep=keep)
    place = Place("up", "DATA", nth, "middle", "spoil")
    with world.judged(guest, plan) as case, Cutter(world.front.tcp, place) as cutter:
        with Connection(cutter.target) as connection:
            case.told = set_skeys(connection, plan)
        assert cutter.found
    assert case.told.reason == "CHUNK_CHECKSUM_MISMATCH"
    assert case.told.outcome == case.outcome == ("UNCHANGED" if nth == 2 else "KEPT" if keep else "ROLLED_BACK")


@pytest.fixture(scope="module")
def length(world: World) -> int:
    """Measure the bytes of a GetSkeys stream that is whole."""
    with Cutter(world.front.tcp, None) as cutter:
        with Connection(cutter.target) as connection:
            parts: list[pb.GetSkeysResponse] = []
            read(connection, pb.GetSkeysRequest(vm=world.guest("7.2").name, max_chunk_keys=CHUNK_KEYS), parts)
        assert parts[-1].HasField("trailer")
        return cutter.total["down"]


def read(connection: Connection, request: pb.GetSkeysRequest, into: list[pb.GetSkeysResponse]) -> None:
    """Read parts until the stream ends or breaks off."""
    for part in connection.keys.GetSkeys(request, timeout=60):
        into.append(part)  # noqa: PERF402  those before an error count


def cut_and_go_on(world: World, place: Place) -> bool:
    """Cut a GetSkeys there, and go on with what came. False where it was whole before."""
    guest = world.guest("7.2")
    held = world.held_at_rest(guest)
    request = pb.GetSkeysRequest(vm=guest.name, max_chunk_keys=CHUNK_KEYS)
    parts: list[pb.GetSkeysResponse] = []
    with Cutter(world.front.tcp, place) as cutter, Connection(cutter.target) as connection:
        try:
            read(connection, request, parts)
        except grpc.RpcError:
            assert cutter.found
            cut = True
        else:
            cut = False
    chunks = [part.chunk for part in parts if part.HasField("chunk")]
    got = b"".join(chunk.data for chunk in chunks)
    assert got == OLD[: len(got)]
    if parts:
        request.resume.gfn = len(got)
        request.resume.incarnation = parts[0].header.incarnation
        request.resume.crc32 = zlib.crc32(got)
    rest: list[pb.GetSkeysResponse] = []
    read(world.front.connection, request, rest)
    assert got + b"".join(part.chunk.data for part in rest if part.HasField("chunk")) == OLD
    assert (rest[-1].trailer.keys, rest[-1].trailer.crc32) == (FRAMES, zlib.crc32(OLD))
    if not cut:
        assert parts[-1].trailer == rest[-1].trailer
    assert world.held_at_rest(guest) == held
    world.require_keys(guest, OLD)
    return cut


@pytest.mark.parametrize("how", ["reset", "end"])
@pytest.mark.parametrize("piece", range(1, PIECES))
def test_a_get_skeys_that_is_cut_off_goes_on_where_it_was(world: World, length: int, piece: int, how: str) -> None:
    assert cut_and_go_on(world, Place("down", "", length * piece // PIECES, "", how))


def test_a_get_skeys_that_is_cut_off_at_any_byte_goes_on_where_it_was(world: World, length: int) -> None:
    seed = int(os.environ.get("SKEYD_CUTS_SEED", "0")) or secrets.randbits(32)
    print(f"SKEYD_CUTS_SEED={seed} cuts at the same bytes again")  # noqa: T201  shown where it fails
    rng = random.Random(seed)  # noqa: S311  no secret
    cuts = 0
    for nth in rng.sample(range(1, length + 1), CUTS_A_RUN):
        place = Place("down", "", nth, "", rng.choice(("reset", "end")))
        print(place)  # noqa: T201  shown where it fails
        cuts += cut_and_go_on(world, place)
    # Behind the last message there are some bytes more, at which nothing is missing.
    assert cuts >= CUTS_A_RUN // 2
