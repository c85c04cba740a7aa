"""A front that talks with workers that lie, stall, break off: the right reason, and nothing left open."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.limits import WORKER_ANSWER_SECONDS, WORKER_HELLO_SECONDS
from skeyd.vms import session as session_module
from skeyd.vms.session import Session
from skeyd.worker.packets import MESSAGE_MAX
from tests.vms.fake_worker import Caller, FakeWorker, answers, hello
from tests.vms.sessions import (
    BEGUN,
    FRAMES,
    LAST,
    ONE,
    Use,
    after_attaching,
    begin,
    begin_nameless,
    commit,
    directory_of,
    opened,
    read_frames,
    refusal_of,
    require_unused,
    rrbe,
    sske,
    write_frames,
)
from tests.worker.processes import SECONDS

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
BAD_WRITE_TIMES: list[Any] = [None, -1, "1", 1.5, 1 << 63]
UNCERTAIN = {"set": str(FRAMES), "keyop": "0x7-0x7"}
"""By op: what nobody knows of after it was asked for and not answered."""


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
    *(("get", read_frames, answer) for answer in NO_ANSWER),
    *(("get", read_frames, {"ok": {"uses_keys": flag, "ns": 1}}) for flag in BAD_FLAGS),
    *(("get", read_frames, {"ok": {"uses_keys": True, "ns": ns}}) for ns in BAD_TIMES),
    *(("set", write_frames, answer) for answer in NO_ANSWER),
    *(("set", write_frames, {"ok": {"repaired": count, "enabled": True, "ns": 1}}) for count in BAD_COUNTS),
    *(("set", write_frames, {"ok": {"repaired": 0, "enabled": flag, "ns": 1}}) for flag in BAD_FLAGS),
    *(
        ("set", write_frames, {"ok": {"repaired": 0, "enabled": True, "ns": time}})
        for time in (None, -1, "1", 1.5, 1 << 63)
    ),
    *(("keyop", sske, answer) for answer in NO_ANSWER),
    *(("keyop", sske, {"ok": {**ONE, "key": key}}) for key in (None, -1, 256, True, "1", 0x01, 0x31)),
    *(("keyop", rrbe, {"ok": {**ONE, "key": key}}) for key in (0x01, 0x08, 0x16, 0x80)),
    *(("keyop", sske, {"ok": {**ONE, "uses_keys": flag}}) for flag in BAD_FLAGS),
    *(("keyop", sske, {"ok": {**ONE, "repaired": flag}}) for flag in BAD_FLAGS),
    *(("shutdown", Session.shut_down, answer) for answer in NO_ANSWER if answer != {"ok": {}}),
    *(("status", Session.status, {"ok": {"uses_keys": True, "last_write": last}}) for last in NO_LAST),
    *(("begin", begin, answer) for answer in NO_ANSWER),
    *(("begin", begin, {"ok": {**BEGUN, **bad}}) for bad in BAD_BEGUN),
    # What has no name can't have been applied before.
    ("begin", begin_nameless, {"ok": {**BEGUN, "state": "applied"}}),
    *(("commit", commit, answer) for answer in NO_ANSWER),
    *(("require_unused", require_unused, answer) for answer in NO_ANSWER if answer != {"ok": {}}),
    *(("commit", commit, {"ok": {**BEGUN, "state": state}}) for state in ("kept", "begun", "resumed")),
    *(("abandon", Session.abandon, answer) for answer in NO_ANSWER if answer != {"ok": {}}),
    *(("abandon", Session.abandon, {"ok": {"last_write": last}}) for last in NO_LAST),
]


@pytest.mark.parametrize(("op", "use", "answer"), BAD_ANSWERS)
def test_an_answer_that_is_none_is_a_failed_worker(
    runtime_dir: Path, op: str, use: Use, answer: dict[str, Any] | bytes
) -> None:
    def then(caller: Caller) -> None:
        caller.say(answer)
        caller.wait_for_end()

    refusal = refusal_of(runtime_dir, after_attaching(op, then), use)
    assert refusal.reason is Reason.WORKER_FAILED
    assert refusal.metadata["vm"] == "vms/web"
    # What a write did that was answered with nonsense nobody knows.
    assert refusal.metadata.get("uncertain") == UNCERTAIN.get(op)


USES: list[tuple[str, Use]] = [
    ("status", Session.uses_keys),
    ("attach", read_frames),
    ("attach", write_frames),
    ("get", read_frames),
    ("set", write_frames),
    ("keyop", sske),
    ("shutdown", Session.shut_down),
    ("begin", begin),
    ("commit", commit),
    ("require_unused", require_unused),
    ("abandon", Session.abandon),
]


@pytest.mark.parametrize(("op", "use"), USES)
def test_a_worker_that_hangs_up_instead_of_answering_was_lost(runtime_dir: Path, op: str, use: Use) -> None:
    refusal = refusal_of(runtime_dir, after_attaching(op, lambda _: None), use)
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

    refusal = refusal_of(runtime_dir, after_attaching(op, Caller.wait_for_end), ask_impatiently)
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
    with FakeWorker(runtime_dir, answers([("status", answer)])), opened(runtime_dir) as session:
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

    with FakeWorker(runtime_dir, script), opened(runtime_dir) as session:
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
    with FakeWorker(runtime_dir, after_attaching(op, Caller.wait_for_end)), directory_of(runtime_dir) as fd:
        if limit == "WORKER_ANSWER_SECONDS":
            monkeypatch.setattr(session_module, limit, 0.01)
        with Session.connect(fd) as session:
            monkeypatch.setattr(session_module, limit, 0.01)  # not before it has said hello
            with pytest.raises(SkeydError, match="did not answer in time"):
                use(session)


@pytest.mark.parametrize("use", [Session.uses_keys, read_frames, write_frames, Session.shut_down])
def test_a_worker_that_is_gone_before_it_is_asked_was_lost_and_nothing_is_uncertain(
    runtime_dir: Path, use: Use
) -> None:
    with FakeWorker(runtime_dir, lambda caller: caller.say(hello())) as worker, opened(runtime_dir) as session:
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

    refusal = refusal_of(runtime_dir, after_attaching(op, then), use)
    assert refusal.reason is Reason.KEYS_NOT_STORED
    assert refusal.metadata == {"gfn": "0x101", "uncertain": "0x1-0x2"}


def test_a_refusal_of_a_write_by_the_worker_leaves_nothing_uncertain_unless_it_says_so(runtime_dir: Path) -> None:
    def then(caller: Caller) -> None:
        caller.say({"error": {"reason": "SKEYS_NOT_ENABLED", "message": "no", "metadata": {}}})
        caller.wait_for_end()

    refusal = refusal_of(runtime_dir, after_attaching("set", then), write_frames)
    assert refusal.metadata == {}


def test_a_descriptor_that_comes_with_an_answer_is_closed(runtime_dir: Path) -> None:
    def then(caller: Caller) -> None:
        caller.say({"ok": {"uses_keys": True}}, caller.connection.fileno())
        caller.wait_for_end()

    with FakeWorker(runtime_dir, after_attaching("status", then)), opened(runtime_dir) as session:
        assert session.uses_keys()
