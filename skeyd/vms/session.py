"""A conversation with one worker: who it is, slices of keys in and out. Everything it says is checked here."""

from __future__ import annotations

import mmap
import os
import select
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any, Self

from skeyd.errors import Reason, SkeydError, read_only
from skeyd.gfn import GfnRange, MemoryMap
from skeyd.limits import DEFAULT_SLICE_SECONDS, WORKER_ANSWER_SECONDS, WORKER_HELLO_SECONDS
from skeyd.linux import is_sealed_memfd, peer_of
from skeyd.storage_key import CHANGED, REFERENCED, RESERVED
from skeyd.vms.hang_up import HangUp
from skeyd.vms.pacing import Pace
from skeyd.vms.read_ahead import ChunkRead, ReadAhead
from skeyd.worker.channel import Channel, address_in, close_all
from skeyd.worker.outcomes import Begun, LastWrite
from skeyd.worker.packets import Fields, ProtocolError, take_answer
from skeyd.worker.protocol import BUFFER_BYTES, NANOSECONDS_MAX, RANGE, SLICE_KEYS, SOCKET, Hello


class Session:
    """A connection to a worker that has said who it is.

    After any SkeydError of reason WORKER_LOST or WORKER_FAILED it is of no more use. Synchronization: one thread.
    """

    def __init__(self, channel: Channel, hello: Hello) -> None:
        self.hello = hello
        self.memory_map = MemoryMap(hello.slots)
        self._channel = channel
        self._buffers: mmap.mmap | None = None
        self._is_lost = False
        """An answer didn't come, or was none: the next packet may be the answer to any question."""
        self._answer_seconds = WORKER_ANSWER_SECONDS
        self._unanswered = 0
        """Requests that were sent ahead."""

    @classmethod
    def connect(cls, directory_fd: int, hang_up: HangUp | None = None) -> Self:
        """Connect to the worker of a VM's directory and take its hello.

        `hang_up` holds the connection from before the hello on, and lets go of it where there is no session.

        OSError (ConnectionRefusedError, FileNotFoundError): nobody listens. TimeoutError: nobody answers.
        ProtocolError: what answers is no worker of this version, or not who it says.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        channel = Channel(connection)
        hang_up = hang_up or HangUp()
        try:
            connection.settimeout(WORKER_HELLO_SECONDS)
            # It doesn't wait: where the worker has not taken the connections before this one, it fails.
            connection.connect(address_in(directory_fd, SOCKET))
            hang_up.hold(connection)
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
            hang_up.let_go()
            channel.close()
            raise

    def hold_by(self, hang_up: HangUp) -> None:
        """Have the connection hung up on by it from now on, as that which `connect` was given."""
        hang_up.hold(self._channel.connection)

    def be_brief(self) -> None:
        """Wait for an answer no longer than for a hello from now on: nothing that takes long is asked."""
        self._answer_seconds = WORKER_HELLO_SECONDS
        self._channel.connection.settimeout(self._answer_seconds)

    def is_quiet(self) -> bool:
        """Whether the worker has neither hung up nor said anything that was not taken, and nothing is awaited."""
        look = select.poll()
        look.register(self._channel.connection, select.POLLIN | select.POLLRDHUP)
        return not (self._is_lost or self._unanswered or look.poll(0))

    def uses_keys(self) -> bool:
        """Whether the guest uses storage keys."""
        return self.status()[0]

    def status(self) -> tuple[bool, LastWrite | None]:
        """Whether the guest uses storage keys, and what became of the last SetSkeys that set one.

        Every look at a VM asks, so it waits no longer than for a hello.
        """
        self._channel.connection.settimeout(WORKER_HELLO_SECONDS)
        try:
            with self._strict():
                answer = self._call({"op": "status"})
                return answer.boolean("uses_keys"), _last_write(answer)
        finally:
            # A refusal too leaves a session that can be used.
            self._channel.connection.settimeout(self._answer_seconds)

    def freeze(self, frames: Sequence[GfnRange], seconds: float, slice_seconds: float) -> tuple[bool, int]:
        """Have the keys of frames that are all in memory slots read at one moment: what is read from now on is those.

        Takes `seconds` at most, and an ioctl about `slice_seconds`. Returns whether the guest uses storage keys, and
        for how many nanoseconds the VM's owner stood still. SkeydError FREEZE_EXPIRED, VM_BUSY; REQUEST_INVALID: they
        are too many; FREEZE_UNSUPPORTED: the worker is of an earlier build.
        """
        if not self.hello.freezes:
            name = f"vms/{self.hello.vm_id}"
            why = "reaches them over QMP" if self._is_read_only else f"is of skeyd {self.hello.version}"
            raise SkeydError(
                Reason.FREEZE_UNSUPPORTED, f"the worker of {name} reads no keys of one moment: it {why}", {"vm": name}
            )
        buffers = self._attached()
        for at, one in enumerate(frames):
            RANGE.pack_into(buffers, at * RANGE.size, one.start, one.count)
        message = {
            "op": "freeze",
            "ranges": len(frames),
            "budget_ns": round(seconds * 1e9),
            "slice_ns": round(slice_seconds * 1e9),
        }
        with self._strict():
            answer = self._call(message)
            return answer.boolean("uses_keys"), answer.integer("ns", 0, NANOSECONDS_MAX)

    def require_writable(self) -> None:
        """BACKEND_READ_ONLY where the VM's keys can't be set."""
        if self._is_read_only:
            raise read_only(self.hello.vm_id)

    def begin_reading(self) -> bool:
        """Make ready to read keys as they are, and return whether the guest uses storage keys.

        Where its VMM prints them, what is read from now on is of one printing, and that is of now. SkeydErrors QMP's;
        TOO_MANY_CALLS_ON_VM: others hold as many printings as there may be.
        """
        if not self._is_read_only:
            return self.uses_keys()
        with self._strict():
            return self._call({"op": "snapshot"}).boolean("uses_keys")

    @property
    def _is_read_only(self) -> bool:
        return self.hello.vmm is not None and self.hello.vmm.access == "qmp"

    def read_chunks(self, chunks: Iterable[GfnRange], chunk_keys: int, pace: Pace) -> Iterator[ChunkRead]:
        """Read ranges of at most `chunk_keys` frames, which are at most BUFFER_KEYS, ahead of the caller.

        An ioctl takes as long as `pace` says.
        """
        with self._strict():
            yield from ReadAhead(self._attached(), self._send, self._take, chunks, chunk_keys, pace)

    def read_slices(self, frames: Iterable[GfnRange]) -> Iterator[tuple[GfnRange, bytes | None]]:
        """As read_chunks of at most SLICE_KEYS, copied: (range, its keys, or None where the guest uses none)."""
        for chunk in self.read_chunks(frames, SLICE_KEYS, Pace(DEFAULT_SLICE_SECONDS)):
            yield chunk.frames, chunk.copy()

    def write_slice(self, frames: GfnRange, keys: bytes | memoryview, allow_enable: bool) -> tuple[int, bool, int]:
        """Set the keys of at most SLICE_KEYS frames, verified.

        Returns (keys repaired, whether this enabled keys, how long the longest ioctl of it took in nanoseconds).
        """
        buffers = self._attached()
        buffers[: frames.count] = keys
        message = {
            "op": "set",
            "buffer": 0,
            "offset": 0,
            "start": frames.start,
            "count": frames.count,
            "allow_enable": allow_enable,
        }
        self._send(message)
        with self._uncertain_where_lost(frames), self._strict():
            done = self._take()
            repaired, enabled = done.integer("repaired", 0, frames.count), done.boolean("enabled")
            return repaired, enabled, done.integer("ns", 0, NANOSECONDS_MAX)

    def begin(self, request_id: str, fingerprint: str, *, keep: bool, resume: bool) -> Begun:
        """Begin a call that `write_slice` is part of until `commit` or the session's end.

        SkeydError VM_BUSY, REQUEST_ID_REUSED, NOTHING_TO_RESUME.
        """
        message = {
            "op": "begin",
            "request_id": request_id,
            "fingerprint": fingerprint,
            "keep": keep,
            "resume": resume,
        }
        with self._strict():
            begun = Begun.from_message(self._call(message))
            if (
                (begun.state == "begun" and begun.keys_set)
                or (begun.state == "resumed" and not resume)
                or (begun.state == "applied" and not request_id)
            ):
                raise ProtocolError(f"it says {begun.state}, and that is not what was asked for")
            return begun

    def require_unused(self, request_id: str, fingerprint: str) -> None:
        """REQUEST_ID_REUSED where another request of this id was applied."""
        with self._strict():
            self._call({"op": "require_unused", "request_id": request_id, "fingerprint": fingerprint})

    def commit(self, keys_set: int, crc32: int) -> Begun:
        """End the call, which is to have set so many keys of that CRC-32: what it set stays.

        SkeydError WORKER_FAILED: the worker has set something else, and the call ends as one without a commit.
        """
        with self._strict():
            done = Begun.from_message(self._call({"op": "commit", "keys_set": keys_set, "crc32": crc32}))
            if done.state != "applied":
                raise ProtocolError(f"it says {done.state} of what it was to commit")
            return done

    def abandon(self) -> LastWrite | None:
        """End the call without a commit: what became of it so far, or None where it had set nothing.

        While the outcome is "rolling_back", each call of this has another slice rolled back.
        """
        with self._strict():
            return _last_write(self._call({"op": "abandon"}))

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
        while self._unanswered and not self._is_lost:
            # A reader stopped before it had them.
            close_all(self._receive()[1])
        self._send(message)
        return self._take()

    def _send(self, message: dict[str, Any]) -> None:
        if self._is_lost:
            raise self._lost(ConnectionAbortedError("it was given up before"))
        try:
            self._channel.send(message)
        except OSError as error:
            raise self._lost(error) from error
        self._unanswered += 1

    def _take(self) -> Fields:
        answer, fds = self._receive()
        close_all(fds)
        try:
            return take_answer(answer)
        except SkeydError as error:
            if error.reason is Reason.VM_BUSY:
                # The front's own lock says so in the same way, and a client need not know who of the two it was.
                name = f"vms/{self.hello.vm_id}"
                raise SkeydError(error.reason, f"{name} is busy: {error.message}", {"vm": name}) from error
            raise

    def _receive(self) -> tuple[Fields, list[int]]:
        try:
            received = self._channel.receive("answer")
        except OSError as error:
            raise self._lost(error) from error
        except ProtocolError as error:
            raise self._failed(error) from error
        if received is None:
            raise self._lost(ConnectionResetError("it closed the connection"))
        self._unanswered -= 1
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
        self._is_lost = True
        why = "it did not answer in time" if isinstance(error, TimeoutError) else str(error)
        name = f"vms/{self.hello.vm_id}"
        return SkeydError(
            Reason.WORKER_LOST, f"the worker of {name} (pid {self.hello.pid}) was lost: {why}", {"vm": name}
        )

    def _failed(self, error: ProtocolError) -> SkeydError:
        self._is_lost = True
        name = f"vms/{self.hello.vm_id}"
        return SkeydError(Reason.WORKER_FAILED, f"the worker of {name} broke the protocol: {error}", {"vm": name})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _last_write(answer: Fields) -> LastWrite | None:
    return LastWrite.from_message(answer.object("last_write")) if answer.has("last_write") else None
