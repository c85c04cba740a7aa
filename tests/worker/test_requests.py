"""What a worker that is a real process does with requests, and with peers that break the protocol."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from skeyd.worker.packets import MESSAGE_MAX, encode
from skeyd.worker.protocol import BUFFER_BYTES, BUFFER_KEYS, SLICE_KEYS
from skeyd.worker.service import MAX_CONNECTIONS
from tests.worker.processes import WorkerProcess
from tests.worker.specs import simulated

Start = Callable[..., WorkerProcess]

SEGMENT = 256


# --- serving -------------------------------------------------------------------------------------------------------


def test_keys_go_in_and_come_out_through_the_two_buffers(worker: WorkerProcess) -> None:
    keys = bytes(range(0, 256, 2)) * 4
    with worker.meet() as front, front.shared() as buffers:
        buffers[: len(keys)] = keys
        asked = {"buffer": 0, "offset": 0, "start": 100, "count": len(keys)}
        for allow_enable in (True, False):
            done = front.ok(op="set", allow_enable=allow_enable, **asked)
            assert done.pop("ns") > 0
            assert done == {"repaired": 0, "enabled": allow_enable}
        # Two at once, the answers in the order of the requests.
        front.say(op="get", buffer=1, offset=0, start=100, count=512)
        front.say(op="get", buffer=0, offset=0, start=101, count=511)
        for _ in range(2):
            took = front.take()
            assert took is not None
            answer = took["ok"]
            assert (answer.keys(), answer["uses_keys"]) == ({"uses_keys", "ns"}, True)
            assert answer["ns"] > 0
        assert buffers[BUFFER_KEYS : BUFFER_KEYS + 512] == keys
        assert buffers[:511] == keys[1:]
        assert front.ok(op="status") == {"uses_keys": True}


def test_a_write_says_how_many_keys_the_kernel_had_lost(start: Start) -> None:
    worker = start(simulated((0, 4), kernel="4.19"))
    worker.first_line()
    with worker.meet() as front, front.shared() as buffers:
        buffers[: 4 * SEGMENT] = b"\x38" * 4 * SEGMENT
        answer = front.ok(op="set", buffer=0, offset=0, start=0, count=4 * SEGMENT, allow_enable=True)
        assert answer.pop("ns") > 0
        assert answer == {"repaired": 4, "enabled": True}
        front.ok(op="get", buffer=1, offset=0, start=0, count=4 * SEGMENT)
        assert buffers[BUFFER_KEYS : BUFFER_KEYS + 4 * SEGMENT] == b"\x38" * 4 * SEGMENT


def test_a_slice_lies_anywhere_in_a_buffer_up_to_its_end(start: Start) -> None:
    worker = start(simulated((0, SLICE_KEYS // SEGMENT)))
    worker.first_line()
    last = BUFFER_KEYS - SLICE_KEYS
    with worker.meet() as front, front.shared() as buffers:
        buffers[BUFFER_KEYS + last :] = b"\x38" * SLICE_KEYS
        front.ok(op="set", buffer=1, offset=last, start=0, count=SLICE_KEYS, allow_enable=True)
        front.ok(op="get", buffer=0, offset=0, start=0, count=SLICE_KEYS)
        front.ok(op="get", buffer=0, offset=BUFFER_KEYS - 5, start=0, count=5)
        assert buffers[:BUFFER_KEYS] == b"\x38" * SLICE_KEYS + bytes(last - 5) + b"\x38" * 5


def test_a_reader_of_a_keyless_guest_finds_its_buffer_untouched(shared_worker: WorkerProcess) -> None:
    with shared_worker.meet() as front, front.shared() as buffers:
        buffers[:4] = b"\xee" * 4
        assert not front.ok(op="get", buffer=0, offset=0, start=0, count=4)["uses_keys"]
        assert buffers[:4] == b"\xee" * 4


@pytest.mark.parametrize(
    ("keys", "asked", "reason"),
    [
        (b"\x01", {"start": 0, "count": 1, "allow_enable": True}, "KEY_RESERVED_BIT"),
        (b"\x10", {"start": 0, "count": 1, "allow_enable": False}, "SKEYS_NOT_ENABLED"),
        (b"\x10", {"start": 4 * SEGMENT, "count": 1, "allow_enable": True}, "GFN_NOT_MAPPED"),
        (b"\x10", {"start": 4 * SEGMENT - 1, "count": 2, "allow_enable": True}, "GFN_NOT_MAPPED"),
        (b"\x10", {"start": (1 << 64) - 1, "count": 2, "allow_enable": True}, "RANGE_OVERFLOW"),
        (b"\x10", {"start": 0, "count": SLICE_KEYS, "allow_enable": True}, "GFN_NOT_MAPPED"),
    ],
)
def test_a_write_that_is_refused_is_an_answer_and_enables_nothing(
    shared_worker: WorkerProcess, keys: bytes, asked: dict[str, object], reason: str
) -> None:
    with shared_worker.meet() as front, front.shared() as buffers:
        buffers[: len(keys)] = keys
        assert front.refused(op="set", buffer=0, offset=0, **asked) == reason
        assert front.ok(op="status") == {"uses_keys": False}


@pytest.mark.parametrize(("start_", "count"), [(4 * SEGMENT, 1), (4 * SEGMENT - 1, 2), ((1 << 64) - 1, 1)])
def test_a_read_of_frames_without_memory_is_refused_though_the_guest_is_keyless(
    shared_worker: WorkerProcess, start_: int, count: int
) -> None:
    with shared_worker.meet() as front, front.shared():
        assert front.refused(op="get", buffer=0, offset=0, start=start_, count=count) == "GFN_NOT_MAPPED"


# --- the buffers ---------------------------------------------------------------------------------------------------


def test_the_buffers_can_neither_be_cut_nor_grown(shared_worker: WorkerProcess) -> None:
    with shared_worker.meet() as front:
        fd = front.attach()
        try:
            assert os.fstat(fd).st_size == BUFFER_BYTES
            for size in (0, BUFFER_BYTES - 4096, BUFFER_BYTES + 4096):
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, size)
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            assert seals == fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        finally:
            os.close(fd)


def test_each_connection_has_buffers_of_its_own(shared_worker: WorkerProcess) -> None:
    with (
        shared_worker.meet() as one,
        shared_worker.meet() as other,
        one.shared() as first,
        other.shared() as second,
    ):
        first[0] = 0x38
        assert second[0] == 0


def test_the_buffers_of_a_connection_are_given_back_when_it_ends(shared_worker: WorkerProcess) -> None:
    def memfds() -> int:
        maps = Path(f"/proc/{shared_worker.pid}/maps").read_text().count("memfd:skeyd-keys")
        return maps + sum("memfd:" in link for link in shared_worker.open_files())

    for _ in range(3):
        with shared_worker.meet() as front, front.shared():
            assert memfds() > 0
        # It meets the next one after it has seen the end of the one before.
        assert shared_worker.serves()
        assert memfds() == 0


# --- peers that break the protocol ---------------------------------------------------------------------------------

NOT_ATTACHED: list[dict[str, object]] = [
    {"op": "get", "buffer": 0, "offset": 0, "start": 0, "count": 1},
    {"op": "set", "buffer": 0, "offset": 0, "start": 0, "count": 1, "allow_enable": True},
]
BAD_OPS: list[dict[str, object]] = [
    {},
    {"op": ""},
    {"op": "reboot"},
    {"op": None},
    {"op": 1},
    {"op": ["get"]},
    {"ok": {}},
]
BAD_SLICES: list[dict[str, object]] = [
    {"buffer": -1},
    {"buffer": 2},
    {"buffer": 1 << 70},
    {"buffer": True},
    {"buffer": None},
    {"buffer": "0"},
    {"offset": -1},
    {"offset": BUFFER_KEYS},
    {"offset": BUFFER_KEYS - 1, "count": 2},
    {"offset": BUFFER_KEYS - SLICE_KEYS + 1, "count": SLICE_KEYS},
    {"offset": None},
    {"offset": True},
    {"start": -1},
    {"start": 1 << 64},
    {"start": 1.0},
    {"start": None},
    {"count": 0},
    {"count": -1},
    {"count": SLICE_KEYS + 1},
    {"count": True},
    {"count": None},
]


@pytest.mark.parametrize("request_", [*NOT_ATTACHED, *BAD_OPS])
def test_a_request_that_breaks_the_protocol_ends_its_connection_and_no_other(
    shared_worker: WorkerProcess, request_: dict[str, object]
) -> None:
    with shared_worker.meet() as other, shared_worker.meet() as front:
        front.say(**request_)
        assert front.is_hung_up_on()
        assert other.ok(op="status") == {"uses_keys": False}


@pytest.mark.parametrize("op", ["get", "set"])
def test_a_slice_out_of_bounds_ends_its_connection_and_no_other(shared_worker: WorkerProcess, op: str) -> None:
    with shared_worker.meet() as other:
        for bad in BAD_SLICES:
            with shared_worker.meet() as front, front.shared():
                front.say(**{"op": op, "buffer": 0, "offset": 0, "start": 0, "count": 1, "allow_enable": True, **bad})
                assert front.is_hung_up_on(), bad
        assert other.ok(op="status") == {"uses_keys": False}


@pytest.mark.parametrize("allow", [None, 0, 1, "true"])
def test_a_write_that_does_not_say_whether_it_may_enable_sets_nothing(
    shared_worker: WorkerProcess, allow: object
) -> None:
    with shared_worker.meet() as front, front.shared():
        front.say(op="set", buffer=0, offset=0, start=0, count=1, allow_enable=allow)
        assert front.is_hung_up_on()
    with shared_worker.meet() as front:
        assert front.ok(op="status") == {"uses_keys": False}


def test_attaching_twice_ends_the_connection(shared_worker: WorkerProcess) -> None:
    with shared_worker.meet() as front, front.shared():
        front.say(op="attach")
        assert front.is_hung_up_on()
    assert shared_worker.serves()


@pytest.mark.parametrize(
    "packet",
    [b"", b"\0", b"{", b"[]", b"null", b"\xff" * 100, b"[" * 60_000, b"{}" + b" " * MESSAGE_MAX],
    ids=["empty", "zero", "half", "array", "null", "no text", "deep", "too long"],
)
@pytest.mark.parametrize("with_fd", [False, True])
def test_garbage_ends_its_connection_and_no_other(shared_worker: WorkerProcess, packet: bytes, with_fd: bool) -> None:
    with shared_worker.meet() as other, shared_worker.meet() as front:
        if with_fd:
            socket.send_fds(front.socket, [packet], [front.socket.fileno()])
        else:
            front.socket.send(packet)
        assert front.is_hung_up_on()
        assert other.ok(op="status") == {"uses_keys": False}


def test_descriptors_that_nobody_asked_for_are_not_kept(shared_worker: WorkerProcess) -> None:
    with shared_worker.meet() as front:
        before = shared_worker.open_files()
        for _ in range(5):
            socket.send_fds(front.socket, [encode({"op": "status"})], [front.socket.fileno()])
            assert front.take() == {"ok": {"uses_keys": False}}
        assert shared_worker.open_files() == before


@pytest.mark.parametrize("op", ["status", "attach", "get", "set"])
def test_a_front_that_dies_in_the_middle_of_a_request_harms_nobody(worker: WorkerProcess, op: str) -> None:
    for _ in range(3):
        with worker.meet() as front:
            if op in ("get", "set"):
                os.close(front.attach())
            for _ in range(3 if op != "attach" else 1):
                front.say(op=op, buffer=0, offset=0, start=0, count=1, allow_enable=True)
    assert worker.serves()


def test_a_front_that_hangs_up_before_the_hello_harms_nobody(shared_worker: WorkerProcess) -> None:
    for _ in range(20):
        shared_worker.connect().close()
    assert shared_worker.serves()


def test_a_peer_that_never_reads_its_answers_is_hung_up_on_and_nobody_waits_for_it(
    shared_worker: WorkerProcess,
) -> None:
    with shared_worker.meet() as deaf:

        def ask_for_ever() -> None:
            while True:
                deaf.say(op="status")

        with pytest.raises(OSError, match=r"Broken pipe|Connection reset") as ended:
            ask_for_ever()
        assert ended.value.errno in (errno.EPIPE, errno.ECONNRESET)
        assert shared_worker.serves()


def test_one_connection_too_many_is_hung_up_on_and_a_place_that_is_given_back_can_be_had(
    shared_worker: WorkerProcess,
) -> None:
    with ExitStack() as undo:
        fronts = [undo.enter_context(shared_worker.meet()) for _ in range(MAX_CONNECTIONS)]
        with shared_worker.connect() as one_too_many:
            assert one_too_many.is_hung_up_on()
        assert fronts[-1].ok(op="status") == {"uses_keys": False}
        fronts[0].close()
        # The worker takes things in their order: after this answer it knows of the place.
        fronts[-1].ok(op="status")
        undo.enter_context(shared_worker.meet())
