"""What the benchmarks share: daemons and peers as processes, clients that are told what to do, rounds and ratios.

Every comparison is made within one run, in rounds that interleave what is compared, on one machine, and every figure
is the median of the rounds' ratios: absolute times change with the machine and with what else runs on it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from benchmarks.report import ROOT, Report
from skeyd.client import connect
from skeyd.v1 import vm_pb2, vm_service_pb2

PEER: Final = ROOT / "benchmarks" / "peer"
BUILD: Final = PEER / "build"
PACKAGES: Final = ROOT / "benchmarks" / "debian-packages"
MIB: Final = 1 << 20
CHUNK: Final = 1 << 20
"""Keys in a chunk wherever nothing else is said: the most that the contract allows."""
VM: Final = "vms/benchmark"
START_SECONDS: Final = 30.0
_MEMORY_DIR: Final = "/dev/shm"  # noqa: S108  only the parent of a private directory
ANSWER_SECONDS: Final = 300.0


Case = Callable[[], dict[str, Any]]
"""Does one thing once, and returns figures of it."""


class BenchmarkError(Exception):
    """Something that a benchmark needs is not there, or failed. The message says what."""


def tool(name: str) -> str:
    """Return the path of a program of the system's. BenchmarkError where it is not installed."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        raise BenchmarkError(f"{name} is needed; install what {PACKAGES.relative_to(ROOT)} lists")
    return found


def set_up() -> None:
    """Build the C++ peer, after installing Debian's packages for it where they are missing and this is root."""
    needed = [line.split("#")[0].strip() for line in PACKAGES.read_text().splitlines()]
    needed = [name for name in needed if name]
    dpkg = shutil.which("dpkg")
    if dpkg and subprocess.run([dpkg, "-s", *needed], capture_output=True, check=False).returncode:
        if os.geteuid():
            raise BenchmarkError(f"the packages of {PACKAGES.relative_to(ROOT)} are needed; install them as root")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for arguments in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *needed]):
            command = [tool("apt-get"), *arguments]
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, check=True)
    jobs = str(os.cpu_count() or 1)
    subprocess.run([tool("make"), "-s", "-C", str(PEER), "-j", jobs], stdout=subprocess.DEVNULL, check=True)


class Processes:
    """Processes of one benchmark, and what they leave behind; all is gone after `with`. One thread's."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        # In memory, so that no disk is measured; mkdtemp's mode is 0700.
        parent = _MEMORY_DIR if Path(_MEMORY_DIR).is_dir() else None
        self.directory = Path(tempfile.mkdtemp(prefix="skeyd-b-", dir=parent))
        self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)

    def enter(self, resource: Any) -> Any:
        """Enter a context that is left with this one."""
        return self._stack.enter_context(resource)

    def callback(self, function: Callable[..., object], *arguments: object) -> None:
        """Have a function called at the end."""
        self._stack.callback(function, *arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def end(process: subprocess.Popen[Any], seconds: float = 15.0) -> None:
    """End a process by SIGTERM, or SIGKILL where that does not do it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


class Daemon:
    """A skeyd of its own, on a unix socket and on TCP.

    `options` go to benchmarks.daemon: none of them is anything that skeyd has. `inside` is put before the command, to
    start it in a network namespace.
    """

    def __init__(
        self, where: Path, tcp: str = "127.0.0.1:0", options: Sequence[str] = (), inside: Sequence[str] = ()
    ) -> None:
        self._runtime_dir = where / f"d{time.monotonic_ns():x}"
        self._log = where / f"{self._runtime_dir.name}.log"
        module = ["-m", "benchmarks.daemon", *options, "--"] if options else ["-m", "skeyd.server"]
        command = [*inside, sys.executable, *module, "--runtime-dir", str(self._runtime_dir)]
        command += ["--insecure-tcp", tcp, "--log-format", "json"]
        with self._log.open("wb") as log:
            begun = time.monotonic()
            self.process = subprocess.Popen(command, cwd=ROOT, stderr=log, stdin=subprocess.DEVNULL)
        self._workers: dict[str, int] = {}
        try:
            self.unix, self.tcp = self._serving()
        except BaseException:
            end(self.process)
            raise
        self.started_seconds = time.monotonic() - begun
        self.pid = self.process.pid

    def _serving(self) -> tuple[str, str]:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            for line in self._log.read_text().splitlines():
                if '"serving"' in line:
                    unix, tcp = json.loads(line)["addresses"]
                    return unix, tcp
            time.sleep(0.01)
        raise BenchmarkError(f"skeyd did not start: {self._log.read_text()[-2000:]}")

    def create_vm(self, keys: int, name: str = VM) -> int:
        """Make a simulated VM of Linux 7.2 with so many frames, and return its worker's process id."""
        most = 1 << 30
        slots = [
            vm_service_pb2.MemorySlotSpec(guest_phys_addr=at << 12, memory_size=min(most, keys - at) << 12)
            for at in range(0, keys, most)
        ]
        request = vm_service_pb2.CreateVmRequest(
            vm_id=name.partition("/")[2],
            kind=vm_pb2.VM_KIND_SIMULATED,
            simulated_kernel=vm_pb2.SIMULATED_KERNEL_LINUX_7_2,
            memory_slots=slots,
        )
        with connect(self.unix) as client:
            pid = int(client.create_vm(request).worker_pid)
        self._workers[name] = pid
        return pid

    def delete_vm(self, name: str = VM) -> None:
        """End a VM and its worker."""
        with connect(self.unix) as client:
            client.delete_vm(name)
        self._workers.pop(name, None)

    def log(self) -> str:
        """Return what it has logged."""
        return self._log.read_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Workers outlive the daemon on purpose.
        for name in list(self._workers):
            try:
                self.delete_vm(name)
            except Exception:
                with suppress(ProcessLookupError):
                    os.kill(self._workers.pop(name), signal.SIGKILL)
        end(self.process)
        shutil.rmtree(self._runtime_dir, ignore_errors=True)
        self._log.unlink(missing_ok=True)


class Peer:
    """The C++ server, on a unix socket and on TCP."""

    def __init__(self, where: Path, keys: int, tcp_host: str = "127.0.0.1", inside: Sequence[str] = ()) -> None:
        path = where / f"p{time.monotonic_ns():x}.sock"
        self.unix = f"unix:{path}"
        command = [*inside, str(BUILD / "server"), self.unix, f"{tcp_host}:0", str(keys)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        said = self.process.stdout.readline() if self.process.stdout else ""
        if not said:
            end(self.process)
            raise BenchmarkError("the C++ server did not start")
        self.tcp = f"{tcp_host}:{json.loads(said)['ports'][1]}"
        self.pid = self.process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end(self.process)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()


class Told:
    """A process that takes a command a line and answers each with a line of JSON: a client."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.pid = self._process.pid
        self._words: list[str] = []

    def do(self, command: str, **arguments: object) -> dict[str, Any]:
        """Have a command done. BenchmarkError where it failed."""
        self.begin(command, **arguments)
        return self.end()

    def begin(self, command: str, **arguments: object) -> None:
        """Have a command begun, the answer to which `end` takes."""
        self._words = [command, *(f"{name}={value}" for name, value in arguments.items())]
        stdin, _ = self._pipes()
        stdin.write(" ".join(self._words) + "\n")
        stdin.flush()

    def end(self) -> dict[str, Any]:
        """Take the answer to the command that was begun. BenchmarkError where it failed."""
        with _limit(ANSWER_SECONDS):
            said = self._pipes()[1].readline()
        if not said:
            raise BenchmarkError(f"a client ended at {self._words}")
        answer: dict[str, Any] = json.loads(said)
        if "error" in answer:
            raise BenchmarkError(f"{' '.join(self._words)}: {answer['error']}")
        return answer

    def first(self) -> dict[str, Any]:
        """Take the line that a process says by itself."""
        with _limit(ANSWER_SECONDS):
            said: dict[str, Any] = json.loads(self._pipes()[1].readline() or '{"error": "it ended"}')
        return said

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        if self._process.stdin is None or self._process.stdout is None:
            raise BenchmarkError("a client without pipes")
        return self._process.stdin, self._process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stdin, stdout = self._pipes()
        with suppress(OSError):
            stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(15)
        end(self._process)
        stdout.close()


def cpp_client(target: str, inside: Sequence[str] = ()) -> Told:
    """Start the C++ client."""
    return Told([*inside, str(BUILD / "client"), target])


def python_client(target: str) -> Told:
    """Start skeyd's own client, in a process that is told as the C++ client is."""
    return Told([sys.executable, "-m", "benchmarks.python_client", target])


def connections(target: str, count: int) -> Told:
    """Open so many idle connections; its first line says that they are there."""
    return Told([sys.executable, "-m", "benchmarks.connections", target, str(count)])


def copy_seconds(kind: str, count: int) -> float:
    """Copy bytes from one process to another through a bare socket, "unix" or "tcp"."""
    done = subprocess.run([str(BUILD / "copy"), kind, str(count), str(MIB)], stdout=subprocess.PIPE, check=True)
    return float(json.loads(done.stdout)["seconds"])


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    # A client that never answers must not keep the benchmark for ever.
    def late(_number: int, _frame: object) -> None:
        raise BenchmarkError(f"no answer in {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def cpu_seconds(pid: int) -> float:
    """Return what a process has used of CPUs, its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a process in KiB."""

    resident: int
    private: int
    most: int
    """Resident at most, since `reset_most`."""


def memory_of(pid: int | str) -> Memory:
    """Look at a process's memory."""
    found: dict[str, int] = {}
    for source in ("smaps_rollup", "status"):
        for line in Path(f"/proc/{pid}/{source}").read_text().splitlines():
            words = line.split()
            if len(words) == 3 and words[2] == "kB":
                found[words[0]] = int(words[1])
    return Memory(found["Rss:"], found["Private_Clean:"] + found["Private_Dirty:"], found["VmHWM:"])


def reset_most(pid: int) -> None:
    """Have a process's most resident memory counted anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5\n")


def rounds_of(rounds: int, cases: Mapping[str, Case], warm_up: int = 1) -> dict[str, list[dict[str, Any]]]:
    """Run cases in turn, every second round in reverse order: the samples of each; `warm_up` rounds aren't counted."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for number in range(-warm_up, rounds):
        order = list(cases)[:: 1 if number % 2 else -1]
        for name in order:
            sample = cases[name]()
            if number >= 0:
                found[name].append(sample)
    return found


def values(samples: Sequence[Mapping[str, Any]], name: str = "seconds") -> list[float]:
    """Take one figure of all samples."""
    return [float(sample[name]) for sample in samples]


def ratio(upper: Sequence[float], lower: Sequence[float]) -> dict[str, float]:
    """Return the median of the rounds' ratios, and their least and most."""
    found = [one / other for one, other in zip(upper, lower, strict=True)]
    return {"median": round(statistics.median(found), 3), "least": round(min(found), 3), "most": round(max(found), 3)}


def percentile(found: Sequence[float], percent: float) -> float:
    """Return a percentile: the least value that so many are not above."""
    ordered = sorted(found)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def run(
    name: str, description: str, body: Callable[[argparse.Namespace, Processes, Report], None], **defaults: int
) -> None:
    """Read a benchmark's command line, set up, run it, clear up and report.

    `defaults` are options that take a number, and their defaults; --rounds and --json are always there.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    for option, default in {"rounds": 7, **defaults}.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    # Ended by SIGTERM, it clears up as after an error.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(128 + signal.SIGTERM))
    try:
        set_up()
        report = Report(name, options.rounds)
        with Processes() as processes:
            body(options, processes, report)
    except (BenchmarkError, subprocess.CalledProcessError) as error:
        sys.exit(f"{name}: {error}")
    report.show(options.json)
