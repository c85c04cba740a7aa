"""SetSkeys calls in the worker: all or none, or exactly which frames are neither."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.worker.transactions import Call
from tests.examples import examples
from tests.worker.backends import Recording
from tests.worker.guest import FRAMES, GENERATIONS, KEEP, OLD, ROLL_BACK, Guest


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_call_that_is_abandoned_leaves_every_key_as_it_was_r_and_c_too(kernel: str) -> None:
    guest = Guest(kernel=kernel)
    guest.begin()
    guest.set(0, b"\x90" * 300)
    guest.set(300, b"\xa6" * 300)
    assert guest.read() != OLD
    last = guest.settle()
    assert guest.read() == OLD
    assert last is not None
    assert (last.outcome, last.keys_set, last.dirty) == ("rolled_back", 600, ())


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_call_that_is_committed_stays(kernel: str) -> None:
    guest = Guest(kernel=kernel)
    guest.begin()
    guest.set(0, b"\x90" * 300)
    done = guest.commit()
    assert (done.keys_set, done.crc32, done.enabled, done.end) == (300, zlib.crc32(b"\x90" * 300), False, 300)
    assert guest.settle() == guest.calls.last_write
    assert guest.read() == b"\x90" * 300 + OLD[300:]
    assert guest.calls.last_write is not None
    assert guest.calls.last_write.outcome == "applied"


@given(st.lists(st.tuples(st.integers(0, FRAMES - 1), st.integers(1, 300), st.integers(0, 127)), max_size=8))
@settings(max_examples=examples(60), deadline=None)
def test_any_slices_even_those_that_overlap_are_undone(slices: list[tuple[int, int, int]]) -> None:
    for kernel in GENERATIONS:
        guest = Guest(kernel=kernel)
        guest.begin()
        left = FRAMES  # more keys than that are no call
        for start, count, key in slices:
            count = min(count, FRAMES - start, left)
            left -= count
            if count:
                guest.set(start, bytes([key * 2]) * count)
        guest.settle()
        assert guest.read() == OLD


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_guest_that_used_no_keys_has_zero_keys_afterwards_and_is_said_to_use_some(kernel: str) -> None:
    guest = Guest(kernel=kernel, keyless=True)
    guest.begin()
    guest.set(0, b"\x90" * 300, allow_enable=True)
    guest.set(300, b"\xa0" * 300, allow_enable=True)
    last = guest.settle()
    assert last is not None
    assert (last.outcome, last.enabled) == ("rolled_back", True)
    assert guest.read() == bytes(FRAMES)


@pytest.mark.parametrize(
    ("frames", "keys", "reason"),
    [
        (GfnRange(FRAMES - 1, 2), b"\x10\x10", Reason.GFN_NOT_MAPPED),
        (GfnRange(0, 2), b"\x10\x11", Reason.KEY_RESERVED_BIT),
    ],
)
def test_what_is_refused_beforehand_asks_the_kernel_for_nothing_and_leaves_no_trace(
    frames: GfnRange, keys: bytes, reason: Reason
) -> None:
    backend = Recording((0, 4))
    guest = Guest(backend)
    before = len(backend.sets())
    guest.begin()
    with pytest.raises(SkeydError) as refused:
        guest.calls.set("a", frames, keys, False)
    assert refused.value.reason is reason
    assert guest.settle() is None
    assert len(backend.sets()) == before


def test_keys_are_not_enabled_unless_that_is_allowed_and_nothing_is_undone_then() -> None:
    guest = Guest(keyless=True)
    for call in (ROLL_BACK, KEEP):
        guest.begin(call)
        with pytest.raises(SkeydError) as refused:
            guest.set(0, b"\x10")
        assert refused.value.reason is Reason.SKEYS_NOT_ENABLED
        assert guest.settle() is None
    assert not guest.keys.uses_keys()


@pytest.mark.parametrize(("keys_set", "crc32"), [(299, None), (301, None), (300, 1), (0, 0)])
@pytest.mark.parametrize("call", [ROLL_BACK, Call("job-1", "1" * 64, keep=False), KEEP])
def test_a_commit_of_other_keys_than_were_set_is_refused_and_taken_back(
    call: Call, keys_set: int, crc32: int | None
) -> None:
    guest = Guest()
    guest.begin(call)
    guest.set(0, b"\x90" * 300)
    with pytest.raises(SkeydError, match=f"300 keys with .* were set, not {keys_set}") as refused:
        guest.calls.commit("a", keys_set, zlib.crc32(b"\x90" * 300) if crc32 is None else crc32)
    assert refused.value.reason is Reason.WORKER_FAILED
    # It is over, whatever its owner does next.
    assert not guest.calls.owned_by("a")
    while guest.calls.rolling_back:
        guest.calls.step()
    last = guest.calls.outcome_for("a")
    assert last is not None
    assert (last.outcome, last.keys_set) == ("kept" if call.keep else "rolled_back", 300)
    assert guest.read() == (b"\x90" * 300 + OLD[300:] if call.keep else OLD)
    assert guest.begin(call, "b").state == "begun", "it was not applied"


# --- one at a time -------------------------------------------------------------------------------------------------


def test_while_a_call_runs_or_is_rolled_back_nobody_else_may_set_a_key() -> None:
    guest = Guest()
    guest.begin()
    guest.set(0, b"\x90" * 300)
    for moment in ("runs", "is being rolled back"):
        with pytest.raises(SkeydError, match=moment) as refused:
            guest.begin(owner="b")
        assert refused.value.reason is Reason.VM_BUSY
        with pytest.raises(SkeydError, match=moment):
            guest.calls.require_idle()
        guest.calls.abandon("a")
    assert guest.calls.rolling_back
    guest.settle()
    guest.calls.require_idle()
    assert guest.begin(owner="b").state == "begun"


def test_a_call_is_its_owners_alone() -> None:
    guest = Guest()
    guest.begin()
    guest.set(0, b"\x90")
    assert guest.calls.owned_by("a")
    assert not guest.calls.owned_by("b")
    ways: list[Callable[[], object]] = [
        lambda: guest.set(1, b"\x90", owner="b"),
        lambda: guest.commit("b"),
    ]
    for way in ways:
        with pytest.raises(SkeydError) as refused:
            way()
        assert refused.value.reason is Reason.WORKER_FAILED
    guest.calls.abandon("b")
    assert guest.calls.owned_by("a")
    guest.settle()
    with pytest.raises(SkeydError):
        guest.commit()
    assert not guest.calls.owned_by("a")
