"""An emulated s390x KVM host: boot it, run commands in it, reach what listens in it, and leave nothing behind.

By hand: ``python -m tests.emulated.host bookworm -- uname -a``
"""

import argparse
import contextlib
import fnmatch
import io
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from tests.emulated import agent, qemu, recipe
from tests.emulated.image import BuildFailed, Image
from tests.emulated.machine import EmulatedHostError, HostDied, Machine
from tests.emulated.overlay import ADDRESS, AGENT_PORT, START, SYSTEMD, overlay
from tests.emulated.process import ANSWER_TIMEOUT, Call, Process, answering

BOOT_TIMEOUT = 240.0  # seconds; a boot takes some ten, and many times that on a machine with much else to do
SYSTEMD_BOOT_TIMEOUT = 380.0
PARALLEL = 2
"""CPUs that QEMU is told may come, at least. With one it doesn't take care that what a guest does atomically is so: a
device sets its bit in the word of which the guest clears another, and an interrupt is lost (README.md)."""
NOT_NEEDED_INSIDE = ("__pycache__", ".git", ".*_cache")

_READY = re.compile(re.escape(agent.READY).encode() + rb"(\S+)\r?\n")

__all__ = ["BootFailed", "EmulatedHost", "EmulatedHostError", "HostDied", "Process"]


class BootFailed(EmulatedHostError):  # noqa: N818 (says what happened)
    """The host did not get as far as answering: the message carries the console's last lines."""


class EmulatedHost:
    """A host from entering the context to leaving it.

    Inside, everything is root's, in memory, and gone afterwards. There is no way out of it: its network
    reaches this machine's forwarded ports and nothing else.

    Synchronization: every method may be called from any thread, several at once; a `Process` from one at a
    time.
    """

    def __init__(
        self,
        image: Image,
        *,
        memory: str = "3G",
        cpus: int = 1,
        systemd: bool = False,
        append: str = "",
        counts_instructions: bool = False,
        boot_timeout: float | None = None,
    ) -> None:
        """Prepare a host that boots an image that is built.

        `memory` is QEMU's -m; `systemd` boots with systemd as the first process, in three times the time;
        `append` goes at the kernel command line's end; `boot_timeout` is in seconds. With `counts_instructions` the
        host's clock goes on by 1 ns an instruction (a real CPU needs less: what is paced by the clock must not be paced
        for a far slower one), and not while it idles: what takes how long inside is then the same whatever else this
        machine does. One CPU at a time runs.
        """
        self._image = image
        self._memory = memory
        self._cpus = cpus
        self._first = SYSTEMD if systemd else START
        self._append = append
        self._clock = ("-icount", "shift=0,sleep=off") if counts_instructions else ()
        self._boot_timeout = boot_timeout or (SYSTEMD_BOOT_TIMEOUT if systemd else BOOT_TIMEOUT)
        self._machine: Machine | None = None
        self._kernel = ""
        self._lock = threading.Lock()
        self._ports: dict[int, int] = {}
        self._agent_port = 0
        self._processes: set[Process] = set()

    def __enter__(self) -> Self:
        """Boot.

        Raises:
            BootFailed: it did not answer in time, or QEMU ended; QEMU is gone then.
            FileNotFoundError: the image is not built, or there is no QEMU.
        """
        with _joined(self._image.initrd, overlay()) as initrd:
            self._machine = machine = Machine(self._command(initrd))
            try:
                ready = machine.wait_for_console(_READY, self._boot_timeout)
                self._kernel = ready[1].decode()
                self._agent_port = machine.forward(ADDRESS, AGENT_PORT)
            except BaseException as error:
                self.__exit__()
                if isinstance(error, (TimeoutError, EmulatedHostError)):
                    raise BootFailed(
                        f"{self._image.suite} did not boot: {error}. The console's end:\n{machine.console_tail()}"
                    ) from error
                raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop QEMU, and with it all that runs inside."""
        for process in list(self._processes):
            process.close()
        if self._machine is not None:
            self._machine.stop()

    @property
    def kernel(self) -> str:
        """The kernel's release, as `uname -r` tells it."""
        return self._kernel

    @property
    def console(self) -> str:
        """What the console has printed so far."""
        return self._machine.console if self._machine else ""

    def freeze(self) -> None:
        """Have it stand still for good, as one that hangs does. Raises HostDied."""
        self._running().freeze()

    def state(self) -> str:
        """Tell what QEMU knows of a host that no longer answers, and what its kernel still says."""
        return self._machine.state() if self._machine else "it was not started"

    def is_running(self) -> bool:
        """Tell whether QEMU runs: False before and after the context, and when the host has died."""
        return self._machine is not None and self._machine.is_running()

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        timeout: float = 60.0,
        input: bytes = b"",  # noqa: A002 (its name in subprocess.run, which this stands for)
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        check: bool = True,
    ) -> "subprocess.CompletedProcess[bytes]":
        """Run a command inside, as subprocess.run does here: until it has ended and its outputs are closed.

        `timeout` is in seconds. `env` is added to the environment inside.

        Raises:
            subprocess.TimeoutExpired: it was killed, with what it had started; carries what was printed by then.
            subprocess.CalledProcessError: its status is not 0, and `check`; a note has the end of its stderr.
            OSError: it can't be started (FileNotFoundError and so on), as told inside.
            HostDied: the host is gone.
        """
        printed = {agent.OUTPUT: bytearray(), agent.ERRORS: bytearray()}
        words = [os.fspath(word) for word in argv]

        def keep(kind: int, data: bytes) -> None:
            printed[kind] += data

        try:
            status = self._run(words, timeout, input, env, cwd, keep)
        except TimeoutError as error:
            output, errors = (bytes(part) for part in printed.values())
            raise subprocess.TimeoutExpired(words, timeout, output, errors) from error
        output, errors = (bytes(part) for part in printed.values())
        finished = subprocess.CompletedProcess(words, status, output, errors)
        if check and status != 0:
            failure = subprocess.CalledProcessError(status, words, output, errors)
            failure.add_note(errors[-4000:].decode(errors="replace"))
            raise failure
        return finished

    def start(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdout_path: str = "/dev/null",
    ) -> Process:
        """Start a command inside and leave it running; its two outputs are appended to a file inside.

        It is killed, with what it started, when its handle is closed or the host is left.
        Raises OSError and HostDied as `run` does.
        """
        with answering(self._running()):
            call = self._call([os.fspath(word) for word in argv], b"", env, cwd, stdout_path, ANSWER_TIMEOUT)
        return Process(call, self._processes)

    def put(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a file inside, and the directories it needs. Raises subprocess.CalledProcessError if that fails."""
        script = 'mkdir -p "$(dirname "$1")" && cat >"$1" && chmod "$2" "$1"'
        self.run(["busybox", "sh", "-c", script, "put", path, f"{mode:o}"], input=data)

    def get(self, path: str) -> bytes:
        """Return a file's content. Raises subprocess.CalledProcessError if it can't be read."""
        return self.run(["busybox", "cat", path]).stdout

    def put_tree(self, local: Path, remote: str, *, exclude: Sequence[str] = NOT_NEEDED_INSIDE) -> None:
        """Copy a directory's content into a directory inside, which is made if absent; all of it becomes root's.

        `exclude` has shell patterns; what matches one by its name or by its path below `local` is left out,
        with all that is below it.
        """

        def chosen(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
            path = member.name.removeprefix("./")
            name = path.rpartition("/")[2]
            if any(fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(path, pattern) for pattern in exclude):
                return None
            member.uid = member.gid = 0
            member.uname = member.gname = "root"
            return member

        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            tar.add(local, ".", filter=chosen)
        script = 'mkdir -p "$1" && tar -x -C "$1"'
        self.run(["busybox", "sh", "-c", script, "put_tree", remote], input=archive.getvalue(), timeout=300)

    def forward(self, port: int) -> int:
        """Return a port of 127.0.0.1 here that reaches 127.0.0.1:`port` inside.

        Whoever listens there sees its clients come from 10.0.2.2. Where nobody listens, a connection from
        here is accepted and then closed: that is how QEMU's user network works. The same port again gives the
        same answer.
        """
        with self._lock:
            if port not in self._ports:
                self._ports[port] = self._running().forward("127.0.0.1", port)
            return self._ports[port]

    def _running(self) -> Machine:
        if self._machine is None or not self._machine.is_running():
            raise HostDied(f"the emulated host does not run\n{self._machine.console_tail() if self._machine else ''}")
        return self._machine

    def _command(self, initrd: str) -> list[str]:
        arguments = [
            # A panic ends QEMU, for the guest's way of saying so is a reboot.
            *("console=ttysclp0", "quiet", "panic=-1", "net.ifnames=0", f"rdinit={self._first}"),
            *("systemd.show_status=0", self._append),
        ]
        return [
            *qemu.command(self._image.suite),
            *("-machine", "s390-ccw-virtio,accel=tcg", "-cpu", "max"),
            *("-smp", f"{self._cpus},maxcpus={max(self._cpus, PARALLEL)}", "-m", self._memory, *self._clock),
            *("-nodefaults", "-display", "none", "-no-reboot"),
            *("-kernel", str(self._image.kernel), "-initrd", initrd, "-append", " ".join(arguments)),
            *("-chardev", "stdio,id=console,signal=off", "-device", "sclpconsole,chardev=console"),
            *("-netdev", "user,id=net0,restrict=on", "-device", "virtio-net-ccw,netdev=net0"),
        ]

    def _run(
        self,
        argv: list[str],
        timeout: float,
        given: bytes,
        env: Mapping[str, str] | None,
        cwd: str | None,
        keep: Callable[[int, bytes], None],
    ) -> int:
        deadline = time.monotonic() + timeout
        with self._call(argv, given, env, cwd, None, timeout) as call:
            try:
                return call.finish(deadline, keep)
            except TimeoutError:
                call.kill(keep)
                raise

    def _call(
        self,
        argv: list[str],
        given: bytes,
        env: Mapping[str, str] | None,
        cwd: str | None,
        log: str | None,
        timeout: float,
    ) -> Call:
        request: agent.Request = {
            "argv": argv,
            "env": dict(env or {}),
            "cwd": cwd,
            "input": len(given),
            "log": log,
        }
        return Call(self._running(), self._agent_port, request, given, timeout)


@contextlib.contextmanager
def _joined(initrd: Path, addition: bytes) -> Iterator[str]:
    # A path to both, one after the other, in memory: there is no file that a dying process could leave.
    memory = os.memfd_create("initrd")
    try:
        with initrd.open("rb") as stream:
            while os.sendfile(memory, stream.fileno(), None, 1 << 30):
                pass
        with open(memory, "ab", closefd=False) as stream:
            stream.write(addition)
        yield f"/proc/{os.getpid()}/fd/{memory}"
    finally:
        os.close(memory)


def main(arguments: list[str] | None = None) -> int:
    """Boot a host, run a command in it, print what it prints, and exit with its status; 124 when it takes too long."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.emulated.host", description=main.__doc__)
    parser.add_argument("suite", choices=recipe.SUITES, help="Debian's release, which decides the kernel")
    parser.add_argument("--systemd", action="store_true", help="boot with systemd as the first process")
    parser.add_argument("--memory", default="3G", help="the host's memory, as QEMU's -m takes it")
    parser.add_argument("--cpus", type=int, default=1, help="how many CPUs the host has")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for the command")
    parser.add_argument(
        "--put",
        action="append",
        default=[],
        metavar="HERE:INSIDE",
        help="copy a directory into the host first",
    )
    parser.add_argument(
        "--stdin", action="store_true", help="read all of standard input first, and hand it to the command"
    )
    parser.add_argument("command", nargs="+", help="what to run inside, after --")
    options = parser.parse_args(arguments)

    def show(kind: int, data: bytes) -> None:
        stream = sys.stdout if kind == agent.OUTPUT else sys.stderr
        stream.buffer.write(data)
        stream.flush()

    given = sys.stdin.buffer.read() if options.stdin else b""
    image = Image(options.suite)
    try:
        image.build()
        host = EmulatedHost(image, memory=options.memory, cpus=options.cpus, systemd=options.systemd)
        with host:
            for pair in options.put:
                here, _, inside = pair.partition(":")
                host.put_tree(Path(here), inside)
            status = host._run(options.command, options.timeout, given, None, None, show)
    except TimeoutError:
        sys.stderr.write(f"the command was killed after {options.timeout} s\n")
        return 124  # as timeout does
    except (BuildFailed, EmulatedHostError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 125  # what env and docker answer where the fault is not the command's
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
