"""Starting worker processes: the seam at which a service manager can do it instead."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from skeyd.errors import Reason, SkeydError, exhausted
from skeyd.limits import WORKER_START_SECONDS
from skeyd.vms.runtime import VmDirectory, last_words
from skeyd.worker.candidates import CANDIDATES_BYTES
from skeyd.worker.packets import MESSAGE_MAX, Fields, ProtocolError, decode, encode, take_answer
from skeyd.worker.protocol import Spec

_WORKER: Final = str(Path(__file__).parent.parent / "worker" / "__main__.py")
_NOT_RUN: Final = (126, 127)
"""How a launcher ends that could not run the worker, and the dynamic linker where it could not run the launcher."""


class WorkerStarter(Protocol):
    """Starts workers."""

    def start(self, directory: VmDirectory, spec: Spec) -> None:
        """Start the worker of a VM and wait until it serves. SkeydError where it does not; nothing runs then."""

    def probe_host(self) -> Fields:
        """Have a short-lived worker look at the host; its report is as skeyd.worker.process.report_host writes it."""

    def find_candidates(self) -> Fields:
        """Have another look for processes that hold VMs; its answer is to be a skeyd.worker.candidates.Found."""

    def reap(self) -> None:
        """Take note of workers that ended, so that no zombie stays."""


class ChildStarter:
    """Starts workers as children in sessions of their own: they outlive this process, and its terminal.

    Where there is a launcher, it is what is started, and it becomes the worker (skeyd.vms.launcher).

    Synchronization: any thread; each worker is one thread's until it serves.
    """

    def __init__(self, launcher: Path | None = None) -> None:
        self._launcher = launcher
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
        self._answer(child, encode(spec.to_message()))
        with self._lock:
            self._children.append(child)

    def probe_host(self) -> Fields:
        """Have a child look at the host."""
        return self._ask("probe", MESSAGE_MAX)

    def find_candidates(self) -> Fields:
        """Have a child look at the host's processes."""
        return self._ask("candidates", CANDIDATES_BYTES)

    def _ask(self, what: str, most: int) -> Fields:
        # A child that says so many bytes at most, and ends.
        log = os.memfd_create(f"{what}.log")
        try:
            child = self._spawn([what], log)
            answer = self._answer(child, b"", most)
            _end(child)
            return answer
        except SkeydError as error:
            if error.reason is Reason.WORKER_FAILED:
                error.metadata["worker_log"] = last_words(log)  # as the registry has it for a VM's worker
            raise
        finally:
            os.close(log)

    def reap(self) -> None:
        """Wait for children that have ended."""
        with self._lock:
            self._children = [child for child in self._children if child.poll() is None]

    def _spawn(self, arguments: list[str], stderr: int, pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-I", "-S", _WORKER, *arguments]
        if self._launcher is not None:
            command.insert(0, str(self._launcher))
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd="/",
                env={},
                start_new_session=True,
                pass_fds=pass_fds,
            )
        except OSError as error:
            through = "" if self._launcher is None else f" through the launcher {self._launcher}"
            failed = SkeydError(Reason.WORKER_FAILED, f"no worker could be started{through}: {error.strerror}")
            raise exhausted(error) or failed from error

    def _answer(self, child: subprocess.Popen[bytes], given: bytes, most: int = MESSAGE_MAX) -> Fields:
        # What the child says first. It is ended where that is no good: it has made no VM that anybody was told of.
        try:
            return _first_answer(child, given, most)
        except BaseException as error:
            status = _end(child)
            if isinstance(error, _SaidNothingError):
                raise SkeydError(Reason.WORKER_FAILED, f"{self._why_nothing(status)}; see its log") from None
            raise

    def _why_nothing(self, status: int) -> str:
        if self._launcher is None:
            return "the worker ended before it was ready"
        if status not in _NOT_RUN:
            return f"the worker, which was started through {self._launcher}, ended before it was ready"
        return (
            f"the launcher {self._launcher} ended with status {status}: "
            f"it could not run {sys.executable}, or could not be run itself"
        )


class _SaidNothingError(Exception):
    """A child closed its standard output before it had said a whole line."""


def _end(child: subprocess.Popen[bytes]) -> int:
    # Kill a child, and what else is in its session: a launcher may have failed to become the worker and be its parent.
    # Nobody has waited for the child yet, so the number is its own. Returns its exit status.
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


def _first_answer(child: subprocess.Popen[bytes], given: bytes, most: int) -> Fields:
    # Give the child its standard input whole, and take the one line it says, of so many bytes.
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
                raise _SaidNothingError
            if len(said) > most:
                raise SkeydError(Reason.WORKER_FAILED, "the worker says more than it should")
    try:
        return take_answer(decode(said, "the worker's first line", most))
    except ProtocolError as error:
        raise SkeydError(Reason.WORKER_FAILED, str(error)) from error
