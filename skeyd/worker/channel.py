"""Packets, and the descriptors that come with them, over a SOCK_SEQPACKET unix socket."""

from __future__ import annotations

import array
import os
import select
import socket
from collections.abc import Sequence
from typing import Any, Final

from skeyd.worker.packets import MESSAGE_MAX, Fields, ProtocolError, decode, encode

_MAX_FDS: Final = 1


def address_in(directory_fd: int, name: str) -> str:
    """Return a socket address in a directory that is held open.

    A unix address has 107 bytes at most; this one is short however deep the directory lies, and stays with the
    directory that was opened should its path come to mean another.
    """
    return f"/proc/self/fd/{directory_fd}/{name}"


class Channel:
    """One end of a connection between front and worker.

    Synchronization: one thread at a time.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send one message. OSError where the other side is gone, or (non-blocking) doesn't take it now."""
        data = encode(message)
        if fds:
            socket.send_fds(self.connection, [data], list(fds), socket.MSG_NOSIGNAL)
        else:
            self.connection.send(data, socket.MSG_NOSIGNAL)

    def receive(self, what: str) -> tuple[Fields, list[int]] | None:
        """Take one message and the descriptors that came with it, which are the caller's to close. None: the end.

        ProtocolError where it is no message (no descriptor is left open then). OSError, TimeoutError from the socket.
        """
        data, fds, flags = self._receive()
        try:
            if not data:
                # The end, or an empty packet, which nobody sends in good faith.
                close_all(fds)
                return None
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ProtocolError(f"{what} is longer than a packet may be, or has too many descriptors")
            return decode(data, what), fds
        except ProtocolError:
            close_all(fds)
            raise

    def _receive(self) -> tuple[bytes, list[int], int]:
        # socket.recv_fds takes flags and drops them (seen in Python 3.11): the descriptors would be inherited.
        fds = array.array("i")
        data, ancillary, flags, _ = self.connection.recvmsg(
            MESSAGE_MAX, socket.CMSG_LEN(_MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, held in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(held[: len(held) - len(held) % fds.itemsize])
        return data, list(fds), flags

    def is_ended(self) -> bool:
        """Whether the other side has hung up, whatever of it is still to be read. Waits for nothing."""
        # Not by reading: what was sent before would hide the end.
        look = select.poll()
        look.register(self.connection, select.POLLRDHUP)
        return bool(look.poll(0))

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)
