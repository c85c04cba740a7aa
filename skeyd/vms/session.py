"""A conversation with one worker: who it is, slices of keys in and out. Everything it says is checked here."""

from __future__ import annotations

import mmap
import os
import socket
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any, Self

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, MemoryMap
from skeyd.limits import WORKER_ANSWER_SECONDS, WORKER_HELLO_SECONDS
from skeyd.linux import is_sealed_memfd, peer_of
from skeyd.storage_key import CHANGED, REFERENCED, RESERVED
from skeyd.worker.channel import Channel, address_in, close_all
from skeyd.worker.protocol import (
    BUFFER_BYTES,
    BUFFERS,
    SLICE_KEYS,
    SOCKET,
    Fields,
    Hello,
    ProtocolError,
    take_answer,
)


class Session:
    """A connection to a worker that has said who it is.

    After any SkeydError of reason WORKER_LOST or WORKER_FAILED it is of no more use. Synchronization: one thread.
    """

    def __init__(self, channel: Channel, hello: Hello) -> None:
        self.hello = hello
        self.memory_map = MemoryMap(hello.slots)
        self._channel = channel
        self._buffers: mmap.mmap | None = None

    @classmethod
    def connect(cls, directory_fd: int) -> Self:
        """Connect to the worker of a VM's directory and take its hello.

        OSError (ConnectionRefusedError, FileNotFoundError): nobody listens. TimeoutError: nobody answers.
        ProtocolError: what answers is no worker of this version, or not who it says.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        channel = Channel(connection)
        try:
            connection.settimeout(WORKER_HELLO_SECONDS)
            connection.connect(address_in(directory_fd, SOCKET))
            peer = peer_of(connection)
            if peer.uid not in (0, os.geteuid()):
                raise ProtocolError(f"the process that listens (pid {peer.pid}) belongs to uid {peer.uid}")
            received = channel.receive("hello")
            if received is None:
                raise ConnectionResetError("the worker closed the connection before it said who it is")
            message, fds = received
            close_all(fds)
            hello = Hello.from_message(message)
            if hello.pid != peer.pid:
                raise ProtocolError(f"the worker says it is pid {hello.pid}, the kernel says pid {peer.pid}")
            connection.settimeout(WORKER_ANSWER_SECONDS)
            return cls(channel, hello)
        except BaseException:
            channel.close()
            raise

    def uses_keys(self) -> bool:
        """Whether the guest uses storage keys. Every look at a VM asks, so it waits no longer than for a hello."""
        self._channel.connection.settimeout(WORKER_HELLO_SECONDS)
        try:
            with self._strict():
                return self._call({"op": "status"}).boolean("uses_keys")
        finally:
            # A refusal too leaves a session that can be used.
            self._channel.connection.settimeout(WORKER_ANSWER_SECONDS)

    def read_slices(self, frames: Iterable[GfnRange]) -> Iterator[tuple[GfnRange, bytes | None]]:
        """Read ranges of at most SLICE_KEYS frames: (range, its keys, or None where the guest uses none).

        One slice is read ahead: the worker fills one buffer while the caller is busy with the other's keys.
        """
        buffers = self._attached()
        pending: deque[tuple[GfnRange, int]] = deque()

        def finish() -> tuple[GfnRange, bytes | None]:
            wanted, at = pending.popleft()
            with self._strict():
                uses_keys = self._take().boolean("uses_keys")
            return wanted, bytes(buffers[at : at + wanted.count]) if uses_keys else None

        for number, wanted in enumerate(frames):
            buffer = number % BUFFERS
            self._send({"op": "get", "buffer": buffer, "start": wanted.start, "count": wanted.count})
            pending.append((wanted, buffer * SLICE_KEYS))
            if len(pending) == BUFFERS:
                yield finish()
        while pending:
            yield finish()

    def write_slice(self, frames: GfnRange, keys: bytes | memoryview, allow_enable: bool) -> tuple[int, bool]:
        """Set the keys of at most SLICE_KEYS frames, verified: (keys repaired, whether this enabled keys)."""
        buffers = self._attached()
        buffers[: frames.count] = keys
        message = {
            "op": "set",
            "buffer": 0,
            "start": frames.start,
            "count": frames.count,
            "allow_enable": allow_enable,
        }
        self._send(message)
        with self._uncertain_where_lost(frames), self._strict():
            done = self._take()
            return done.integer("repaired", 0, frames.count), done.boolean("enabled")

    def keyop(self, operation: str, gfn: int, key: int = 0) -> tuple[int | None, bool]:
        """Do one of KEYOPS on a frame: (the key it gives, whether it was set again); None: the guest uses no keys.

        Only where the hello says that there is KEYOP.
        """
        self._send({"op": "keyop", "operation": operation, "gfn": gfn, "key": key})
        with nullcontext() if operation == "iske" else self._uncertain_where_lost(GfnRange(gfn, 1)), self._strict():
            done = self._take()
            found, repaired = done.integer("key", 0, 0xFF), done.boolean("repaired")
            if found & (~(REFERENCED | CHANGED) if operation == "rrbe" else RESERVED):
                raise ProtocolError(f"{found:#04x} is nothing that {operation} gives")
            return found if done.boolean("uses_keys") else None, repaired

    def shut_down(self) -> None:
        """Ask the worker to end the VM and itself."""
        with self._strict():
            self._call({"op": "shutdown", "uid": self.hello.uid})

    def close(self) -> None:
        """Hang up. The worker and its VM go on."""
        self._channel.close()
        if self._buffers is not None:
            self._buffers.close()

    def _attached(self) -> mmap.mmap:
        if self._buffers is None:
            self._send({"op": "attach"})
            answer, fds = self._receive()
            try:
                with self._strict():
                    take_answer(answer)
                    if len(fds) != 1 or not is_sealed_memfd(fds[0], BUFFER_BYTES):
                        raise ProtocolError("it sent no memory that can be trusted")
                    try:
                        self._buffers = mmap.mmap(fds[0], BUFFER_BYTES)
                    except OSError as error:
                        raise ProtocolError(f"it sent memory that can't be mapped: {error.strerror}") from error
            finally:
                close_all(fds)
        return self._buffers

    def _call(self, message: dict[str, Any]) -> Fields:
        self._send(message)
        return self._take()

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._channel.send(message)
        except OSError as error:
            raise self._lost(error) from error

    def _take(self) -> Fields:
        answer, fds = self._receive()
        close_all(fds)
        return take_answer(answer)

    def _receive(self) -> tuple[Fields, list[int]]:
        try:
            received = self._channel.receive("answer")
        except OSError as error:
            raise self._lost(error) from error
        except ProtocolError as error:
            raise self._failed(error) from error
        if received is None:
            raise self._lost(ConnectionResetError("it closed the connection"))
        return received

    @contextmanager
    def _strict(self) -> Iterator[None]:
        try:
            yield
        except ProtocolError as error:
            raise self._failed(error) from error

    @contextmanager
    def _uncertain_where_lost(self, frames: GfnRange) -> Iterator[None]:
        try:
            yield
        except SkeydError as error:
            if error.reason in (Reason.WORKER_LOST, Reason.WORKER_FAILED):
                # It was asked and nobody knows what it did, or is still doing.
                error.metadata.setdefault("uncertain", str(frames))
            raise

    def _lost(self, error: OSError) -> SkeydError:
        why = "it did not answer in time" if isinstance(error, TimeoutError) else str(error)
        name = f"vms/{self.hello.vm_id}"
        return SkeydError(
            Reason.WORKER_LOST, f"the worker of {name} (pid {self.hello.pid}) was lost: {why}", {"vm": name}
        )

    def _failed(self, error: ProtocolError) -> SkeydError:
        name = f"vms/{self.hello.vm_id}"
        return SkeydError(Reason.WORKER_FAILED, f"the worker of {name} broke the protocol: {error}", {"vm": name})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
