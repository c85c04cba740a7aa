"""What it costs that no key is lost: skeyd's verified SET against the raw ioctl, on a real s390x kernel.

    python -m benchmarks.repair [SUITE ...] [--mib 1024] [--rounds 9]

from the checkout's root, with the emulated host built (tests/emulated/README.md). For each suite one host is booted,
and in it, one after the other in every round:

- raw: KVM_S390_SET_SKEYS alone, where page tables exist already, as every other user of the call does it ("mapped" in
  benchmarks/end_to_end.py: next to no frame is there);
- verified: the same keys on the same VM by skeyd's worker: SET, GET, compare, SET again what was lost;
- raw, new and verified, new: the same on a new VM, whose memory nobody ever touched: here Linux up to 6.19 loses keys;
- SetSkeys and SetSkeys, new: the same once more through the whole daemon, over gRPC on a unix socket.

Printed are ratios of medians to the first. An emulated CPU runs Python slower than it runs the kernel's key
instructions, so that all but the first are overstated.
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
from collections.abc import Callable
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
INSIDE: Final = "/srv/benchmark"
PGSTE: Final = "/proc/sys/vm/allocate_pgste"
RAW: Final = "raw"


def measure(mib: int, rounds: int) -> None:
    """Measure on this machine's kernel, and print seconds as JSON: what was measured, in the order of ROWS."""
    from skeyd.client import Keys as Chunk
    from skeyd.client import connect
    from skeyd.gfn import GfnRange
    from skeyd.v1 import vm_pb2, vm_service_pb2
    from skeyd.worker.keys import Keys
    from skeyd.worker.owned import OwnedVm
    from skeyd.worker.protocol import SLICE_KEYS, SlotSpec, Spec

    frames = GfnRange(0, mib * 256)
    slices = [GfnRange(at, min(SLICE_KEYS, frames.end - at)) for at in range(0, frames.end, SLICE_KEYS)]
    keys = bytes(0x10 + number % 15 * 0x10 for number in range(frames.count))
    parts = [keys[one.start : one.end] for one in slices]
    spec = Spec("benchmark", "", "owned", (SlotSpec(0, mib << 20, "anonymous"),), 0)
    lost = 0

    def raw(vm: OwnedVm) -> None:
        for one, part in zip(slices, parts, strict=True):
            vm.set_skeys(one.start, memoryview(bytearray(part)))

    def verified(vm: OwnedVm) -> None:
        nonlocal lost
        lost = sum(Keys(vm).write(one, part, True).repaired for one, part in zip(slices, parts, strict=True))

    def seconds(what: Callable[[], object]) -> float:
        begun = time.perf_counter()
        what()
        return time.perf_counter() - begun

    def on_new(what: Callable[[OwnedVm], None]) -> float:
        vm = OwnedVm(spec)
        try:
            return seconds(lambda: what(vm))
        finally:
            vm.close()

    found: dict[str, list[float]] = {}

    def note(name: str, took: float) -> None:
        found.setdefault(name, []).append(took)

    touched = OwnedVm(spec)
    verified(touched)
    with tempfile.TemporaryDirectory() as runtime_dir:
        command = [sys.executable, "-m", "skeyd.server", "--runtime-dir", runtime_dir]
        with (
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as daemon,
            connect(f"unix:{runtime_dir}/skeyd.sock") as client,
        ):
            log = daemon.stderr or ()
            next(line for line in log if '"serving"' in line)
            # It is read on, so that it never stands still.
            threading.Thread(target=list, args=(log,), daemon=True).start()
            slot = vm_service_pb2.MemorySlotSpec(memory_size=mib << 20)
            request = vm_service_pb2.CreateVmRequest(vm_id="new", kind=vm_pb2.VM_KIND_OWNED, memory_slots=[slot])
            chunks = [Chunk(one, part) for one, part in zip(slices, parts, strict=True)]
            for _ in range(rounds):
                note(RAW, seconds(lambda: raw(touched)))
                note("verified", seconds(lambda: verified(touched)))
                note("raw, new", on_new(raw))
                note("verified, new", on_new(verified))
                name = client.create_vm(request).name

                def set_skeys(name: str = name) -> None:
                    client.set_skeys(name, [frames], chunks, allow_enable=True)

                note("SetSkeys, new", seconds(set_skeys))
                note("SetSkeys", seconds(set_skeys))
                client.delete_vm(name)
            daemon.terminate()
    touched.close()
    sys.stdout.write(json.dumps({"seconds": found, "lost": lost}) + "\n")


def report(suite: str, mib: int, rounds: int) -> None:
    """Boot a host, measure in it, and print the ratios."""
    from tests.emulated.host import EmulatedHost
    from tests.emulated.image import Image

    with EmulatedHost(Image(suite)) as host:
        host.put_tree(ROOT / "skeyd", f"{INSIDE}/skeyd")
        host.put(f"{INSIDE}/repair.py", Path(__file__).read_bytes())
        host.run(["sh", "-c", f"test ! -e {PGSTE} || echo 1 >{PGSTE}"])
        command = ["python3", f"{INSIDE}/repair.py", "--inside", "--mib", str(mib), "--rounds", str(rounds)]
        told = host.run(command, env={"PYTHONPATH": INSIDE}, timeout=60 + 60 * rounds).stdout
        answer = json.loads(told)
    medians = {name: statistics.median(took) for name, took in answer["seconds"].items()}
    lines = [f"{suite}, Linux {host.kernel}: {mib} MiB, {rounds} rounds; new memory loses {answer['lost']} keys"]
    lines += [f"  {name:<15} {took / medians[RAW]:5.2f}" for name, took in medians.items()]
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    """Measure on all suites that are named, or on this machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.repair", description="What verified SETs cost.")
    parser.add_argument("suites", nargs="*", default=["bookworm"], metavar="SUITE")
    parser.add_argument("--mib", type=int, default=1024, help="the guest's memory")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        measure(options.mib, options.rounds)
        return
    for suite in options.suites:
        report(suite, options.mib, options.rounds)


if __name__ == "__main__":
    main()
