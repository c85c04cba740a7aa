"""A front that talks with workers that lie, stall, break off: the right reason, and nothing left open."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.limits import WORKER_ANSWER_SECONDS, WORKER_HELLO_SECONDS
from skeyd.linux import Peer
from skeyd.vms import session as session_module
from skeyd.vms.hang_up import HangUp
from skeyd.vms.session import Session
from skeyd.worker.outcomes import Begun, LastWrite
from skeyd.worker.protocol import (
    BUFFER_BYTES,
    BUFFER_KEYS,
    MESSAGE_MAX,
    PROTOCOL,
    SLICE_KEYS,
    ProtocolError,
    error_message,
)
from tests.vms.fake_worker import Caller, FakeWorker, Script, answers, hello, says
from tests.worker.processes import SECONDS, WorkerProcess
from tests.worker.specs import UID, simulated

OK: dict[str, Any] = {"ok": {}}
READ: dict[str, Any] = {"ok": {"uses_keys": True, "ns": 1}}
"""A good answer to "get"."""
FRAMES = GfnRange(0x100, 4)
Use = Callable[[Session], object]


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _session(path: Path) -> Iterator[Session]:
    with _directory(path) as fd, Session.connect(fd) as session:
        yield session


def _read(session: Session) -> list[tuple[GfnRange, bytes | None]]:
    return list(session.read_slices([FRAMES]))


def _write(session: Session) -> tuple[int, bool]:
    repaired, enabled, _ = session.write_slice(FRAMES, b"\x10\x20\x30\x40", allow_enable=True)
    return repaired, enabled


def _refusal(path: Path, script: Script, use: Use) -> SkeydError:
    with FakeWorker(path, script), _session(path) as session, pytest.raises(SkeydError) as refused:
        use(session)
    return refused.value


# --- hello ---------------------------------------------------------------------------------------------------------


def test_a_worker_that_says_who_it_is_is_known(runtime_dir: Path) -> None:
    with FakeWorker(runtime_dir, answers([("status", {"ok": {"uses_keys": True}})])), _session(runtime_dir) as session:
        assert (session.hello.vm_id, session.hello.uid, session.hello.pid) == ("web", UID, os.getpid())
        assert list(session.memory_map.mapped) == [GfnRange(0, 1 << 20)]
        assert session.uses_keys()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        pytest.param(
            hello(protocol=PROTOCOL + 1), f"protocol is no number from {PROTOCOL} to {PROTOCOL}", id="another protocol"
        ),
        pytest.param(
            hello(protocol=PROTOCOL - 1), f"protocol is no number from {PROTOCOL} to {PROTOCOL}", id="an older protocol"
        ),
        pytest.param(hello(pid=1), r"says it is pid 1, the kernel says pid \d+", id="another process"),
        pytest.param(hello(id="../web"), "id is no text", id="a bad id"),
        pytest.param(hello(slots=[]), "without memory slots", id="no memory"),
        pytest.param(
            hello(slots=[{"slot": 0, "start": 0, "count": 2, "backing": "none"}] * 2), "overlap", id="memory twice"
        ),
        pytest.param({"ok": {}}, "hello: protocol", id="another message"),
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\n", "hello is no JSON", id="another program"),
        pytest.param(b"\xff" * 1000, "hello is no JSON", id="no text"),
        pytest.param(b"[]", "hello is no object", id="no object"),
        pytest.param(b"[" * 60_000, "hello is no JSON", id="deep"),
        pytest.param(json.dumps(hello()).encode() + b" " * MESSAGE_MAX, "longer than a packet", id="too long"),
    ],
)
def test_what_answers_and_is_no_worker_of_this_protocol_is_refused(
    runtime_dir: Path, said: dict[str, Any] | bytes, why: str
) -> None:
    with (
        FakeWorker(runtime_dir, says(said)),
        _directory(runtime_dir) as fd,
        pytest.raises(ProtocolError, match=why),
    ):
        Session.connect(fd)


def test_a_worker_of_another_user_is_refused_before_it_says_anything(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only root could make one for real; the kernel's word is faked here and nothing else.
    other = Peer(os.getpid(), os.geteuid() + 1, 0)
    monkeypatch.setattr(session_module, "peer_of", lambda _: other)
    with (
        FakeWorker(runtime_dir, says(hello())),
        _directory(runtime_dir) as fd,
        pytest.raises(ProtocolError, match=f"belongs to uid {other.uid}"),
    ):
        Session.connect(fd)


def test_a_hello_that_brings_a_descriptor_is_a_hello_and_the_descriptor_is_closed(runtime_dir: Path) -> None:
    def script(caller: Caller) -> None:
        caller.say(hello(), caller.connection.fileno())
        caller.wait_for_end()

    with FakeWorker(runtime_dir, script), _session(runtime_dir) as session:
        assert session.hello.vm_id == "web"


def test_a_worker_that_hangs_up_before_its_hello_is_an_oserror(runtime_dir: Path) -> None:
    with (
        FakeWorker(runtime_dir, lambda _: None),
        _directory(runtime_dir) as fd,
        pytest.raises(ConnectionResetError),
    ):
        Session.connect(fd)


def test_a_worker_that_never_says_who_it_is_is_a_timeout(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "WORKER_HELLO_SECONDS", 0.01)
    with FakeWorker(runtime_dir, says()), _directory(runtime_dir) as fd, pytest.raises(TimeoutError):
        Session.connect(fd)


def test_where_nobody_listens_it_is_known_whether_there_is_a_socket(runtime_dir: Path) -> None:
    with _directory(runtime_dir) as fd:
        with pytest.raises(FileNotFoundError):
            Session.connect(fd)
        FakeWorker(runtime_dir).close()
        with pytest.raises(ConnectionRefusedError):
            Session.connect(fd)


# --- the buffers ---------------------------------------------------------------------------------------------------


def _memfd(size: int, seals: int) -> int:
    fd = os.memfd_create("skeyd-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _reader() -> list[int]:
    reader, writer = os.pipe()
    os.close(writer)
    return [reader]


_SEALED = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

BAD_MEMORY: dict[str, Callable[[], list[int]]] = {
    "none": list,
    "unsealed": lambda: [_memfd(BUFFER_BYTES, 0)],
    "can be cut": lambda: [_memfd(BUFFER_BYTES, _SEALED & ~fcntl.F_SEAL_SHRINK)],
    "can be unsealed": lambda: [_memfd(BUFFER_BYTES, _SEALED & ~fcntl.F_SEAL_SEAL)],
    "too short": lambda: [_memfd(BUFFER_BYTES - 4096, _SEALED)],
    "empty": lambda: [_memfd(0, _SEALED)],
    "too long": lambda: [_memfd(BUFFER_BYTES + 4096, _SEALED)],
    "read only": lambda: [_memfd(BUFFER_BYTES, _SEALED | fcntl.F_SEAL_WRITE)],
    "a pipe": _reader,
    "two": lambda: [_memfd(BUFFER_BYTES, _SEALED), _memfd(BUFFER_BYTES, _SEALED)],
}


@pytest.mark.parametrize("use", [_read, _write])
@pytest.mark.parametrize("memory", BAD_MEMORY)
def test_memory_that_cannot_be_trusted_is_not_mapped(runtime_dir: Path, memory: str, use: Use) -> None:
    def script(caller: Caller) -> None:
        caller.say(hello())
        assert caller.take() == {"op": "attach"}
        fds = BAD_MEMORY[memory]()
        caller.say(OK, *fds)
        for fd in fds:
            os.close(fd)
        caller.wait_for_end()

    refusal = _refusal(runtime_dir, script, use)
    assert refusal.reason is Reason.WORKER_FAILED
    assert refusal.metadata == {"vm": "vms/web"}


def test_memory_that_comes_with_a_refusal_is_not_mapped(runtime_dir: Path) -> None:
    def script(caller: Caller) -> None:
        caller.say(hello())
        caller.take()
        fd = _memfd(BUFFER_BYTES, _SEALED)
        caller.say({"error": {"reason": "OUT_OF_MEMORY", "message": "no", "metadata": {}}}, fd)
        os.close(fd)
        caller.wait_for_end()

    assert _refusal(runtime_dir, script, _read).reason is Reason.OUT_OF_MEMORY


# --- answers -------------------------------------------------------------------------------------------------------

NO_ANSWER: list[dict[str, Any] | bytes] = [
    b"{",
    b"[]",
    b"null",
    b"\xff",
    b"{}" + b" " * MESSAGE_MAX,
    {},
    {"ok": None},
    {"ok": []},
    {"ok": {}},
    {"error": "no"},
    {"error": {"reason": "VM_DEAD"}},
]
BAD_FLAGS: list[Any] = [None, 0, 1, "true", [], {}]
BAD_COUNTS: list[Any] = [None, -1, FRAMES.count + 1, 1 << 64, True, 1.0, "1", []]

BAD_TIMES: list[Any] = [None, -1, (1 << 62) + 1, True, 1.0, "1", []]
ONE = {"uses_keys": True, "key": 0x30, "repaired": False}
UNCERTAIN = {"set": str(FRAMES), "keyop": "0x7-0x7"}
"""By op: what nobody knows of after it was asked for and not answered."""


def _sske(session: Session) -> object:
    return session.keyop("sske", 7, 0x40)


def _rrbe(session: Session) -> object:
    return session.keyop("rrbe", 7)


def _begin(session: Session) -> Begun:
    return session.begin("mine", "0" * 64, keep=True, resume=False)


def _commit(session: Session) -> Begun:
    return session.commit(8, 2)


def _require_unused(session: Session) -> None:
    session.require_unused("mine", "f" * 64)


def _begin_nameless(session: Session) -> Begun:
    return session.begin("", "0" * 64, keep=True, resume=True)


BEGUN = Begun("begun", 0, 0, 0, False).to_message()
LAST = LastWrite("rolled_back", "mine", 4, 1, False, 4).to_message()
NO_LAST: list[Any] = [[], 1, "no", {}, {**LAST, "outcome": "unchanged"}, {**LAST, "dirty": [{"start": 0, "count": 1}]}]
"""What is sent as "last_write" and is none."""
BAD_BEGUN: list[dict[str, Any]] = [
    {"state": "kept"},
    {"state": "resumed"},  # nobody asked for that
    {"keys_set": 1},  # nothing can be set yet
    {"keys_set": -1},
    {"crc32": 1 << 32},
    {"enabled": None},
]

BAD_ANSWERS: list[tuple[str, Use, dict[str, Any] | bytes]] = [
    *(("status", Session.uses_keys, answer) for answer in NO_ANSWER),
    *(("status", Session.uses_keys, {"ok": {"uses_keys": flag}}) for flag in BAD_FLAGS),
    *(("get", _read, answer) for answer in NO_ANSWER),
    *(("get", _read, {"ok": {"uses_keys": flag, "ns": 1}}) for flag in BAD_FLAGS),
    *(("get", _read, {"ok": {"uses_keys": True, "ns": ns}}) for ns in BAD_TIMES),
    *(("set", _write, answer) for answer in NO_ANSWER),
    *(("set", _write, {"ok": {"repaired": count, "enabled": True, "ns": 1}}) for count in BAD_COUNTS),
    *(("set", _write, {"ok": {"repaired": 0, "enabled": flag, "ns": 1}}) for flag in BAD_FLAGS),
    *(("set", _write, {"ok": {"repaired": 0, "enabled": True, "ns": time}}) for time in (None, -1, "1", 1.5, 1 << 63)),
    *(("keyop", _sske, answer) for answer in NO_ANSWER),
    *(("keyop", _sske, {"ok": {**ONE, "key": key}}) for key in (None, -1, 256, True, "1", 0x01, 0x31)),
    *(("keyop", _rrbe, {"ok": {**ONE, "key": key}}) for key in (0x01, 0x08, 0x16, 0x80)),
    *(("keyop", _sske, {"ok": {**ONE, "uses_keys": flag}}) for flag in BAD_FLAGS),
    *(("keyop", _sske, {"ok": {**ONE, "repaired": flag}}) for flag in BAD_FLAGS),
    *(("shutdown", Session.shut_down, answer) for answer in NO_ANSWER if answer != {"ok": {}}),
    *(("status", Session.status, {"ok": {"uses_keys": True, "last_write": last}}) for last in NO_LAST),
    *(("begin", _begin, answer) for answer in NO_ANSWER),
    *(("begin", _begin, {"ok": {**BEGUN, **bad}}) for bad in BAD_BEGUN),
    # What has no name can't have been applied before.
    ("begin", _begin_nameless, {"ok": {**BEGUN, "state": "applied"}}),
    *(("commit", _commit, answer) for answer in NO_ANSWER),
    *(("require_unused", _require_unused, answer) for answer in NO_ANSWER if answer != {"ok": {}}),
    *(("commit", _commit, {"ok": {**BEGUN, "state": state}}) for state in ("kept", "begun", "resumed")),
    *(("abandon", Session.abandon, answer) for answer in NO_ANSWER if answer != {"ok": {}}),
    *(("abandon", Session.abandon, {"ok": {"last_write": last}}) for last in NO_LAST),
]


def _after_attaching(op: str, then: Callable[[Caller], None]) -> Script:
    # A worker that is a good one until it gets the request that matters.
    def script(caller: Caller) -> None:
        caller.say(hello())
        if op in ("get", "set"):
            os.close(caller.attach())
        assert caller.take()["op"] == op
        then(caller)

    return script


@pytest.mark.parametrize(("op", "use", "answer"), BAD_ANSWERS)
def test_an_answer_that_is_none_is_a_failed_worker(
    runtime_dir: Path, op: str, use: Use, answer: dict[str, Any] | bytes
) -> None:
    def then(caller: Caller) -> None:
        caller.say(answer)
        caller.wait_for_end()

    refusal = _refusal(runtime_dir, _after_attaching(op, then), use)
    assert refusal.reason is Reason.WORKER_FAILED
    assert refusal.metadata["vm"] == "vms/web"
    # What a write did that was answered with nonsense nobody knows.
    assert refusal.metadata.get("uncertain") == UNCERTAIN.get(op)


USES: list[tuple[str, Use]] = [
    ("status", Session.uses_keys),
    ("attach", _read),
    ("attach", _write),
    ("get", _read),
    ("set", _write),
    ("keyop", _sske),
    ("shutdown", Session.shut_down),
    ("begin", _begin),
    ("commit", _commit),
    ("require_unused", _require_unused),
    ("abandon", Session.abandon),
]


@pytest.mark.parametrize(("op", "use"), USES)
def test_a_worker_that_hangs_up_instead_of_answering_was_lost(runtime_dir: Path, op: str, use: Use) -> None:
    refusal = _refusal(runtime_dir, _after_attaching(op, lambda _: None), use)
    assert refusal.reason is Reason.WORKER_LOST
    assert refusal.metadata["vm"] == "vms/web"
    assert refusal.metadata.get("uncertain") == UNCERTAIN.get(op)


@pytest.mark.parametrize(("op", "use"), USES)
def test_a_worker_that_never_answers_was_lost(
    runtime_dir: Path, op: str, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask_impatiently(session: Session) -> object:
        if op in ("get", "set"):
            session._attached()  # in good time; only what comes after is not answered
        session._channel.connection.settimeout(0.01)
        monkeypatch.setattr(session_module, "WORKER_HELLO_SECONDS", 0.01)  # a status has no more time than a hello
        return use(session)

    refusal = _refusal(runtime_dir, _after_attaching(op, Caller.wait_for_end), ask_impatiently)
    assert refusal.reason is Reason.WORKER_LOST
    assert "did not answer in time" in refusal.message
    assert refusal.metadata.get("uncertain") == UNCERTAIN.get(op)


@pytest.mark.parametrize("brief", [False, True], ids=["a-slice", "a-brief-question"])
@pytest.mark.parametrize("answer", [{"ok": {"uses_keys": True}}, {"error": {"reason": "OUT_OF_MEMORY"}}])
def test_a_worker_has_its_time_for_what_is_asked_next_whatever_it_said_before(
    runtime_dir: Path, answer: dict[str, Any], brief: bool
) -> None:
    if "error" in answer:
        answer["error"].update(message="no", metadata={})
    with FakeWorker(runtime_dir, answers([("status", answer)])), _session(runtime_dir) as session:
        if brief:
            session.be_brief()
        with suppress(SkeydError):
            session.uses_keys()
        seconds = WORKER_HELLO_SECONDS if brief else WORKER_ANSWER_SECONDS
        assert session._channel.connection.gettimeout() == seconds


def test_a_session_is_not_quiet_while_an_answer_is_awaited(runtime_dir: Path) -> None:
    may_answer = threading.Event()

    def script(caller: Caller) -> None:
        caller.say(hello())
        assert caller.take() == {"op": "status"}
        assert may_answer.wait(SECONDS)
        caller.say({"ok": {"uses_keys": True}})
        caller.wait_for_end()

    with FakeWorker(runtime_dir, script), _session(runtime_dir) as session:
        try:
            assert session.is_quiet()
            session._send({"op": "status"})
            # Nothing has come that was not taken, and it will.
            assert not session.is_quiet()
        finally:
            may_answer.set()
        assert session._take().boolean("uses_keys")
        assert session.is_quiet()


@pytest.mark.parametrize(
    ("limit", "op", "use"),
    [("WORKER_HELLO_SECONDS", "status", Session.uses_keys), ("WORKER_ANSWER_SECONDS", "shutdown", Session.shut_down)],
)
def test_a_worker_has_its_time_to_answer_and_no_more(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, limit: str, op: str, use: Use
) -> None:
    with FakeWorker(runtime_dir, _after_attaching(op, Caller.wait_for_end)), _directory(runtime_dir) as fd:
        if limit == "WORKER_ANSWER_SECONDS":
            monkeypatch.setattr(session_module, limit, 0.01)
        with Session.connect(fd) as session:
            monkeypatch.setattr(session_module, limit, 0.01)  # not before it has said hello
            with pytest.raises(SkeydError, match="did not answer in time"):
                use(session)


@pytest.mark.parametrize("use", [Session.uses_keys, _read, _write, Session.shut_down])
def test_a_worker_that_is_gone_before_it_is_asked_was_lost_and_nothing_is_uncertain(
    runtime_dir: Path, use: Use
) -> None:
    with FakeWorker(runtime_dir, lambda caller: caller.say(hello())) as worker, _session(runtime_dir) as session:
        worker.close()  # the connection is closed for sure when this returns
        with pytest.raises(SkeydError) as refused:
            use(session)
    assert refused.value.reason is Reason.WORKER_LOST
    assert "uncertain" not in refused.value.metadata


@pytest.mark.parametrize(("op", "use"), [one for one in USES if one[0] != "attach"])
def test_a_workers_refusal_arrives_as_it_was_raised(runtime_dir: Path, op: str, use: Use) -> None:
    error = {"reason": "KEYS_NOT_STORED", "message": "lost", "metadata": {"gfn": "0x101", "uncertain": "0x1-0x2"}}

    def then(caller: Caller) -> None:
        caller.say({"error": error})
        caller.wait_for_end()

    refusal = _refusal(runtime_dir, _after_attaching(op, then), use)
    assert refusal.reason is Reason.KEYS_NOT_STORED
    assert refusal.metadata == {"gfn": "0x101", "uncertain": "0x1-0x2"}


def test_a_refusal_of_a_write_by_the_worker_leaves_nothing_uncertain_unless_it_says_so(runtime_dir: Path) -> None:
    def then(caller: Caller) -> None:
        caller.say({"error": {"reason": "SKEYS_NOT_ENABLED", "message": "no", "metadata": {}}})
        caller.wait_for_end()

    refusal = _refusal(runtime_dir, _after_attaching("set", then), _write)
    assert refusal.metadata == {}


def test_a_descriptor_that_comes_with_an_answer_is_closed(runtime_dir: Path) -> None:
    def then(caller: Caller) -> None:
        caller.say({"ok": {"uses_keys": True}}, caller.connection.fileno())
        caller.wait_for_end()

    with FakeWorker(runtime_dir, _after_attaching("status", then)), _session(runtime_dir) as session:
        assert session.uses_keys()


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

    with FakeWorker(runtime_dir, script), _session(runtime_dir) as session:
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
    with FakeWorker(runtime_dir, script), _session(runtime_dir) as session:
        session.hold_by(hang_up)
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(_read, session)
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
    with FakeWorker(runtime_dir, says()), _directory(runtime_dir) as fd, pytest.raises(ConnectionResetError):
        Session.connect(fd, hang_up)
    assert hang_up._connection is None, "what is closed is let go of"


def test_a_hang_up_after_the_worker_is_gone_is_no_error(runtime_dir: Path) -> None:
    with FakeWorker(runtime_dir, lambda caller: caller.say(hello())) as worker, _session(runtime_dir) as session:
        hang_up = HangUp()
        session.hold_by(hang_up)
        worker.close()
        hang_up.now()


def test_slices_of_a_guest_that_uses_no_keys_are_none(runtime_dir: Path) -> None:
    def then(caller: Caller) -> None:
        caller.say({"ok": {"uses_keys": False, "ns": 1}})
        caller.wait_for_end()

    with FakeWorker(runtime_dir, _after_attaching("get", then)), _session(runtime_dir) as session:
        assert _read(session) == [(FRAMES, None)]


def test_a_worker_that_dies_after_the_first_of_two_slices_was_lost_and_the_first_was_read(runtime_dir: Path) -> None:
    def then(caller: Caller) -> None:
        caller.say(READ)
        caller.take()

    with FakeWorker(runtime_dir, _after_attaching("get", then)), _session(runtime_dir) as session:
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

    with FakeWorker(runtime_dir, script), _session(runtime_dir) as session:
        ((_, keys),) = _read(session)
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

    with FakeWorker(runtime_dir, script), _session(runtime_dir) as session:
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
    with FakeWorker(runtime_dir, script), _session(runtime_dir) as session:
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

    with FakeWorker(runtime_dir, _after_attaching("set", then)), _session(runtime_dir) as session:
        assert _write(session) == (FRAMES.count, False)


# --- a real worker -------------------------------------------------------------------------------------------------


def test_keys_go_in_and_come_out_of_a_real_worker(runtime_dir: Path) -> None:
    whole = SLICE_KEYS + 512
    with WorkerProcess(runtime_dir, simulated((0, (whole + 255) // 256), kernel="4.19")) as worker:
        assert worker.first_line() == OK
        with _session(runtime_dir) as session:
            assert not session.uses_keys()
            keys = bytes(range(0, 256, 2)) * (SLICE_KEYS // 128)
            repaired, enabled, took = session.write_slice(GfnRange(0, SLICE_KEYS), keys, allow_enable=True)
            # The first non-zero key of every MiB was lost at first.
            assert (repaired, enabled) == (SLICE_KEYS // 256, True)
            assert took > 0
            slices = [GfnRange(0, SLICE_KEYS), GfnRange(SLICE_KEYS, 512), GfnRange(1, 3)]
            found = list(session.read_slices(slices))
            assert [frames for frames, _ in found] == slices
            assert [part for _, part in found] == [keys, bytes(512), keys[1:4]]
        with _session(runtime_dir) as session:
            session.shut_down()
        assert worker.process.wait(30) == 0


def test_a_real_worker_that_is_killed_was_lost(runtime_dir: Path) -> None:
    with WorkerProcess(runtime_dir, simulated((0, 4))) as worker:
        worker.first_line()
        with _session(runtime_dir) as session:
            assert _write(session) == (0, True)
            worker.process.kill()
            worker.process.wait(30)
            for use in (_write, _read, Session.uses_keys):
                with pytest.raises(SkeydError) as refused:
                    use(session)
                assert refused.value.reason is Reason.WORKER_LOST


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

    with FakeWorker(runtime_dir, script), _session(runtime_dir) as session:
        assert session.keyop("sske", 7, 0x40) == found
    assert asked == [{"op": "keyop", "operation": "sske", "gfn": 7, "key": 0x40}]


def test_a_read_that_was_not_answered_leaves_nothing_uncertain(runtime_dir: Path) -> None:
    def use(session: Session) -> object:
        return session.keyop("iske", 7)

    assert "uncertain" not in _refusal(runtime_dir, _after_attaching("keyop", lambda _: None), use).metadata


@contextmanager
def _served(worker: WorkerProcess) -> Iterator[None]:
    assert worker.first_line() == OK
    yield


def test_a_real_worker_takes_keyop(runtime_dir: Path) -> None:
    with (
        WorkerProcess(runtime_dir, simulated((0, 4), kernel="7.2")) as worker,
        _served(worker),
        _session(runtime_dir) as session,
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

    with FakeWorker(runtime_dir, script), _session(runtime_dir) as session:
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

    with FakeWorker(runtime_dir, script), _session(runtime_dir) as session:
        _require_unused(session)
    assert asked == [{"op": "require_unused", "request_id": "mine", "fingerprint": "f" * 64}]


def test_what_became_of_a_call_is_what_the_worker_says(runtime_dir: Path) -> None:
    last = LastWrite("dirty", "mine", 4, 1, True, 4, (GfnRange(0, 4),))
    pairs: list[tuple[str, dict[str, Any] | bytes]] = [
        ("abandon", {"ok": {}}),
        ("abandon", {"ok": {"last_write": last.to_message()}}),
        ("status", {"ok": {"uses_keys": True, "last_write": last.to_message()}}),
        ("status", {"ok": {"uses_keys": False}}),
    ]
    with FakeWorker(runtime_dir, answers(pairs)), _session(runtime_dir) as session:
        assert session.abandon() is None
        assert session.abandon() == last
        assert session.status() == (True, last)
        assert session.status() == (False, None)


@pytest.mark.parametrize(("op", "use"), [("begin", _begin), ("set", _write), ("keyop", _sske)])
def test_a_worker_that_is_busy_is_so_in_the_words_of_the_fronts_own_lock(runtime_dir: Path, op: str, use: Use) -> None:
    def then(caller: Caller) -> None:
        caller.say(error_message(SkeydError(Reason.VM_BUSY, "a SetSkeys is being rolled back on this VM")))
        caller.wait_for_end()

    refusal = _refusal(runtime_dir, _after_attaching(op, then), use)
    assert refusal.reason is Reason.VM_BUSY
    assert refusal.message == "vms/web is busy: a SetSkeys is being rolled back on this VM"
    assert refusal.metadata == {"vm": "vms/web"}


def test_a_real_worker_takes_back_what_was_not_committed_when_the_front_hangs_up(runtime_dir: Path) -> None:
    frames = GfnRange(0, 4)
    with WorkerProcess(runtime_dir, simulated((0, 4))) as worker, _served(worker):
        with _session(runtime_dir) as session:
            session.write_slice(frames, b"\x10\x20\x30\x46", True)
            session.begin("mine", "0" * 64, keep=False, resume=False)
            session.write_slice(frames, b"\xf8" * 4, False)
        with _session(runtime_dir) as session:
            end = time.monotonic() + SECONDS
            while (last := session.status()[1]) is None or last.outcome == "rolling_back":
                assert time.monotonic() < end
            assert (last.outcome, last.request_id, last.keys_set) == ("rolled_back", "mine", 4)
            assert list(session.read_slices([frames])) == [(frames, b"\x10\x20\x30\x46")]
