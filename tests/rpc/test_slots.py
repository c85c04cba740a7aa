"""CallSlots: so many calls, and of one VM no more than leave room for others."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from skeyd import limits
from skeyd.errors import Reason, SkeydError
from skeyd.rpc.slots import CallSlots
from skeyd.rpc.status import RETRY_SECONDS, STATUS
from skeyd.worker.service import MAX_CONNECTIONS


def slots(most: int) -> CallSlots:
    return CallSlots(most, "calls", Reason.TOO_MANY_CALLS)


def fill(held: ExitStack, some: CallSlots, sharer: str) -> tuple[int, SkeydError]:
    """Take slots for a sharer until one is refused: how many it got, and the refusal."""
    for got in range(1000):
        try:
            held.enter_context(some.taken(sharer))
        except SkeydError as error:
            return got, error
    raise AssertionError("there is no bound")


def test_one_vm_gets_half_and_each_that_comes_later_half_of_the_rest_until_nothing_is_left() -> None:
    some = slots(64)
    with ExitStack() as held:
        got, refused = fill(held, some, "vms/a")
        assert got == 32
        assert refused.reason is Reason.TOO_MANY_CALLS_ON_VM
        assert refused.metadata == {"vm": "vms/a"}
        assert "vms/a" in refused.message
        assert [fill(held, some, f"vms/{name}")[0] for name in "bcdef"] == [16, 8, 4, 2, 1]
        assert fill(held, some, "vms/g")[0] == 1
        got, refused = fill(held, some, "vms/h")
        assert (got, refused.reason, refused.metadata) == (0, Reason.TOO_MANY_CALLS, {})
    assert fill(ExitStack(), some, "vms/a")[0] == 32, "all came back"


def test_vms_that_fill_up_side_by_side_leave_as_much_as_each_has() -> None:
    some = slots(64)
    with ExitStack() as held:
        refused = 0
        got = dict.fromkeys(("vms/a", "vms/b", "vms/c"), 0)
        while refused < 3:
            refused = 0
            for name in got:
                try:
                    held.enter_context(some.taken(name))
                    got[name] += 1
                except SkeydError:
                    refused += 1
        assert list(got.values()) == [16, 16, 16]
        assert fill(held, some, "vms/d")[0] == 8


def test_who_has_no_name_may_have_all() -> None:
    some = slots(3)
    with some.taken(), some.taken(), some.taken(), pytest.raises(SkeydError) as refused, some.taken():
        pass
    assert refused.value.reason is Reason.TOO_MANY_CALLS
    with some.taken():
        pass


def test_what_is_no_vm_has_a_share_under_another_reason() -> None:
    some = slots(2)
    with (
        some.taken("ListVms", Reason.TOO_MANY_CALLS),
        pytest.raises(SkeydError) as refused,
        some.taken("ListVms", Reason.TOO_MANY_CALLS),
    ):
        pass
    assert (refused.value.reason, refused.value.metadata) == (Reason.TOO_MANY_CALLS, {})
    assert "ListVms" in refused.value.message


def test_a_slot_comes_back_however_a_call_ends() -> None:
    some = slots(2)
    for _ in range(3):
        with pytest.raises(KeyError), some.taken("vms/a"):
            raise KeyError


@pytest.mark.parametrize("reason", [Reason.TOO_MANY_CALLS, Reason.TOO_MANY_CALLS_ON_VM, Reason.TOO_MANY_STREAMS])
def test_refusals_say_when_to_come_again(reason: Reason) -> None:
    assert STATUS[reason].name == "RESOURCE_EXHAUSTED"
    assert RETRY_SECONDS[reason] == 1


def test_six_vms_that_want_all_short_calls_leave_none_as_the_page_on_design_says() -> None:
    some = slots(limits.MAX_SHORT_CALLS)
    with ExitStack() as held:
        assert [fill(held, some, f"vms/{name}")[0] for name in "abcdefg"] == [24, 12, 6, 3, 2, 1, 0]


def test_a_worker_has_connections_for_all_that_one_vm_may_have() -> None:
    streams, short = limits.MAX_KEY_STREAMS // 2, limits.MAX_SHORT_CALLS // 2
    assert streams + short + limits.MAX_LISTS + limits.IDLE_SESSIONS_A_VM < MAX_CONNECTIONS
