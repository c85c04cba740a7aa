"""A client of QMP: what a monitor may say, what it may not, and that nobody waits for it for longer than agreed."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest

from skeyd.qmp.errors import BrokenError, BusyError, QmpError, RefusedError, UnreachableError
from skeyd.qmp.monitor import Monitor
from skeyd.qmp.words import LINE_MAX, TEXT_MAX
from tests.injection.victims import wait_for
from tests.qmp.monitors import GREETING, SECONDS, Conversation, FakeMonitor

SHORT: Final = 0.2
"""Seconds, where the time is to pass."""

pytestmark = pytest.mark.usefixtures("open_fds")

EVENT: Final = {"event": "RTC_CHANGE", "data": {"offset": 1}, "timestamp": {"seconds": 1, "microseconds": 2}}


@pytest.fixture
def path(runtime_dir: Path) -> Path:
    return runtime_dir / "qmp"


def said(path: Path, converse: Callable[[Conversation], None], seconds: float = SECONDS) -> QmpError:
    """Return how a client fails that makes one command, query-status."""
    with FakeMonitor(path, converse) as fake, pytest.raises(QmpError) as caught:
        ask(fake.path, seconds)
    assert str(path) in str(caught.value)
    return caught.value


def ask(path: str, seconds: float = SECONDS) -> Any:
    with Monitor(path, seconds) as monitor:
        return monitor.execute("query-status")


def test_a_command_is_answered_and_events_are_no_answers(path: Path) -> None:
    def converse(one: Conversation) -> None:
        one.say(GREETING, EVENT)
        assert one.hear() == {"execute": "qmp_capabilities", "id": 1}
        one.say(EVENT, {"return": {}, "id": 1}, EVENT)
        assert one.hear() == {"execute": "x", "arguments": {"a": [1, "ä"]}, "id": 2}
        one.say(EVENT, {"return": {"b": None}, "id": 2})
        assert one.hear() == {"execute": "y", "id": 3}
        one.say({"id": 3, "return": []})
        one.wait_for_end()

    with FakeMonitor(path, converse) as fake, Monitor(fake.path, SECONDS) as monitor:
        assert monitor.version == "9.2.1"
        assert (monitor.peer.pid, monitor.peer.uid) == (os.getpid(), os.getuid())
        assert monitor.execute("x", {"a": [1, "ä"]}) == {"b": None}
        assert monitor.execute("y") == []


def test_an_answer_may_come_in_any_pieces(path: Path) -> None:
    def converse(one: Conversation) -> None:
        one.greet()
        heard = one.hear()
        for byte in b'{"return": {"status": "running"}, "id": %d}\r\n' % heard["id"]:
            one.say(bytes([byte]))

    with FakeMonitor(path, converse) as fake:
        assert ask(fake.path) == {"status": "running"}


def test_an_answer_can_be_looked_for_without_waiting(path: Path) -> None:
    def converse(one: Conversation) -> None:
        one.greet()
        heard = one.hear()
        one.say(EVENT)
        assert one.read(1) == b"."
        one.say({"return": 7, "id": heard["id"]})
        one.wait_for_end()

    with FakeMonitor(path, converse) as fake, Monitor(fake.path, SECONDS) as monitor:
        monitor.begin("x")
        assert not monitor.is_answered()
        with pytest.raises(ValueError, match="x is not answered yet"):
            monitor.begin("y")
        os.write(monitor.fileno(), b".")
        while not monitor.is_answered():
            os.sched_yield()
        assert monitor.is_answered()
        assert monitor.answer() == 7


def test_a_descriptor_goes_along_with_its_command(path: Path) -> None:
    def converse(one: Conversation) -> None:
        one.greet()
        data, fds, _, _ = socket.recv_fds(one.connection, 4096, 2)
        assert data == b'{"execute": "add-fd", "id": 2}\n'
        (fd,) = fds
        os.write(fd, b"hello")
        os.close(fd)
        one.say({"return": {"fd": 11}, "id": 2})
        one.wait_for_end()

    read, write = os.pipe()
    with FakeMonitor(path, converse) as fake, Monitor(fake.path, SECONDS) as monitor:
        assert monitor.execute("add-fd", fd=write) == {"fd": 11}
    os.close(write)
    assert os.read(read, 100) == b"hello"
    assert os.read(read, 100) == b""
    os.close(read)


def test_descriptors_that_nobody_asked_for_are_not_kept(path: Path) -> None:
    def converse(one: Conversation) -> None:
        one.greet()
        heard = one.hear()
        socket.send_fds(one.connection, [b'{"return": 1, "id": %d}\n' % heard["id"]], [0, 1, 2])
        one.wait_for_end()

    with FakeMonitor(path, converse) as fake:
        assert ask(fake.path) == 1


def test_a_command_that_is_refused_says_how_and_the_next_is_answered(path: Path) -> None:
    def converse(one: Conversation) -> None:
        one.greet()
        heard = one.hear()
        one.say({"error": {"class": "GenericError", "desc": "no\nsuch \x1b[31mthing" + "!" * 999}, "id": heard["id"]})
        one.answer(1)
        one.wait_for_end()

    with FakeMonitor(path, converse) as fake, Monitor(fake.path, SECONDS) as monitor:
        with pytest.raises(RefusedError) as caught:
            monitor.execute("x")
        assert (caught.value.command, caught.value.error_class) == ("x", "GenericError")
        assert caught.value.description.startswith("no such ?[31mthing!!!")
        assert len(caught.value.description) <= TEXT_MAX
        assert f"the QMP monitor at {path} refused x: no such" in str(caught.value)
        assert monitor.execute("y") == 1


def test_what_was_begun_can_be_given_up(path: Path) -> None:
    def converse(one: Conversation) -> None:
        one.greet()
        heard = one.hear()
        one.say({"error": {"class": "GenericError", "desc": "no"}, "id": heard["id"]})
        one.answer(2)
        one.answer(3)
        one.wait_for_end()

    with FakeMonitor(path, converse) as fake, Monitor(fake.path, SECONDS) as monitor:
        monitor.settle()
        monitor.begin("refused")
        monitor.settle()
        monitor.begin("answered")
        monitor.settle()
        assert monitor.execute("x") == 3


def answering(*messages: Any) -> Callable[[Conversation], None]:
    """Greet well, and answer query-status with messages."""

    def converse(one: Conversation) -> None:
        one.greet()
        assert one.hear()["id"] == 2
        # A client may hang up before it has it all: one who doesn't listen to a line of any length.
        with suppress(BrokenPipeError, ConnectionResetError):
            one.say(*messages)

    return converse


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ([b"\n"], "no JSON"),
        ([b"{\n"], "no JSON"),
        ([b"\xff\xfe{\x00}\x00\n"], "no JSON"),
        ([b'{"return": NaN, "id": 2}\n'], "NaN is no JSON"),
        ([b'{"return": ' + b"9" * 5000 + b', "id": 2}\n'], "no JSON"),
        ([b"[" * 100_000 + b"\n"], "no JSON"),
        # Too deep for a parser before Python 3.14, and no answer for a later one.
        ([b'{"a":' * 30_000 + b"1" + b"}" * 30_000 + b"\n"], ""),
        ([b"[]\n"], "no JSON object"),
        ([b'"return"\n'], "no JSON object"),
        ([{}], "nothing that was asked"),
        ([{"return": {}}], "nothing that was asked"),
        ([{"return": {}, "id": 1}], "nothing that was asked"),
        ([{"return": {}, "id": 3}], "nothing that was asked"),
        ([{"return": {}, "id": "2"}], "nothing that was asked"),
        ([{"return": {}, "id": True}], "nothing that was asked"),
        ([{"return": {}, "id": 2.0}], "nothing that was asked"),
        ([{"event": 1}], "nothing that was asked"),
        ([{"event": "X", "return": {}, "id": 1}], "nothing that was asked"),
        ([{"id": 2}], "both or none"),
        ([{"return": {}, "error": {"class": "a", "desc": "b"}, "id": 2}], "both or none"),
        ([{"error": "no", "id": 2}], "no class and desc"),
        ([{"error": {"class": "a"}, "id": 2}], "no class and desc"),
        ([{"error": {"class": "a", "desc": 1}, "id": 2}], "no class and desc"),
        ([b"x" * (LINE_MAX + 65_537)], "a line has more than"),
        ([], "it hung up"),
        ([b'{"return": {}'], "in the middle of a line"),
    ],
)
def test_what_is_no_answer_is_told_and_ends_it(path: Path, wrong: list[Any], what: str) -> None:
    error = said(path, answering(*wrong))
    assert type(error) is BrokenError
    assert what in str(error)


@pytest.mark.parametrize(
    "greeting",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        {},
        {"QMP": None},
        {"QMP": {"version": "9"}},
        {"QMP": {"version": {"qemu": {"major": 9, "minor": 2}}}},
        {"QMP": {"version": {"qemu": {"major": 9, "minor": 2, "micro": True}}}},
        {"QMP": {"version": {"qemu": {"major": 9, "minor": -2, "micro": 1}}}},
        {"event": "X"},
    ],
)
def test_a_stranger_is_sent_nothing(path: Path, greeting: Any) -> None:
    def converse(one: Conversation) -> None:
        one.say(greeting)
        one.wait_for_end()

    assert type(said(path, converse)) is BrokenError


def test_a_second_client_gets_no_greeting_and_is_told_why(path: Path) -> None:
    error = said(path, Conversation.wait_for_end, SHORT)
    assert type(error) is BusyError
    assert "no greeting within 0.2 s. It takes one client at a time" in str(error)
    assert "libvirt" in str(error)


def test_a_third_client_doesnt_wait_for_a_place_in_the_queue(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as second:
        listener.bind(str(path))
        listener.listen(0)
        second.connect(str(path))
        with pytest.raises(BusyError, match="no connection within"):
            ask(str(path), SHORT)


@pytest.mark.parametrize(
    "flood",
    [b'{"event": "X"}\n', b'{"event": "X"}\n' * 10_000, b" " * 100 + b"\n"],
    ids=["events", "many events", "no JSON"],
)
def test_who_never_stops_talking_isnt_listened_to_for_longer(path: Path, flood: bytes) -> None:
    def converse(one: Conversation) -> None:
        one.greet()
        one.flood(flood)

    error = said(path, converse, SHORT)
    assert type(error) is (BusyError if b"event" in flood else BrokenError)


def test_a_greeting_without_an_end_is_cut(path: Path) -> None:
    def converse(one: Conversation) -> None:
        one.flood(b"x" * 65_536)

    assert "a line has more than" in str(said(path, converse))


def test_who_looks_without_waiting_isnt_kept_by_a_flood_either(path: Path) -> None:
    def converse(one: Conversation) -> None:
        one.greet()
        one.flood(b'{"event": "X"}\n' * 10_000)

    with FakeMonitor(path, converse) as fake, Monitor(fake.path, SECONDS) as monitor:
        monitor.begin("x")
        for _ in range(3):
            assert not monitor.is_answered()  # it returns: others are served before the next
        monitor.allow(SHORT)
        with pytest.raises(BusyError, match="no answer to x within"):
            wait_for(monitor.is_answered)


def test_an_answer_that_comes_too_late_is_told_with_its_command(path: Path) -> None:
    def converse(one: Conversation) -> None:
        one.greet()
        one.hear()
        one.wait_for_end()

    assert "no answer to query-status within" in str(said(path, converse, SHORT))


def test_more_time_can_be_given(path: Path) -> None:
    def converse(one: Conversation) -> None:
        one.greet()
        one.answer(1)
        one.wait_for_end()

    with FakeMonitor(path, converse) as fake, Monitor(fake.path, SECONDS) as monitor:
        monitor.allow(0)
        with pytest.raises(BusyError, match="no room for x"):
            monitor.execute("x")
        monitor.allow(SECONDS)
        assert 0 < monitor.seconds_left() <= SECONDS
        assert monitor.execute("x") == 1


def test_where_there_is_no_monitor_it_says_so(runtime_dir: Path) -> None:
    with pytest.raises(UnreachableError, match="No such file"):
        ask(str(runtime_dir / "none"))
    file = runtime_dir / "file"
    file.touch()
    with pytest.raises(UnreachableError, match="it is no unix socket"):
        ask(str(file))
    gone = runtime_dir / "gone"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(gone))
    with pytest.raises(UnreachableError, match="Connection refused"):
        ask(str(gone))
    packets = runtime_dir / "packets"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(packets))
        listener.listen()
        with pytest.raises(UnreachableError, match="wrong type"):
            ask(str(packets))


def test_a_path_may_be_longer_than_a_unix_address(runtime_dir: Path) -> None:
    deep = runtime_dir / ("d" * 200)
    deep.mkdir()
    short = runtime_dir / "qmp"
    with FakeMonitor(short, answering({"return": 5, "id": 2})):
        short.rename(deep / "qmp")
        assert ask(str(deep / "qmp")) == 5
