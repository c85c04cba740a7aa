"""GetSkeys and SetSkeys, end to end, against the raw ioctls in a loop of C, on a real s390x kernel.

    python -m benchmarks.end_to_end [SUITE ...] [--mib 1024] [--rounds 7] [--clock CLOCK] [--cpus 1] [--json FILE]

from the checkout's root, with the emulated host built (tests/emulated/README.md) and its compiler. For each suite one
host is booted, and in it, in every round, the same is done by `raw_skeys.c` and by a client of skeyd over a unix
socket, one right after the other, each with an owned VM of anonymous memory. How the memory is makes a difference:

- touched: every frame was written to, as those of a guest that has run;
- mapped: there are page tables, but next to no frames;
- untouched: nobody ever touched it; Linux up to 6.19 loses keys here. Each round has a new VM.

"SetSkeys, kept" is a call with on_interrupt KEEP: verified, and no old keys kept for a rollback. "SetSkeys" is all or
none.

All of it is done in a boot whose clock counts instructions, so that what else this machine does changes nothing, but
which doesn't see that some take longer than others; and in one with an ordinary clock. There a SET on touched memory
takes some 20 times as long as one on mapped memory up to Linux 6.19, for each SSKE has QEMU forget all that it knows of
addresses. --clock chooses one of them.

Printed is, for each, the median of the rounds' ratios, and in the end all of it as JSON. A guest over 1 GiB is not
touched: its frames would have to be there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:  # not inside the host
    from benchmarks.report import Report

ROOT: Final = Path(__file__).resolve().parent.parent
INSIDE: Final = "/srv/benchmark"
PGSTE: Final = "/proc/sys/vm/allocate_pgste"
MIB: Final = 1 << 20
MOST_TOUCHED: Final = 1024
"""MiB of a guest whose frames are all brought in, twice: the C program's and skeyd's."""
RATIOS: Final = (
    ("GetSkeys, touched", "GET, touched", 1.15),
    ("GetSkeys, mapped", "GET, mapped", 1.15),
    ("SetSkeys, kept, touched", "SET, touched", 1.7),
    ("SetSkeys, kept, mapped", "SET, mapped", 1.7),
    ("SetSkeys, kept, untouched", "SET, untouched", 1.7),
    ("SetSkeys, kept, untouched", "SET, mapped", None),
    ("SetSkeys, kept, untouched", "SET, touched", 2.2),
    ("SetSkeys, touched", "SET, touched", 2.3),
    ("SetSkeys, mapped", "SET, mapped", 2.3),
    ("SetSkeys, untouched", "SET, untouched", 2.3),
    ("SetSkeys, untouched", "SET, mapped", None),
    ("SetSkeys, untouched", "SET, touched", 2.2),
)
"""What is compared with what, and what it is to come to at most."""
CLOCKS: Final = ("instructions", "wall")


class Raw:
    """One run of raw_skeys.c: a VM of its own, and the loop of ioctls on it."""

    def __init__(self, mib: int, slice_keys: int, memory: str) -> None:
        command = [f"{INSIDE}/raw_skeys", str(mib), str(slice_keys), memory]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._process.stdin is None or self._process.stdout is None:
            raise SystemExit("no pipes")
        self._asks, self._answers = self._process.stdin, self._process.stdout

    def seconds(self, what: str) -> float:
        """Have it do "get" or "set", and return how long it took by its own clock."""
        self._asks.write(f"{what}\n")
        self._asks.flush()
        return int(self._answers.readline()) / 1e9

    def close(self) -> None:
        """End it, its VM with it."""
        self._process.communicate()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def daemon() -> Iterator[str]:
    """Run skeyd; gives the target to connect to."""
    with tempfile.TemporaryDirectory() as runtime_dir:
        command = [sys.executable, "-m", "skeyd.server", "--runtime-dir", runtime_dir]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            log = process.stderr or ()
            next(line for line in log if '"serving"' in line)
            # It is read on, so that it never stands still.
            threading.Thread(target=list, args=(log,), daemon=True).start()
            try:
                yield f"unix:{runtime_dir}/skeyd.sock"
            finally:
                process.terminate()


def touch(pid: int, mib: int) -> None:
    """Write to every frame of a guest of which only its worker's process is known."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if end - start == mib * MIB:
            break
    else:
        raise SystemExit(f"process {pid} has no mapping of {mib} MiB")
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        for address in range(start, end, MIB):
            memory.seek(address)
            memory.write(b"\1" * MIB)


def measure(mib: int, rounds: int) -> None:
    """Measure on this machine's kernel, and print seconds as JSON: a list for each thing that was measured."""
    from skeyd.client import Keys, SetOptions, connect
    from skeyd.gfn import GfnRange
    from skeyd.v1 import vm_pb2, vm_service_pb2
    from skeyd.worker.protocol import SLICE_KEYS

    frames = GfnRange(0, mib * 256)
    keys = bytes(0x10 + number % 15 * 0x10 for number in range(frames.count))
    slices = [GfnRange(at, min(SLICE_KEYS, frames.end - at)) for at in range(0, frames.end, SLICE_KEYS)]
    chunks = [Keys(one, keys[one.start : one.end]) for one in slices]
    found: dict[str, list[float]] = {}
    repaired = 0
    with ExitStack() as open_until_the_end:
        client = open_until_the_end.enter_context(connect(open_until_the_end.enter_context(daemon())))

        def create(vm_id: str) -> vm_pb2.Vm:
            slot = vm_service_pb2.MemorySlotSpec(memory_size=mib * MIB)
            kind = vm_pb2.VM_KIND_OWNED
            return client.create_vm(vm_service_pb2.CreateVmRequest(vm_id=vm_id, kind=kind, memory_slots=[slot]))

        def set_skeys(name: str, keep: bool = False) -> None:
            nonlocal repaired
            done = client.set_skeys(name, [frames], chunks, SetOptions(allow_enable=True, keep=keep))
            repaired = max(repaired, done.keys_repaired)

        def set_and_keep(name: str) -> None:
            set_skeys(name, keep=True)

        def get_skeys(name: str) -> None:
            with client.get_skeys(name) as stream:
                told = b"".join(part.keys for part in stream if isinstance(part, Keys))
            if len(told) != frames.count:
                raise SystemExit(f"GetSkeys told of {len(told)} keys")

        def note(what: str, took: float) -> None:
            found.setdefault(what, []).append(took)

        def timed(what: str, call: Callable[[str], None], name: str) -> None:
            begun = time.perf_counter()
            call(name)
            note(what, time.perf_counter() - begun)

        kept: dict[str, tuple[Raw, str]] = {}
        for memory in ("touched", "mapped") if mib <= MOST_TOUCHED else ("mapped",):
            vm = create(memory)
            if memory == "touched":
                touch(vm.worker_pid, mib)
            set_skeys(vm.name)
            kept[memory] = open_until_the_end.enter_context(Raw(mib, SLICE_KEYS, memory)), vm.name
        for _ in range(rounds):
            for memory, (raw, name) in kept.items():
                note(f"GET, {memory}", raw.seconds("get"))
                timed(f"GetSkeys, {memory}", get_skeys, name)
                note(f"SET, {memory}", raw.seconds("set"))
                timed(f"SetSkeys, {memory}", set_skeys, name)
                timed(f"SetSkeys, kept, {memory}", set_and_keep, name)
            with Raw(mib, SLICE_KEYS, "untouched") as raw:
                note("SET, untouched", raw.seconds("set"))
            for what, call in {"SetSkeys, untouched": set_skeys, "SetSkeys, kept, untouched": set_and_keep}.items():
                name = create("untouched").name
                timed(what, call, name)
                client.delete_vm(name)
    sys.stdout.write(json.dumps({"seconds": found, "repaired": repaired}) + "\n")


def in_a_host(suite: str, clock: str, options: argparse.Namespace, report: Report) -> None:
    """Boot a host, measure in it, and report the ratios."""
    from tests.emulated.compiler import compiled
    from tests.emulated.host import EmulatedHost
    from tests.emulated.image import Image

    mib, rounds = options.mib, options.rounds
    memory = f"{2048 + 2 * mib if mib <= MOST_TOUCHED else 4096}M"
    with EmulatedHost(Image(suite), memory=memory, cpus=options.cpus, counts_instructions=clock != "wall") as host:
        host.put_tree(ROOT / "skeyd", f"{INSIDE}/skeyd")
        host.put(f"{INSIDE}/end_to_end.py", Path(__file__).read_bytes())
        host.put(f"{INSIDE}/raw_skeys", compiled(ROOT / "benchmarks/raw_skeys.c", "-Wl,--s390-pgste"), 0o755)
        host.run(["sh", "-c", f"test ! -e {PGSTE} || echo 1 >{PGSTE}"])
        command = ["python3", f"{INSIDE}/end_to_end.py", "--inside", "--mib", str(mib), "--rounds", str(rounds)]
        told = host.run(command, env={"PYTHONPATH": INSIDE}, timeout=300 + 240 * rounds).stdout
        answer = json.loads(told)
    seconds: dict[str, list[float]] = answer["seconds"]
    title = f"Linux {'.'.join(host.kernel.split('.')[:2])}, {clock}"
    report.results[title] = {"kernel": host.kernel, "mib": mib, "cpus": options.cpus, **answer}
    report.line(f"{title}: {host.kernel}, {mib} MiB, {options.cpus} CPUs, {answer['repaired']} keys repaired")
    for what, raw, most in RATIOS:
        if not (what in seconds and raw in seconds):
            continue
        ratios = [one / other for one, other in zip(seconds[what], seconds[raw], strict=True)]
        found = round(statistics.median(ratios), 2)
        name = f"{what} / {raw}"
        report.line(f"  {name}", f"{found:.2f}", f"({min(ratios):.2f} to {max(ratios):.2f})")
        if most is not None:
            report.at_most(f"{title}: {name}", most, found)


def main() -> None:
    """Measure on all suites that are named, or on this machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description="skeyd against raw ioctls.")
    parser.add_argument("suites", nargs="*", default=["bookworm"], metavar="SUITE")
    parser.add_argument("--mib", type=int, default=1024, help="the guest's memory")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpus", type=int, default=1, help="the host's")
    parser.add_argument("--clock", choices=CLOCKS, action="append", help="only by this one")
    parser.add_argument("--json", type=Path, help="write the JSON here too")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        measure(options.mib, options.rounds)
        return
    from benchmarks.report import Report

    report = Report("end_to_end", options.rounds)
    for suite in options.suites:
        for clock in options.clock or CLOCKS:
            in_a_host(suite, clock, options, report)
    report.show(options.json)


if __name__ == "__main__":
    main()
