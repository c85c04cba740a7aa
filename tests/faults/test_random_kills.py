"""Front, worker or client killed at any moment of a call, however it is made; then all that must be true is.

SKEYD_KILLS says how many; `make soak` has 10,000. A batch's number is its seed: the same number does the same, as far
as the moments of a running machine are the same.
"""

from __future__ import annotations

import os
import random
import time
from typing import Final

import pytest

from tests.faults.calls import Plan, Told
from tests.faults.world import World

KILLS: Final = int(os.environ.get("SKEYD_KILLS", "500"))
BATCH: Final = 25
VICTIMS: Final = ("front", "worker", "client", "front", "client")
"""A worker that is killed leaves nothing to judge but that it is dead; so the others come more often."""


@pytest.fixture(scope="module")
def whole_call(world: World) -> float:
    """Measure how long a call takes from a client's start to its end, in seconds."""
    guest = world.guest(world.kernels[-1])
    took = []
    for _ in range(5):
        plan = world.plan(guest)
        with world.judged(guest, plan) as case:
            began = time.monotonic()
            client = world.start_client(plan)
            try:
                told = client.told()
            finally:
                client.close()
            assert told is not None
            case.told = told
            took.append(time.monotonic() - began)
    return sorted(took)[2]


def some_plan(world: World, rng: random.Random, name: str) -> Plan:
    """Plan a call of any kind."""
    guest = world.guest(name)
    end = rng.choice(("commit", "commit", "commit", "close", "cancel"))
    return world.plan(
        guest,
        keep=rng.random() < 0.5,
        end=end,
        chunks=1 << 30 if end == "commit" else rng.randrange(6),
        spoil=rng.choice(("", "", "", "", "checksum", "order")),
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("batch", range(-(-KILLS // BATCH)))
def test_whoever_is_killed_whenever_it_is(world: World, whole_call: float, batch: int) -> None:
    rng = random.Random(batch)  # noqa: S311  no secret
    for number in range(min(BATCH, KILLS - batch * BATCH)):
        kernel = rng.choice(world.kernels)
        guest = world.guest(kernel)
        plan = some_plan(world, rng, kernel)
        victim, moment = rng.choice(VICTIMS), rng.random() * whole_call * 1.1
        try:
            with world.judged(guest, plan) as case:
                client = world.start_client(plan)
                try:
                    case.told = client.told(moment) or Told("")
                    match victim:
                        case "front":
                            world.kill_front()
                        case "worker":
                            world.kill_worker(guest)
                        case _:
                            client.kill()
                    if not case.told.code:
                        # It may have been told just before; whoever was killed was not it, or it says nothing.
                        case.told = client.told() or Told("")
                finally:
                    client.close()
        except BaseException as error:
            error.add_note(f"kill {number} of batch {batch}: {victim} after {moment:.4f} s of {plan}")
            raise
