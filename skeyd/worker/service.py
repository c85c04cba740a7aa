"""Answers to the front: one thread, one request at a time, every connection served in turn."""

from __future__ import annotations

import mmap
import os
import selectors
import socket
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from skeyd.errors import Reason, SkeydError, read_only
from skeyd.gfn import GfnRange
from skeyd.linux import peer_of, sealed_memfd
from skeyd.storage_key import GFN_LIMIT
from skeyd.worker.backend import Backend
from skeyd.worker.channel import Channel, close_all
from skeyd.worker.keyops import KeyOps
from skeyd.worker.keys import Keys
from skeyd.worker.outcomes import CRC_MAX, FINGERPRINT, REQUEST_ID, Begun, LastWrite
from skeyd.worker.packets import Fields, ProtocolError, error_message
from skeyd.worker.protocol import BUFFER_BYTES, BUFFER_KEYS, BUFFERS, KEYOPS, SLICE_KEYS, Hello
from skeyd.worker.traceback_log import log_traceback
from skeyd.worker.transactions import Call, Transactions

MAX_CONNECTIONS: Final = 128
"""Connections at once; one more is closed unanswered. Each costs BUFFER_BYTES at most."""


MAX_SNAPSHOTS: Final = 4
"""Connections that hold one at once; each costs a byte a key of the guest at worst."""


_SETTING: Final = ("set", "begin", "keyop")
"""Ops that set keys, or are about to."""


class KeysKept(Protocol):
    """All keys as they were at one time: what is read of them in slices belongs together."""

    def read(self, frames: GfnRange, into: memoryview) -> None:
        """Fill `into` with the keys of frames that are in memory slots."""


class HasFileno(Protocol):
    """A descriptor's owner."""

    def fileno(self) -> int:
        """Return the descriptor."""


class _Connection:
    def __init__(self, connection: socket.socket) -> None:
        self.channel = Channel(connection)
        self.buffers: mmap.mmap | None = None
        self.kept: KeysKept | None = None
        """What "get" reads from, if it isn't the guest itself."""

    def close(self) -> None:
        self.channel.close()
        if self.buffers is not None:
            self.buffers.close()


class Service:
    """Serves one VM's keys on a listening socket until it is told to end, by a shutdown request or by `stop`.

    A connection that breaks the protocol is closed; the others and the VM go on. With `release` the VM
    outlives this process: it is called before a shutdown request is obeyed, what it raises is the answer, and all goes
    on; VM_BUSY while a call runs or is rolled back. `snapshot` reads all keys at once, or says with None that the guest
    uses none; a VM that has it can't have keys set.
    """

    def __init__(
        self,
        listener: socket.socket,
        hello: Hello,
        backend: Backend,
        open_journal: Callable[[], int],
        release: Callable[[], None] | None = None,
        snapshot: Callable[[], KeysKept | None] | None = None,
    ) -> None:
        self._listener = listener
        self._hello = hello
        self._release = release
        self._snapshot = snapshot
        self._keys = Keys(backend)
        self._keyops = KeyOps(backend, self._keys)
        self._transactions = Transactions(self._keys, open_journal)
        self._connections: set[_Connection] = set()
        self._selector = selectors.DefaultSelector()
        self._running = True

    def run(self, ends: Iterable[HasFileno]) -> None:
        """Serve until one of `ends` is readable: a signal has come, or the VM's owner is gone."""
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        for end in ends:
            self._selector.register(end, selectors.EVENT_READ, end)
        try:
            while self._running:
                # Rolling back goes on between requests, so that nobody who reads waits for more than a slice of it.
                for key, _ in self._selector.select(0 if self._transactions.rolling_back else None):
                    if key.data is None:
                        self._accept()
                    elif isinstance(key.data, _Connection):
                        self._serve(key.data)
                    else:
                        self._running = False
                self._roll_back()
        finally:
            for connection in list(self._connections):
                self._drop(connection)
            self._selector.close()

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError:
            return  # gone before it was met
        # Never wait for a peer: answers are small, and one that doesn't take them is dropped.
        accepted.setblocking(False)
        connection = _Connection(accepted)
        if len(self._connections) >= MAX_CONNECTIONS or peer_of(accepted).uid not in (0, os.geteuid()):
            connection.close()
            return
        self._connections.add(connection)
        self._selector.register(accepted, selectors.EVENT_READ, connection)
        self._send(connection, self._hello.to_message())

    def _serve(self, connection: _Connection) -> None:
        try:
            received = connection.channel.receive("request")
        except BlockingIOError:
            return
        except (ProtocolError, OSError):
            self._drop(connection)
            return
        if received is None:
            self._drop(connection)
            return
        request, fds = received
        close_all(fds)  # the front has none to send
        if connection.channel.is_ended():
            # Who asked has given up, and has told its client so: nothing may be changed for it any more.
            self._drop(connection)
            return
        try:
            answer, fd = self._answer(connection, request)
        except SkeydError as error:
            self._send(connection, error_message(error))
        except ProtocolError:
            self._drop(connection)
        except Exception as error:
            # The VM dies with this process, so no mistake in one answer may end it.
            log_traceback()
            failed = SkeydError(Reason.WORKER_FAILED, f"the worker failed: {type(error).__name__}")
            self._send(connection, error_message(failed))
        else:
            self._send(connection, {"ok": answer}, fd)

    def _answer(self, connection: _Connection, request: Fields) -> tuple[dict[str, Any], int | None]:
        op = request.text("op")
        if self._snapshot is not None and op in _SETTING:
            raise read_only(self._hello.vm_id)
        match op:
            case "status":
                return {"uses_keys": self._keys.uses_keys(), **_last_write(self._transactions.outcome())}, None
            case "attach":
                return {}, self._attach(connection)
            case "get":
                frames, view = self._slice(connection, request)
                with view:
                    if connection.kept is not None:
                        connection.kept.read(frames, view)
                        return {"uses_keys": True, "ns": 0}, None
                    self._keys.take_longest()
                    uses_keys = self._keys.read(frames, view)
                    return {"uses_keys": uses_keys, "ns": self._keys.take_longest()}, None
            case "snapshot":
                return {"uses_keys": self._keep(connection)}, None
            case "set":
                return self._set(connection, request), None
            case "begin":
                call = Call(
                    request.text("request_id", REQUEST_ID),
                    request.text("fingerprint", FINGERPRINT),
                    request.boolean("keep"),
                )
                return self._transactions.begin(connection, call, request.boolean("resume")).to_message(), None
            case "require_unused":
                self._transactions.require_unused(
                    request.text("request_id", REQUEST_ID), request.text("fingerprint", FINGERPRINT)
                )
                return {}, None
            case "commit":
                done = self._transactions.commit(
                    connection, request.integer("keys_set", 0, GFN_LIMIT), request.integer("crc32", 0, CRC_MAX)
                )
                applied = Begun("applied", done.keys_set, done.repaired, done.crc32, done.enabled)
                return applied.to_message(), None
            case "abandon":
                self._transactions.abandon(connection)
                self._roll_back()
                return _last_write(self._transactions.outcome_for(connection)), None
            case "keyop":
                return self._keyop(request), None
            case "shutdown":
                if request.text("uid") != self._hello.uid:
                    raise ProtocolError("shutdown of another VM")
                if self._release is not None:
                    # The VM goes on without this process, and so with the keys that it has then: whole ones.
                    self._transactions.require_idle()
                    self._release()
                self._running = False
                return {}, None
        raise ProtocolError("no such op")

    def _set(self, connection: _Connection, request: Fields) -> dict[str, Any]:
        frames, view = self._slice(connection, request)
        with view:
            # A copy: the front can still write to the buffer while the kernel and the read-back look at it.
            keys = bytes(view)
        allow_enable = request.boolean("allow_enable")
        self._keys.take_longest()
        if self._transactions.owned_by(connection):
            written = self._transactions.set(connection, frames, keys, allow_enable)
        else:
            self._transactions.require_idle()
            self._transactions.forget_kept()
            written = self._keys.write(frames, keys, allow_enable)
        return {"repaired": written.repaired, "enabled": written.enabled, "ns": self._keys.take_longest()}

    def _keep(self, connection: _Connection) -> bool:
        if self._snapshot is None:
            raise ProtocolError("a snapshot of a VM that has none")
        connection.kept = None
        if sum(one.kept is not None for one in self._connections) >= MAX_SNAPSHOTS:
            raise SkeydError(
                Reason.TOO_MANY_CALLS_ON_VM, f"{MAX_SNAPSHOTS} streams hold all keys of vms/{self._hello.vm_id} already"
            )
        connection.kept = self._snapshot()
        return connection.kept is not None

    def _roll_back(self) -> None:
        try:
            self._transactions.step()
        except Exception:
            log_traceback()  # the outcome says what it came to; the VM lives on

    def _keyop(self, request: Fields) -> dict[str, Any]:
        gfn = request.integer("gfn", 0, GFN_LIMIT - 1)
        key, repaired = request.integer("key", 0, 0xFF), False
        operation = request.choice("operation", KEYOPS)
        if operation != "iske":
            self._transactions.require_idle()
            self._transactions.forget_kept()
        match operation:
            case "iske":
                found = self._keyops.read(gfn)
            case "rrbe":
                found = self._keyops.reset_referenced(gfn)
            case "sske":
                written = self._keyops.write(gfn, key)
                found, repaired = written if written is not None else (None, False)
        return {"uses_keys": found is not None, "key": found or 0, "repaired": repaired}

    def _attach(self, connection: _Connection) -> int:
        if connection.buffers is not None:
            raise ProtocolError("attached twice")
        fd = sealed_memfd("skeyd-keys", BUFFER_BYTES)
        try:
            connection.buffers = mmap.mmap(fd, BUFFER_BYTES)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _slice(self, connection: _Connection, request: Fields) -> tuple[GfnRange, memoryview]:
        if connection.buffers is None:
            raise ProtocolError("not attached")
        at = request.integer("buffer", 0, BUFFERS - 1) * BUFFER_KEYS
        offset = request.integer("offset", 0, BUFFER_KEYS - 1)
        start = request.integer("start", 0, GFN_LIMIT - 1)
        frames = GfnRange(start, request.integer("count", 1, min(SLICE_KEYS, BUFFER_KEYS - offset)))
        at += offset
        with memoryview(connection.buffers) as whole:
            return frames, whole[at : at + frames.count]

    def _send(self, connection: _Connection, message: dict[str, Any], fd: int | None = None) -> None:
        try:
            connection.channel.send(message, () if fd is None else (fd,))
        except OSError:
            self._drop(connection)
        finally:
            if fd is not None:
                os.close(fd)

    def _drop(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
            self._selector.unregister(connection.channel.connection)
            connection.close()
            self._transactions.abandon(connection)


def _last_write(last: LastWrite | None) -> dict[str, Any]:
    return {} if last is None else {"last_write": last.to_message()}
