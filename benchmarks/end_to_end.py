"""GetSkeys and SetSkeys, end to end, against the raw ioctls in a loop of C, on a real s390x kernel.

    python -m benchmarks.end_to_end [SUITE ...] [--mib 1024] [--rounds 7] [--wall-clock] [--cpus 1]

from the checkout's root, with the emulated host built (tests/emulated/README.md) and its compiler. For each suite one
host is booted, and in it, in every round, the same is done by `raw_skeys.c` and by a client of skeyd over a unix
socket, one right after the other, each with an owned VM of anonymous memory. How the memory is makes a difference:

- touched: every frame was written to, as those of a guest that has run;
- mapped: there are page tables, but next to no frames;
- untouched: nobody ever touched it; Linux up to 6.19 loses keys here. Each round has a new VM.

The host's clock counts instructions, so that what else this machine does changes nothing. It doesn't see that some
take longer than others. With --wall-clock it is an ordinary clock: then a SET on touched memory takes some 20 times as
long as one on mapped memory up to Linux 6.19, for each SSKE has QEMU forget all that it knows of addresses.

Printed is, for each, the median of the rounds' ratios, and in the end all of it as a line of JSON. A guest over
1 GiB is not touched: its frames would have to be there.
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
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
INSIDE: Final = "/srv/benchmark"
PGSTE: Final = "/proc/sys/vm/allocate_pgste"
MIB: Final = 1 << 20
MOST_TOUCHED: Final = 1024
"""MiB of a guest whose frames are all brought in, twice: the C program's and skeyd's."""
RATIOS: Final = {
    "GetSkeys, touched": "GET, touched",
    "GetSkeys, mapped": "GET, mapped",
    "SetSkeys, touched": "SET, touched",
    "SetSkeys, mapped": "SET, mapped",
    "SetSkeys, untouched": "SET, untouched",
}
"""What is compared with what. The last is compared with SETs on touched and on mapped memory too."""


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
    from skeyd.client import Keys, connect
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

        def set_skeys(name: str) -> None:
            nonlocal repaired
            done = client.set_skeys(name, [frames], chunks, allow_enable=True)
            repaired = max(repaired, done.keys_repaired)

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
            with Raw(mib, SLICE_KEYS, "untouched") as raw:
                note("SET, untouched", raw.seconds("set"))
            name = create("untouched").name
            timed("SetSkeys, untouched", set_skeys, name)
            client.delete_vm(name)
    sys.stdout.write(json.dumps({"seconds": found, "repaired": repaired}) + "\n")


def report(suite: str, mib: int, rounds: int, cpus: int, wall_clock: bool) -> dict[str, object]:
    """Boot a host, measure in it, print the ratios and return them."""
    from tests.emulated.compiler import compiled
    from tests.emulated.host import EmulatedHost
    from tests.emulated.image import Image

    memory = f"{2048 + 2 * mib if mib <= MOST_TOUCHED else 4096}M"
    with EmulatedHost(Image(suite), memory=memory, cpus=cpus, counts_instructions=not wall_clock) as host:
        host.put_tree(ROOT / "skeyd", f"{INSIDE}/skeyd")
        host.put(f"{INSIDE}/end_to_end.py", Path(__file__).read_bytes())
        host.put(f"{INSIDE}/raw_skeys", compiled(ROOT / "benchmarks/raw_skeys.c", "-Wl,--s390-pgste"), 0o755)
        host.run(["sh", "-c", f"test ! -e {PGSTE} || echo 1 >{PGSTE}"])
        command = ["python3", f"{INSIDE}/end_to_end.py", "--inside", "--mib", str(mib), "--rounds", str(rounds)]
        told = host.run(command, env={"PYTHONPATH": INSIDE}, timeout=300 + 120 * rounds).stdout
        answer = json.loads(told)
    seconds: dict[str, list[float]] = answer["seconds"]
    pairs = [(what, raw) for what, raw in RATIOS.items() if what in seconds]
    others = [f"SET, {memory}" for memory in ("mapped", "touched")]
    pairs += [("SetSkeys, untouched", raw) for raw in others if raw in seconds]
    ratios = {f"{what} / {raw}": _ratio(seconds[what], seconds[raw]) for what, raw in pairs}
    clock = "wall clock" if wall_clock else "instructions"
    title = f"{suite}, Linux {host.kernel}: {mib} MiB, {cpus} CPUs, {clock}, {rounds} rounds; "
    title += f"{answer['repaired']} keys repaired"
    lines = [title, *(f"  {what:<38} {ratio:6.2f}" for what, ratio in ratios.items())]
    sys.stdout.write("\n".join(lines) + "\n")
    return {
        "suite": suite,
        "kernel": host.kernel,
        "mib": mib,
        "cpus": cpus,
        "clock": clock,
        "rounds": rounds,
        "repaired": answer["repaired"],
        "ratios": ratios,
    }


def _ratio(took: list[float], raw: list[float]) -> float:
    return round(statistics.median(one / other for one, other in zip(took, raw, strict=True)), 2)


def main() -> None:
    """Measure on all suites that are named, or on this machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description="skeyd against raw ioctls.")
    parser.add_argument("suites", nargs="*", default=["bookworm"], metavar="SUITE")
    parser.add_argument("--mib", type=int, default=1024, help="the guest's memory")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpus", type=int, default=1, help="the host's")
    parser.add_argument("--wall-clock", action="store_true", help="time as it passes here, and not instructions")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        measure(options.mib, options.rounds)
        return
    reports = [report(suite, options.mib, options.rounds, options.cpus, options.wall_clock) for suite in options.suites]
    sys.stdout.write(json.dumps(reports) + "\n")


if __name__ == "__main__":
    main()
