"""What runs commands inside an emulated host: ``python3 agent.py ADDRESS PORT``; and its protocol, for both ends.

The host's first process in a boot without systemd, a service with it. Standard library only, Python 3.11 or
later; EmulatedHost puts it into every boot, so that a change here needs no new image.

A connection is one command. Both ends send frames, a kind (u8) and a length (be32) before that many bytes:

    REQUEST  to the agent   JSON: see `Request`; then INPUT frames of `input` bytes in all
    INPUT    to the agent   a part of the command's standard input
    SIGNAL   to the agent   JSON: a signal's number, for the command's own process
    KILL     to the agent   SIGKILL for the command's session; it then ends with what it printed so far
    STARTED  from it        JSON: the process's number
    REFUSED  from it        JSON: errno, text and file name, when the command can't be started; the last frame
    OUTPUT   from it        a part of what it wrote to standard output
    ERRORS   from it        a part of what it wrote to standard error
    SIGNALLED from it       answers SIGNAL
    ENDED    from it        JSON: its status as subprocess counts it; the last frame

A connection that breaks is a KILL: no command outlives its caller.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import TypedDict

REQUEST, INPUT, SIGNAL, KILL, STARTED, REFUSED, OUTPUT, ERRORS, SIGNALLED, ENDED = range(1, 11)

READY = "emulated host is ready: "  # on the console, before the kernel's release and a line's end

HEADER = struct.Struct(">BI")
PIECE = 1 << 20  # bytes read or sent at once, and a pipe's size
F_SETPIPE_SZ = 1031


class Request(TypedDict):
    """What to run."""

    argv: list[str]
    env: dict[str, str]  # added to the agent's own
    cwd: str | None
    input: int  # bytes of standard input that follow
    log: str | None  # append both outputs to this file instead of sending them


class Frames:
    """Frames over a connected socket.

    Synchronization: one thread sends and one receives at a time; they may be two.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._received = bytearray()

    def send(self, kind: int, payload: bytes = b"") -> None:
        """Send one frame. Raises OSError when the other end is gone."""
        self._socket.sendall(HEADER.pack(kind, len(payload)) + payload)

    def receive(self, timeout: float | None = None) -> tuple[int, bytes]:
        """Return the next frame's kind and payload.

        Raises TimeoutError after `timeout` seconds, losing nothing: a later call goes on. Raises EOFError
        where the other end has closed, and other OSErrors where it broke.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (frame := self.take()) is None:
            if deadline is not None:
                readable, _, _ = select.select([self._socket], [], [], max(deadline - time.monotonic(), 0))
                if not readable:
                    raise TimeoutError(f"no frame within {timeout} s")
            self.fill()
        return frame

    def fill(self) -> None:
        """Wait for bytes, and keep them. Raises EOFError at the end."""
        received = self._socket.recv(PIECE)
        if not received:
            raise EOFError("the connection was closed")
        self._received += received

    def take(self) -> tuple[int, bytes] | None:
        """Return the next frame if all of it is here already."""
        if len(self._received) < HEADER.size:
            return None
        kind, length = HEADER.unpack_from(self._received)
        end = HEADER.size + length
        if len(self._received) < end:
            return None
        payload = bytes(memoryview(self._received)[HEADER.size : end])
        del self._received[:end]
        return kind, payload


def _serve(connection: socket.socket) -> None:
    with connection, contextlib.suppress(EOFError, OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        frames = Frames(connection)
        kind, payload = frames.receive()
        if kind != REQUEST:
            return
        request: Request = json.loads(payload)
        with contextlib.ExitStack() as stack:
            stdin = _receive_input(frames, request["input"], stack)
            try:
                command = _start(request, stdin)
            except OSError as error:
                frames.send(REFUSED, json.dumps([error.errno, error.strerror, error.filename]).encode())
                return
            try:
                _attend(command, connection, frames)
            finally:
                _kill(command)
                with command:  # closes its pipes and reaps it
                    pass


def _receive_input(frames: Frames, size: int, stack: contextlib.ExitStack) -> int:
    # All of it before the command starts, as a file: so neither end can wait for the other.
    if not size:
        return subprocess.DEVNULL
    memory = os.memfd_create("input")
    stack.callback(os.close, memory)
    while size > 0:
        kind, payload = frames.receive()
        if kind != INPUT:
            raise EOFError("the input was cut short")
        size -= len(payload)
        while payload:
            payload = payload[os.write(memory, payload) :]
    os.lseek(memory, 0, os.SEEK_SET)
    return memory


def _start(request: Request, stdin: int) -> "subprocess.Popen[bytes]":
    with contextlib.ExitStack() as stack:
        out, err = subprocess.PIPE, subprocess.PIPE
        if request["log"] is not None:
            out = err = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            stack.callback(os.close, out)
        command = subprocess.Popen(
            request["argv"],
            stdin=stdin,
            stdout=out,
            stderr=err,
            env={**os.environ, **request["env"]},
            cwd=request["cwd"],
            start_new_session=True,
            bufsize=0,
        )
    for pipe in (command.stdout, command.stderr):
        if pipe is not None:
            fcntl.fcntl(pipe, F_SETPIPE_SZ, PIECE)
            os.set_blocking(pipe.fileno(), False)
    return command


def _attend(command: "subprocess.Popen[bytes]", connection: socket.socket, frames: Frames) -> None:
    # Until the command has ended and nobody holds its outputs any more, or it was killed.
    frames.send(STARTED, json.dumps(command.pid).encode())
    process = os.pidfd_open(command.pid)
    try:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        poll.register(process, select.POLLIN)
        outputs = {}
        for kind, pipe in ((OUTPUT, command.stdout), (ERRORS, command.stderr)):
            if pipe is not None:
                poll.register(pipe, select.POLLIN)
                outputs[pipe.fileno()] = kind
        ended = killed = False
        while not ended or (outputs and not killed):
            for ready, _ in poll.poll():
                if ready == process:
                    ended = True
                    poll.unregister(process)
                elif ready in outputs:
                    if not _forward(ready, outputs[ready], frames):
                        poll.unregister(ready)
                        del outputs[ready]
                else:
                    frames.fill()
                    while (frame := frames.take()) is not None:
                        killed |= _obey(frame, command, process, frames)
        for pipe_fd, kind in outputs.items():
            _forward(pipe_fd, kind, frames)  # a pipe's whole content, and no more: somebody may still be writing
        # Reaped only now: until here its number can't have become another process's.
        frames.send(ENDED, json.dumps(command.wait()).encode())
    finally:
        os.close(process)


def _forward(pipe: int, kind: int, frames: Frames) -> bool:
    # Whether there may be more.
    try:
        data = os.read(pipe, PIECE)
    except BlockingIOError:
        return False
    if data:
        frames.send(kind, data)
    return bool(data)


def _obey(frame: tuple[int, bytes], command: "subprocess.Popen[bytes]", process: int, frames: Frames) -> bool:
    # Whether the command was killed with all that it started.
    kind, payload = frame
    if kind == KILL:
        _kill(command)
        return True
    if kind == SIGNAL:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, json.loads(payload))
        frames.send(SIGNALLED)
    return False


def _kill(command: "subprocess.Popen[bytes]") -> None:
    if command.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)


def _reap_orphans() -> None:
    # The first process inherits what others leave behind. The agent is its child: Popen must be let wait for
    # its own.
    agent = os.fork()
    if not agent:
        return
    while True:
        pid, status = os.wait()
        if pid == agent:
            sys.exit(f"the agent ended with {status:#x}")  # the kernel panics, which ends QEMU


def main(address: str, port: int) -> None:
    """Serve forever."""
    if os.getpid() == 1:
        _reap_orphans()
    with socket.create_server((address, port), backlog=64) as listener:
        with open("/dev/console", "w") as console:  # noqa: PTH123 (pathlib costs a tenth of a second here)
            console.write(f"\n{READY}{os.uname().release}\n")
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
