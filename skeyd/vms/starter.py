"""Starting worker processes: the seam at which a service manager can do it instead."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final, Protocol

from skeyd.errors import Reason, SkeydError, exhausted
from skeyd.limits import WORKER_START_SECONDS
from skeyd.vms.runtime import VmDirectory
from skeyd.worker.protocol import MESSAGE_MAX, Fields, ProtocolError, Spec, decode, encode, take_answer

_WORKER: Final = str(Path(__file__).parent.parent / "worker" / "__main__.py")


class WorkerStarter(Protocol):
    """Starts workers."""

    def start(self, directory: VmDirectory, spec: Spec) -> None:
        """Start the worker of a VM and wait until it serves. SkeydError where it does not; nothing runs then."""

    def probe_host(self) -> Fields:
        """Have a short-lived worker look at the host; its report is as skeyd.worker.process.report_host writes it."""

    def reap(self) -> None:
        """Take note of workers that ended, so that no zombie stays."""


class ChildStarter:
    """Starts workers as children in sessions of their own: they outlive this process, and its terminal.

    Synchronization: any thread; each worker is one thread's until it serves.
    """

    def __init__(self) -> None:
        # Only to be waited for. Which VMs there are is read from the runtime directory, never from here.
        self._children: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def start(self, directory: VmDirectory, spec: Spec) -> None:
        """Start a child that serves the VM."""
        log = directory.open_log()
        try:
            child = self._spawn(["vm", str(directory.fd)], log, pass_fds=(directory.fd,))
        finally:
            os.close(log)
        try:
            _first_answer(child, encode(spec.to_message()))
        except BaseException:
            # It has made no VM that anybody was told of, and it is this process's own unreaped child.
            child.kill()
            child.wait()
            raise
        with self._lock:
            self._children.append(child)

    def probe_host(self) -> Fields:
        """Have a child look at the host."""
        child = self._spawn(["probe"], subprocess.DEVNULL)
        try:
            return _first_answer(child, b"")
        finally:
            child.kill()
            child.wait()

    def reap(self) -> None:
        """Wait for children that have ended."""
        with self._lock:
            self._children = [child for child in self._children if child.poll() is None]

    def _spawn(self, arguments: list[str], stderr: int, pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", _WORKER, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd="/",
                env={},
                start_new_session=True,
                pass_fds=pass_fds,
            )
        except OSError as error:
            failed = SkeydError(Reason.WORKER_FAILED, f"no worker could be started: {error.strerror}")
            raise exhausted(error) or failed from error


def _first_answer(child: subprocess.Popen[bytes], given: bytes) -> Fields:
    # Give the child its standard input whole, and take the one line it says.
    assert child.stdin is not None  # noqa: S101  it is a pipe
    assert child.stdout is not None  # noqa: S101  likewise
    until = time.monotonic() + WORKER_START_SECONDS
    said = b""
    with child.stdin, child.stdout, selectors.DefaultSelector() as selector:
        try:
            child.stdin.write(given)
            child.stdin.close()
        except BrokenPipeError:
            pass  # it ended before it read; what it said is read below
        selector.register(child.stdout, selectors.EVENT_READ)
        while not said.endswith(b"\n"):
            if not selector.select(max(0.0, until - time.monotonic())):
                raise SkeydError(Reason.WORKER_FAILED, f"the worker was not ready after {WORKER_START_SECONDS:g} s")
            part = os.read(child.stdout.fileno(), MESSAGE_MAX)
            said += part
            if not part:
                raise SkeydError(Reason.WORKER_FAILED, "the worker ended before it was ready; see its log")
            if len(said) > MESSAGE_MAX:
                raise SkeydError(Reason.WORKER_FAILED, "the worker says more than it should")
    try:
        return take_answer(decode(said, "the worker's first line"))
    except ProtocolError as error:
        raise SkeydError(Reason.WORKER_FAILED, str(error)) from error
