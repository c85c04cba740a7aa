"""SetSkeys calls that go on where they were cut, and those that are made twice."""

from __future__ import annotations

import errno
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.kvm.errors import KvmError
from skeyd.worker import transactions
from skeyd.worker.outcomes import Begun, LastWrite
from skeyd.worker.transactions import REMEMBERED, Call
from tests.worker.backends import Recording
from tests.worker.guest import KEEP, OLD, ROLL_BACK, Guest, Stubborn

# --- keep, and go on -----------------------------------------------------------------------------------------------


def test_a_call_that_keeps_has_no_old_keys_and_leaves_the_new_ones() -> None:
    backend = Recording((0, 4))
    guest = Guest(backend)
    guest.begin(KEEP)
    before = len(backend.calls)
    guest.set(0, b"\x90" * 100)
    # A look whether there are keys, the SET and its read-back: nothing is read to be kept.
    assert [call for call, _ in backend.calls[before:]] == ["get", "prepare", "set", "get"]
    assert backend.calls[before][1].count == 1
    last = guest.settle()
    assert last == LastWrite("kept", "job-1", 100, zlib.crc32(b"\x90" * 100), False, 100)
    assert guest.read() == b"\x90" * 100 + OLD[100:]


def test_a_call_that_was_kept_goes_on_where_it_was() -> None:
    guest = Guest()
    guest.begin(KEEP)
    guest.set(0, b"\x90" * 100)
    guest.settle()
    begun = guest.begin(KEEP, owner="b", resume=True)
    assert begun == Begun("resumed", 100, 0, zlib.crc32(b"\x90" * 100), False)
    guest.set(100, b"\xa0" * 50, owner="b")
    guest.settle("b")
    assert guest.begin(KEEP, owner="c", resume=True).keys_set == 150
    guest.set(150, b"\xb0" * 10, owner="c")
    done = guest.commit("c")
    assert (done.keys_set, done.crc32) == (160, zlib.crc32(b"\x90" * 100 + b"\xa0" * 50 + b"\xb0" * 10))
    assert guest.read()[:160] == b"\x90" * 100 + b"\xa0" * 50 + b"\xb0" * 10


@pytest.mark.parametrize("error", [KvmError("KVM_S390_SET_SKEYS", errno.EFAULT), ZeroDivisionError()])
def test_a_kept_call_names_the_frames_that_the_kernel_stopped_in_the_middle_of(error: Exception) -> None:
    class Stopping(Stubborn):
        stops = False

        def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
            if self.stops:
                super().set_skeys(start_gfn, buffer[: len(buffer) // 2])
                raise error
            super().set_skeys(start_gfn, buffer)

    backend = Stopping()
    guest = Guest(backend)
    guest.begin(KEEP)
    guest.set(0, b"\x90" * 100)
    backend.stops = True
    with pytest.raises((SkeydError, ZeroDivisionError)):
        guest.set(100, b"\xa0" * 100)
    last = guest.settle()
    assert last is not None
    assert (last.outcome, last.keys_set, last.end, last.dirty) == ("kept", 100, 100, (GfnRange(100, 100),))
    # Until they are set: a call that goes on and is cut again leaves what it didn't come to.
    backend.stops = False
    for set_, left in ((0, (GfnRange(100, 100),)), (30, (GfnRange(130, 70),)), (10, (GfnRange(140, 60),))):
        begun = guest.begin(KEEP, resume=True)
        if set_:
            guest.set(begun.keys_set, b"\xa0" * set_)
        last = guest.settle()
        assert last is not None
        assert (last.outcome, last.dirty) == ("kept", left)
    guest.begin(KEEP, resume=True)
    guest.set(140, b"\xa0" * 100)
    last = guest.settle()
    assert last is not None
    assert (last.outcome, last.keys_set, last.dirty) == ("kept", 240, ())
    guest.begin(KEEP, resume=True)
    assert guest.commit().keys_set == 240


@pytest.mark.parametrize("keep", [False, True])
def test_a_slice_that_the_kernel_stopped_in_the_middle_of_is_never_committed(keep: bool) -> None:
    backend = Stubborn()
    guest = Guest(backend)
    guest.begin(KEEP if keep else ROLL_BACK)
    guest.set(0, b"\x90" * 100)
    backend.bad = {150}
    with pytest.raises(SkeydError):
        guest.set(100, b"\xa0" * 100)
    with pytest.raises(SkeydError, match="nobody knows the keys of 0x64-0xc7"):
        guest.commit()
    backend.bad = set()
    last = guest.settle()
    assert last is not None
    assert last.outcome == ("kept" if keep else "rolled_back")
    assert last.dirty == ((GfnRange(100, 100),) if keep else ())


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), max_size=5),
    st.tuples(st.integers(0, 40), st.integers(1, 20)),
)
def test_what_is_left_of_ranges_without_one(ranges: list[tuple[int, int]], gone: tuple[int, int]) -> None:
    left = transactions._without([GfnRange(*one) for one in ranges], GfnRange(*gone))
    taken = set(range(gone[0], sum(gone)))
    wanted = [gfn for start, count in ranges for gfn in range(start, start + count) if gfn not in taken]
    assert [gfn for one in left for gfn in range(one.start, one.end)] == wanted


def test_a_call_that_is_resumed_cant_be_one_that_rolls_back() -> None:
    guest = Guest()
    guest.begin(KEEP)
    guest.set(0, b"\x90" * 100)
    guest.settle()
    with pytest.raises(SkeydError, match="can't be rolled back") as refused:
        guest.begin(Call("job-1", "1" * 64, keep=False), resume=True)
    assert refused.value.reason is Reason.REQUEST_INVALID
    guest.calls.require_idle()
    assert guest.begin(KEEP, resume=True).keys_set == 100


def test_a_call_that_goes_on_and_is_cut_before_it_sets_anything_can_go_on_again() -> None:
    guest = Guest()
    guest.begin(KEEP)
    guest.set(0, b"\x90" * 100)
    guest.settle()
    guest.begin(KEEP, resume=True)
    guest.settle()
    assert guest.begin(KEEP, resume=True).keys_set == 100


def _another_call(guest: Guest) -> None:
    guest.begin(Call("other", "2" * 64, keep=True))
    guest.set(0, b"\x20")
    guest.commit()


def _one_key(guest: Guest) -> None:
    guest.calls.forget_kept()


def _its_own_end(guest: Guest) -> None:
    guest.begin(KEEP, resume=True)
    guest.commit()


@pytest.mark.parametrize("between", [_another_call, _one_key])
def test_after_somebody_else_has_set_a_key_a_call_does_not_go_on(between: Callable[[Guest], None]) -> None:
    guest = Guest()
    guest.begin(KEEP)
    guest.set(0, b"\x90" * 100)
    guest.settle()
    between(guest)
    with pytest.raises(SkeydError) as refused:
        guest.begin(KEEP, resume=True)
    assert refused.value.reason is Reason.NOTHING_TO_RESUME
    guest.calls.require_idle()


@pytest.mark.parametrize("call", [Call("job-2", "1" * 64, keep=True), Call("", "1" * 64, keep=True)])
def test_only_the_call_that_was_kept_goes_on(call: Call) -> None:
    guest = Guest()
    for _ in range(2):
        with pytest.raises(SkeydError) as refused:
            guest.begin(call, resume=True)
        assert refused.value.reason is Reason.NOTHING_TO_RESUME
        guest.begin(KEEP)
        guest.set(0, b"\x90" * 100)
        guest.settle()
    with pytest.raises(SkeydError) as refused:
        guest.begin(Call("job-1", "3" * 64, keep=True), resume=True)
    assert refused.value.reason is Reason.REQUEST_ID_REUSED


# --- the same request twice ----------------------------------------------------------------------------------------


def test_a_request_that_was_applied_is_answered_alike_and_not_applied_again() -> None:
    guest = Guest()
    call = Call("id", "5" * 64, keep=False)
    guest.begin(call)
    guest.set(0, b"\x90" * 100)
    guest.commit()
    _another_call(guest)
    for owner in ("b", "c"):
        assert guest.begin(call, owner) == Begun("applied", 100, 0, zlib.crc32(b"\x90" * 100), False)
        assert not guest.calls.owned_by(owner)
    # Also while another call runs: nothing is changed by it.
    guest.begin(owner="d")
    assert guest.begin(call, "b").state == "applied"
    assert guest.read()[0] == 0x20


def test_a_request_id_stands_for_one_request() -> None:
    guest = Guest()
    guest.begin(Call("id", "5" * 64, keep=False))
    guest.commit()
    with pytest.raises(SkeydError) as refused:
        guest.begin(Call("id", "6" * 64, keep=False))
    assert refused.value.reason is Reason.REQUEST_ID_REUSED


def test_it_can_be_asked_whether_a_request_id_is_that_of_another() -> None:
    guest = Guest()
    guest.begin(Call("id", "5" * 64, keep=False))
    guest.calls.require_unused("id", "6" * 64)
    guest.commit()
    guest.calls.require_unused("id", "5" * 64)
    guest.calls.require_unused("", "6" * 64)
    with pytest.raises(SkeydError, match="'id'") as refused:
        guest.calls.require_unused("id", "6" * 64)
    assert refused.value.reason is Reason.REQUEST_ID_REUSED
    assert guest.begin(owner="b").state == "begun", "nothing was begun by asking"


def test_a_request_that_was_rolled_back_may_be_sent_again() -> None:
    guest = Guest()
    call = Call("id", "5" * 64, keep=False)
    guest.begin(call)
    guest.set(0, b"\x90" * 100)
    guest.settle()
    assert guest.begin(call).state == "begun"
    guest.set(0, b"\x90" * 100)
    guest.commit()
    assert guest.begin(call).state == "applied"


def test_the_last_requests_are_remembered_and_those_before_are_not() -> None:
    guest = Guest()
    for number in range(REMEMBERED + 1):
        guest.begin(Call(str(number), "5" * 64, keep=False))
        guest.commit()
    assert guest.begin(Call("1", "5" * 64, keep=False)).state == "applied"
    assert guest.begin(Call("0", "5" * 64, keep=False)).state == "begun"


def test_a_call_without_an_id_is_never_taken_for_another() -> None:
    guest = Guest()
    for _ in range(2):
        assert guest.begin().state == "begun"
        guest.set(0, b"\x90")
        guest.commit()
