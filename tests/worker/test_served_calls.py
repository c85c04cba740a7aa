"""SetSkeys calls of several writes, as a service in this process has them: whose they are, how they end, what stays."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.kvm.errors import KvmError
from skeyd.worker import journal
from skeyd.worker.protocol import BUFFER_KEYS, SOCKET
from tests.worker.backends import Recording, Refusing
from tests.worker.processes import SECONDS, Front, hung_up
from tests.worker.serving import attached, met, serving
from tests.worker.specs import UID

BEGIN: dict[str, Any] = {"op": "begin", "request_id": "", "fingerprint": "0" * 64, "keep": False, "resume": False}


def _set(front: Front, buffers: mmap.mmap, start: int, keys: bytes) -> dict[str, Any]:
    buffers[: len(keys)] = keys
    return front.ask(op="set", buffer=0, offset=0, start=start, count=len(keys), allow_enable=True)


def _keys(front: Front, buffers: mmap.mmap, start: int, count: int) -> bytes:
    front.ok(op="get", buffer=1, offset=0, start=start, count=count)
    return buffers[BUFFER_KEYS : BUFFER_KEYS + count]


def _settled(front: Front) -> str:
    # The worker may not have noticed yet that the one whose call it is has hung up.
    end = time.monotonic() + SECONDS
    while True:
        last = front.ok(op="status").get("last_write")
        if last is not None and last["outcome"] != "rolling_back":
            return str(last["outcome"])
        assert time.monotonic() < end, "it is being rolled back for ever"


class Gated(Recording):
    """Waits before each SET, once it is told to; and says that it does."""

    def __init__(self, *slots: tuple[int, int], kernel: str = "7.2") -> None:
        super().__init__(*slots, kernel=kernel)
        self.gate = threading.Semaphore(0)
        self.reached = threading.Semaphore(0)
        self.gated = False

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
        if self.gated:
            self.reached.release()
            assert self.gate.acquire(timeout=SECONDS)
        super().set_skeys(start_gfn, buffer)


def _set_two_slices(backend: Gated, front: Front, buffers: mmap.mmap, rolling: bool) -> None:
    """Set two slices of a call; `rolling`: hang up, and be in the middle of rolling back the second."""
    front.ok(**BEGIN)
    for start in (0, 4):
        assert "ok" in _set(front, buffers, start, b"\xf8" * 4)
    backend.gated = rolling
    if rolling:
        front.close()
        assert backend.reached.acquire(timeout=SECONDS)


def test_who_reads_while_a_call_is_rolled_back_waits_for_no_more_than_a_slice_of_it(runtime_dir: Path) -> None:
    backend = Gated()
    with serving(runtime_dir, backend), attached(runtime_dir) as (other, others):
        assert "ok" in _set(other, others, 0, b"\x10" * 12)
        with attached(runtime_dir) as (front, buffers):
            front.ok(**BEGIN)
            for start in (0, 4, 8):
                assert "ok" in _set(front, buffers, start, b"\xf8" * 4)
            backend.gated = True
        # The last slice comes first; the worker is in the middle of it. What is asked meanwhile is answered after it.
        assert backend.reached.acquire(timeout=SECONDS)
        for left in (b"\xf8" * 8 + b"\x10" * 4, b"\xf8" * 4 + b"\x10" * 8):
            other.say(op="get", buffer=1, offset=0, start=0, count=12)
            backend.gate.release()
            answer = other.take()
            assert answer is not None
            assert answer["ok"]["uses_keys"]
            # Behind the answer the next slice has begun, and the worker stands in it.
            assert backend.reached.acquire(timeout=SECONDS)
            assert others[BUFFER_KEYS : BUFFER_KEYS + 12] == left
        backend.gate.release()
        assert _settled(other) == "rolled_back"
        assert _keys(other, others, 0, 12) == b"\x10" * 12
        backend.gated = False
        assert "ok" in _set(other, others, 0, b"\x20")


def test_a_front_that_hangs_up_in_the_middle_of_a_slice_has_no_more_of_it_set(runtime_dir: Path) -> None:
    # 15 keys are lost by the SET, one a MiB that was not touched before, and set again one by one.
    whole = GfnRange(0, 4096)
    backend = Gated((0, 16), kernel="4.19")
    with serving(runtime_dir, backend), attached(runtime_dir) as (other, others):
        assert "ok" in _set(other, others, 0, b"\x10")
        with attached(runtime_dir) as (front, buffers):
            front.ok(**BEGIN)
            before = len(backend.sets())
            backend.gated = True
            buffers[: whole.count] = b"\x90" * whole.count
            front.say(op="set", buffer=0, offset=0, start=0, count=whole.count, allow_enable=True)
            assert backend.reached.acquire(timeout=SECONDS)
            backend.gate.release()
            assert backend.reached.acquire(timeout=SECONDS)
        backend.gated = False
        backend.gate.release()
        assert _settled(other) == "rolled_back"
        found = backend.sets()[before:]
        assert (found[0], found[1].count, found[2]) == (whole, 1, whole), "and the last rolls back"
        assert _keys(other, others, 0, whole.count) == b"\x10" + bytes(whole.count - 1)


def test_what_a_front_has_asked_for_that_has_hung_up_is_not_done(runtime_dir: Path) -> None:
    backend = Gated()
    with serving(runtime_dir, backend), attached(runtime_dir) as (other, others):
        with attached(runtime_dir) as (front, buffers):
            backend.gated = True
            others[:4] = b"\x10" * 4
            other.say(op="set", buffer=0, offset=0, start=0, count=4, allow_enable=True)
            assert backend.reached.acquire(timeout=SECONDS)
            # The worker is busy, and finds this when the one who asked has gone.
            buffers[:4] = b"\x20" * 4
            front.say(op="set", buffer=0, offset=0, start=8, count=4, allow_enable=True)
        backend.gated = False
        backend.gate.release()
        answer = other.take()
        assert answer is not None
        assert "ok" in answer
        # Twice: the first may be answered before the worker comes to the other's.
        for _ in range(2):
            assert _keys(other, others, 0, 12) == b"\x10" * 4 + bytes(8)


@pytest.mark.parametrize(
    "request_",
    [
        BEGIN,
        {"op": "set", "buffer": 0, "offset": 0, "start": 0, "count": 1, "allow_enable": True},
        {"op": "keyop", "operation": "sske", "gfn": 0, "key": 0x20},
        {"op": "keyop", "operation": "rrbe", "gfn": 0, "key": 0},
    ],
    ids=["begin", "set", "sske", "rrbe"],
)
@pytest.mark.parametrize("rolling", [False, True], ids=["runs", "is being rolled back"])
def test_who_would_set_a_key_while_a_call_runs_or_is_rolled_back_is_busy(
    runtime_dir: Path, request_: dict[str, Any], rolling: bool
) -> None:
    backend = Gated()
    with serving(runtime_dir, backend), attached(runtime_dir) as (other, others):
        with attached(runtime_dir) as (front, buffers):
            _set_two_slices(backend, front, buffers, rolling)
            # It is asked in the middle of the first of two slices, and answered before the second.
            others[:1] = b"\x20"
            other.say(**request_)
            backend.gate.release(5)
            answer = other.take()
            assert answer is not None
            assert answer["error"]["reason"] == "VM_BUSY"
            assert ("is being rolled back" if rolling else "runs") in answer["error"]["message"]
            assert other.ok(op="keyop", operation="iske", gfn=0, key=0)["uses_keys"]
        assert _settled(other) == "rolled_back"
        assert _keys(other, others, 0, 8) == bytes(8)


@pytest.mark.parametrize("rolling", [False, True], ids=["runs", "rolls back"])
def test_a_vm_that_outlives_its_worker_is_let_go_with_whole_keys_only(runtime_dir: Path, rolling: bool) -> None:
    backend, released = Gated(), threading.Event()
    with serving(runtime_dir, backend, release=released.set), met(runtime_dir) as other:
        with attached(runtime_dir) as (front, buffers):
            _set_two_slices(backend, front, buffers, rolling)
            other.say(op="shutdown", uid=UID)
            backend.gate.release(5)
            answer = other.take()
            assert answer is not None
            assert answer["error"]["reason"] == "VM_BUSY"
            assert not released.is_set()
        assert _settled(other) == "rolled_back"
        other.ok(op="shutdown", uid=UID)
        assert released.is_set()


@pytest.mark.parametrize("rolling", [False, True], ids=["runs", "rolls back"])
def test_a_vm_that_outlives_its_worker_has_whole_keys_when_that_is_told_to_end(
    runtime_dir: Path, rolling: bool
) -> None:
    backend = Gated()
    with serving(runtime_dir, backend, release=lambda: None) as stop, met(runtime_dir) as other:
        with attached(runtime_dir) as (front, buffers):
            front.ok(**BEGIN)
            for start in (0, 4):
                assert "ok" in _set(front, buffers, start, b"\xf8" * 4)
            backend.gated = True
            if rolling:
                front.close()
                assert backend.reached.acquire(timeout=SECONDS)
            stop()
            if not rolling:
                # The first slice that is rolled back waits; all this is asked while it does.
                assert backend.reached.acquire(timeout=SECONDS)
                front.say(op="set", buffer=0, offset=0, start=0, count=4, allow_enable=True)
            other.say(op="keyop", operation="sske", gfn=0, key=0x20)
            backend.gate.release(1)
            for one in (other,) if rolling else (other, front):
                answer = one.take()
                assert answer is not None
                assert answer["error"]["reason"] == "WORKER_LOST"
            assert not hung_up(other.socket, 0)
            backend.gate.release(9)
        assert hung_up(other.socket)
        keys = bytearray(8)
        assert backend.get_skeys(0, memoryview(keys))
        assert not any(keys)


def test_a_vm_that_cant_be_let_go_is_served_on(runtime_dir: Path) -> None:
    refusals = [SkeydError(Reason.VMM_TRACED, "by a debugger")]

    def release() -> None:
        if refusals:
            raise refusals.pop()

    with serving(runtime_dir, Recording(), release=release), met(runtime_dir) as front:
        front.say(op="shutdown", uid=UID)
        answer = front.take()
        assert answer is not None
        assert answer["error"]["reason"] == "VMM_TRACED"
        assert "uses_keys" in front.ok(op="status")
        front.ok(op="shutdown", uid=UID)


@pytest.mark.parametrize("end", ["abandon", "hang up", "garbage", "commit"])
@pytest.mark.parametrize("keep", [False, True], ids=["roll-back", "keep"])
def test_the_end_of_a_call_decides_what_stays(runtime_dir: Path, end: str, keep: bool) -> None:
    backend = Recording()
    with serving(runtime_dir, backend), attached(runtime_dir) as (other, others):
        before = bytes(range(0, 256, 2)) * 2
        assert "ok" in _set(other, others, 0, before)
        with attached(runtime_dir) as (front, buffers):
            assert front.ok(**{**BEGIN, "keep": keep})["state"] == "begun"
            for start in (0, 100, 60):
                assert "ok" in _set(front, buffers, start, b"\xf8" * 50)
            if end == "garbage":
                front.socket.send(b"garbage")
                assert front.is_hung_up_on()
            elif end == "commit":
                assert front.ok(op="commit", keys_set=150, crc32=zlib.crc32(b"\xf8" * 150))["keys_set"] == 150
            elif end == "abandon":
                # Each of them has at least a slice of it done, and says whether that is all.
                outcomes = [front.ok(op="abandon")["last_write"]["outcome"] for _ in range(1 if keep else 4)]
                assert (outcomes[0], outcomes[-1]) == (("kept",) * 2 if keep else ("rolling_back", "rolled_back"))
                assert front.refused(op="commit", keys_set=0, crc32=0) == "WORKER_FAILED"
        outcome = "applied" if end == "commit" else "kept" if keep else "rolled_back"
        assert _settled(other) == outcome
        new = before if outcome == "rolled_back" else b"\xf8" * 50 + before[50:60] + b"\xf8" * 90 + before[150:]
        assert _keys(other, others, 0, 256) == new


def test_what_a_call_that_set_nothing_came_to_is_not_what_another_came_to(runtime_dir: Path) -> None:
    with serving(runtime_dir, Recording()), attached(runtime_dir) as (other, others):
        other.ok(**{**BEGIN, "keep": True})
        _set(other, others, 0, b"\x10")
        assert other.ok(op="abandon")["last_write"]["outcome"] == "kept"
        with met(runtime_dir) as front:
            assert front.ok(op="abandon") == {}, "it has begun none"
            front.ok(**BEGIN)
            assert front.ok(op="abandon") == {}
        # It can have another, and is told of that one.
        other.ok(**BEGIN)
        assert other.ok(op="abandon") == {}
        assert _settled(other) == "kept"


@pytest.mark.parametrize("op", ["commit", "set"])
def test_a_call_is_its_connections_and_nobody_elses(runtime_dir: Path, op: str) -> None:
    with (
        serving(runtime_dir, Recording()),
        attached(runtime_dir) as (front, buffers),
        attached(runtime_dir) as (other, _),
    ):
        front.ok(**BEGIN)
        _set(front, buffers, 0, b"\x10")
        reason = other.refused(op=op, buffer=0, offset=0, start=0, count=1, allow_enable=True, keys_set=0, crc32=0)
        assert reason == ("WORKER_FAILED" if op == "commit" else "VM_BUSY")
        assert other.ok(op="abandon") == {}
        assert front.ok(op="commit", keys_set=1, crc32=zlib.crc32(b"\x10"))["keys_set"] == 1


@pytest.mark.parametrize("lie", [{"keys_set": 7}, {"keys_set": 9}, {"crc32": 1}])
def test_a_commit_of_what_was_not_set_is_refused_and_taken_back(runtime_dir: Path, lie: dict[str, int]) -> None:
    with serving(runtime_dir, Recording()), attached(runtime_dir) as (front, buffers):
        front.ok(**BEGIN)
        for start in (0, 4):
            _set(front, buffers, start, b"\x10" * 4)
        commit = {"op": "commit", "keys_set": 8, "crc32": zlib.crc32(b"\x10" * 8), **lie}
        assert front.refused(**commit) == "WORKER_FAILED"
        # By itself: the front says nothing more.
        assert _settled(front) == "rolled_back"
        assert front.ok(op="abandon")["last_write"]["outcome"] == "rolled_back"
        assert _keys(front, buffers, 0, 8) == bytes(8)


@pytest.mark.parametrize(
    "bad", [{}, {"keys_set": 0}, {"crc32": 0}, {"keys_set": -1, "crc32": 0}, {"keys_set": 0, "crc32": 1 << 32}]
)
def test_a_commit_says_what_it_is_of(runtime_dir: Path, bad: dict[str, int]) -> None:
    with serving(runtime_dir, Recording()), met(runtime_dir) as front:
        front.ok(**BEGIN)
        front.say(op="commit", **bad)
        assert front.is_hung_up_on()


def test_a_front_can_ask_whether_a_request_id_is_that_of_another(runtime_dir: Path) -> None:
    with serving(runtime_dir, Recording()), met(runtime_dir) as front:
        asked = {"op": "require_unused", "request_id": "mine", "fingerprint": "1" * 64}
        assert front.ok(**asked) == {}
        front.ok(**{**BEGIN, "request_id": "mine"})
        assert front.ok(op="commit", keys_set=0, crc32=0)["state"] == "applied"
        assert front.refused(**asked) == "REQUEST_ID_REUSED"
        assert front.ok(**{**asked, "fingerprint": "0" * 64}) == {}
        front.say(**{**asked, "fingerprint": "1"})
        assert front.is_hung_up_on()


def test_old_keys_that_the_kernel_refuses_are_dirty_and_the_others_are_back(runtime_dir: Path) -> None:
    # SETs: three of the call; then, of its last slice, with which the rollback begins, the whole, halves, each frame.
    refused = KvmError("KVM_S390_SET_SKEYS", errno.EFAULT)
    backend = Refusing({("set", number): refused for number in range(3, 10)})
    with serving(runtime_dir, backend), attached(runtime_dir) as (front, buffers):
        front.ok(**BEGIN)
        for start, key in ((0, 0x10), (4, 0x20), (8, 0x30)):
            assert "ok" in _set(front, buffers, start, bytes([key]) * 4)
        while (last := front.ok(op="abandon")["last_write"])["outcome"] == "rolling_back":
            pass
        assert (last["outcome"], last["dirty"]) == ("dirty", [{"start": 8, "count": 4}])
        assert _keys(front, buffers, 0, 12) == bytes(8) + b"\x30" * 4


def test_a_mistake_while_old_keys_are_set_again_is_part_of_the_outcome_and_the_vm_lives_on(
    runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = Refusing({("set", 2): ZeroDivisionError("a bug")})
    with serving(runtime_dir, backend), attached(runtime_dir) as (other, others):
        with attached(runtime_dir) as (front, buffers):
            front.ok(**BEGIN)
            for start in (0, 8):
                assert "ok" in _set(front, buffers, start, b"\x10" * 4)
        assert _settled(other) == "dirty"
        dirty = other.ok(op="status")["last_write"]["dirty"]
        assert dirty == [{"start": 8, "count": 4}], "and the other slice has its old keys"
        assert _keys(other, others, 0, 4) == bytes(4)
        assert "ok" in _set(other, others, 0, b"\x20" * 12)
    assert "a bug" in capsys.readouterr().err


def test_old_keys_that_cant_be_kept_keep_the_new_ones_from_being_set(runtime_dir: Path) -> None:
    def full() -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    backend = Recording()
    old = os.urandom(512).translate(bytes(key & 0xFE for key in range(256)))
    with serving(runtime_dir, backend, full), attached(runtime_dir) as (front, buffers):
        assert "ok" in _set(front, buffers, 512, old)
        with mock.patch.object(journal, "MEMORY_BYTES", 100), mock.patch.object(journal, "JOINED_KEYS", 1):
            front.ok(**BEGIN)
            assert "ok" in _set(front, buffers, 0, b"\x10" * 512)  # old keys of one value take next to no room
            sets = backend.sets()
            assert _set(front, buffers, 512, b"\x10" * 512)["error"]["reason"] == "HOST_EXHAUSTED"
            assert backend.sets() == sets
            front.ok(op="abandon")
        assert _settled(front) == "rolled_back"
        assert _keys(front, buffers, 0, 1024) == bytes(512) + old


def test_old_keys_that_memory_has_no_room_for_come_back_from_the_file(runtime_dir: Path) -> None:
    old = os.urandom(1024).translate(bytes(key & 0xFE for key in range(256)))
    with serving(runtime_dir, Recording()), attached(runtime_dir) as (front, buffers):
        assert "ok" in _set(front, buffers, 0, old)
        with mock.patch.object(journal, "MEMORY_BYTES", 100), mock.patch.object(journal, "JOINED_KEYS", 1):
            front.ok(**BEGIN)
            for start in (0, 256, 300, 700):
                assert "ok" in _set(front, buffers, start, b"\x10" * 256)
            assert list(runtime_dir.iterdir()) == [runtime_dir / SOCKET], "the file has no name"
            front.ok(op="abandon")
        assert _settled(front) == "rolled_back"
        assert _keys(front, buffers, 0, 1024) == old
