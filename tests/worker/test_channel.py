"""Packets and descriptors: whole ones come through, nothing of broken ones stays."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from skeyd.worker.channel import Channel, address_in, close_all
from skeyd.worker.packets import MESSAGE_MAX, ProtocolError


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """Connect two channels."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        yield Channel(one), Channel(other)


def _raw(channel: Channel, data: bytes, fds: int = 0) -> None:
    # What a peer that isn't one of ours may send. The sender's own descriptors are closed at once.
    sent = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(fds)]
    try:
        if sent:
            socket.send_fds(channel.connection, [data], sent)
        else:
            channel.connection.send(data)
    finally:
        close_all(sent)


def test_messages_arrive_one_by_one_in_order(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    for number in range(3):
        one.send({"number": number})
    for number in range(3):
        received = other.receive("message")
        assert received is not None
        message, fds = received
        assert message.integer("number", 0, 2) == number
        assert fds == []


def test_a_descriptor_arrives_as_the_same_file_and_is_inherited_by_nobody(
    ends: tuple[Channel, Channel], tmp_path: Path
) -> None:
    one, other = ends
    with (tmp_path / "file").open("w+b") as file:
        one.send({}, [file.fileno()])
        received = other.receive("message")
        assert received is not None
        (fd,) = received[1]
        try:
            assert os.path.samestat(os.fstat(fd), os.fstat(file.fileno()))
            assert not os.get_inheritable(fd)
        finally:
            os.close(fd)


def test_a_message_of_the_largest_size_arrives_whole(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    text = "x" * (MESSAGE_MAX - len('{"a":""}'))
    one.send({"a": text})
    received = other.receive("message")
    assert received is not None
    assert received[0].has("a")


def test_a_message_that_fits_no_packet_is_not_sent(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    with pytest.raises(ProtocolError, match="doesn't fit a packet"):
        one.send({"a": "x" * MESSAGE_MAX})
    other.connection.setblocking(False)
    with pytest.raises(BlockingIOError):
        other.receive("message")


def test_the_end_of_a_connection_is_none(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one.send({})
    one.close()
    assert other.receive("message") is not None
    assert other.receive("message") is None


# That nothing stays open in the tests below is what this folder's fixture sees to.


@pytest.mark.parametrize("fds", [0, 1, 2])
def test_an_empty_packet_is_the_end_and_its_descriptors_are_closed(ends: tuple[Channel, Channel], fds: int) -> None:
    one, other = ends
    if fds:
        _raw(one, b"", fds)
    else:
        one.connection.send(b"")
    assert other.receive("message") is None


@pytest.mark.parametrize("fds", [0, 1])
@pytest.mark.parametrize("data", [b"\0", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":1}x'])
def test_a_packet_that_is_no_message_is_refused_and_its_descriptor_closed(
    ends: tuple[Channel, Channel], data: bytes, fds: int
) -> None:
    one, other = ends
    _raw(one, data, fds)
    with pytest.raises(ProtocolError, match=r"^request is no "):
        other.receive("request")


@pytest.mark.parametrize("fds", [0, 1])
@pytest.mark.parametrize("over", [1, MESSAGE_MAX])
def test_a_packet_that_is_too_long_is_refused_though_its_beginning_is_a_message(
    ends: tuple[Channel, Channel], over: int, fds: int
) -> None:
    one, other = ends
    # Cut at MESSAGE_MAX this is a valid message: only the kernel's flag tells.
    _raw(one, b"{}" + b" " * (MESSAGE_MAX - 2 + over), fds)
    with pytest.raises(ProtocolError, match="longer than a packet may be"):
        other.receive("request")


@pytest.mark.parametrize("fds", [2, 3, 50])
def test_a_packet_with_more_than_one_descriptor_is_refused_and_all_are_closed(
    ends: tuple[Channel, Channel], fds: int
) -> None:
    one, other = ends
    _raw(one, b"{}", fds)
    with pytest.raises(ProtocolError, match="too many descriptors"):
        other.receive("request")


def test_a_message_after_a_bad_packet_is_still_a_message(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    _raw(one, b"{", 1)
    one.send({})
    with pytest.raises(ProtocolError):
        other.receive("request")
    assert other.receive("request") is not None


def test_sending_to_who_is_gone_is_an_error_and_no_signal(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    other.close()
    with pytest.raises(BrokenPipeError):
        one.send({})
    reader, writer = os.pipe()
    try:
        with pytest.raises(BrokenPipeError):
            one.send({}, [reader])
    finally:
        close_all([reader, writer])


def test_sending_to_who_never_reads_is_an_error_once_the_socket_is_full(ends: tuple[Channel, Channel]) -> None:
    one, _ = ends
    one.connection.setblocking(False)

    def fill() -> None:
        for _ in range(100_000):
            one.send({})

    with pytest.raises(BlockingIOError):
        fill()


def test_waiting_for_who_says_nothing_ends_after_the_sockets_time(ends: tuple[Channel, Channel]) -> None:
    one, _ = ends
    one.connection.settimeout(0.01)
    with pytest.raises(TimeoutError):
        one.receive("message")


def test_a_socket_can_be_bound_and_found_however_deep_its_directory_lies(runtime_dir: Path) -> None:
    deep = runtime_dir / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    fd = os.open(deep, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
        ):
            listener.bind(address_in(fd, "socket"))
            listener.listen()
            connection.connect(address_in(fd, "socket"))
        assert (deep / "socket").is_socket()
    finally:
        os.close(fd)


def test_an_end_shows_even_behind_what_was_said_before_it() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        channel = Channel(ours)
        theirs.send(b"{}")
        assert not channel.is_ended()
        theirs.close()
        assert channel.is_ended()
