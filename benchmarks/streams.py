"""Whole streams: skeyd against a C++ gRPC server that streams the same messages, and against a bare copy.

    make benchmark-streams        (python -m benchmarks.streams [--mib 256] [--rounds 7] [--source-mib 32])

256 MiB of random keys (a guest of 1 TiB), raw, in chunks of 1 MiB: GetSkeys over a unix socket and TCP, SetSkeys over a
unix socket. One C++ client measures both; Python's client measures skeyd. Ratios are speeds relative to the C++ client
on the C++ server over the same kind of socket, in the same round.

Then a source that takes 50 ns a key, as slow as a real kernel: how much of it is left when it goes through the worker,
the front and a client, against a bare loop, and how much CPU those take beyond the source's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    CHUNK,
    MIB,
    VM,
    Case,
    Daemon,
    Peer,
    Processes,
    Told,
    copy_seconds,
    cpp_client,
    cpu_seconds,
    python_client,
    ratio,
    rounds_of,
    run,
    values,
)
from benchmarks.mixes import write
from benchmarks.report import ROOT, Report


def _get(client: Told, **more: object) -> Case:
    return lambda: client.do("get", vm=VM, chunk=CHUNK, **more)


def _set(client: Told, keys: Path) -> Case:
    return lambda: client.do("set", vm=VM, file=keys, chunk=CHUNK)


def _copy(kind: str, count: int) -> Case:
    return lambda: {"seconds": copy_seconds(kind, count)}


def whole_streams(options: argparse.Namespace, processes: Processes, report: Report) -> None:
    """Measure GetSkeys and SetSkeys at full speed."""
    count = options.mib * MIB
    keys = processes.directory / "keys"
    write("random", keys, count)
    daemon: Daemon = processes.enter(Daemon(processes.directory))
    worker = daemon.create_vm(count)
    peer: Peer = processes.enter(Peer(processes.directory, count))
    clients: dict[str, Told] = {
        "skeyd unix": processes.enter(cpp_client(daemon.unix)),
        "skeyd tcp": processes.enter(cpp_client(daemon.tcp)),
        "c++ unix": processes.enter(cpp_client(peer.unix)),
        "c++ tcp": processes.enter(cpp_client(peer.tcp)),
        "skeyd unix, python": processes.enter(python_client(daemon.unix)),
        "c++ unix, python": processes.enter(python_client(peer.unix)),
    }
    cases: dict[str, Case] = {f"get {name}": _get(client) for name, client in clients.items()}
    for name in ("skeyd unix", "c++ unix"):
        cases[f"get {name}, unchecked"] = _get(clients[name], check=0)
        cases[f"set {name}"] = _set(clients[name], keys)
    for kind in ("unix", "tcp"):
        cases[f"copy {kind}"] = _copy(kind, count)
    # What the servers themselves use, by case.
    for name in [name for name in cases if not name.startswith("copy")]:
        pids = [daemon.pid, worker] if "skeyd" in name else [peer.pid]
        cases[name] = _with_cpu(cases[name], pids)
    for name in ("skeyd unix", "c++ unix"):
        clients[name].do("set", vm=VM, file=keys, chunk=CHUNK)
    found = rounds_of(options.rounds, cases)
    report.results["streams"] = {"keys": count, "chunk_keys": CHUNK, "samples": found}
    ratios: dict[str, dict[str, float]] = {}
    report.line("case", "keys/s", "of C++ on C++", "least", "most", "server CPU ns/key", "client CPU ns/key")
    for name, samples in found.items():
        base = f"{'set' if name.startswith('set') else 'get'} c++ {'tcp' if 'tcp' in name else 'unix'}"
        base += ", unchecked" if "unchecked" in name else ""
        ratios[name] = ratio(values(found[base]), values(samples))
        cpus = [
            f"{1e9 * min(values(samples, which)) / count:.2f}" if which in samples[0] else "-"
            for which in ("server_cpu", "cpu")
        ]
        speed = count / sorted(values(samples))[len(samples) // 2]
        report.line(name, f"{speed / 1e6:.0f} M", *(f"{one:.3f}" for one in ratios[name].values()), *cpus)
    report.results["ratios"] = ratios
    report.at_least("GetSkeys, C++ client, unix socket, of C++ on C++", 0.8, ratios["get skeyd unix"]["median"])
    report.at_least("GetSkeys, Python client, of C++ on C++", 0.65, ratios["get skeyd unix, python"]["median"])
    report.at_least("GetSkeys, C++ client, TCP, of C++ on C++ by TCP", 0.8, ratios["get skeyd tcp"]["median"])
    report.at_least("SetSkeys, C++ client, unix socket, of C++ on C++", 0.65, ratios["set skeyd unix"]["median"])


def _with_cpu(case: Case, pids: list[int]) -> Case:
    def measured() -> dict[str, Any]:
        before = sum(map(cpu_seconds, pids))
        sample = case()
        return {**sample, "server_cpu": sum(map(cpu_seconds, pids)) - before}

    return measured


_BARE_LOOP = """
import sys, time
sys.path.append(sys.argv[1])
from benchmarks.slow_worker import SlowVm
from skeyd.worker.protocol import SLICE_KEYS, SlotSpec, Spec
count = int(sys.argv[2])
vm = SlowVm(Spec("bare", "", "simulated", (SlotSpec(0, count << 12, "none"),), 0, "7.2"))
buffer = memoryview(bytearray(SLICE_KEYS))
vm.set_skeys(0, memoryview(bytearray(1)))
for line in sys.stdin:
    begun, begun_cpu = time.perf_counter(), time.process_time()
    for at in range(0, count, SLICE_KEYS):
        vm.get_skeys(at, buffer[: min(SLICE_KEYS, count - at)])
    took, used = time.perf_counter() - begun, time.process_time() - begun_cpu
    print(f'{{"seconds": {took}, "cpu": {used}}}', flush=True)
"""


def slow_source(options: argparse.Namespace, processes: Processes, report: Report) -> None:
    """Measure what is left of a source that takes 50 ns a key."""
    count = options.source_mib * MIB
    daemon: Daemon = processes.enter(Daemon(processes.directory, options=["--slow-source"]))
    worker = daemon.create_vm(count)
    client: Told = processes.enter(cpp_client(daemon.unix))
    bare: Told = processes.enter(Told([sys.executable, "-I", "-S", "-c", _BARE_LOOP, str(ROOT), str(count)]))
    keys = processes.directory / "one-key"
    write("random", keys, count)
    client.do("set", vm=VM, file=keys, chunk=CHUNK)
    through = _with_cpu(_get(client), [daemon.pid, worker])
    found = rounds_of(options.rounds, {"bare loop": lambda: bare.do("loop"), "through skeyd": through})
    report.results["slow_source"] = {"keys": count, "nanoseconds_a_key": 50, "samples": found}
    kept = ratio(values(found["bare loop"]), values(found["through skeyd"]))
    # By the CPU time of the source, not by the clock: on a busy machine everything takes longer, and would look cheap.
    beyond = [
        (one["server_cpu"] + one["cpu"] - loop["cpu"]) / loop["cpu"]
        for one, loop in zip(found["through skeyd"], found["bare loop"], strict=True)
    ]
    extra = round(sorted(beyond)[len(beyond) // 2], 3)
    report.results["slow_source"].update(kept=kept, beyond_source_cores=extra)
    report.line("source of 50 ns a key", f"kept {kept['median']:.3f}", f"CPU beyond it {extra:.1%} of a core")
    report.at_least("source of 50 ns a key, of the bare loop", 0.99, kept["median"])
    report.at_most("front, worker and client beyond the source, cores", 0.10, extra)


def main(options: argparse.Namespace, processes: Processes, report: Report) -> None:
    """Measure whole streams, then the slow source."""
    whole_streams(options, processes, report)
    slow_source(options, processes, report)


if __name__ == "__main__":
    run("streams", str(__doc__).partition("\n")[0], main, mib=256, source_mib=32)
