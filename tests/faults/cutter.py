"""A TCP relay between a client and a daemon that cuts the connection, or spoils a byte, at one place of it."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

_PREFACE: Final = 24
"""Bytes that a client sends before its first frame of HTTP/2 (RFC 9113, 3.4)."""
_HEADER: Final = 9
"""Bytes before a frame's payload: its length (3), type (1), flags, stream (RFC 9113, 4.1)."""
_TYPES: Final = {"DATA": 0, "HEADERS": 1}


@dataclass(frozen=True)
class Place:
    """A place in one direction of a connection."""

    way: str
    """ "up", to the daemon, or "down"."""
    frame: str = ""
    """One of _TYPES, in which a message of gRPC lies; empty: `nth` counts bytes."""
    nth: int = 0
    """From 1: which frame of that type; or after how many bytes."""
    where: str = "before"
    """ "before" the frame, in its "header", in the "middle" of its payload, or "after" it."""
    how: str = "reset"
    """ "reset" (RST), "end" (FIN), or "spoil": a byte is changed, and nothing is cut."""

    def __str__(self) -> str:
        return f"{self.way}-{self.frame or 'byte'}-{self.nth}-{self.where}-{self.how}"


class _Stream:
    # One direction: finds the place in what comes by.
    def __init__(self, place: Place | None, preface: int) -> None:
        self._place = place
        self._left = preface
        self._held = b""
        self._seen = 0
        self.total = 0
        self.found = False

    def pass_on(self, data: bytes) -> bytes:
        """Return what may go on of it: after `found` nothing more."""
        self.total += len(data)
        if self._place is None or not self._place.frame:
            return self._count(data)
        self._held += data
        out = b""
        while self._held and not (self.found and self._place.how != "spoil"):
            size = self._left or self._frame_size()
            if not size or len(self._held) < size:
                break
            part, self._held = self._held[:size], self._held[size:]
            out += part if self._left else self._look_at(self._place, part)
            self._left = 0
        return out

    def _count(self, data: bytes) -> bytes:
        if self._place is None or self.total < self._place.nth:
            return data
        self.found = True
        return data[: len(data) - (self.total - self._place.nth)]

    def _frame_size(self) -> int:
        if len(self._held) < _HEADER:
            return 0
        return _HEADER + int.from_bytes(self._held[:3], "big")

    def _look_at(self, place: Place, frame: bytes) -> bytes:
        if frame[3] != _TYPES[place.frame] or len(frame) == _HEADER:
            return frame  # an empty one says that the stream ends, and holds no message
        self._seen += 1
        if self._seen != place.nth:
            return frame
        self.found = True
        middle = _HEADER + (len(frame) - _HEADER) // 2
        if place.how == "spoil":
            return frame[:middle] + bytes([frame[middle] ^ 0x10]) + frame[middle + 1 :]
        return frame[: {"before": 0, "header": 5, "middle": middle, "after": len(frame)}[place.where]]


class Cutter:
    """Relays one connection to an address, as far as the place. Takes no second one: who is cut off stays so.

    Synchronization: a thread of its own relays.
    """

    def __init__(self, address: str, place: Place | None) -> None:
        host, _, port = address.rpartition(":")
        self._daemon = host, int(port)
        self._place = place
        self._streams = {
            way: _Stream(place if place is not None and place.way == way else None, preface)
            for way, preface in (("up", _PREFACE), ("down", 0))
        }
        self._stop, self._stopped = socket.socketpair()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def found(self) -> bool:
        """Whether the place was reached."""
        return any(stream.found for stream in self._streams.values())

    @property
    def total(self) -> dict[str, int]:
        """Bytes that came, by their way."""
        return {way: stream.total for way, stream in self._streams.items()}

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._stopped, selectors.EVENT_READ)
            selector.register(self._listener, selectors.EVENT_READ)
            if any(key.fileobj is self._stopped for key, _ in selector.select()):
                return
            client, _ = self._listener.accept()
            self._listener.close()
            with client, socket.create_connection(self._daemon) as daemon:
                self._relay(client, daemon)

    def _relay(self, client: socket.socket, daemon: socket.socket) -> None:
        ways = {client: (self._streams["up"], daemon), daemon: (self._streams["down"], client)}
        with selectors.DefaultSelector() as selector:
            for one in (self._stopped, client, daemon):
                selector.register(one, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._stopped:
                        return
                    sender = key.fileobj
                    assert isinstance(sender, socket.socket)
                    stream, other = ways[sender]
                    try:
                        data = sender.recv(1 << 16)
                        other.sendall(stream.pass_on(data))
                    except OSError:
                        return
                    if not data:
                        return
                    if stream.found and self._place is not None and self._place.how != "spoil":
                        self._cut(client, daemon, self._place.how)
                        return

    def _cut(self, client: socket.socket, daemon: socket.socket, how: str) -> None:
        for one in (client, daemon):
            if how == "reset":
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                one.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.close()
        self._thread.join()
        self._stopped.close()
        self._listener.close()
