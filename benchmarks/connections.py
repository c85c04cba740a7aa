"""Opens many connections to a gRPC server and keeps them open, idle, as a client does that has nothing to ask.

    python -m benchmarks.connections unix:PATH|HOST:PORT COUNT

Each begins as HTTP/2 does, and answers settings and pings from then on. Says {"open": COUNT} and ends with its standard
input; {"error": ...} where they can't be had, or where the server has closed one.
"""

from __future__ import annotations

import json
import resource
import selectors
import socket
import sys
from typing import Final

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000 04 00 00000000")
_HEADER: Final = 9
_SETTINGS: Final = 4
_PING: Final = 6
_ACK: Final = 1


class _Connection:
    def __init__(self, target: str) -> None:
        if target.startswith("unix:"):
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.socket.connect(target.removeprefix("unix:"))
        else:
            host, _, port = target.rpartition(":")
            self.socket = socket.create_connection((host, int(port)))
        self.socket.sendall(_PREFACE)
        self.settled = False
        self._rest = b""

    def answer(self) -> bool:
        """Read what there is and answer it. False: the server hung up."""
        data = self.socket.recv(65536)
        self._rest += data
        while len(self._rest) >= _HEADER:
            length = int.from_bytes(self._rest[:3], "big")
            kind, flags = self._rest[3], self._rest[4]
            if len(self._rest) < _HEADER + length:
                break
            payload, self._rest = self._rest[_HEADER : _HEADER + length], self._rest[_HEADER + length :]
            if kind == _SETTINGS and not flags & _ACK:
                self.socket.sendall(bytes((0, 0, 0, _SETTINGS, _ACK, 0, 0, 0, 0)))
                self.settled = True
            elif kind == _PING and not flags & _ACK:
                self.socket.sendall(bytes((0, 0, length, _PING, _ACK, 0, 0, 0, 0)) + payload)
        return bool(data)


def main() -> None:
    """Open them, say so, and keep them."""
    target, count = sys.argv[1], int(sys.argv[2])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with selectors.DefaultSelector() as selector:
        opened = 0
        settled = 0
        selector.register(sys.stdin, selectors.EVENT_READ, None)
        while True:
            # A few at a time, so that no backlog runs over.
            for _ in range(min(64, count - opened)):
                connection = _Connection(target)
                selector.register(connection.socket, selectors.EVENT_READ, connection)
                opened += 1
            for key, _ in selector.select():
                if key.data is None:
                    return  # told to end
                connection = key.data
                before = connection.settled
                if not connection.answer():
                    sys.stdout.write(json.dumps({"error": "the server closed an idle connection"}) + "\n")
                    return
                settled += connection.settled and not before
                if settled == count and not before:
                    sys.stdout.write(json.dumps({"open": count}) + "\n")
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
