"""What a call without a commit comes to where the kernel, or what was kept of the old keys, stands in the way."""

from __future__ import annotations

import errno
import os
import random
import zlib
from contextlib import suppress
from pathlib import Path

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.kvm.errors import KvmError
from skeyd.worker import restoring, transactions
from skeyd.worker.journal import Journal
from skeyd.worker.keys import Keys
from skeyd.worker.outcomes import DIRTY_RANGES
from skeyd.worker.transactions import Transactions
from tests.worker.backends import Recording
from tests.worker.guest import FRAMES, OLD, ROLL_BACK, WHOLE, Guest, Stubborn

# --- what the kernel refuses ---------------------------------------------------------------------------------------


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


def test_a_kernel_that_refuses_everything_is_asked_twice_a_frame_and_a_bounded_number_of_times_a_step() -> None:
    backend = Stubborn("7.2")
    guest = Guest(backend)
    guest.begin()
    guest.set(0, b"\x90" * FRAMES)
    backend.bad = set(range(FRAMES))
    begun = len(backend.tried)
    guest.calls.abandon("a")
    while guest.calls.rolling_back:
        before = len(backend.tried)
        guest.calls.step()
        assert len(backend.tried) - before <= restoring.TRIES
    last = guest.calls.outcome()
    assert last is not None
    assert last.dirty == (WHOLE,)
    assert len(backend.tried) - begun == 2 * FRAMES - 1


@pytest.mark.parametrize("step", [2, 3, 64, 128])
def test_however_many_frames_are_refused_all_others_have_their_old_keys(step: int) -> None:
    backend = Stubborn("7.2")
    guest = Guest(backend)
    guest.begin()
    guest.set(0, bytes((key ^ 0x40) & 0xF8 for key in OLD))
    backend.bad = set(range(0, FRAMES, step))
    last = guest.settle()
    assert last is not None
    found = guest.read()
    assert {gfn for gfn in range(FRAMES) if found[gfn] != OLD[gfn]} == backend.bad
    # As many as are told apart; beyond that the last range reaches to the end of all.
    told = {gfn for one in last.dirty for gfn in range(one.start, one.end)}
    assert told >= backend.bad
    assert told == backend.bad or len(last.dirty) == DIRTY_RANGES


def test_dirty_ranges_take_bounded_room_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "DIRTY_KEPT", 16)
    backend = Stubborn("7.2")
    guest = Guest(backend)
    guest.begin()
    guest.set(0, bytes((key ^ 0x40) & 0xF8 for key in OLD))
    backend.bad = set(range(0, FRAMES, 2))
    guest.calls.abandon("a")
    while guest.calls.rolling_back:
        guest.calls.step()
        assert guest.calls._open is None or len(guest.calls._open.dirty) <= 16
    last = guest.calls.outcome()
    assert last is not None
    assert backend.bad <= {gfn for one in last.dirty for gfn in range(one.start, one.end)}


def test_a_file_that_cant_be_closed_well_is_no_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closes_badly(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, "Input/output error")

    close = os.close
    monkeypatch.setattr("skeyd.worker.journal.MEMORY_BYTES", 0)
    backend = Recording((0, 4))
    keys = Keys(backend)
    calls = Transactions(keys, lambda: os.open(tmp_path, os.O_TMPFILE | os.O_RDWR))
    keys.write(WHOLE, OLD, allow_enable=True)
    monkeypatch.setattr("skeyd.worker.journal.JOINED_KEYS", 1)
    for commit in (False, True):
        calls.begin("a", ROLL_BACK, False)
        calls.set("a", WHOLE, b"\x90" * FRAMES, False)
        with monkeypatch.context() as patched:
            patched.setattr("skeyd.worker.journal.os.close", closes_badly)
            if commit:
                calls.commit("a", FRAMES, zlib.crc32(b"\x90" * FRAMES))
            calls.abandon("a")
            while calls.rolling_back:
                calls.step()
        last = calls.outcome()
        assert last is not None
        assert last.outcome == ("applied" if commit else "rolled_back")
        calls.require_idle()


def test_old_keys_take_no_more_room_than_a_byte_a_frame() -> None:
    backend = Recording((0, 4))
    guest = Guest(backend)
    guest.begin()
    guest.set(0, b"\x90" * (FRAMES - 1))
    guest.set(5, b"\xa0")
    sets = backend.sets()
    with pytest.raises(SkeydError, match="more keys than the VM has frames"):
        guest.set(5, b"\xb0")
    assert backend.sets() == sets
    last = guest.settle()
    assert last is not None
    assert last.outcome == "rolled_back"
    assert guest.read() == OLD


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


def test_old_keys_that_are_lost_are_dirty_frames_and_never_made_up(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    guest = Guest()
    guest.begin()
    guest.set(0, b"\x90" * 100)
    guest.set(100, b"\x90" * 100)
    guest.set(300, b"\x90" * 100)
    guest.calls.abandon("a")
    guest.calls.step()

    def broken(_: Journal) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "pop", broken)
        while clock.passed < transactions.PATIENCE_SECONDS:
            guest.calls.step()
            assert guest.calls.rolling_back
            assert guest.calls.outcome() is not None
            clock.wait(guest.calls.seconds_left())
        guest.calls.step()
    last = guest.settle()
    assert last is not None
    assert (last.outcome, last.dirty) == ("dirty", (GfnRange(0, 200),))
    assert guest.read() == b"\x90" * 200 + OLD[200:]


def test_a_mistake_in_the_middle_of_a_slice_makes_it_dirty_and_no_other() -> None:
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
    last = guest.settle()
    assert last is not None
    assert last.dirty == (GfnRange(500, 100),)
    assert guest.read()[:500] == OLD[:500]
    guest.calls.require_idle()


def test_a_mistake_that_is_made_again_and_again_ends_the_call_too() -> None:
    guest = Guest(Stubborn())
    guest.begin()
    guest.set(0, b"\x90" * 100)
    guest.set(500, b"\x90" * 100)
    guest.calls.abandon("a")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Keys, "read", lambda *_, **__: 1 / 0)
        for _ in range(10):
            if guest.calls.rolling_back:
                with suppress(ZeroDivisionError):
                    guest.calls.step()
    last = guest.calls.outcome()
    assert last is not None
    assert (last.outcome, last.dirty) == ("dirty", (GfnRange(0, 100), GfnRange(500, 100)))


# --- what passes ---------------------------------------------------------------------------------------------------


class Clock:
    """The monotonic clock of the calls, which moves as a test says."""

    def __init__(self) -> None:
        self.passed = 0.0

    def __call__(self) -> float:
        """Tell the time."""
        return 1000 + self.passed

    def wait(self, seconds: float | None) -> None:
        """Let so much time pass, or none."""
        self.passed += seconds or 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("skeyd.worker.transactions.time.monotonic", clock)
    return clock


class Interrupted(Recording):
    """Fails as long as there is something to fail with, whatever it is asked."""

    def __init__(self) -> None:
        super().__init__((0, 4), kernel="4.19")
        self.error: BaseException | None = None
        self.asked = 0

    def _fail(self) -> None:
        self.asked += 1
        if self.error is not None:
            raise self.error

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """Read the keys."""
        self._fail()
        return super().get_skeys(start_gfn, buffer)

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
        """Set them."""
        self._fail()
        super().set_skeys(start_gfn, buffer)


PASSING = {
    "a debugger": SkeydError(Reason.VMM_TRACED, "a debugger"),
    "a thread that hangs": SkeydError(Reason.VMM_STUCK, "it hangs"),
    "a sandbox": SkeydError(Reason.VMM_SANDBOXED, "ioctl is refused"),
    "no descriptors": OSError(errno.ENFILE, "Too many open files in system"),
    "no memory": MemoryError(),
    "no memory in the kernel": KvmError("KVM_S390_GET_SKEYS", errno.ENOMEM),
}
FOR_EVER = ("a debugger", "a thread that hangs")


@pytest.mark.parametrize("what", PASSING)
def test_what_passes_costs_no_key(clock: Clock, what: str) -> None:
    backend = Interrupted()
    guest = Guest(backend)
    guest.begin()
    guest.set(0, b"\x90" * 100)
    guest.set(100, b"\xa0" * 600)
    guest.calls.abandon("a")
    backend.error = PASSING[what]
    while clock.passed < transactions.PATIENCE_SECONDS - 1:
        asked = backend.asked
        guest.calls.step()
        last = guest.calls.outcome()
        assert last is not None
        assert (last.outcome, last.dirty, last.left) == ("rolling_back", (), 700)
        # Now and then, and not for as long as each of 700 frames takes.
        assert backend.asked - asked <= 11
        pause = guest.calls.seconds_left()
        assert pause is not None
        asked = backend.asked
        if pause:
            guest.calls.step()
            assert backend.asked == asked, "it was too early"
        clock.wait(pause)
    backend.error = None
    last = guest.settle()
    assert last is not None
    assert (last.outcome, last.left) == ("rolled_back", 0)
    assert guest.read() == OLD


@pytest.mark.parametrize("what", PASSING)
def test_what_does_not_pass_is_given_up_unless_it_must(clock: Clock, what: str) -> None:
    backend = Interrupted()
    guest = Guest(backend)
    guest.begin()
    for at in range(0, 1000, 200):
        guest.set(at, b"\x90" * 200)
    guest.calls.abandon("a")
    backend.error = PASSING[what]
    steps = 0
    while clock.passed < 3 * transactions.PATIENCE_SECONDS and guest.calls.rolling_back:
        guest.calls.step()
        clock.wait(guest.calls.seconds_left())
        steps += 1
    assert guest.calls.rolling_back == (what in FOR_EVER)
    if what in FOR_EVER:
        backend.error = None
        last = guest.settle()
        assert last is not None
        assert last.outcome == "rolled_back"
        assert guest.read() == OLD
    else:
        last = guest.calls.outcome()
        assert last is not None
        assert (last.outcome, last.dirty) == ("dirty", (GfnRange(0, 1000),))
        assert clock.passed < transactions.PATIENCE_SECONDS + 10


@pytest.mark.parametrize("more", [0x02, 0x04, 0x06])
def test_an_old_key_that_the_kernel_loses_is_back_where_the_new_one_has_more_of_r_and_c_only(more: int) -> None:
    """Seen once: the key that stayed could have been the guest's doing, and was taken for it."""

    class Losing(Recording):
        loses: int | None = None

        def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
            if self.loses is None:
                return super().set_skeys(start_gfn, buffer)
            index, self.loses = self.loses, None
            super().set_skeys(start_gfn, buffer[:index])
            return super().set_skeys(start_gfn + index + 1, buffer[index + 1 :])

    backend = Losing((0, 4), kernel="7.2")
    guest = Guest(backend)
    guest.set_old(b"\x30" * 100)
    guest.begin()
    guest.set(0, bytes([0x30 | more]) * 100)
    backend.loses = 50
    last = guest.settle()
    assert last is not None
    assert (last.outcome, last.dirty) == ("rolled_back", ())
    assert guest.read(GfnRange(0, 100)) == b"\x30" * 100


def test_a_step_asks_no_more_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restoring, "STEP_SECONDS", 0.0)
    backend = Stubborn("7.2")
    guest = Guest(backend)
    guest.begin()
    guest.set(0, b"\x90" * FRAMES)
    backend.bad = set(range(0, FRAMES, 2))
    guest.calls.abandon("a")
    while guest.calls.rolling_back:
        before = len(backend.tried)
        guest.calls.step()
        assert len(backend.tried) - before <= 1
    assert {gfn for gfn, (found, old) in enumerate(zip(guest.read(), OLD, strict=True)) if found != old} == backend.bad


def test_what_is_left_becomes_less_with_every_part_that_is_done() -> None:
    backend = Stubborn("7.2")
    guest = Guest(backend)
    guest.begin()
    for at in range(0, FRAMES, 256):
        guest.set(at, b"\x90" * 256)
    backend.bad = set(range(300, 350))
    guest.calls.abandon("a")
    left = [FRAMES]
    while guest.calls.rolling_back:
        guest.calls.step()
        last = guest.calls.outcome()
        assert last is not None
        left.append(last.left)
    assert left == sorted(left, reverse=True)
    assert (left[1], left[-1]) == (768, 0)


@pytest.mark.parametrize("fails", ["the SET", "the read-back and whoever asks then"])
def test_that_a_call_may_have_enabled_keys_is_said(fails: str) -> None:
    backend = Interrupted()
    guest = Guest(backend, keyless=True)
    guest.begin()

    def enable_and_fail(start_gfn: int, buffer: memoryview) -> None:
        Recording.set_skeys(backend, start_gfn, buffer)
        backend.error = KvmError("KVM_S390_GET_SKEYS", errno.ENOMEM)
        if fails == "the SET":
            raise MemoryError

    backend.set_skeys = enable_and_fail  # type: ignore[method-assign]
    with pytest.raises((SkeydError, MemoryError)):
        guest.set(0, b"\x90" * 100, allow_enable=True)
    backend.error = None
    del backend.set_skeys
    last = guest.settle()
    assert last is not None
    assert (last.outcome, last.enabled) == ("rolled_back", True)
    assert guest.read() == bytes(FRAMES)


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
