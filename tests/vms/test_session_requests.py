"""What a session asks of a worker (slices, single frames, calls of several writes) and makes of good answers."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.vms import session as session_module
from skeyd.vms.hang_up import HangUp
from skeyd.vms.session import Session
from skeyd.worker.outcomes import Begun, LastWrite
from skeyd.worker.packets import error_message
from skeyd.worker.protocol import BUFFER_BYTES, BUFFER_KEYS
from tests.vms.fake_worker import Caller, FakeWorker, answers, hello, says
from tests.vms.sessions import (
    FRAMES,
    OK,
    ONE,
    READ,
    Use,
    after_attaching,
    begin,
    directory_of,
    opened,
    read_frames,
    refusal_of,
    require_unused,
    sske,
    write_frames,
)
from tests.worker.processes import SECONDS, WorkerProcess
from tests.worker.specs import simulated

# --- slices --------------------------------------------------------------------------------------------------------


def test_slices_are_asked_for_ahead_and_lie_where_they_were_asked_to(runtime_dir: Path) -> None:
    wanted = [GfnRange(0x1000 * number, 8) for number in range(5)]
    asked: list[tuple[int, int, int, int]] = []

    def script(caller: Caller) -> None:
        caller.say(hello())
        fd = caller.attach()
        with mmap.mmap(fd, BUFFER_BYTES) as buffers:
            os.close(fd)
            for number in range(len(wanted)):
                # Of the first slice nobody knows how long it takes; when it is known all others are asked for.
                while len(asked) < (1 if number == 0 else len(wanted)):
                    request = caller.take()
                    assert request["op"] == "get"
                    asked.append((request["buffer"], request["offset"], request["start"], request["count"]))
                caller.require_silence()
                buffer, offset, _, count = asked[number]
                at = buffer * BUFFER_KEYS + offset
                buffers[at : at + count] = bytes([number * 2]) * count
                caller.say(READ)
        caller.wait_for_end()

    with FakeWorker(runtime_dir, script), opened(runtime_dir) as session:
        found = list(session.read_slices(wanted))
    assert found == [(one, bytes([number * 2]) * 8) for number, one in enumerate(wanted)]
    assert asked == [(0, 8 * number, one.start, 8) for number, one in enumerate(wanted)]


def test_a_session_that_is_hung_up_wakes_who_waits_for_the_worker(runtime_dir: Path) -> None:
    asked = threading.Event()

    def script(caller: Caller) -> None:
        caller.say(hello())
        os.close(caller.attach())
        caller.take()
        asked.set()
        caller.wait_for_end()

    hang_up = HangUp()
    with FakeWorker(runtime_dir, script), opened(runtime_dir) as session:
        session.hold_by(hang_up)
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read_frames, session)
            assert asked.wait(SECONDS)
            hang_up.now()
            refused = reading.exception(SECONDS)
        assert isinstance(refused, SkeydError)
        assert refused.reason is Reason.WORKER_LOST
        hang_up.now()


def test_nobody_waits_for_a_hello_for_a_call_that_has_ended(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "WORKER_HELLO_SECONDS", 0.05)  # it would be a TimeoutError
    hang_up = HangUp()
    hang_up.now()
    with FakeWorker(runtime_dir, says()), directory_of(runtime_dir) as fd, pytest.raises(ConnectionResetError):
        Session.connect(fd, hang_up)
    assert hang_up._connection is None, "what is closed is let go of"


def test_a_hang_up_after_the_worker_is_gone_is_no_error(runtime_dir: Path) -> None:
    with FakeWorker(runtime_dir, lambda caller: caller.say(hello())) as worker, opened(runtime_dir) as session:
        hang_up = HangUp()
        session.hold_by(hang_up)
        worker.close()
        hang_up.now()


def test_slices_of_a_guest_that_uses_no_keys_are_none(runtime_dir: Path) -> None:
    def then(caller: Caller) -> None:
        caller.say({"ok": {"uses_keys": False, "ns": 1}})
        caller.wait_for_end()

    with FakeWorker(runtime_dir, after_attaching("get", then)), opened(runtime_dir) as session:
        assert read_frames(session) == [(FRAMES, None)]


def test_a_worker_that_dies_after_the_first_of_two_slices_was_lost_and_the_first_was_read(runtime_dir: Path) -> None:
    def then(caller: Caller) -> None:
        caller.say(READ)
        caller.take()

    with FakeWorker(runtime_dir, after_attaching("get", then)), opened(runtime_dir) as session:
        slices = session.read_slices([FRAMES, GfnRange(0x200, 4)])
        assert next(slices) == (FRAMES, bytes(4))
        with pytest.raises(SkeydError) as refused:
            next(slices)
    assert refused.value.reason is Reason.WORKER_LOST


def test_what_the_worker_changes_after_its_answer_is_not_in_what_was_read(runtime_dir: Path) -> None:
    held: list[mmap.mmap] = []

    def script(caller: Caller) -> None:
        caller.say(hello())
        fd = caller.attach()
        held.append(mmap.mmap(fd, BUFFER_BYTES))
        os.close(fd)
        caller.answer("get", READ)
        caller.wait_for_end()

    with FakeWorker(runtime_dir, script), opened(runtime_dir) as session:
        ((_, keys),) = read_frames(session)
        held[0][: FRAMES.count] = b"\xff" * FRAMES.count
        assert keys == bytes(4)
    held[0].close()


def test_a_reader_that_stops_in_the_middle_leaves_nothing(runtime_dir: Path) -> None:
    def script(caller: Caller) -> None:
        caller.say(hello())
        os.close(caller.attach())
        for _ in range(2):
            caller.answer("get", READ)
        caller.wait_for_end()

    with FakeWorker(runtime_dir, script), opened(runtime_dir) as session:
        slices = session.read_slices(GfnRange(number * 8, 8) for number in range(100))
        next(slices)


@pytest.mark.parametrize("allow_enable", [False, True])
def test_a_slice_that_is_written_lies_in_the_buffer_when_the_worker_is_asked(
    runtime_dir: Path, allow_enable: bool
) -> None:
    seen: list[Any] = []

    def script(caller: Caller) -> None:
        caller.say(hello())
        fd = caller.attach()
        with mmap.mmap(fd, BUFFER_BYTES) as buffers:
            os.close(fd)
            request = caller.answer("set", {"ok": {"repaired": 2, "enabled": True, "ns": 7}})
            at = request["buffer"] * BUFFER_KEYS
            seen.append((request, buffers[at : at + request["count"]]))
        caller.wait_for_end()

    keys = memoryview(b"\x10\x20\x30\x40")
    with FakeWorker(runtime_dir, script), opened(runtime_dir) as session:
        assert session.write_slice(FRAMES, keys, allow_enable) == (2, True, 7)
    ((request, written),) = seen
    assert written == b"\x10\x20\x30\x40"
    assert request == {
        "op": "set",
        "buffer": request["buffer"],
        "offset": 0,
        "start": 0x100,
        "count": 4,
        "allow_enable": allow_enable,
    }


def test_as_many_keys_may_be_repaired_as_were_set(runtime_dir: Path) -> None:
    def then(caller: Caller) -> None:
        caller.say({"ok": {"repaired": FRAMES.count, "enabled": False, "ns": 0}})
        caller.wait_for_end()

    with FakeWorker(runtime_dir, after_attaching("set", then)), opened(runtime_dir) as session:
        assert write_frames(session) == (FRAMES.count, False)


# --- one frame -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (ONE, (0x30, False)),
        ({**ONE, "repaired": True}, (0x30, True)),
        ({**ONE, "uses_keys": False}, (None, False)),
        ({**ONE, "key": 0}, (0, False)),
    ],
)
def test_what_keyop_gives_is_what_the_worker_says(
    runtime_dir: Path, answer: dict[str, Any], found: tuple[int | None, bool]
) -> None:
    asked: list[dict[str, Any]] = []

    def script(caller: Caller) -> None:
        caller.say(hello())
        asked.append(caller.answer("keyop", {"ok": answer}))
        caller.wait_for_end()

    with FakeWorker(runtime_dir, script), opened(runtime_dir) as session:
        assert session.keyop("sske", 7, 0x40) == found
    assert asked == [{"op": "keyop", "operation": "sske", "gfn": 7, "key": 0x40}]


def test_a_read_that_was_not_answered_leaves_nothing_uncertain(runtime_dir: Path) -> None:
    def use(session: Session) -> object:
        return session.keyop("iske", 7)

    assert "uncertain" not in refusal_of(runtime_dir, after_attaching("keyop", lambda _: None), use).metadata


@contextmanager
def _served(worker: WorkerProcess) -> Iterator[None]:
    assert worker.first_line() == OK
    yield


def test_a_real_worker_takes_keyop(runtime_dir: Path) -> None:
    with (
        WorkerProcess(runtime_dir, simulated((0, 4), kernel="7.2")) as worker,
        _served(worker),
        opened(runtime_dir) as session,
    ):
        assert session.hello.keyop
        assert session.keyop("sske", 3, 0x30) == (None, False)
        assert session.write_slice(GfnRange(0, 4), b"\x16" * 4, True)[:2] == (0, True)
        assert session.keyop("sske", 3, 0x30) == (0x16, False)
        assert session.keyop("iske", 3) == (0x30, False)
        assert session.keyop("rrbe", 2) == (0x06, False)
        assert list(session.read_slices([GfnRange(0, 4)])) == [(GfnRange(0, 4), b"\x16\x16\x12\x30")]
        with pytest.raises(SkeydError) as refused:
            session.keyop("iske", 1 << 20)
        assert refused.value.reason is Reason.GFN_NOT_MAPPED
        assert session.keyop("iske", 3) == (0x30, False), "a refusal leaves a session that can be used"


# --- calls of several writes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begun", "resume"),
    [
        (Begun("begun", 0, 0, 0, False), False),
        (Begun("begun", 0, 0, 0, False), True),
        (Begun("resumed", 8, 1, 2, True), True),
        (Begun("applied", 8, 1, 2, True), False),
        (Begun("applied", 8, 1, 2, True), True),
    ],
)
def test_a_call_begins_as_the_worker_says(runtime_dir: Path, begun: Begun, resume: bool) -> None:
    asked: list[dict[str, Any]] = []

    def script(caller: Caller) -> None:
        caller.say(hello())
        asked.append(caller.answer("begin", {"ok": begun.to_message()}))
        asked.append(caller.answer("commit", {"ok": Begun("applied", 8, 1, 2, True).to_message()}))
        caller.wait_for_end()

    with FakeWorker(runtime_dir, script), opened(runtime_dir) as session:
        assert session.begin("mine", "f" * 64, keep=False, resume=resume) == begun
        assert session.commit(8, 2) == Begun("applied", 8, 1, 2, True)
    assert asked == [
        {"op": "begin", "request_id": "mine", "fingerprint": "f" * 64, "keep": False, "resume": resume},
        {"op": "commit", "keys_set": 8, "crc32": 2},
    ]


def test_a_worker_is_asked_whether_a_request_id_is_that_of_another(runtime_dir: Path) -> None:
    asked: list[dict[str, Any]] = []

    def script(caller: Caller) -> None:
        caller.say(hello())
        asked.append(caller.answer("require_unused", {"ok": {}}))

    with FakeWorker(runtime_dir, script), opened(runtime_dir) as session:
        require_unused(session)
    assert asked == [{"op": "require_unused", "request_id": "mine", "fingerprint": "f" * 64}]


def test_what_became_of_a_call_is_what_the_worker_says(runtime_dir: Path) -> None:
    last = LastWrite("dirty", "mine", 4, 1, True, 4, (GfnRange(0, 4),))
    pairs: list[tuple[str, dict[str, Any] | bytes]] = [
        ("abandon", {"ok": {}}),
        ("abandon", {"ok": {"last_write": last.to_message()}}),
        ("status", {"ok": {"uses_keys": True, "last_write": last.to_message()}}),
        ("status", {"ok": {"uses_keys": False}}),
    ]
    with FakeWorker(runtime_dir, answers(pairs)), opened(runtime_dir) as session:
        assert session.abandon() is None
        assert session.abandon() == last
        assert session.status() == (True, last)
        assert session.status() == (False, None)


@pytest.mark.parametrize(("op", "use"), [("begin", begin), ("set", write_frames), ("keyop", sske)])
def test_a_worker_that_is_busy_is_so_in_the_words_of_the_fronts_own_lock(runtime_dir: Path, op: str, use: Use) -> None:
    def then(caller: Caller) -> None:
        caller.say(error_message(SkeydError(Reason.VM_BUSY, "a SetSkeys is being rolled back on this VM")))
        caller.wait_for_end()

    refusal = refusal_of(runtime_dir, after_attaching(op, then), use)
    assert refusal.reason is Reason.VM_BUSY
    assert refusal.message == "vms/web is busy: a SetSkeys is being rolled back on this VM"
    assert refusal.metadata == {"vm": "vms/web"}


def test_a_real_worker_takes_back_what_was_not_committed_when_the_front_hangs_up(runtime_dir: Path) -> None:
    frames = GfnRange(0, 4)
    with WorkerProcess(runtime_dir, simulated((0, 4))) as worker, _served(worker):
        with opened(runtime_dir) as session:
            session.write_slice(frames, b"\x10\x20\x30\x46", True)
            session.begin("mine", "0" * 64, keep=False, resume=False)
            session.write_slice(frames, b"\xf8" * 4, False)
        with opened(runtime_dir) as session:
            end = time.monotonic() + SECONDS
            while (last := session.status()[1]) is None or last.outcome == "rolling_back":
                assert time.monotonic() < end
            assert (last.outcome, last.request_id, last.keys_set) == ("rolled_back", "mine", 4)
            assert list(session.read_slices([frames])) == [(frames, b"\x10\x20\x30\x46")]
