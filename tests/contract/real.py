"""The real kernels as subjects of the contract: a server in each emulated host plays the operations."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Final

from tests.contract import operations
from tests.contract.operations import HERE, Answer, Operation
from tests.contract.subject import Subject, new_vm
from tests.emulated.compiler import compiled
from tests.emulated.host import EmulatedHost, EmulatedHostError, HostDied

ROOT: Final = Path(__file__).parents[2]
INSIDE: Final = "/srv/contract"
LOG: Final = f"{INSIDE}/log"
SERVER: Final = ("adopting", "contract_server")
LOOKS: Final = (["busybox", "free", "-m"], ["busybox", "uptime"], ["sh", "-c", "dmesg | tail -n 60"])
"""What says most where a process has ended, or stands still."""
PORTS: Final = {(True, False): 50061, (False, False): 50062, (False, True): 50063, (True, True): 50064}
PGSTE: Final = "/proc/sys/vm/allocate_pgste"
LAUNCHER: Final = "deploy/launcher/skeyd-pgste"
SECONDS: Final = 120.0
"""For one request: a shared machine that emulates takes its time."""
LOOK_SECONDS: Final = 60.0
"""For a look at whether the host lives at all, once it has not answered."""


class RealKernel:
    """A Subject: the kernel of an emulated host. `place` is where operations are done that ask for none."""

    def __init__(self, host: EmulatedHost, place: str = HERE) -> None:
        self.name = f"Linux {host.kernel}"
        self.place = place
        self.generation = generation_of(host.kernel)
        self._host = host
        self._resources = ExitStack()
        self._ports: dict[tuple[bool, bool], int] = {}
        self._given_up: str | None = None
        self._shared: tuple[AbstractContextManager[_Process], _Process] | None = None
        host.put_tree(ROOT / "skeyd", f"{INSIDE}/skeyd")
        for path in ("tests/contract/operations.py", *(f"tests/emulated/{one}.py" for one in SERVER)):
            host.put(f"{INSIDE}/{path}", (ROOT / path).read_bytes())
        try:
            _ = self.shared
        except BaseException:
            self.close()
            raise

    @property
    def shared(self) -> _Process:
        """The process that tests share; another one where it has ended, so that one test's fault stays its own."""
        self._must_live()
        if self._shared is None or self._shared[1].has_ended:
            self._end_shared()
            context = self.process()
            self._shared = context, context.__enter__()
            new_vm(self._shared[1], number=-1).store(0, b"\0")
        return self._shared[1]

    @contextmanager
    def process(self, *, pgste: bool = True, launcher: bool = False) -> Iterator[_Process]:
        """Make a process; where it matters, `pgste` says whether the sysctl was set when its program was started.

        With `launcher` it was skeyd's own launcher that started it.
        """
        self._must_live()
        how = pgste, launcher
        if how not in self._ports:
            self._ports[how] = self._serve(pgste, launcher)
        with socket.create_connection(("127.0.0.1", self._ports[how]), SECONDS) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield _Process(connection, self)

    @contextmanager
    def allocate_pgste(self, on: bool) -> Iterator[None]:
        """Set the sysctl for as long as the context lasts, where the kernel has it."""
        self._must_live()
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
        self._must_live()
        return self._host.run(["python3", "-c", program], cwd=INSIDE).stdout.decode()

    def run_compiled(self, source: Path) -> str:
        """Compile a C program that asks for PGSTE, run it, and return what it has printed."""
        self._must_live()
        inside = f"{INSIDE}/{source.stem}"
        self._host.put(inside, compiled(source, "-Wl,--s390-pgste"), mode=0o755)
        return self._host.run([inside]).stdout.decode()

    def close(self) -> None:
        """End the servers, and with them all processes."""
        self._end_shared()
        self._resources.close()

    def why_it_fails(self) -> str:
        """Tell what is known once a process has not answered; no test waits for this kernel again if it is dead."""
        self._must_live()
        try:
            found = [
                self._host.run(argv, timeout=LOOK_SECONDS, check=False).stdout.decode(errors="replace")
                for argv in (["tail", "-c", "4000", LOG], *LOOKS)
            ]
        except (EmulatedHostError, subprocess.TimeoutExpired) as error:
            self._given_up = f"{self.name} is dead, as a test before has found: {error}"
            return f"{self.name} is dead: {error}\n{self._host.state()}"
        return "\n".join((*found, self._host.console[-4000:]))

    def _must_live(self) -> None:
        if self._given_up is not None:
            raise HostDied(self._given_up)

    def _end_shared(self) -> None:
        if self._shared is not None:
            context, _ = self._shared
            self._shared = None
            context.__exit__(None, None, None)

    def _set_pgste(self, value: str) -> None:
        self._host.run(["sh", "-c", f"echo {value} >{PGSTE}"])

    def _serve(self, pgste: bool, launcher: bool) -> int:
        port = PORTS[pgste, launcher]
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
                stdout_path=LOG,
            )
            self._resources.callback(server.close)
            assert self._host.get(ready) == b"ready", self.why_it_fails()  # waits: it is a fifo
        return self._host.forward(port)


class _Process:
    def __init__(self, connection: socket.socket, kernel: RealKernel) -> None:
        self._connection = connection
        self._kernel = kernel
        self.has_ended = False

    def play(self, *wanted: Operation, where: str = HERE) -> list[Answer]:
        if self.has_ended:
            raise HostDied("the process inside the host has ended, as was told before")
        try:
            place = self._kernel.place if where == HERE else where
            operations.send(self._connection, operations.request(wanted, place))
            if (message := operations.receive(self._connection)) is not None:
                return operations.answers_of(message)
            failure = "it has ended"
        except (OSError, EOFError) as error:
            failure = repr(error)
        # Never asked again: its next answer could be the one to this.
        self.has_ended = True
        raise HostDied(f"the process inside the host doesn't answer, {failure}\n{self._kernel.why_it_fails()}")


def generation_of(release: str) -> str:
    """Whose rules a release follows, as docs/kernel.md has them."""
    found = re.match(r"(\d+)\.(\d+)", release)
    assert found, release
    version = int(found[1]), int(found[2])
    assert version >= (4, 19), f"nobody has looked at Linux {release}"
    return "7.2" if version >= (7, 2) else "7.0" if version >= (7, 0) else "4.19"


_: type[Subject] = RealKernel
