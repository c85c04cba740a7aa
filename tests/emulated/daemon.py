"""skeyd inside an emulated host, talked with from outside over TCP."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import grpc

from skeyd.client import Client
from tests.emulated.host import EmulatedHost, Process

ROOT: Final = Path(__file__).resolve().parent.parent.parent
INSIDE: Final = "/srv/skeyd"
MEMORY_DIR: Final = "/srv/memory"
READY_SECONDS: Final = 90.0
PORT: Final = 50051


class DaemonInside:
    """A daemon in a host, as a user there would start it: Debian's own Python, grpcio and protobuf.

    Workers outlive it, and end with the host.
    """

    def __init__(self, host: EmulatedHost, runtime_dir: str = "/run/skeyd", port: int = PORT) -> None:
        self._host = host
        self._runtime_dir = runtime_dir
        self._port = port
        self._log = f"{runtime_dir}.log"
        self._process: Process | None = None

    @staticmethod
    def install(host: EmulatedHost) -> None:
        """Copy skeyd into the host."""
        host.put_tree(ROOT / "skeyd", f"{INSIDE}/skeyd")

    def start(self, *arguments: str, through: Sequence[str] = ()) -> None:
        """Start it, with these arguments too, as those of another program where one is given.

        `connect` waits until it serves.
        """
        self._host.run(["mkdir", "-p", MEMORY_DIR])
        self._process = self._host.start(
            [
                *(*through, "python3", "-m", "skeyd.server", "--runtime-dir", self._runtime_dir),
                *("--insecure-tcp", f"127.0.0.1:{self._port}", "--memory-dir", MEMORY_DIR, *arguments),
            ],
            env={"PYTHONPATH": INSIDE},
            stdout_path=self._log,
        )

    def connect(self) -> Client:
        """Connect from outside, with this machine's grpcio, when it serves. Close the client, or use it in a `with`."""
        channel = grpc.insecure_channel(f"127.0.0.1:{self._host.forward(self._port)}")
        try:
            grpc.channel_ready_future(channel).result(READY_SECONDS)
        except BaseException as error:
            channel.close()
            if isinstance(error, grpc.FutureTimeoutError):
                raise AssertionError(f"the daemon does not serve; its log: {self.log()}") from None
            raise
        return Client(channel)

    def kill(self) -> None:
        """SIGKILL it, and wait until it is gone."""
        assert self._process is not None
        self._process.signal(signal.SIGKILL)
        assert self._process.wait(30) == -signal.SIGKILL

    def log(self) -> list[dict[str, Any]]:
        """Its log so far, a line each."""
        return [json.loads(line) for line in self._host.get(self._log).splitlines() if line.startswith(b"{")]
