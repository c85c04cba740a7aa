"""Keys of one moment, by a Service whose captures end when a test says so: who is served meanwhile, and who isn't."""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, Ranges
from skeyd.kvm.errors import KvmError
from skeyd.worker import captures
from skeyd.worker.own_capture import FrozenKeys, OwnCapture
from skeyd.worker.packets import ProtocolError
from skeyd.worker.protocol import FREEZE_MAX_NS, RANGE
from tests.worker.backends import Recording, Refusing
from tests.worker.processes import SECONDS, Front
from tests.worker.serving import attached, met, serving

BUDGET = FREEZE_MAX_NS
SLICE = 10_000_000


def freeze(front: Front, buffers: memoryview | object, *frames: tuple[int, int], budget: int = BUDGET) -> None:
    """Ask for it, and wait for no answer."""
    for at, one in enumerate(frames):
        RANGE.pack_into(buffers, at * RANGE.size, *one)  # type: ignore[arg-type]
    front.say(op="freeze", ranges=len(frames), budget_ns=budget, slice_ns=SLICE)


def get(start: int, count: int) -> dict[str, object]:
    return {"op": "get", "buffer": 1, "offset": 0, "start": start, "count": count}


def put(start: int, count: int) -> dict[str, object]:
    return {"op": "set", "buffer": 0, "offset": 0, "start": start, "count": count, "allow_enable": True}


BEGIN = {"op": "begin", "request_id": "", "fingerprint": "0" * 64, "keep": False, "resume": False}


class Keyed(Recording):
    """Uses keys, which are those of its frames' numbers."""

    def __init__(self) -> None:
        super().__init__((0, 4), (8, 1))
        keys = bytearray(gfn % 120 * 2 for gfn in range(1024))
        self.vm.set_skeys(0, memoryview(keys))
        self.vm.set_skeys(2048, memoryview(bytearray(b"\x40" * 256)))


class Later(Keyed):
    """Reads as another process would: all at once, when the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.cancelled = threading.Event(), threading.Event()
        self.told, self.telling = os.pipe()
        self.error: SkeydError | None = None
        self.closing = threading.Event()
        self.closed = False

    def capture(self, frames: Sequence[GfnRange], into: memoryview, seconds: float, slice_seconds: float) -> Any:
        backend = self
        self.began.set()

        class Reading:
            def fileno(self) -> int | None:
                return backend.told

            def step(self) -> int | None:
                os.set_blocking(backend.told, False)
                try:
                    os.read(backend.told, 1)
                except BlockingIOError:
                    return None
                if backend.error is not None:
                    raise backend.error
                done = 0
                for one in frames:
                    with into[done : done + one.count] as view:
                        backend.get_skeys(one.start, view)
                    done += one.count
                return 5

            def seconds_left(self) -> None:
                pass

            def cancel(self) -> None:
                backend.cancelled.set()

            def close(self) -> None:
                backend.closing.set()
                assert select.select([backend.told], [], [], SECONDS)[0]
                backend.closed = True

        return Reading()

    def go_on(self) -> None:
        os.write(self.telling, b"x")

    def close(self) -> None:
        os.close(self.told)
        os.close(self.telling)
        super().close()


def test_what_is_read_of_a_moment_is_given_though_others_set_keys_afterwards(runtime_dir: Path) -> None:
    with serving(runtime_dir, Keyed()), attached(runtime_dir) as (one, mine), attached(runtime_dir) as (two, other):
        freeze(one, mine, (2, 6), (2048, 256))
        assert one.take() == {"ok": {"uses_keys": True, "ns": 0}}
        other[:256] = b"\x70" * 256
        assert two.ok(**put(0, 256))["repaired"] == 0
        for start, count in ((2, 6), (3, 2), (2048, 256), (2303, 1)):
            assert one.ok(**get(start, count)) == {"uses_keys": True, "ns": 0}
            expected = bytes(gfn * 2 if gfn < 120 else 0x40 for gfn in range(start, start + count))
            assert mine[1 << 20 :][:count] == expected
        two.ok(**get(0, 4))
        assert other[1 << 20 :][:4] == b"\x70" * 4
        # What was not asked for is of no moment.
        one.say(**get(1, 2))
        assert one.is_hung_up_on()
        two.ok(**get(0, 4))


def test_a_guest_without_keys_has_none_at_any_moment(runtime_dir: Path) -> None:
    with serving(runtime_dir, Recording()), attached(runtime_dir) as (front, buffers):
        freeze(front, buffers, (0, 4))
        assert front.take() == {"ok": {"uses_keys": False, "ns": 0}}
        assert front.ok(**get(0, 4))["uses_keys"] is False


def test_while_another_process_reads_nobody_sets_and_who_reads_waits(runtime_dir: Path) -> None:
    backend = Later()
    with (
        serving(runtime_dir, backend),
        attached(runtime_dir) as (owner, mine),
        attached(runtime_dir) as (reader, its),
        attached(runtime_dir) as (setter, _),
    ):
        freeze(owner, mine, (0, 1024))
        assert backend.began.wait(SECONDS)
        assert setter.refused(**BEGIN) == "VM_BUSY"
        assert setter.refused(**put(0, 4)) == "VM_BUSY"
        assert setter.refused(op="keyop", operation="sske", gfn=0, key=0) == "VM_BUSY"
        assert setter.refused(op="shutdown", uid="0c54ab32-5d11-4a3c-9b3e-6d1b2f0c9a77") == "VM_BUSY"
        assert setter.ok(op="status") == {"uses_keys": True}
        freeze(setter, _, (0, 4))
        assert (setter.take() or {})["error"]["reason"] == "VM_BUSY"
        asked = len(backend.calls)
        reader.say(**get(8, 4))
        reader.say(op="status")
        setter.say(op="keyop", operation="iske", gfn=5, key=0)
        with met(runtime_dir) as somebody:
            # Whoever comes is met, and nothing is asked of the VM for anybody.
            assert somebody.ok(op="status") == {"uses_keys": True}
        assert len(backend.calls) == asked
        backend.go_on()
        assert owner.take() == {"ok": {"uses_keys": True, "ns": 5}}
        assert reader.take() is not None
        assert its[1 << 20 :][:4] == bytes([16, 18, 20, 22])
        assert reader.take() == {"ok": {"uses_keys": True}}
        assert (setter.take() or {})["ok"]["key"] == 10
        assert setter.ok(**put(0, 4))["enabled"] is False


def test_who_hangs_up_has_the_capture_cancelled_and_others_served(runtime_dir: Path) -> None:
    backend = Later()
    with serving(runtime_dir, backend), attached(runtime_dir) as (reader, _):
        with attached(runtime_dir) as (owner, mine):
            freeze(owner, mine, (0, 1024))
            assert backend.began.wait(SECONDS)
        assert backend.cancelled.wait(SECONDS)
        assert reader.refused(**put(0, 4)) == "VM_BUSY"  # until it has ended
        reader.say(**get(0, 4))
        backend.go_on()
        assert reader.take() is not None
        assert reader.ok(**put(0, 4))["enabled"] is False


def test_what_goes_wrong_in_a_capture_is_its_owners_answer_and_the_next_one_works(runtime_dir: Path) -> None:
    backend = Later()
    with serving(runtime_dir, backend), attached(runtime_dir) as (owner, mine):
        backend.error = SkeydError(Reason.FREEZE_EXPIRED, "too late")
        backend.go_on()
        freeze(owner, mine, (0, 1024))
        assert (owner.take() or {})["error"]["reason"] == "FREEZE_EXPIRED"
        backend.error = None
        backend.go_on()
        freeze(owner, mine, (0, 1024))
        assert (owner.take() or {})["ok"]["ns"] == 5
        # One moment a connection.
        freeze(owner, mine, (0, 1024))
        assert owner.is_hung_up_on()


def test_a_worker_that_ends_waits_for_who_reads(runtime_dir: Path) -> None:
    backend = Later()
    with serving(runtime_dir, backend), attached(runtime_dir) as (owner, mine):
        freeze(owner, mine, (0, 1024))
        assert backend.began.wait(SECONDS)

        def end() -> None:
            backend.closing.wait(SECONDS)
            backend.go_on()

        thread = threading.Thread(target=end)
        thread.start()
    thread.join()
    assert backend.cancelled.is_set()
    assert backend.closed


@pytest.mark.parametrize(
    "message",
    [
        {"ranges": 0},
        {"ranges": (1 << 17) + 1},
        {"ranges": 2},  # the second is of no frames
        {"budget_ns": 0},
        {"budget_ns": FREEZE_MAX_NS + 1},
        {"slice_ns": 0},
        {"budget_ns": None},
    ],
)
def test_nonsense_ends_its_connection_and_no_other(runtime_dir: Path, message: dict[str, object]) -> None:
    with serving(runtime_dir, Keyed()), attached(runtime_dir) as (front, buffers), met(runtime_dir) as other:
        RANGE.pack_into(buffers, 0, 0, 4)
        front.say(**{"op": "freeze", "ranges": 1, "budget_ns": BUDGET, "slice_ns": SLICE, **message})
        assert front.is_hung_up_on()
        other.say(op="freeze", ranges=1, budget_ns=BUDGET, slice_ns=SLICE)  # without buffers
        assert other.is_hung_up_on()
        with met(runtime_dir) as third:
            assert third.ok(op="status") == {"uses_keys": True}


def test_frames_without_memory_and_too_many_are_refused(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captures, "FROZEN_KEYS", 1100)
    with serving(runtime_dir, Keyed()), attached(runtime_dir) as (one, mine), attached(runtime_dir) as (two, other):

        def refused(front: Front, *frames: tuple[int, int]) -> str:
            freeze(front, mine if front is one else other, *frames)
            return str((front.take() or {})["error"]["reason"])

        assert refused(one, (1020, 8)) == "GFN_NOT_MAPPED"
        assert refused(one, (0, 1024), (2048, 77)) == "REQUEST_INVALID"
        freeze(one, mine, (0, 1024), (2048, 76))
        assert (one.take() or {})["ok"]["uses_keys"]
        assert refused(two, (0, 1)) == "VM_BUSY"
        one.close()
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            freeze(two, other, (0, 1))
            if "ok" in (two.take() or {}):
                break
        else:
            raise AssertionError("its room never came back")


def test_a_call_of_setskeys_that_runs_keeps_a_capture_from_beginning(runtime_dir: Path) -> None:
    with serving(runtime_dir, Keyed()), attached(runtime_dir) as (one, mine), met(runtime_dir) as setter:
        setter.ok(**BEGIN)
        freeze(one, mine, (0, 4))
        assert (one.take() or {})["error"]["reason"] == "VM_BUSY"


def test_what_the_kernel_refuses_is_said(runtime_dir: Path) -> None:
    backend = Refusing({("get", 1): KvmError("KVM_S390_GET_SKEYS", errno.EFAULT)})
    backend.vm.set_skeys(0, memoryview(bytearray(4)))
    with serving(runtime_dir, backend), attached(runtime_dir) as (front, buffers):
        freeze(front, buffers, (0, 4))
        assert (front.take() or {})["error"]["reason"] == "GFN_NOT_MAPPED"


def own_capture(backend: Recording, seconds: float, *frames: tuple[int, int]) -> tuple[OwnCapture, FrozenKeys]:
    keys = FrozenKeys(Ranges(GfnRange(*one) for one in frames))
    return OwnCapture(backend, tuple(keys.frames), memoryview(keys.memory), seconds, 0.01), keys


def test_a_capture_that_takes_too_long_gives_nothing() -> None:
    capture, _ = own_capture(Keyed(), 0.0, (0, 1024))
    with pytest.raises(SkeydError, match="the freeze_budget of 0 s has passed") as refused:
        capture.step()
    assert refused.value.reason is Reason.FREEZE_EXPIRED


def test_a_capture_is_made_of_ioctls_that_take_as_long_as_they_may() -> None:
    backend = Recording((0, 1024))
    backend.vm.set_skeys(0, memoryview(bytearray(1)))
    capture, keys = own_capture(backend, SECONDS, (0, 262_144))
    steps = 1
    while capture.step() is None:
        steps += 1
    sizes = [frames.count for call, frames in backend.calls if call == "get"]
    assert (len(sizes), sum(sizes), sizes[0]) == (steps, 262_144, 16_384)
    assert all(new <= 4 * old for old, new in pairwise(sizes))
    with pytest.raises(ProtocolError):
        keys.read(GfnRange(262_143, 2), memoryview(bytearray(2)))


def test_keys_that_are_said_not_to_be_there_any_more_are_an_error() -> None:
    capture, _ = own_capture(Recording(), SECONDS, (0, 4))
    with pytest.raises(SkeydError, match="it is said to use none"):
        capture.step()
