"""Answers to the front: one thread, one request at a time, every connection served in turn."""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, Protocol

from skeyd.errors import Reason, SkeydError, exhausted, read_only
from skeyd.linux import peer_of
from skeyd.storage_key import GFN_LIMIT
from skeyd.worker.backend import Backend, Printing
from skeyd.worker.capture_requests import Asked, CaptureRequests
from skeyd.worker.captures import Captures
from skeyd.worker.channel import close_all
from skeyd.worker.front_connection import FrontConnection
from skeyd.worker.keyops import KeyOps
from skeyd.worker.keys import Keys
from skeyd.worker.outcomes import CRC_MAX, FINGERPRINT, REQUEST_ID, Begun, LastWrite
from skeyd.worker.packets import Fields, ProtocolError, error_message
from skeyd.worker.protocol import KEYOPS, Hello
from skeyd.worker.transactions import Call, Transactions
from skeyd.worker.worker_log import log_line, log_traceback

MAX_CONNECTIONS: Final = 128
"""Connections at once; one more is closed unanswered. Each costs protocol.BUFFER_BYTES at most."""

_SETTING: Final = ("set", "begin", "keyop")
"""Ops that set keys, or are about to."""


class HasFileno(Protocol):
    """A descriptor's owner."""

    def fileno(self) -> int:
        """Return the descriptor."""


class Service:
    """Serves one VM's keys on a listening socket until it is told to end, by a shutdown request or by `stop`.

    A connection that breaks the protocol is closed; the others and the VM go on. With `release` the VM
    outlives this process, with the keys that it has then: so a shutdown request is refused with VM_BUSY while a call
    runs or is rolled back; it is called before one is obeyed, what it raises is the answer, and all goes on. And `stop`
    has what runs rolled back before `run` returns. `print_keys` begins to read all keys at once, in so many seconds at
    most; of a VM that has it keys are read so, and can't be set.
    """

    def __init__(
        self,
        listener: socket.socket,
        hello: Hello,
        backend: Backend,
        open_journal: Callable[[], int],
        release: Callable[[], None] | None = None,
        print_keys: Callable[[float], Printing] | None = None,
    ) -> None:
        self._listener = listener
        self._hello = hello
        self._release = release
        self._is_read_only = print_keys is not None
        self._keys = Keys(backend)
        self._keyops = KeyOps(backend, self._keys)
        self._transactions = Transactions(self._keys, open_journal)
        self._captures: Captures[FrontConnection] = Captures(backend)
        self._capture_requests = CaptureRequests(
            self._captures, self._keys, backend.memory_map, self._transactions, print_keys
        )
        self._connections: set[FrontConnection] = set()
        self._selector = selectors.DefaultSelector()
        self._running = True
        self._stopping = False

    def run(self, stop: HasFileno, ends: Iterable[HasFileno] = ()) -> None:
        """Serve until `stop` is readable, a signal has come, or one of `ends`: the VM's owner is gone."""
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(stop, selectors.EVENT_READ, partial(self._stop, stop))
        for end in ends:
            self._selector.register(end, selectors.EVENT_READ, self._end)
        try:
            while self._running:
                # Rolling back goes on between requests, so that nobody who reads waits for more than a slice of it; so
                # does a capture that this process makes.
                for key, _ in self._selector.select(self._seconds_left()):
                    if key.data is None:
                        self._accept()
                    elif isinstance(key.data, FrontConnection):
                        self._serve(key.data)
                    elif key.data is not self._captures:
                        key.data()
                self._roll_back()
                self._capture()
                if self._stopping and not self._transactions.rolling_back:
                    self._running = False
        finally:
            for connection in list(self._connections):
                self._drop(connection)
            self._captures.close()
            self._selector.close()
            self._say_what_is_not_well()

    def _say_what_is_not_well(self) -> None:
        # Of a VM that goes on without this process nobody else knows it then.
        last = self._transactions.outcome()
        if self._release is not None and last is not None and last.outcome in ("dirty", "rolling_back"):
            frames = ", ".join(map(str, last.dirty)) or "none that is known"
            log_line(
                f"ends with the last SetSkeys {last.outcome}, {last.left} keys not rolled back; frames that have other "
                f"keys than before: {frames}"
            )

    def _end(self) -> None:
        self._running = False

    def _stop(self, stop: HasFileno) -> None:
        self._selector.unregister(stop)
        self._stopping = True
        if self._release is None:
            # The VM ends with this process, and its keys with it.
            self._running = False
        else:
            # As long as it takes; meanwhile all is answered but what would set keys.
            self._transactions.stop()

    def _seconds_left(self) -> float | None:
        # Until there is something to do though nobody asks.
        if self._captures.is_running() and self._captures.fileno() is None:
            return 0
        left = [one for one in (self._transactions.seconds_left(), self._captures.seconds_left()) if one is not None]
        return min(left, default=None)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError:
            return  # gone before it was met
        # Never wait for a peer: answers are small, and one that doesn't take them is dropped.
        accepted.setblocking(False)
        connection = FrontConnection(accepted)
        if len(self._connections) >= MAX_CONNECTIONS:
            for one in self._capture_requests.waiting():
                if one.channel.is_ended():
                    self._drop(one)
        if len(self._connections) >= MAX_CONNECTIONS or peer_of(accepted).uid not in (0, os.geteuid()):
            connection.close()
            return
        self._connections.add(connection)
        if self._watch(connection):
            self._send(connection, self._hello.to_message())

    def _watch(self, connection: FrontConnection) -> bool:
        # The kernel bounds how many descriptors may be watched. The VM must not end for that, a connection may.
        try:
            self._selector.register(connection.channel.connection, selectors.EVENT_READ, connection)
        except OSError:
            self._connections.remove(connection)
            self._transactions.abandon(connection)
            self._captures.abandon(connection)
            connection.close()
            return False
        return True

    def _watch_capture(self, connection: FrontConnection, descriptor: int) -> None:
        try:
            self._selector.register(descriptor, selectors.EVENT_READ, self._captures)
        except OSError as error:
            # Nobody would hear of its end; who is there to be answered may be somebody else by then.
            self._captures.abandon(connection)
            raise exhausted(error) or error from error

    def _serve(self, connection: FrontConnection) -> None:
        try:
            received = connection.channel.receive("request")
        except BlockingIOError:
            return
        except (ProtocolError, OSError, MemoryError):
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
        self._handle(Asked(connection, request, time.monotonic()))

    def _handle(self, asked: Asked) -> None:
        connection, request, _ = asked
        try:
            if self._capture_requests.must_wait(asked):
                # It is looked at no more until the capture has ended.
                self._selector.unregister(connection.channel.connection)
                return
            if self._capture_requests.begin(asked):
                descriptor = self._captures.fileno()
                if descriptor is not None:
                    self._watch_capture(connection, descriptor)
                return  # the answer comes when it has ended
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

    def _answer(self, connection: FrontConnection, request: Fields) -> tuple[dict[str, Any], int | None]:
        op = request.text("op")
        if self._is_read_only and op in _SETTING:
            raise read_only(self._hello.vm_id)
        match op:
            case "status":
                # Where it is being frozen it was asked before, and who uses keys uses them for good.
                uses_keys = self._captures.is_running() or self._keys.uses_keys()
                return {"uses_keys": uses_keys, **_last_write(self._transactions.outcome())}, None
            case "freeze" | "snapshot":
                return {"uses_keys": False, "ns": 0}, None
            case "attach":
                return {}, connection.attach()
            case "get":
                frames, view = connection.slice(request)
                with view:
                    frozen = self._captures.keys_of(connection)
                    if frozen is not None:
                        frozen.read(frames, view)
                        return {"uses_keys": True, "ns": 0}, None
                    self._keys.take_longest()
                    uses_keys = self._keys.read(frames, view)
                    return {"uses_keys": uses_keys, "ns": self._keys.take_longest()}, None
            case "set":
                return self._set(connection, request), None
            case "begin":
                self._captures.require_none()
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
                self._captures.require_none()
                if self._release is not None:
                    # The VM goes on without this process, and so with the keys that it has then: whole ones.
                    self._transactions.require_idle()
                    self._release()
                self._running = False
                return {}, None
        raise ProtocolError("no such op")

    def _capture(self) -> None:
        if not self._captures.is_running():
            return
        descriptor = self._captures.fileno()
        told = self._captures.step()
        if self._captures.is_running():
            return
        if descriptor is not None:
            self._selector.unregister(descriptor)
        if told is not None:
            connection, end = told
            good = {"ok": {"uses_keys": True, "ns": end}}
            self._send(connection, error_message(end) if isinstance(end, SkeydError) else good)
        waiting = self._capture_requests.take_waiting()
        for one in [one for one in waiting if self._watch(one.connection)]:
            if one.connection.channel.is_ended():
                self._drop(one.connection)  # nobody looked meanwhile
            else:
                self._handle(one)

    def _set(self, connection: FrontConnection, request: Fields) -> dict[str, Any]:
        frames, view = connection.slice(request)
        with view:
            # A copy: the front can still write to the buffer while the kernel and the read-back look at it.
            keys = bytes(view)
        allow_enable = request.boolean("allow_enable")
        self._captures.require_none()
        self._keys.take_longest()
        if self._transactions.owned_by(connection):
            written = self._transactions.set(connection, frames, keys, allow_enable, connection.require_heard)
        else:
            self._transactions.require_idle()
            self._transactions.forget_kept()
            written = self._keys.write(frames, keys, allow_enable)
        return {"repaired": written.repaired, "enabled": written.enabled, "ns": self._keys.take_longest()}

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
            self._captures.require_none()
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

    def _send(self, connection: FrontConnection, message: dict[str, Any], fd: int | None = None) -> None:
        try:
            connection.channel.send(message, () if fd is None else (fd,))
        except OSError:
            self._drop(connection)
        finally:
            if fd is not None:
                os.close(fd)

    def _drop(self, connection: FrontConnection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
            if not self._capture_requests.forget(connection):
                self._selector.unregister(connection.channel.connection)
            connection.close()
            self._transactions.abandon(connection)
            self._captures.abandon(connection)


def _last_write(last: LastWrite | None) -> dict[str, Any]:
    return {} if last is None else {"last_write": last.to_message()}
