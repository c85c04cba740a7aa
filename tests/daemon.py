"""The real daemon as a process, for tests that talk with it as its users do."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from skeyd.client import Client, connect
from skeyd.vms.session import Session
from tests.processes import links_of, look_at, wait_for_end


class DaemonProcess:
    """A daemon on a runtime directory. It can be killed and started again; its VMs' workers stay, as in life."""

    def __init__(self, runtime_dir: Path, through: tuple[str, ...] = ()) -> None:
        """`through` is a program that becomes the daemon, with its arguments."""
        self.runtime_dir = runtime_dir
        self._through = through
        self.target = f"unix:{runtime_dir}/skeyd.sock"
        self.addresses: list[str] = []
        self.log: list[dict[str, Any]] = []
        """Its log so far, a line each."""
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None

    def start(self, *arguments: str) -> None:
        """Start it and wait until it serves. AssertionError with its log where it doesn't."""
        self._lines = queue.Queue()
        self._process = subprocess.Popen(
            [
                *self._through,
                *(sys.executable, "-m", "skeyd.server", "--runtime-dir", str(self.runtime_dir), *arguments),
            ],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self._reader = threading.Thread(target=self._read, args=(self._process, self._lines))
        self._reader.start()
        self.addresses = self.wait_for_line("serving")["addresses"]

    @property
    def tcp(self) -> str:
        """Its TCP address, if it was started with one."""
        return next(address for address in self.addresses if not address.startswith("unix:"))

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def wait_for_line(self, event: str, seconds: float = 30, **fields: Any) -> dict[str, Any]:
        """Wait for a line of the log that was not waited for before; AssertionError where it ends without one."""
        while True:
            line = self._lines.get(timeout=seconds)
            assert line is not None, f"the daemon ended: {self.log}"
            if line.get("event") == event and all(line.get(name) == value for name, value in fields.items()):
                return line

    def connect(self) -> Client:
        """Connect to its unix socket."""
        return connect(self.target)

    def kill(self) -> None:
        """Kill it where it stands."""
        assert self._process is not None
        self._process.kill()
        self.wait()

    def terminate(self) -> None:
        """Ask it to end, as systemd does."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = 30) -> int:
        """Wait for its end; its exit status."""
        assert self._process is not None
        assert self._reader is not None
        status = self._process.wait(seconds)
        self._reader.join(seconds)
        return status

    def end_everything(self) -> None:
        """Stop it and end every worker of its runtime directory, stopped ones included."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self.wait()
        for pid in self.worker_pids():
            with suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                try:
                    os.kill(pid, signal.SIGKILL)
                    wait_for_end(pidfd)
                    with suppress(ChildProcessError):
                        os.waitpid(pid, 0)
                finally:
                    os.close(pidfd)

    def worker_pids(self) -> list[int]:
        """Process ids of all workers that serve a directory below this one, by what they hold open."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            process = look_at(int(path.name))
            if process is None or "worker/__main__.py vm" not in process.command:
                continue
            if any(link.startswith(f"{self.runtime_dir}/vms/") for link in links_of(process.pid)):
                found.append(process.pid)
        return found

    def worker_pid(self, vm_id: str) -> int:
        """Process id of a VM's worker, by its own word."""
        fd = os.open(self.runtime_dir / "vms" / vm_id, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with Session.connect(fd) as session:
                return session.hello.pid
        finally:
            os.close(fd)

    def _read(self, process: subprocess.Popen[bytes], lines: queue.Queue[dict[str, Any] | None]) -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                try:
                    entry = json.loads(line)
                except ValueError:
                    entry = {"event": "not json", "line": line.decode(errors="replace")}
                self.log.append(entry)
                lines.put(entry)
        lines.put(None)


def start_in_vain(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Run a daemon that can't begin: its exit status and the last line of its log."""
    done = subprocess.run(
        [sys.executable, "-m", "skeyd.server", *arguments],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    line: dict[str, Any] = json.loads(done.stderr.splitlines()[-1])
    return done.returncode, line
