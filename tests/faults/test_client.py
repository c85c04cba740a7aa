"""Faults of the client: killed at every step, gone without a word, half finished, or wrong in what it sends."""

from __future__ import annotations

from typing import Final

import pytest

from tests.faults.subjects import Fault
from tests.faults.world import World

KERNELS: Final = ("4.19", "7.0", "7.2")
MODES: Final = (False, True)
POINTS: Final = (
    *(("header", moment, 1) for moment in ("before", "sent", "answered")),
    *(("chunk", moment, nth) for moment in ("before", "sent", "answered") for nth in (1, 2, 5)),
    *(("commit", moment, 1) for moment in ("before", "sent", "answered")),
)


@pytest.mark.parametrize("keep", MODES)
@pytest.mark.parametrize(("part", "moment", "nth"), POINTS)
def test_a_client_that_is_killed(world: World, part: str, moment: str, nth: int, keep: bool) -> None:
    guest = world.guest(KERNELS[(nth + keep) % 3])
    plan = world.plan(guest, keep=keep)
    with world.judged(guest, plan, Fault("client", f"{part}.{moment}", "kill", nth)):
        client = world.start_client(plan)
        try:
            assert client.told() is None
        finally:
            client.close()


@pytest.mark.parametrize("keep", MODES)
@pytest.mark.parametrize("end", ["close", "cancel", "deadline"])
@pytest.mark.parametrize("chunks", [0, 1, 3, 5])
def test_a_stream_that_ends_without_commit(world: World, end: str, chunks: int, keep: bool) -> None:
    guest = world.guest(KERNELS[chunks % 3])
    plan = world.plan(guest, keep=keep, end=end, chunks=chunks, seconds=0.5 if end == "deadline" else 60.0)
    with world.judged(guest, plan) as case:
        case.told = world.set_skeys(plan)
    if end == "close":
        assert (case.told.reason, case.told.outcome) == ("STREAM_INCOMPLETE", case.outcome)
    else:
        assert not case.told.outcome
    if end != "deadline" or len(case.told.answers) == chunks + 1:
        assert case.outcome == ("KEPT" if keep else "ROLLED_BACK") if chunks else "UNCHANGED"


@pytest.mark.parametrize("keep", MODES)
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ("checksum", "CHUNK_CHECKSUM_MISMATCH"),
        ("reserved", "KEY_RESERVED_BIT"),
        ("order", "CHUNK_OUT_OF_ORDER"),
        ("size", "CHUNK_SIZE_MISMATCH"),
    ],
)
def test_a_chunk_that_is_wrong_never_reaches_the_kernel(world: World, spoil: str, reason: str, keep: bool) -> None:
    guest = world.guest("7.0" if keep else "4.19")
    plan = world.plan(guest, keep=keep, spoil=spoil)
    with world.judged(guest, plan) as case, world.trace() as ioctls:
        case.told = world.set_skeys(plan)
        # Of the call: the first chunk, and what set the old keys again.
        first = range(*plan.first_chunk)
        assert all(start in first and start + count - 1 in first for kind, start, count in ioctls() if kind == "set")
    assert case.told.reason == reason
    assert case.told.outcome == case.outcome == ("KEPT" if keep else "ROLLED_BACK")


@pytest.mark.parametrize("keep", MODES)
def test_what_is_only_checked_changes_nothing(world: World, keep: bool) -> None:
    guest = world.guest("4.19")
    plan = world.plan(guest, keep=keep, validate_only=True)
    with world.judged(guest, plan) as case, world.trace() as ioctls:
        case.told = world.set_skeys(plan)
        assert not [one for one in ioctls() if one[0] == "set"]
    assert (case.told.outcome, case.outcome) == ("VALIDATED", "UNCHANGED")
