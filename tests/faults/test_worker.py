"""Faults of a worker, and of the kernel below it, at every step of a SetSkeys.

What must be true after each is World.judged's business; here is what happens, and what its client must have been told.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import pytest

from skeyd.v1 import vm_pb2
from tests.faults import nonsense
from tests.faults.calls import DEADLINE
from tests.faults.subjects import Fault, acc_f
from tests.faults.world import World

ERRORS: Final = ("EINTR", "ENOMEM", "EIO", "EFAULT")
MOMENTS: Final = ("before", "after")
TOLD: Final = {"APPLIED", "UNCHANGED", "ROLLED_BACK", "DIRTY", "KEPT"}
MODES: Final = (False, True)
"""ON_INTERRUPT_KEEP or not."""
CUT: Final = ("close", 2)
"""A call that ends without Commit after two chunks, and so is rolled back."""


@dataclass(frozen=True)
class Hurt:
    """One case: a fault in a call."""

    fault: Fault
    keep: bool
    kernel: str
    end: str = "commit"
    chunks: int = 1 << 30

    def __str__(self) -> str:
        mode = "keep" if self.keep else "roll-back"
        return f"{self.fault}-{mode}-{self.kernel}" + ("" if self.end == "commit" else f"-{self.end}")


def over_kernels(faults: Iterable[tuple[Fault, bool]], end: str = "commit", chunks: int = 1 << 30) -> list[Hurt]:
    """Spread faults over the generations of kernels."""
    kernels: Iterator[str] = itertools.cycle(("4.19", "7.0", "7.2"))
    return [Hurt(fault, keep, next(kernels), end, chunks) for fault, keep in faults]


def cases(*hurts: Hurt) -> pytest.MarkDecorator:
    """Make them a test's."""
    return pytest.mark.parametrize("hurt", hurts, ids=str)


def worker(point: str, action: str, nth: int = 1) -> Fault:
    """Order a worker's fault."""
    return Fault("worker", point, action, nth)


def hurt_one(world: World, hurt: Hurt, *, fresh: bool = False) -> tuple[str, str]:
    """Have it happen: what was told, and what was found."""
    guest = world.new_guest(hurt.kernel) if fresh else world.guest(hurt.kernel)
    plan = world.plan(guest, keep=hurt.keep, end=hurt.end, chunks=hurt.chunks)
    case = world.hurt(guest, plan, hurt.fault)
    if fresh and case.outcome != "DEAD":
        world.delete(guest)
    return case.told.outcome, case.outcome


# --- the kernel refuses -------------------------------------------------------------------------------------------


@cases(
    *over_kernels(
        (worker(f"set.{call}.{moment}", f"errno:{error}", nth), keep)
        for call in ("get", "set", "read_back")
        for moment in MOMENTS
        for error in ERRORS
        for nth, keep in ((1, False), (1, True), (6, False), (6, True))
    ),
    *over_kernels(
        (worker("set.set.before", f"half:{error}", nth), keep) for error in ERRORS for nth in (1, 6) for keep in MODES
    ),
)
def test_an_ioctl_of_a_slice_that_is_refused_ends_the_call_and_the_client_knows_how(world: World, hurt: Hurt) -> None:
    told, found = hurt_one(world, hurt)
    assert told == found
    if not hurt.keep:
        assert found == (
            "UNCHANGED" if hurt.fault.point.startswith("set.get") and hurt.fault.nth == 1 else "ROLLED_BACK"
        )


@cases(
    *over_kernels(
        (worker(f"rollback.{call}.{moment}", f"errno:{error}", nth), False)
        for call in ("get", "set", "read_back")
        for moment in MOMENTS
        for error in ERRORS
        for nth in (1, 5)
    ),
    *over_kernels((worker("rollback.set.before", f"half:{error}", 3), False) for error in ERRORS),
)
@pytest.mark.parametrize("end", ["close", "cancel"])
def test_an_ioctl_of_the_rollback_that_is_refused(world: World, hurt: Hurt, end: str) -> None:
    guest = world.guest(hurt.kernel)
    case = world.hurt(guest, world.plan(guest, end=end, chunks=2), hurt.fault)
    # What is refused once is halved, and then taken; but a kernel that says that the VM is dead is asked no more. What
    # was set before that is well.
    _, call, moment = hurt.fault.point.split(".")
    is_dirty = hurt.fault.action.endswith(":EIO") and (call == "get" or (call, moment) == ("set", "before"))
    assert case.outcome == ("DIRTY" if is_dirty else "ROLLED_BACK")
    if end == "close":
        assert case.told.outcome == case.outcome


@cases(
    *over_kernels(
        (worker(point, f"always:errno:{error}"), False)
        for point in ("rollback.set.before", "rollback.read_back.after")
        for error in ("EFAULT", "EINVAL", "EIO")
    )
)
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("end", ["close", "cancel"])
def test_old_keys_that_the_kernel_never_takes_again_are_told_frame_by_frame(
    world: World, hurt: Hurt, end: str, chunks: int
) -> None:
    guest = world.guest(hurt.kernel)
    # More steps than there are slices: each slice is halved down to its frames.
    case = world.hurt(guest, world.plan(guest, end=end, chunks=chunks), hurt.fault)
    # All were set by the time that nobody could read them back; that they are the old ones is seen in the end.
    assert case.outcome == ("ROLLED_BACK" if "read_back" in hurt.fault.point else "DIRTY")
    if end == "close":
        assert case.told.outcome == case.outcome


@cases(
    *(
        Hurt(worker(f"set.{call}.{moment}", action), number % 2 == 0, "4.19")
        for number, (call, moment, action) in enumerate(
            itertools.product(("repair", "read_again"), MOMENTS, (*(f"errno:{error}" for error in ERRORS), "kill"))
        )
    )
)
def test_an_ioctl_that_sets_a_lost_key_again_and_is_refused(world: World, hurt: Hurt) -> None:
    # A guest that was never written to before, where Linux up to 6.19 loses keys.
    told, found = hurt_one(world, hurt, fresh=True)
    assert (told == found and found in ("KEPT", "ROLLED_BACK")) or hurt.fault.action == "kill"


@pytest.mark.parametrize("kernel", ["4.19", "7.0", "7.2"])
@pytest.mark.parametrize("point", ["set.set.before", "rollback.set.before"])
@pytest.mark.parametrize("nth", [1, 4])
def test_a_key_that_the_kernel_loses_is_set_again(world: World, kernel: str, point: str, nth: int) -> None:
    end, chunks = CUT if point.startswith("rollback") else ("commit", 1 << 30)
    told, found = hurt_one(world, Hurt(worker(point, "lose", nth), False, kernel, end, chunks))
    assert told == found == ("ROLLED_BACK" if end == "close" else "APPLIED")


@pytest.mark.parametrize("kernel", ["4.19", "7.0", "7.2"])
def test_nothing_goes_wrong_and_no_key_is_lost(world: World, kernel: str) -> None:
    guest = world.new_guest(kernel)
    plan = world.plan(guest)
    with world.judged(guest, plan) as case:
        case.told = world.set_skeys(plan)
    assert case.outcome == case.told.outcome == "APPLIED"
    world.delete(guest)


# --- a guest that uses no keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["4.19", "7.2"])
@pytest.mark.parametrize(
    "fault",
    [
        *(worker(f"set.get.{moment}", "errno:ENOMEM") for moment in MOMENTS),
        *(worker(f"set.set.{moment}", "errno:EINTR") for moment in MOMENTS),
        worker("set.set.before", "half:EFAULT", 2),
        worker("set.read_back.before", "errno:ENOMEM", 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("keep", MODES)
def test_a_guest_that_used_no_keys_uses_some_only_if_it_was_allowed_and_is_said_to(
    world: World, kernel: str, fault: Fault, keep: bool
) -> None:
    guest = world.new_guest(kernel, keyless=True)
    case = world.hurt(guest, world.plan(guest, allow_enable=True, keep=keep), fault)
    assert case.told.outcome == case.outcome
    world.delete(guest)


@pytest.mark.parametrize("end", ["commit", "close", "cancel"])
@pytest.mark.parametrize("keep", MODES)
def test_a_guest_that_uses_no_keys_uses_none_afterwards_where_it_was_not_allowed(
    world: World, end: str, keep: bool
) -> None:
    guest = world.new_guest("4.19", keyless=True)
    plan = world.plan(guest, end=end, keep=keep)
    with world.trace() as ioctls:
        with world.judged(guest, plan) as case:
            case.told = world.set_skeys(plan)
        assert case.told.reason == "SKEYS_NOT_ENABLED"
        assert not [one for one in ioctls() if one[0] == "set"]
    world.require_keys(guest, None)
    world.delete(guest)


# --- the journal ---------------------------------------------------------------------------------------------------


@cases(
    *over_kernels(
        (worker("set.write.before", f"errno:{error}", nth), False)
        for error in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "ENOMEM")
        for nth in (1, 3)
    )
)
def test_old_keys_that_cant_be_kept_refuse_the_slice(world: World, hurt: Hurt) -> None:
    assert hurt_one(world, hurt) == ("ROLLED_BACK", "ROLLED_BACK")


@pytest.mark.parametrize("nth", [1, 3])
def test_old_keys_that_are_written_in_two_parts_are_whole(world: World, nth: int) -> None:
    hurt = Hurt(worker("set.write.before", "half", nth), False, "7.2", *CUT)
    assert hurt_one(world, hurt) == ("ROLLED_BACK", "ROLLED_BACK")


@cases(
    *over_kernels(
        (
            (worker("rollback.read.before", action, nth), False)
            for action in ("errno:EIO", "damage", "cut")
            for nth in (1, 2, 6)
        ),
        *CUT,
    )
)
def test_old_keys_that_are_damaged_are_never_set(world: World, hurt: Hurt) -> None:
    assert hurt_one(world, hurt) == ("DIRTY", "DIRTY")


# --- what was read ahead ----------------------------------------------------------------------------------------


DIGESTS: Final = (("expected", False), ("expected", True), ("resulting", False))
"""Which digest, and ON_INTERRUPT_KEEP or not; that and what is to result exclude each other."""


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(("digest", "keep"), DIGESTS)
def test_answers_to_what_was_read_ahead_are_not_taken_for_others(
    world: World, digest: str, keep: bool, error: str
) -> None:
    guest = world.guest("7.2")
    # Two looks whether the guest uses keys, then eleven slices, of which several are asked for at once.
    case = world.hurt(
        guest, world.plan(guest, keep=keep, digest=digest), worker("other.get.before", f"errno:{error}", 5)
    )
    assert case.told.outcome == case.outcome
    assert case.outcome == ("UNCHANGED" if digest == "expected" else "ROLLED_BACK")


@pytest.mark.parametrize(("digest", "keep"), DIGESTS)
def test_keys_that_have_another_digest(world: World, digest: str, keep: bool) -> None:
    guest = world.guest("7.0")
    plan = world.plan(guest, keep=keep, digest=digest)
    with world.judged(guest, plan) as case:
        case.told = world.set_skeys(plan)
    assert case.told.reason == {"expected": "EXPECTED_DIGEST_MISMATCH", "resulting": "RESULT_DIGEST_MISMATCH"}[digest]
    assert case.told.outcome == case.outcome
    assert case.outcome == ("UNCHANGED" if digest == "expected" else "ROLLED_BACK")


# --- the worker is killed -----------------------------------------------------------------------------------------


@cases(
    *over_kernels(
        (worker(f"{point}.{moment}", "kill", nth), keep)
        for number, (point, moment) in enumerate(
            itertools.product(
                (
                    *("begin", "set.get", "set.set", "set.read_back", "commit"),
                    *(f"answer.{op}" for op in ("hello", "status", "begin", "attach", "set", "commit")),
                ),
                MOMENTS,
            )
        )
        for nth in ((1, 9) if point.startswith("set.") or point == "answer.set" else (1,))
        for keep in ((number + nth) % 2 == 0,)
    ),
    *over_kernels(
        (worker(f"set.{point}.{moment}", "kill", nth), False)
        for point in ("push", "write")
        for moment in MOMENTS
        for nth in (1, 3)
    ),
    *over_kernels(
        (
            (worker(f"{point}.{moment}", "kill", nth), False)
            for point in (
                *("abandon", "step", "answer.abandon"),
                *(f"rollback.{call}" for call in ("pop", "read", "get", "set", "read_back")),
            )
            for moment in MOMENTS
            for nth in ((1,) if point == "abandon" else (2,))
        ),
        *CUT,
    ),
)
def test_a_worker_that_is_killed_is_dead_and_nobody_is_told_otherwise(world: World, hurt: Hurt) -> None:
    told, found = hurt_one(world, hurt)
    assert found == "DEAD"
    point = hurt.fault.point
    late = point in ("answer.commit.after", "answer.abandon.after")
    early = point.startswith(("begin.", "answer.begin.before", "answer.status", "answer.hello"))
    assert told in ("", "UNKNOWN") or (early and told == "UNCHANGED") or (late and told in TOLD)


# --- the worker stands still --------------------------------------------------------------------------------------

STANDSTILLS: Final = (
    "begin.before",
    "set.set.before",
    "set.set.after",
    "answer.set.before",
    "answer.set.after",
    "commit.before",
    "commit.after",
    "answer.commit.before",
)


@cases(*over_kernels((worker(point, "stop"), number % 2 == 0) for number, point in enumerate(STANDSTILLS)))
def test_a_worker_that_stands_still_for_a_while_is_waited_for(world: World, hurt: Hurt) -> None:
    guest = world.guest(hurt.kernel)
    plan = world.plan(guest, keep=hurt.keep)
    with world.judged(guest, plan, hurt.fault) as case, world.woken(guest, hurt.fault):
        case.told = world.set_skeys(plan)
    assert case.told.outcome == case.outcome == "APPLIED"


@cases(*over_kernels((worker(point, "stop"), keep) for point in STANDSTILLS for keep in MODES))
def test_a_worker_that_stands_still_for_too_long_is_given_up_and_does_what_is_to_be_done_when_it_goes_on(
    world: World, hurt: Hurt
) -> None:
    guest = world.guest(hurt.kernel)
    plan = world.plan(guest, keep=hurt.keep)
    with world.judged(guest, plan, hurt.fault) as case:
        with world.patience(0.4):
            case.told = world.set_skeys(plan)
        os.kill(guest.worker_pid, signal.SIGCONT)
    # Nobody knows yet what it does when it goes on, and so nobody says so. It was asked to set nothing before it began.
    assert case.told.outcome == ("UNCHANGED" if hurt.fault.point == "begin.before" else "UNKNOWN")


@pytest.mark.parametrize("keep", MODES)
@pytest.mark.parametrize("point", ["set.set.before", "set.set.after", "answer.set.before", "commit.before"])
def test_an_answer_that_comes_late_is_not_taken_for_that_to_another_question(
    world: World, point: str, keep: bool
) -> None:
    guest = world.guest("7.2")
    plan = world.plan(guest, keep=keep)
    stop = worker(point, "stop", 1)
    # It goes on just when the front, which has waited for long enough, asks what became of the keys.
    wake = Fault("front", "session.abandon.before", f"wake:{guest.worker_pid}")
    with world.judged(guest, plan, stop, wake) as case, world.patience(0.4):
        case.told = world.set_skeys(plan)
    assert case.told.outcome == "UNKNOWN"


# --- the worker talks nonsense ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", MODES)
@pytest.mark.parametrize(
    ("op", "said"),
    [
        (op, said)
        for op in ("hello", "status", "attach", "begin", "set", "commit", "abandon")
        for said in (*nonsense.PACKETS, "twice", "descriptor", "end", "nothing")
        # A second answer to "set" is no nonsense but a lie about the next slice.
        if (op, said) != ("set", "twice")
    ],
)
def test_a_worker_that_answers_nonsense_is_not_believed(world: World, said: str, op: str, keep: bool) -> None:
    kernels = ("4.19", "7.0", "7.2")
    guest = world.guest(kernels[(len(said) + len(op) + keep) % 3])
    end, chunks = CUT if op == "abandon" else ("commit", 1 << 30)
    plan = world.plan(guest, keep=keep, end=end, chunks=chunks)
    fault = worker(f"answer.{op}.before", f"say:{said}")
    with world.patience(0.4 if said == "nothing" else 30):
        case = world.hurt(guest, plan, fault)
    assert case.told.outcome in ("", "UNKNOWN", case.outcome)


@pytest.mark.parametrize("keep", MODES)
def test_a_worker_that_lies_about_a_slice_ends_in_nobody_knowing(world: World, keep: bool) -> None:
    """Each slice has the answer of the one before it from then on, and Commit that of the last slice."""
    guest = world.new_guest("7.2")
    fault = worker("answer.set.before", "say:twice")
    world.arm(guest, fault)
    plan = world.plan(guest, keep=keep)
    told = world.set_skeys(plan)
    assert world.fired(guest, fault)
    assert (told.outcome, told.reason) == ("UNKNOWN", "WORKER_FAILED")
    # The front writes the next slice where the worker may still read this one. Nobody is told that this was applied,
    # unless all keys are there.
    end = time.monotonic() + DEADLINE
    unsettled = (vm_pb2.WRITE_OUTCOME_UNSPECIFIED, vm_pb2.WRITE_OUTCOME_ROLLING_BACK)
    while (last := world.look(guest).last_write).request_id != plan.request_id or last.outcome in unsettled:
        assert time.monotonic() < end
    if last.outcome == vm_pb2.WRITE_OUTCOME_APPLIED:
        now = world.read(guest)
        assert now is not None
        assert acc_f(bytes(now[gfn] for gfn in plan.frames())) == acc_f(plan.keys)
    world.delete(guest)


# --- a front that is gone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", MODES)
def test_a_call_ends_with_its_connection_before_anybody_is_heard_who_comes_after(world: World, keep: bool) -> None:
    guest = world.guest("7.0")
    begin = {"op": "begin", "request_id": "", "fingerprint": "0" * 64, "keep": keep, "resume": False}
    with world.talk(guest) as front:
        assert "ok" in front.ask(**begin)
        front.attached()[:64] = b"\xf8" * 64
        assert "ok" in front.ask(op="set", buffer=0, offset=0, start=0, count=64, allow_enable=False)
    with world.talk(guest) as next_front:
        answer = next_front.ask(**begin)
        assert "ok" in answer or "is being rolled back" in answer["error"]["message"], answer
    plan = world.plan(guest)
    if keep:
        world.restore(guest)
    with world.judged(guest, plan) as case:
        case.told = world.set_skeys(plan)
    assert case.outcome == "APPLIED"
