"""How long single calls take, with the daemon idle and busy, against the C++ server.

    make benchmark-latency        (python -m benchmarks.latency [--rounds 7] [--calls 300] [--streams 16] [...])

One C++ client makes the calls, one after the other, on skeyd and on the C++ server in turn: GetSkey of one key,
GetSkeys of 4,096 keys, and grpc.health.v1's Check. Idle, and while streams run at full rate: GetSkeys of 64 Mi keys in
chunks of 1 MiB, over and over, each on a connection of its own from another process; where the daemon refuses some of
them, that is said. Last, pings with 64 streams and 10,000 idle connections. --limit sets the daemon's limit on streams.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, Final

from benchmarks.harness import (
    CHUNK,
    MIB,
    VM,
    BenchmarkError,
    Case,
    Daemon,
    Peer,
    Processes,
    Told,
    connections,
    cpp_client,
    percentile,
    rounds_of,
    run,
)
from benchmarks.mixes import write
from benchmarks.report import Report

KEYS: Final = 64 * MIB
PING_LIMITS: Final = {4: 10.0, 16: 20.0, 64: 50.0}
"""Streams, and milliseconds that a ping may take at the 99th percentile beside them."""
PING_TIMEOUT_MS: Final = 1000
CALLS: Final[dict[str, dict[str, object]]] = {
    "one key": {"what": "key", "gfn": 12345},
    "4,096 keys": {"what": "range", "gfn": 8192, "count": 4096},
    "ping": {"what": "health"},
}


def _figures(samples: list[dict[str, Any]]) -> dict[str, Any]:
    # The 50th percentile is the median of the rounds'; for the 99th a round has too few calls: all are taken together.
    by_round = [sample["microseconds"] for sample in samples if sample["microseconds"]]
    together = [one for round_ in by_round for one in round_]
    return {
        "calls": len(together),
        "failed": sum(sample["failed"] for sample in samples),
        "p50_us": round(statistics.median(percentile(one, 50) for one in by_round), 1) if by_round else None,
        "p99_us": round(percentile(together, 99), 1) if together else None,
        "most_us": round(max(together), 1) if together else None,
    }


def _show(report: Report, when: str, figures: dict[str, dict[str, Any]]) -> None:
    report.results[when] = figures
    for name, one in figures.items():
        cells = ["-" if one[field] is None else f"{one[field] / 1000:.2f}" for field in ("p50_us", "p99_us", "most_us")]
        report.line(when, name, *cells, one["calls"], one["failed"])


class Load:
    """Streams that a client process of its own keeps running; `with` begins and ends them."""

    def __init__(self, client: Told, streams: int) -> None:
        self._client = client
        self._streams = streams
        self.found: dict[str, Any] = {}

    def __enter__(self) -> Load:
        self._client.do("streams", n=self._streams, vm=VM, chunk=CHUNK)
        time.sleep(0.5)  # they are under way
        return self

    def __exit__(self, *_: object) -> None:
        self.found = self._client.do("stop")


def calls(options: argparse.Namespace, clients: dict[str, Told], loads: dict[str, Told], report: Report) -> None:
    """Measure calls, idle and beside streams."""
    report.line("when", "call", "p50 ms", "p99 ms", "most ms", "calls", "failed")
    idle: dict[str, Case] = {
        f"{call}, {side}": _call(client, options.calls, arguments)
        for call, arguments in CALLS.items()
        for side, client in clients.items()
    }
    found = {name: _figures(samples) for name, samples in rounds_of(options.rounds, idle).items()}
    _show(report, "idle", found)
    times = round(found["one key, skeyd"]["p50_us"] / found["one key, c++"]["p50_us"], 2)
    report.at_most("one key, idle: p50, times C++", 3.0, times)

    busy: dict[str, list[dict[str, Any]]] = {name: [] for name in idle}
    streamed: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        for side in clients:
            with Load(loads[side], options.streams) as load:
                for call, arguments in CALLS.items():
                    busy[f"{call}, {side}"].append(_call(clients[side], options.calls // 5, arguments)())
            streamed.append({"side": side, **load.found})
    when = f"{options.streams} streams"
    _show(report, when, {name: _figures(samples) for name, samples in busy.items()})
    report.results[f"{when}, load"] = streamed


def _call(client: Told, count: int, arguments: dict[str, object]) -> Case:
    return lambda: client.do("latency", calls=count, vm=VM, **arguments)


def pings(options: argparse.Namespace, clients: dict[str, Told], loads: dict[str, Told], report: Report) -> None:
    """Measure pings beside streams at full rate."""
    for streams, limit in PING_LIMITS.items():
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in clients}
        streamed: list[dict[str, Any]] = []
        for _ in range(options.rounds):
            for side, client in clients.items():
                with Load(loads[side], streams) as load:
                    found[side].append(_ping(client, options.pings))
                streamed.append({"side": side, **load.found})
        _ping_report(report, f"{streams} streams", limit, found, streamed)


def _ping(client: Told, count: int) -> dict[str, Any]:
    return client.do("latency", what="health", calls=count, every_us=10_000, timeout_ms=PING_TIMEOUT_MS)


def _ping_report(
    report: Report,
    when: str,
    limit: float,
    found: dict[str, list[dict[str, Any]]],
    streamed: list[dict[str, Any]],
) -> None:
    figures = {f"paced ping, {side}": _figures(samples) for side, samples in found.items()}
    _show(report, when, figures)
    report.results[f"{when}, pings' load"] = streamed
    refused = sum(one["refused"] for one in streamed if one["side"] == "skeyd")
    rates = {
        side: statistics.median(one["keys"] / one["seconds"] / 1e6 for one in streamed if one["side"] == side)
        for side in found
    }
    said = ", ".join(f"{side} {rate:.0f} M keys/s" for side, rate in rates.items())
    report.line(when, f"streams: {said}; refused by skeyd {refused} times")
    mine = figures["paced ping, skeyd"]
    report.at_most(f"ping beside {when}, p99 ms", limit, (mine["p99_us"] or float("inf")) / 1000)
    report.at_most(f"ping beside {when}, timed out", 0, mine["failed"])


def many_connections(options: argparse.Namespace, daemon: Daemon, load: Told, client: Told, report: Report) -> None:
    """Measure pings beside 64 streams and thousands of idle connections."""
    if not options.connections:
        return
    with connections(daemon.unix, options.connections) as held:
        opened = held.first()
        if opened.get("open") != options.connections:
            raise BenchmarkError(f"connections: {opened}")
        samples, streamed = [], []
        for _ in range(options.rounds):
            with Load(load, 64) as running:
                samples.append(_ping(client, options.pings))
            streamed.append({"side": "skeyd", **running.found})
    when = f"64 streams, {options.connections} connections"
    _ping_report(report, when, PING_LIMITS[64], {"skeyd": samples}, streamed)


def main(options: argparse.Namespace, processes: Processes, report: Report) -> None:
    """Measure calls, then pings, then pings among connections."""
    keys = processes.directory / "keys"
    write("random", keys, KEYS)
    more = ["--streams", str(options.limit)] if options.limit else []
    daemon: Daemon = processes.enter(Daemon(processes.directory, options=more))
    daemon.create_vm(KEYS)
    peer: Peer = processes.enter(Peer(processes.directory, KEYS))
    targets = {"skeyd": daemon.unix, "c++": peer.unix}
    clients: dict[str, Told] = {side: processes.enter(cpp_client(target)) for side, target in targets.items()}
    loads: dict[str, Told] = {side: processes.enter(cpp_client(target)) for side, target in targets.items()}
    for client in clients.values():
        client.do("set", vm=VM, file=keys, chunk=CHUNK)
    calls(options, clients, loads, report)
    pings(options, clients, loads, report)
    many_connections(options, daemon, loads["skeyd"], clients["skeyd"], report)


if __name__ == "__main__":
    run(
        "latency",
        str(__doc__).partition("\n")[0],
        main,
        calls=300,
        streams=16,
        pings=150,
        connections=10_000,
        limit=0,
    )
