"""SetSkeys calls in the worker: all or none, or exactly which frames are neither."""

from __future__ import annotations

import errno
import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.kvm.errors import KvmError
from skeyd.worker import transactions
from skeyd.worker.backend import Backend
from skeyd.worker.journal import Journal
from skeyd.worker.keys import Keys
from skeyd.worker.outcomes import DIRTY_RANGES, Begun, LastWrite
from skeyd.worker.transactions import REMEMBERED, Call, Done, Transactions
from tests.examples import examples
from tests.worker.backends import Recording

FRAMES = 1024
"""Of the VM that most tests have: one slot of 4 MiB."""
WHOLE = GfnRange(0, FRAMES)
OLD = bytes(random.Random(1).choices(b"\x00\x16\x38\x52\xf4", k=FRAMES))  # noqa: S311  no secret
GENERATIONS = ("4.19", "7.0", "7.2")
ROLL_BACK = Call("", "0" * 64, keep=False)
KEEP = Call("job-1", "1" * 64, keep=True)


def no_file() -> int:
    raise AssertionError("a file was asked for")


class Guest:
    """A VM, its keys, and the calls on it."""

    def __init__(self, backend: Backend | None = None, *, kernel: str = "7.2", keyless: bool = False) -> None:
        self.backend = backend or Recording((0, 4), kernel=kernel)
        self.keys = Keys(self.backend)
        self.calls = Transactions(self.keys, no_file)
        if not keyless:
            self.keys.write(WHOLE, OLD, allow_enable=True)

    def read(self, frames: GfnRange = WHOLE) -> bytes:
        """Read keys, past everything that is tested."""
        found = bytearray(frames.count)
        assert self.backend.get_skeys(frames.start, memoryview(found))
        return bytes(found)

    def begin(self, call: Call = ROLL_BACK, owner: object = "a", *, resume: bool = False) -> Begun:
        """Begin a call."""
        return self.calls.begin(owner, call, resume)

    def set(self, start: int, keys: bytes, owner: object = "a", *, allow_enable: bool = False) -> None:
        """Set a slice."""
        self.calls.set(owner, GfnRange(start, len(keys)), keys, allow_enable)

    def commit(self, owner: object = "a") -> Done:
        """Commit what was set, whatever it was."""
        current = self.calls._open
        done = current.done if current is not None else Done()
        return self.calls.commit(owner, done.keys_set, done.crc32)

    def settle(self, owner: object = "a") -> LastWrite | None:
        """End the call without a commit, and do all that is then to be done."""
        self.calls.abandon(owner)
        steps = 0
        while self.calls.rolling_back:
            self.calls.step()
            steps += 1
            assert steps < 10_000
        return self.calls.outcome()


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
        for start, count, key in slices:
            guest.set(start, bytes([key * 2]) * min(count, FRAMES - start))
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


# --- what the kernel refuses ---------------------------------------------------------------------------------------


class Stubborn(Recording):
    """Refuses SETs of chosen frames, as an old kernel does: those before the bad one are set."""

    def __init__(self, kernel: str = "4.19") -> None:
        super().__init__((0, 4), kernel=kernel)
        self.bad: set[int] = set()
        self.errno = errno.EFAULT
        self.blind: set[int] = set()
        """Frames that can't be read either."""

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
        """Set the keys up to the first bad frame."""
        for index in range(buffer.nbytes):
            if start_gfn + index in self.bad:
                if index:
                    super().set_skeys(start_gfn, buffer[:index])
                raise KvmError("KVM_S390_SET_SKEYS", self.errno)
        super().set_skeys(start_gfn, buffer)

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """Read the keys, or none."""
        if self.blind & set(range(start_gfn, start_gfn + buffer.nbytes)):
            raise KvmError("KVM_S390_GET_SKEYS", errno.EFAULT)
        return super().get_skeys(start_gfn, buffer)


def test_a_slice_that_the_kernel_stops_in_the_middle_of_is_undone_too() -> None:
    backend = Stubborn()
    guest = Guest(backend)
    guest.begin()
    guest.set(0, b"\x90" * 100)
    backend.bad = {150}
    with pytest.raises(SkeydError) as refused:
        guest.set(100, b"\xa0" * 100)
    assert refused.value.metadata["uncertain"] == "0x64-0xc7"
    assert guest.read()[100:150] == b"\xa0" * 50
    backend.bad = set()
    last = guest.settle()
    assert last is not None
    assert (last.outcome, last.keys_set) == ("rolled_back", 100)
    assert guest.read() == OLD


@pytest.mark.parametrize("bad", [{0}, {150}, {FRAMES - 1}, {5, 6, 7, 600}, set(range(256, 512))])
def test_frames_that_the_kernel_keeps_from_their_old_keys_are_named_and_all_others_have_them(bad: set[int]) -> None:
    backend = Stubborn()
    guest = Guest(backend)
    guest.begin()
    new = bytes((key ^ 0x40) & 0xF8 for key in OLD)
    guest.set(0, new)
    backend.bad = bad
    last = guest.settle()
    assert last is not None
    assert last.outcome == "dirty"
    dirty = {gfn for one in last.dirty for gfn in range(one.start, one.end)}
    found = guest.read()
    # Exactly those: every other frame has its old key, and each of those hasn't.
    assert {gfn for gfn in range(FRAMES) if found[gfn] != OLD[gfn]} == dirty == bad


def test_frames_that_can_neither_be_set_nor_read_are_dirty() -> None:
    backend = Stubborn()
    guest = Guest(backend)
    guest.begin()
    guest.set(0, b"\x90" * 300)
    backend.bad, backend.blind = {10}, {10}
    last = guest.settle()
    assert last is not None
    assert last.dirty == (GfnRange(10, 1),)
    backend.blind = set()
    assert guest.read()[:10] + guest.read()[11:] == OLD[:10] + OLD[11:]


def test_a_first_frame_that_cant_be_read_keeps_no_other_from_its_old_key() -> None:
    backend = Stubborn()
    guest = Guest(backend)
    guest.begin()
    guest.set(300, b"\x90" * 300)
    backend.bad, backend.blind = {0}, {0}
    last = guest.settle()
    assert last is not None
    assert (last.outcome, last.dirty) == ("rolled_back", ())
    backend.blind = set()
    assert guest.read() == OLD


def test_where_the_kernel_refuses_everything_it_is_not_asked_for_each_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "REFUSALS", 20)
    backend = Stubborn("7.2")
    guest = Guest(backend)
    guest.begin()
    guest.set(0, b"\x90" * FRAMES)
    backend.bad = set(range(FRAMES))
    asked = len(backend.calls)
    last = guest.settle()
    assert last is not None
    assert last.dirty == (WHOLE,)
    assert len(backend.calls) - asked < 200


def test_a_vm_that_the_kernel_declared_dead_is_asked_once_a_slice() -> None:
    backend = Stubborn()
    guest = Guest(backend)
    guest.begin()
    guest.set(0, b"\x90" * FRAMES)
    backend.bad, backend.errno = set(range(FRAMES)), errno.EIO
    asked = len(backend.calls)
    last = guest.settle()
    assert last is not None
    assert last.outcome == "dirty"
    assert len(backend.calls) - asked <= 4


def test_a_failed_set_that_enabled_keys_says_so_and_is_rolled_back_to_zero_keys() -> None:
    backend = Stubborn()
    guest = Guest(backend, keyless=True)
    guest.begin()
    backend.bad = {20}
    with pytest.raises(SkeydError) as refused:
        guest.set(0, b"\x90" * 100, allow_enable=True)
    assert refused.value.metadata["enabled"] == "true"
    backend.bad = set()
    last = guest.settle()
    assert last is not None
    assert (last.outcome, last.enabled) == ("rolled_back", True)
    assert guest.read() == bytes(FRAMES)


def test_a_failed_set_that_enabled_nothing_left_nothing_to_undo() -> None:
    backend = Stubborn()
    guest = Guest(backend, keyless=True)
    guest.begin()
    backend.bad = {0}
    with pytest.raises(SkeydError):
        guest.set(0, b"\x90" * 100, allow_enable=True)
    last = guest.settle()
    assert last is not None
    assert (last.outcome, last.enabled) == ("rolled_back", False)
    assert not guest.keys.uses_keys()


def test_dirty_ranges_are_bounded_and_the_last_reaches_to_the_last_dirty_frame() -> None:
    many = [GfnRange(gfn, 1) for gfn in range(0, 4 * DIRTY_RANGES, 2)]
    random.Random(2).shuffle(many)  # noqa: S311  no secret
    joined = transactions._joined(many)
    assert len(joined) == DIRTY_RANGES
    assert joined[:-1] == [GfnRange(gfn, 1) for gfn in range(0, 2 * DIRTY_RANGES - 2, 2)]
    assert joined[-1].end == 4 * DIRTY_RANGES - 1
    assert transactions._joined([GfnRange(4, 2), GfnRange(0, 4), GfnRange(1, 2)]) == [GfnRange(0, 6)]


# --- the journal ---------------------------------------------------------------------------------------------------


def test_old_keys_that_cant_be_kept_refuse_the_slice_before_the_kernel_is_asked() -> None:
    def full() -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    backend = Recording((0, 512))
    keys = Keys(backend)
    size = 1 << 16
    old = random.Random(3).randbytes(size).translate(bytes(byte & 0xFE for byte in range(256)))  # noqa: S311  no secret
    for at in range(0, 2 * size, size):
        keys.write(GfnRange(at, size), old, allow_enable=True)
    calls = Transactions(keys, full)
    calls.begin("a", ROLL_BACK, False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("skeyd.worker.journal.MEMORY_BYTES", size + size // 2)
        calls.set("a", GfnRange(0, size), b"\x90" * size, False)
        before = len(backend.sets())
        with pytest.raises(SkeydError) as refused:
            calls.set("a", GfnRange(size, size), b"\x90" * size, False)
        assert refused.value.reason is Reason.HOST_EXHAUSTED
        assert len(backend.sets()) == before
    calls.abandon("a")
    while calls.rolling_back:
        calls.step()
    assert calls.last_write is not None
    assert calls.last_write.outcome == "rolled_back"
    found = bytearray(2 * size)
    backend.get_skeys(0, memoryview(found))
    assert found == old + old


def test_old_keys_that_are_damaged_are_dirty_frames_and_all_others_are_set_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("skeyd.worker.journal.JOINED_KEYS", 1)
    guest = Guest()
    guest.begin()
    for start in (0, 100, 300, 400):
        guest.set(start, b"\x90" * 100)
    journal = guest.calls._open.journal if guest.calls._open else None
    assert journal is not None
    # The first byte of the second record, and of the last.
    records = [journal._records[at : at + 5] for at in range(0, len(journal._records), 5)]
    for _, at, _, _, _ in (records[1], records[3]):
        journal._memory[at + 8] ^= 0x10
    last = guest.settle()
    assert last is not None
    assert (last.outcome, last.dirty) == ("dirty", (GfnRange(100, 100), GfnRange(400, 100)))
    assert guest.read() == OLD[:100] + b"\x90" * 100 + OLD[200:400] + b"\x90" * 100 + OLD[500:]


def test_old_keys_that_are_lost_are_dirty_frames_and_never_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest()
    guest.begin()
    guest.set(0, b"\x90" * 100)
    guest.set(100, b"\x90" * 100)
    guest.set(300, b"\x90" * 100)
    guest.calls.abandon("a")
    guest.calls.step()

    def broken(_: Journal) -> None:
        raise MemoryError

    monkeypatch.setattr(Journal, "pop", broken)
    with pytest.raises(MemoryError):
        guest.calls.step()
    assert not guest.calls.rolling_back
    last = guest.calls.last_write
    assert last is not None
    assert (last.outcome, last.dirty) == ("dirty", (GfnRange(0, 200),))
    assert guest.read() == b"\x90" * 200 + OLD[200:]


def test_a_mistake_in_the_middle_of_a_slice_makes_it_dirty_and_ends_the_call() -> None:
    backend = Stubborn()
    guest = Guest(backend)
    guest.begin()
    guest.set(0, b"\x90" * 100)
    guest.set(500, b"\x90" * 100)
    guest.calls.abandon("a")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Keys, "write_checked", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            guest.calls.step()
    last = guest.calls.last_write
    assert last is not None
    assert last.dirty == (GfnRange(0, 100), GfnRange(500, 100))
    guest.calls.require_idle()


def test_rolling_back_takes_one_slice_a_step() -> None:
    backend = Recording((0, 4))
    guest = Guest(backend)
    guest.begin()
    for at in range(0, 400, 100):
        guest.set(at, b"\x90" * 100)
    guest.calls.abandon("a")
    for number in range(4):
        before = len(backend.sets())
        assert guest.calls.rolling_back
        guest.calls.step()
        assert backend.sets()[before:] == [GfnRange(300 - 100 * number, 100)]


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


def test_old_keys_take_no_descriptor_that_outlives_the_call(tmp_path: Path, open_fds: None) -> None:
    def file() -> int:
        return os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)

    backend = Recording((0, 512))
    keys = Keys(backend)
    calls = Transactions(keys, file)
    old = random.Random(3).randbytes(1 << 17).translate(bytes(byte & 0xFE for byte in range(256)))  # noqa: S311
    keys.write(GfnRange(0, 1 << 17), old, allow_enable=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("skeyd.worker.journal.MEMORY_BYTES", 1000)
        for commit in (True, False):
            calls.begin("a", ROLL_BACK, False)
            calls.set("a", GfnRange(0, 1 << 17), old, False)
            if commit:
                calls.commit("a", 1 << 17, zlib.crc32(old))
            calls.abandon("a")
            while calls.rolling_back:
                calls.step()
