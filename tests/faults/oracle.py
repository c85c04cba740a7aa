"""Reads keys from a worker with code of its own: no front, and nothing of skeyd.vms or skeyd.worker."""

from __future__ import annotations

import array
import json
import mmap
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

_PACKET: Final = 1 << 16
_READ_AT_ONCE: Final = 4096
_SECONDS: Final = 30.0


class WorkerGone(Exception):  # noqa: N818 (says what happened)
    """Nobody serves the VM any more."""


class Oracle:
    """A connection to the worker of a VM's directory. WorkerGone where there is none."""

    def __init__(self, directory: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_SECONDS)
        self._buffer: mmap.mmap | None = None
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._socket.connect(f"/proc/self/fd/{fd}/worker.sock")
            self.hello = self._take()
        except (ConnectionRefusedError, ConnectionResetError, FileNotFoundError) as error:
            self._socket.close()
            raise WorkerGone from error
        finally:
            os.close(fd)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Ask for something: the answer as it comes, with "ok" or "error". WorkerGone where it hangs up instead."""
        try:
            self._socket.send(json.dumps(request).encode())
            return self._take()
        except OSError as error:
            raise WorkerGone from error

    def keys(self) -> bytes | None:
        """Read all keys of all memory slots, in order; None: the guest uses none."""
        found = b""
        for slot in self.hello["slots"]:
            for start in range(slot["start"], slot["start"] + slot["count"], _READ_AT_ONCE):
                count = min(_READ_AT_ONCE, slot["start"] + slot["count"] - start)
                buffer = self.attached()
                buffer[:count] = b"\x01" * count  # which no key is
                answer = self.ask(op="get", buffer=0, offset=0, start=start, count=count)
                if not answer["ok"]["uses_keys"]:
                    return None
                found += buffer[:count]
        assert not any(key & 1 for key in found)
        return found

    def attached(self) -> mmap.mmap:
        """Return the memory that keys are passed in."""
        if self._buffer is None:
            self._socket.send(json.dumps({"op": "attach"}).encode())
            fds = array.array("i")
            _, ancillary, _, _ = self._socket.recvmsg(_PACKET, socket.CMSG_LEN(fds.itemsize))
            fds.frombytes(ancillary[0][2])
            self._buffer = mmap.mmap(fds[0], os.fstat(fds[0]).st_size)
            os.close(fds[0])
        return self._buffer

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
        if self._buffer is not None:
            self._buffer.close()

    def _take(self) -> dict[str, Any]:
        data = self._socket.recv(_PACKET)
        if not data:
            raise ConnectionResetError("it hung up")
        answer: dict[str, Any] = json.loads(data)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
