"""An unmodified QEMU with a paused guest, whose VM others work on."""

from __future__ import annotations

import json
import os
import platform
import re
import select
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

from tests.injection.victims import SECONDS, cannot, wait_for
from tests.processes import Process, end, look_at

PROGRAM: Final = "qemu-system-s390x"
FRAMES: Final = 64 << 20 >> 12
SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""What libvirt asks for."""


class Qemu:
    """A guest, and a connection to its monitor; `monitor` is the socket of another one, for others."""

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        memory_mib: int = 64,
        accel: str = "kvm",
        paused: bool = True,
        pass_fds: tuple[int, ...] = (),
    ) -> None:
        self._directory = directory
        self.frames = memory_mib << 20 >> 12
        self.monitor = directory / "monitor"
        path = directory / "qmp"
        self.process = subprocess.Popen(
            [
                *(PROGRAM, "-machine", "s390-ccw-virtio", "-accel", accel, "-m", f"{memory_mib}M", "-nodefaults"),
                *("-display", "none", "-qmp", f"unix:{path},server=on,wait=off", *(["-S"] if paused else [])),
                *("-qmp", f"unix:{self.monitor},server=on,wait=off", *arguments),
            ],
            pass_fds=pass_fds,
        )
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            wait_for(lambda: self.monitor.exists() or self.process.poll() is not None)
            self._socket.settimeout(SECONDS)
            wait_for(lambda: self._socket.connect_ex(str(path)) == 0)
            self._file = self._socket.makefile("rb")
            assert "QMP" in json.loads(self._file.readline())
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self.process.pid

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command of the monitor, and return its answer."""
        self.ask(command, **arguments)
        return self.answer()

    def ask(self, command: str, **arguments: Any) -> None:
        """Send a command to the monitor."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())

    def has_answer(self, seconds: float) -> bool:
        """Wait for a word of the monitor."""
        return bool(select.select([self._socket], [], [], seconds)[0])

    def answer(self) -> Any:
        """Take the answer."""
        while True:
            said = json.loads(self._file.readline())
            assert "error" not in said, said
            if "return" in said:
                return said["return"]

    def answers(self) -> None:
        """See that it lives as it did."""
        assert self.execute("query-status")["status"] in ("prelaunch", "paused", "running")

    def dumped(self) -> bytes:
        """Return the keys as QEMU reads them itself."""
        path = self._directory / "keys"
        self.execute("dump-skeys", filename=str(path))
        lines = re.findall(r"page=([0-9a-f]+): key\((\d+)\)", path.read_text())
        assert [int(page, 16) for page, _ in lines] == list(range(self.frames))
        return bytes(int(key) for _, key in lines)

    def close(self) -> None:
        self._socket.close()
        if hasattr(self, "_file"):
            self._file.close()
        process: Process | None = look_at(self.pid)
        if process is not None:
            end(process)
        self.process.wait(SECONDS)


def require_program() -> None:
    """Skip where there is no QEMU."""
    if shutil.which(PROGRAM) is None:
        cannot(f"this takes {PROGRAM}")


def require_qemu() -> None:
    """Skip where there is none, or no KVM for it."""
    if platform.machine() != "s390x":
        pytest.skip("storage keys take an s390x machine; tests/emulated/test_injection.py has one")
    if shutil.which(PROGRAM) is None or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        cannot(f"this takes {PROGRAM} and KVM")
