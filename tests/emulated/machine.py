"""The outside of an emulated machine: QEMU's process, its console and its monitor."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

MONITOR_TIMEOUT = 30.0  # seconds for an answer; QEMU answers in milliseconds unless the machine is overloaded
STOP_TIMEOUT = 30.0

GUARD = Path(__file__).with_name("guard.py")


class EmulatedHostError(Exception):
    """Something is wrong with the emulated host itself, not with what runs in it."""


class HostDied(EmulatedHostError):  # noqa: N818 (says what happened)
    """QEMU ended, or the agent inside did: the message carries the console's last lines."""


class Machine:
    """A QEMU process, from the constructor to `stop`; it ends with the process that made it, however that ends.

    Synchronization: `console` and `wait_for_console` may be called from any thread; the monitor takes one at
    a time.
    """

    def __init__(self, command: Sequence[str]) -> None:
        """Start QEMU with these arguments, its console on standard output, plus a monitor."""
        self._console = bytearray()
        self._console_grew = threading.Condition()
        self._console_ended = False
        self._monitor, theirs = socket.socketpair()
        self._monitor.settimeout(MONITOR_TIMEOUT)
        self._monitor_lock = threading.Lock()
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(self._monitor.close)
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", str(GUARD), str(os.getpid())),
                    *command,
                    *(
                        "-chardev",
                        f"socket,id=monitor,fd={theirs.fileno()}",
                        "-mon",
                        "chardev=monitor,mode=control",
                    ),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C is for the tests, which then stop it
            )
            undo.pop_all()
        assert self._process.stdout is not None
        self._reader = threading.Thread(
            target=self._read_console, args=(self._process.stdout,), name="emulated console", daemon=True
        )
        self._reader.start()
        self._answers = self._monitor.makefile("r", encoding="utf-8")
        self._greeted = False

    @property
    def console(self) -> str:
        """All that the console and QEMU itself have printed so far."""
        with self._console_grew:
            return self._console.decode(errors="replace").replace("\r\n", "\n")

    def console_tail(self, lines: int = 40) -> str:
        """Return the console's last lines, for a message."""
        return "\n".join(self.console.splitlines()[-lines:])

    def wait_for_console(self, pattern: re.Pattern[bytes], timeout: float) -> re.Match[bytes]:
        """Wait until the console has printed the pattern.

        Raises TimeoutError after `timeout` seconds, and HostDied if QEMU ends before.
        """
        deadline = time.monotonic() + timeout
        with self._console_grew:
            while (found := pattern.search(bytes(self._console))) is None:
                if self._console_ended:
                    raise HostDied("QEMU ended")
                if not self._console_grew.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"{pattern.pattern!r} did not appear within {timeout:.0f} s")
            return found

    def is_running(self) -> bool:
        """Tell whether QEMU is."""
        return self._process.poll() is None

    def forward(self, address: str, port: int) -> int:
        """Make QEMU reach a TCP port of the machine from a port of 127.0.0.1, and return that, chosen by the kernel.

        Raises HostDied if QEMU doesn't answer.
        """
        with self._monitor_lock:
            failure = self._human(f"hostfwd_add net0 tcp:127.0.0.1:0-{address}:{port}")
            table = self._human("info usernet")
        # Protocol[State] FD Source-Address Port Dest.-Address Port RecvQ SendQ
        row = re.compile(rf"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+{re.escape(address)}\s+{port}\s")
        ports = row.findall(table)
        if not ports:
            raise EmulatedHostError(f"QEMU forwards nothing to {address}:{port}: {failure or table}")
        return int(ports[-1])

    def freeze(self) -> None:
        """Hold its CPUs for good: a machine that stands still, while QEMU runs. Raises HostDied."""
        with self._monitor_lock:
            self._human("stop")

    def state(self) -> str:
        """Tell what is known of a machine that seems to stand still; never raises.

        What its CPUs do, twice, and where its network's packets are; and the console's end.
        """
        found = []
        try:
            with self._monitor_lock:
                for line in ("info status", "info registers -a", "info registers -a", "info usernet"):
                    found += [f"- {line}", self._human(line)]
                (network,) = re.findall(r"^(\S+) \[virtio-net\]", self._human("info virtio"), re.MULTILINE)
                for queue in range(2):
                    line = f"info virtio-queue-status {network} {queue}"
                    found += [f"- {line}", self._human(line)]
        except (EmulatedHostError, ValueError) as error:
            found.append(str(error))
        return "\n".join((*found, self.console_tail()))

    def stop(self) -> None:
        """Kill QEMU and wait until nothing of it is left. Does nothing the second time."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()  # QEMU's death signal
            self._process.wait()
        self._reader.join()
        self._answers.close()
        self._monitor.close()

    def _read_console(self, stream: IO[bytes]) -> None:
        with stream:
            while data := os.read(stream.fileno(), 1 << 16):
                with self._console_grew:
                    self._console += data
                    self._console_grew.notify_all()
        with self._console_grew:
            self._console_ended = True
            self._console_grew.notify_all()

    def _human(self, line: str) -> str:
        if not self._greeted:
            self._receive("QMP")
            self._execute("qmp_capabilities")
            self._greeted = True
        return str(self._execute("human-monitor-command", {"command-line": line}))

    def _execute(self, command: str, arguments: dict[str, str] | None = None) -> Any:
        request = {"execute": command, "arguments": arguments or {}}
        try:
            self._monitor.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise HostDied(f"QEMU's monitor is gone: {error}\n{self.console_tail()}") from error
        return self._receive("return")

    def _receive(self, key: str) -> Any:
        # The answer is the line with that key; events come in between.
        while True:
            try:
                line = self._answers.readline()
            except OSError as error:
                raise HostDied(f"QEMU's monitor is silent: {error}\n{self.console_tail()}") from error
            if not line:
                raise HostDied(f"QEMU ended\n{self.console_tail()}")
            answer = json.loads(line)
            if key in answer:
                return answer[key]
            if "error" in answer:
                raise EmulatedHostError(f"QEMU refused: {answer['error']['desc']}")
