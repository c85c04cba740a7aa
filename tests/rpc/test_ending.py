"""hanging_up: what waits for a worker ends with its call, and nobody else's."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.rpc.calls import Cancelled
from skeyd.rpc.ending import all_hanging_up, hanging_up, require_active

LOST = SkeydError(Reason.WORKER_LOST, "lost")


class Call:
    """A call that ends when it is told to."""

    def __init__(self, *, already: bool = False) -> None:
        self._already = already
        self.end: Callable[[], None] = lambda: None

    def is_active(self) -> bool:
        return not self._already

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self.end = callback
        return not self._already


def test_what_fails_since_the_call_ended_is_nobodys_error() -> None:
    call = Call()

    def work() -> None:
        with hanging_up(call) as hang_up:
            assert not hang_up.was_told
            call.end()
            assert hang_up.was_told
            raise LOST

    with pytest.raises(Cancelled):
        work()
    with pytest.raises(SkeydError) as raised, hanging_up(Call()):
        raise LOST
    assert raised.value is LOST


def test_nothing_is_begun_for_a_call_that_has_ended() -> None:
    begun = False
    with pytest.raises(Cancelled), hanging_up(Call(already=True)):
        begun = True
    assert not begun
    with pytest.raises(Cancelled):
        require_active(Call(already=True))
    require_active(Call())


@pytest.mark.parametrize("told_first", [True, False])
def test_all_connections_of_a_call_are_hung_up_on_those_too_that_come_later(told_first: bool) -> None:
    with ExitStack() as sockets:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
        for one in (one for pair in pairs for one in pair):
            sockets.enter_context(one)
        with all_hanging_up(call := Call()) as hang_ups:
            for number, (ours, theirs) in enumerate(pairs):
                theirs.settimeout(10)
                if told_first and number == 1:
                    call.end()
                hang_ups.one_more().hold(ours)
            if not told_first:
                call.end()
            assert [theirs.recv(1) for _, theirs in pairs] == [b""] * 3


def test_a_connection_is_hung_up_on_from_when_it_is_held_until_it_is_let_go() -> None:
    for told_first in (True, False):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs, hanging_up(call := Call()) as hang_up:
            theirs.settimeout(10)
            if told_first:
                call.end()
            hang_up.hold(ours)
            if not told_first:
                call.end()
            assert theirs.recv(1) == b""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, hanging_up(call := Call()) as hang_up:
        hang_up.hold(ours)
        hang_up.let_go()
        call.end()  # as gRPC does at the end of every call; the connection may be another one's by now
        ours.send(b"x")
        assert theirs.recv(1) == b"x"
