"""What DigestSkeys and SummarizeSkeys have in common: refusals, limits, and that they read for nobody who has gone."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, Ranges
from skeyd.limits import CALL_THREADS, DEFAULT_SLICE_SECONDS, MAX_KEY_STREAMS
from skeyd.rpc import bulk
from skeyd.rpc.bulk import parts_of, slice_seconds_of
from skeyd.rpc.calls import Cancelled
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.vms.pacing import Pace
from skeyd.worker.protocol import SLICE_KEYS
from tests.daemon import DaemonProcess
from tests.rpc.fixtures import NewVm
from tests.rpc.standard_services import SERVING, check
from tests.rpc.stubs import SECONDS, Stubs, chunk, header, ranges, refusal, refused
from tests.vms.fake_session import FakeSession, key_of

LARGE: Final = 4 << 20
"""MiB of a guest whose 1 Gi keys take longer to read than any test waits."""

SHARE: Final = MAX_KEY_STREAMS // 2
"""Such calls that one VM has alone."""

QUICKLY: Final = 20.0
"""Seconds; a call that waits for such a reader waits for longer."""

Call = Callable[..., Any]


@pytest.fixture(params=["DigestSkeys", "SummarizeSkeys"])
def method(request: pytest.FixtureRequest) -> str:
    """Both of them."""
    return str(request.param)


def call(stubs: Stubs, method: str, vm: str, *wanted: tuple[int, int]) -> object:
    """Make a call of either."""
    request = getattr(pb, f"{method}Request")(vm=vm, ranges=ranges(*wanted))
    return getattr(stubs.keys, method)(request, timeout=SECONDS)


def begin(stubs: Stubs, method: str, vm: str, seconds: float | None = None) -> Any:
    """Begin a call of either."""
    return getattr(stubs.keys, method).future(getattr(pb, f"{method}Request")(vm=vm), timeout=seconds)


def first_done(futures: list[Any]) -> Any:
    """Wait for the first that ends."""
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for one in futures:
        one.add_done_callback(done.put)
    return done.get(timeout=SECONDS)


@pytest.mark.parametrize(
    ("wanted", "code", "reason", "named"),
    [
        ([(0x100, 0)], grpc.StatusCode.INVALID_ARGUMENT, "RANGE_EMPTY", "0x100"),
        ([(2**64 - 1, 2)], grpc.StatusCode.INVALID_ARGUMENT, "RANGE_OVERFLOW", "0xffffffffffffffff"),
        ([(2**64 - 1, 1)], grpc.StatusCode.OUT_OF_RANGE, "GFN_NOT_MAPPED", "0xffffffffffffffff"),
        ([(0x100, 4), (0x103, 1)], grpc.StatusCode.INVALID_ARGUMENT, "RANGES_NOT_ASCENDING", "0x103"),
        ([(0xFF, 2)], grpc.StatusCode.OUT_OF_RANGE, "GFN_NOT_MAPPED", "gfn 0xff "),
        ([(0x100, 0x101)], grpc.StatusCode.OUT_OF_RANGE, "GFN_NOT_MAPPED", "gfn 0x200 "),
        ([(2 * n, 1) for n in range(16_385)], grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID", "16385"),
    ],
    ids=["empty", "overflow", "last-gfn", "overlapping", "before-a-slot", "behind-a-slot", "too-many"],
)
def test_bad_ranges_are_refused_and_named(
    stubs: Stubs,
    new_vm: NewVm,
    method: str,
    wanted: list[tuple[int, int]],
    code: grpc.StatusCode,
    reason: str,
    named: str,
) -> None:
    vm = new_vm((1, 1))
    found = refused(lambda: call(stubs, method, vm, *wanted))
    assert (found.code, found.reason, found.domain) == (code, reason, "skeyd")
    assert named in found.message


@pytest.mark.parametrize(
    ("vm", "code", "reason"),
    [
        ("vms/nobody", grpc.StatusCode.NOT_FOUND, "VM_NOT_FOUND"),
        ("nobody", grpc.StatusCode.INVALID_ARGUMENT, "VM_ID_INVALID"),
        ("vms/../x", grpc.StatusCode.INVALID_ARGUMENT, "VM_ID_INVALID"),
        ("", grpc.StatusCode.INVALID_ARGUMENT, "VM_ID_INVALID"),
    ],
)
def test_a_vm_that_is_not_there_is_refused(
    stubs: Stubs, method: str, vm: str, code: grpc.StatusCode, reason: str
) -> None:
    found = refused(lambda: call(stubs, method, vm))
    assert (found.code, found.reason) == (code, reason)
    assert repr(vm) in found.message or vm in found.message


def test_many_readers_are_bounded_keep_no_short_call_waiting_and_end_with_their_worker(
    daemon: DaemonProcess, method: str
) -> None:
    with Stubs(daemon.target) as stubs:
        vm = stubs.create("large", (0, LARGE)).name
        stubs.set(vm, [(0, b"\x10")])
        calls = [begin(stubs, method, vm) for _ in range(SHARE + 1)]
        found = refusal(first_done(calls).exception())
        assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS_ON_VM")
        assert sum(one.done() for one in calls) == 1
        for other in ("DigestSkeys", "SummarizeSkeys"):
            assert refused(lambda other=other: call(stubs, other, vm)).reason == "TOO_MANY_CALLS_ON_VM"  # type: ignore[misc]
        _, write = stubs.send(header(vm, (0, 1)), chunk(0, b"\x20"))
        assert write is not None
        assert write.reason == "TOO_MANY_CALLS_ON_VM"

        assert check(stubs.channel, seconds=QUICKLY) == SERVING
        assert stubs.names() == [vm]
        small = stubs.create("small", (0, 1)).name

        os.kill(daemon.worker_pid("large"), signal.SIGKILL)
        for one in calls:
            found = refusal(one.exception(timeout=SECONDS))
            assert found.reason in ("WORKER_LOST", "VM_DEAD", "TOO_MANY_CALLS_ON_VM")
        assert refused(lambda: call(stubs, method, vm)).reason == "VM_DEAD"
        call(stubs, method, small)


@pytest.mark.parametrize("how", ["cancelled", "deadline", "worker-stands-still"])
def test_nothing_more_is_read_for_a_client_that_has_gone(daemon: DaemonProcess, method: str, how: str) -> None:
    with Stubs(daemon.target) as stubs:
        vm = stubs.create("large", (0, LARGE)).name
        stubs.set(vm, [(0, b"\x10")])
        # All slots that one VM may have are taken: whoever is refused has seen that the others are served.
        calls = [begin(stubs, method, vm, 3.0 if how == "deadline" else None) for _ in range(SHARE + 1)]
        first_done(calls)
        stopped = how == "worker-stands-still"
        if stopped:
            os.kill(daemon.worker_pid("large"), signal.SIGSTOP)
        for one in calls if how != "deadline" else ():
            one.cancel()
        for _ in range(SHARE):
            line = daemon.wait_for_line("rpc", method=f"/skeyd.v1.StorageKeyService/{method}")
            while line.get("reason") == "TOO_MANY_CALLS_ON_VM":
                line = daemon.wait_for_line("rpc", method=f"/skeyd.v1.StorageKeyService/{method}")
            # A worker that is stopped before it has said who it is can't be told from one that never will.
            assert line["code"] == "CANCELLED" or (stopped and line["reason"] == "VM_QUARANTINED")
            assert line.get("keys", 0) < LARGE * 256
        if how == "deadline":
            assert {one.exception().code() for one in calls} <= {
                grpc.StatusCode.DEADLINE_EXCEEDED,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            }
        if not stopped:
            call(stubs, method, vm, (0, 1))  # the slots are free again


def test_calls_that_never_send_their_request_keep_no_short_call_waiting(daemon: DaemonProcess, method: str) -> None:
    with Stubs(daemon.target) as stubs:
        name = f"/skeyd.v1.StorageKeyService/{method}"
        never: grpc.StreamStreamMultiCallable[bytes, bytes] = stubs.channel.stream_stream(name)
        sent = threading.Event()

        def requests() -> Iterator[bytes]:
            sent.wait()
            yield from ()

        calls = [never(requests()) for _ in range(CALL_THREADS + 1)]
        try:
            stubs.names()
            daemon.wait_for_line("rpc", method="/skeyd.v1.VmService/ListVms")
            lines = [line.get("method", "") for line in daemon.log]
            assert name not in lines, "it was answered only after one of them was cut off"
            daemon.wait_for_line("rpc", method=name, code="CANCELLED")
        finally:
            sent.set()
            for one in calls:
                one.cancel()


class Client:
    """A client that hangs up after it was looked for so often."""

    def __init__(self, looks: int) -> None:
        self._looks = looks

    def is_active(self) -> bool:
        """As grpc's context does."""
        self._looks -= 1
        return self._looks >= 0


def test_the_client_is_looked_for_before_each_slice() -> None:
    session = FakeSession((0, 4 * SLICE_KEYS))
    client: Any = Client(2)
    parts = parts_of(session, Ranges([GfnRange(0, 4 * SLICE_KEYS)]), 1.0, client)
    assert [next(parts)[0].start for _ in range(2)] == [0, SLICE_KEYS]
    before = len(session.read)
    with pytest.raises(Cancelled):
        next(parts)
    assert len(session.read) == before < 4


class Endless:
    """A call that never ends."""

    def is_active(self) -> bool:
        """As grpc's context does."""
        return True

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """As grpc's context does."""
        return True


def test_an_ioctl_may_take_as_long_as_the_request_says(
    stubs: Stubs, new_vm: NewVm, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    def pace(seconds: float) -> Pace:
        limits.append(seconds)
        return Pace(seconds)

    monkeypatch.setattr(bulk, "Pace", pace)
    client: Any = Client(10)
    list(parts_of(FakeSession((0, 2)), Ranges([GfnRange(0, 2)]), 0.25, client))
    assert limits == [0.25]
    made = getattr(pb, f"{method}Request")
    assert slice_seconds_of(made()) == DEFAULT_SLICE_SECONDS
    assert slice_seconds_of(made(max_slice_time=Duration(nanos=5_000_000))) == 0.005
    bad = made(vm=new_vm((0, 1)), max_slice_time=Duration(seconds=-1))
    found = refused(lambda: getattr(stubs.keys, method)(bad, timeout=SECONDS))
    assert (found.reason, "max_slice_time" in found.message) == ("REQUEST_INVALID", True)


def test_all_parts_come_while_the_client_is_there() -> None:
    session = FakeSession((0, 2), (6, 1))
    client: Any = Client(10)
    assert list(parts_of(session, Ranges([GfnRange(0, 7)]), 1.0, client)) == [
        (GfnRange(0, 2), bytes(map(key_of, (0, 1)))),
        (GfnRange(2, 4), None),
        (GfnRange(6, 1), bytes([key_of(6)])),
    ]


def test_a_worker_that_tells_of_impossible_keys_or_suddenly_of_none_is_found_out() -> None:
    session, client = FakeSession((0, 8)), Endless()
    session.impossible[5] = 0x31
    with pytest.raises(SkeydError, match="impossible key at gfn 0x5") as failed:
        list(parts_of(session, Ranges([GfnRange(0, 8)]), 1.0, client))
    assert failed.value.reason is Reason.WORKER_FAILED
    session.keyless_from = 7
    with pytest.raises(SkeydError, match="said to use none") as failed:
        list(parts_of(session, Ranges([GfnRange(0, 8)]), 1.0, client))
    assert failed.value.reason is Reason.WORKER_FAILED
