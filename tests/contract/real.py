"""The real kernels as subjects of the contract: a server in each emulated host plays the operations."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from tests.contract import operations
from tests.contract.operations import HERE, Answer, Operation
from tests.contract.subject import Subject, new_vm
from tests.emulated.compiler import compiled
from tests.emulated.host import EmulatedHost

ROOT: Final = Path(__file__).parents[2]
INSIDE: Final = "/srv/contract"
PORTS: Final = {(True, False): 50061, (False, False): 50062, (False, True): 50063, (True, True): 50064}
PGSTE: Final = "/proc/sys/vm/allocate_pgste"
LAUNCHER: Final = "deploy/launcher/skeyd-pgste"
SECONDS: Final = 120.0
"""For one request: a shared machine that emulates takes its time."""


class RealKernel:
    """A Subject: the kernel of an emulated host."""

    def __init__(self, host: EmulatedHost) -> None:
        self.name = f"Linux {host.kernel}"
        self.generation = generation_of(host.kernel)
        self._host = host
        self._resources = ExitStack()
        self._ports: dict[tuple[bool, bool], int] = {}
        host.put_tree(ROOT / "skeyd", f"{INSIDE}/skeyd")
        for path in ("tests/contract/operations.py", "tests/emulated/contract_server.py"):
            host.put(f"{INSIDE}/{path}", (ROOT / path).read_bytes())
        try:
            self.shared = self._resources.enter_context(self.process())
            new_vm(self.shared, number=-1).store(0, b"\0")
        except BaseException:
            self.close()
            raise

    @contextmanager
    def process(self, *, pgste: bool = True, launcher: bool = False) -> Iterator[_Process]:
        """Make a process; where it matters, `pgste` says whether the sysctl was set when its program was started.

        With `launcher` it was skeyd's own launcher that started it.
        """
        how = pgste, launcher
        if how not in self._ports:
            self._ports[how] = self._serve(pgste, launcher)
        with socket.create_connection(("127.0.0.1", self._ports[how]), SECONDS) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield _Process(connection, self._log)

    @contextmanager
    def allocate_pgste(self, on: bool) -> Iterator[None]:
        """Set the sysctl for as long as the context lasts, where the kernel has it."""
        if not self.has_pgste_sysctl():
            yield
            return
        before = self._host.get(PGSTE).decode().strip()
        self._set_pgste(str(int(on)))
        try:
            yield
        finally:
            self._set_pgste(before)

    def has_pgste_sysctl(self) -> bool:
        """Tell whether there is one."""
        return not self._host.run(["test", "-e", PGSTE], check=False).returncode

    def run(self, program: str) -> str:
        """Run a Python program that may import skeyd, and return what it has printed."""
        return self._host.run(["python3", "-c", program], cwd=INSIDE).stdout.decode()

    def run_compiled(self, source: Path) -> str:
        """Compile a C program that asks for PGSTE, run it, and return what it has printed."""
        inside = f"{INSIDE}/{source.stem}"
        self._host.put(inside, compiled(source, "-Wl,--s390-pgste"), mode=0o755)
        return self._host.run([inside]).stdout.decode()

    def close(self) -> None:
        """End the servers, and with them all processes."""
        self._resources.close()

    def _set_pgste(self, value: str) -> None:
        self._host.run(["sh", "-c", f"echo {value} >{PGSTE}"])

    def _serve(self, pgste: bool, launcher: bool) -> int:
        port, log = PORTS[pgste, launcher], f"{INSIDE}/log"
        ready = f"{INSIDE}/ready-{port}"
        through = []
        if launcher:
            through.append(f"{INSIDE}/{LAUNCHER}")
            self._host.put(through[0], compiled(ROOT / f"{LAUNCHER}.c", "-Wl,--s390-pgste"), mode=0o755)
        self._host.run(["sh", "-c", f"rm -f {ready}; mkfifo {ready}"])
        with self.allocate_pgste(pgste):
            server = self._host.start(
                [*through, "python3", "-m", "tests.emulated.contract_server", str(port), ready],
                env={"PYTHONPATH": INSIDE},
                cwd=INSIDE,
                stdout_path=log,
            )
            self._resources.callback(server.close)
            assert self._host.get(ready) == b"ready", self._log()  # waits: it is a fifo
        return self._host.forward(port)

    def _log(self) -> str:
        return self._host.get(f"{INSIDE}/log").decode(errors="replace")[-4000:]


class _Process:
    def __init__(self, connection: socket.socket, log: Callable[[], str]) -> None:
        self._connection = connection
        self._log = log

    def play(self, *wanted: Operation, where: str = HERE) -> list[Answer]:
        operations.send(self._connection, operations.request(wanted, where))
        message = operations.receive(self._connection)
        assert message is not None, f"the process inside the host ended:\n{self._log()}"
        return operations.answers_of(message)


def generation_of(release: str) -> str:
    """Whose rules a release follows, as docs/kernel.md has them."""
    found = re.match(r"(\d+)\.(\d+)", release)
    assert found, release
    version = int(found[1]), int(found[2])
    assert version >= (4, 19), f"nobody has looked at Linux {release}"
    return "7.2" if version >= (7, 2) else "7.0" if version >= (7, 0) else "4.19"


_: type[Subject] = RealKernel
