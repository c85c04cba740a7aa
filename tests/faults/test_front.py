"""Faults of the front: killed or stopped at every step of a SetSkeys. No VM is harmed, and the next front finds all."""

from __future__ import annotations

import itertools
from typing import Final

import pytest

from tests.faults.subjects import Fault
from tests.faults.world import World

POINTS: Final = (
    "session.status",
    "session.begin",
    "answer.begun",
    "session.write_slice",
    "answer.progress",
    "session.commit",
    "answer.result",
)
CUT_POINTS: Final = ("session.abandon",)
MOMENTS: Final = ("before", "after")
KERNELS: Final = ("4.19", "7.0", "7.2")
SEVERAL: Final = ("session.write_slice", "answer.progress")
"""Points that a call comes by several times."""


def faults(action: str) -> list[Fault]:
    """Order it at every point."""
    return [
        Fault("front", f"{point}.{moment}", action, nth)
        for point in POINTS
        for moment in MOMENTS
        for nth in ((1, 4) if point in SEVERAL else (1,))
    ]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("fault", faults("kill"), ids=str)
def test_a_front_that_is_killed(world: World, fault: Fault, keep: bool) -> None:
    guest = world.guest(KERNELS[(len(fault.point) + fault.nth + keep) % 3])
    first = world.front.pid
    case = world.hurt(guest, world.plan(guest, keep=keep), fault)
    assert world.front.pid != first
    # Only the answer to the Commit can have come before.
    assert not case.told.outcome or (fault.point == "answer.result.after" and case.told.outcome == "APPLIED")
    early = fault.point.startswith(("session.status", "session.begin", "answer.begun")) or (
        fault.point == "session.write_slice.before" and fault.nth == 1
    )
    late = fault.point.startswith(("session.commit.after", "answer.result"))
    assert case.outcome == ("UNCHANGED" if early else "APPLIED" if late else "KEPT" if keep else "ROLLED_BACK")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("end", "chunks"), [("close", 0), ("close", 2), ("close", 5)])
def test_a_front_that_is_killed_while_it_asks_what_became_of_the_keys(
    world: World, moment: str, end: str, chunks: int
) -> None:
    guest = world.guest(KERNELS[chunks % 3])
    plan = world.plan(guest, end=end, chunks=chunks)
    case = world.hurt(guest, plan, Fault("front", f"session.abandon.{moment}", "kill"))
    assert not case.told.outcome
    assert case.outcome == ("ROLLED_BACK" if chunks else "UNCHANGED")


@pytest.mark.parametrize("fault", faults("stop"), ids=str)
def test_a_front_that_stands_still_for_a_while(world: World, fault: Fault) -> None:
    guest = world.guest(KERNELS[len(fault.point) % 3])
    plan = world.plan(guest, keep=fault.nth > 1)
    with world.judged(guest, plan, fault) as case, world.woken(guest, fault):
        case.told = world.set_skeys(plan)
    assert case.told.outcome == case.outcome == "APPLIED"


@pytest.mark.parametrize("point", ["session.begin.before", "session.write_slice.after", "session.commit.before"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_front_that_stands_still_until_its_client_has_given_up(world: World, point: str, keep: bool) -> None:
    guest = world.guest("7.0")
    plan = world.plan(guest, keep=keep, seconds=3.0)
    fault = Fault("front", point, "stop")
    with world.judged(guest, plan, fault) as case:
        case.told = world.set_skeys(plan)
        world.wake(world.front.pid)
    assert not case.told.outcome


@pytest.mark.parametrize(("victim", "then"), [*itertools.permutations(("front", "worker"))])
def test_both_are_killed(world: World, victim: str, then: str) -> None:
    guest = world.guest("7.2")
    points = {"front": "session.write_slice.before", "worker": "set.set.before"}
    order = [Fault(victim, points[victim], "kill", 3), Fault(then, points[then], "kill", 4)]
    plan = world.plan(guest)
    with world.judged(guest, plan, order[0]) as case:
        case.told = world.set_skeys(plan)
        world.kill_worker(guest)
    assert case.outcome == "DEAD"
