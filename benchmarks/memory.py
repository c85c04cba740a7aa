"""Memory of front, worker and client while keys pass, and whether the front grows.

    make benchmark-memory         (python -m benchmarks.memory [--rounds 7] [--calls 10000])

GetSkeys of 16 MiB, 256 MiB and 4 GiB of keys in chunks of 1 MiB, by the C++ and the Python client; streams side by
side, read at full rate, and not read at all, each on a new daemon; 10,000 calls of all kinds. Memory is what the kernel
says: resident, and for workers private, less the keys of the simulated VM, which are in no worker on a real host.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack
from typing import Any, Final

from benchmarks.harness import (
    CHUNK,
    MIB,
    VM,
    Daemon,
    Processes,
    Told,
    cpp_client,
    memory_of,
    python_client,
    reset_most,
    run,
)
from benchmarks.mixes import write
from benchmarks.report import Report

SIZES: Final = {"16 MiB": 16 * MIB, "256 MiB": 256 * MIB, "4 GiB": 4096 * MIB}
STREAMS: Final = (1, 4, 16)
SET_STREAMS: Final = (1, 4)
SET_KEYS: Final = 64 * MIB
KIB: Final = 1024


def starting(options: argparse.Namespace, processes: Processes, report: Report) -> Daemon:
    """Measure the front idle, and workers as they start."""
    daemon: Daemon = processes.enter(Daemon(processes.directory))
    daemon.create_vm(256)
    took, private = [], []
    for number in range(options.rounds):
        name = f"vms/w{number}"
        begun = time.monotonic()
        pid = daemon.create_vm(256, name)
        took.append((time.monotonic() - begun) * 1000)
        # It has read and written a key, so that all its code is there.
        with cpp_client(daemon.unix) as client:
            path = processes.directory / "few"
            write("one", path, 256)
            client.do("set", vm=name, file=path)
            client.do("get", vm=name)
        private.append(memory_of(pid).private / KIB)
        daemon.delete_vm(name)
    idle = memory_of(daemon.pid).resident / KIB
    daemon.delete_vm()
    ready, mib = statistics.median(took), statistics.median(private)
    report.results["start"] = {"front_idle_mib": idle, "create_vm_ms": took, "worker_private_mib": private}
    report.line("front, idle", f"{idle:.1f} MiB resident", f"started in {daemon.started_seconds:.2f} s")
    report.line("worker", f"{mib:.1f} MiB private", f"CreateVm takes {ready:.0f} ms, connection included")
    report.at_most("front idle, MiB", 60, round(idle, 1))
    report.at_most("worker private, MiB", 6, round(mib, 2))
    report.at_most("worker ready (all of CreateVm), ms", 60, round(ready, 1))
    return daemon


def passing(daemon: Daemon, processes: Processes, report: Report) -> None:
    """Measure what is taken while ever more keys pass."""
    report.line("keys that pass", "client", "front at most", "worker private less keys", "client at most", "keys/s")
    for label, count in SIZES.items():
        worker = daemon.create_vm(count)
        path = processes.directory / "first"
        write("one", path, min(count, 16 * MIB))
        for name, start in (("C++", cpp_client), ("Python", python_client)):
            with start(daemon.unix) as client:
                if name == "C++":
                    client.do("set", vm=VM, file=path, chunk=CHUNK)
                reset_most(daemon.pid)
                took = float(client.do("get", vm=VM, chunk=CHUNK)["seconds"])
                held = memory_of(worker).private * KIB - min(count, 16 * MIB)
                found = {
                    "front_most_mib": memory_of(daemon.pid).most / KIB,
                    "worker_private_mib": held / MIB,
                    "client_most_mib": client.do("memory")["most_kib"] / KIB,
                    "keys_a_second": count / took,
                }
            report.results[f"{label}, {name}"] = found
            report.line(
                label,
                name,
                *(f"{found[one]:.1f} MiB" for one in ("front_most_mib", "worker_private_mib", "client_most_mib")),
                f"{found['keys_a_second'] / 1e6:.0f} M",
            )
        daemon.delete_vm()


def side_by_side(processes: Processes, report: Report) -> None:
    """Measure the front with several streams, which are read at full rate or not at all."""
    path = processes.directory / "one"
    write("one", path, 256)
    report.line("streams", "front more than idle", "in chunks of 1 MiB a stream")
    most = 0.0
    for how, name in (("streams", "read at full rate"), ("stall", "not read")):
        for streams in STREAMS:
            # A new one each time: what was freed is not all given back.
            with Daemon(processes.directory) as daemon:
                daemon.create_vm(256 * MIB)
                with cpp_client(daemon.unix) as client:
                    client.do("set", vm=VM, file=path)
                    idle = memory_of(daemon.pid).resident
                    client.do(how, n=streams, vm=VM, chunk=CHUNK)
                    time.sleep(2)  # of streaming: what it takes at most counts
                    told = client.do("stop")
                more = (memory_of(daemon.pid).most - idle) / KIB
            report.results[f"{streams} {how}"] = {"more_mib": more, "chunks_a_stream": more / streams, **told}
            report.line(f"{streams}, {name}", f"{more:.1f} MiB", f"{more / streams:.2f}")
            if streams > 1:
                most = max(most, more / streams)
    report.at_most("front, chunks a stream beyond idle (4 and 16 streams)", 4.5, round(most, 2))


def writing(processes: Processes, report: Report) -> None:
    """Measure the front while keys are set, one VM's or several VMs' at once."""
    path = processes.directory / "set"
    write("random", path, SET_KEYS)
    report.line("SetSkeys", "front more than idle", "in chunks of 1 MiB a stream")
    for streams in SET_STREAMS:
        with Daemon(processes.directory) as daemon, ExitStack() as stack:
            names = [f"vms/s{number}" for number in range(streams)]
            for name in names:
                daemon.create_vm(SET_KEYS, name)
            clients = [stack.enter_context(cpp_client(daemon.unix)) for _ in names]
            idle = memory_of(daemon.pid).resident
            for client, name in zip(clients, names, strict=True):
                client.begin("set", vm=name, file=path, chunk=CHUNK)
            seconds = [float(client.end()["seconds"]) for client in clients]
            more = (memory_of(daemon.pid).most - idle) / KIB
        report.results[f"{streams} set"] = {"more_mib": more, "chunks_a_stream": more / streams, "seconds": seconds}
        report.line(f"{streams}, of a VM each", f"{more:.1f} MiB", f"{more / streams:.2f}")


def growth(options: argparse.Namespace, processes: Processes, report: Report) -> None:
    """Measure whether the front grows over many calls."""
    daemon: Daemon = processes.enter(Daemon(processes.directory))
    daemon.create_vm(MIB)
    path = processes.directory / "one"
    write("random", path, MIB)
    client: Told = processes.enter(cpp_client(daemon.unix))
    seen: list[dict[str, Any]] = []

    def some(calls: int) -> None:
        client.do("latency", what="health", calls=calls * 3 // 10)
        client.do("latency", what="key", vm=VM, gfn=77, calls=calls * 3 // 10)
        client.do("latency", what="range", vm=VM, gfn=0, count=65536, calls=calls * 3 // 10)
        for _ in range(calls // 20):
            client.do("get", vm=VM, chunk=CHUNK)
            client.do("set", vm=VM, file=path, chunk=CHUNK)
        seen.append({"calls": calls, "resident_mib": memory_of(daemon.pid).resident / KIB})

    client.do("set", vm=VM, file=path, chunk=CHUNK)
    some(options.calls // 5)
    for _ in range(5):
        some(options.calls // 5)
    first, last = seen[0]["resident_mib"], seen[-1]["resident_mib"]
    report.results["growth"] = seen
    shown = ", ".join(f"{one['resident_mib']:.1f}" for one in seen)
    report.line(f"front over {options.calls} calls", f"{shown} MiB, each after {options.calls // 5} more")
    report.at_most(f"front after {options.calls} calls, of before", 1.10, round(last / first, 3))


def main(options: argparse.Namespace, processes: Processes, report: Report) -> None:
    """Measure memory."""
    daemon = starting(options, processes, report)
    passing(daemon, processes, report)
    side_by_side(processes, report)
    writing(processes, report)
    growth(options, processes, report)


if __name__ == "__main__":
    run("memory", str(__doc__).partition("\n")[0], main, calls=10_000)
