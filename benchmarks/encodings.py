"""Keys as guests have them, in each encoding: keys a second and bytes on the wire, on loopback and over a slow link.

    make benchmark-encodings      (python -m benchmarks.encodings [--mib 256] [--rounds 7] [--link-mib 128])

The mixes are those of benchmarks/mixes.py. One C++ client reads them from skeyd (offering nothing, RUNS, ZSTD, or
both), decodes them and checks the checksums, and from a C++ gRPC server that sends them raw: over TCP on loopback, and
over a link of two network namespaces shaped to 1 Gbit/s (needs root). Bytes are those of messages on loopback, and on
the link those that its receiving end counted, with all headers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
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
    cpp_client,
    ratio,
    rounds_of,
    run,
    tool,
    values,
)
from benchmarks.mixes import MIXES, mean_run, write
from benchmarks.report import Report

OFFERS: Final = {"raw": "", "runs": "runs", "zstd": "zstd", "both": "runs,zstd"}
HELD: Final = "both"
"""The offer that is held against the figures, chosen beforehand: the best of several noisy medians flatters."""
LINK_MIXES: Final = ("linux-like", "zos-like")
RATE: Final = "1gbit"
# 198.18.0.0/15 is set aside for benchmarks of network devices (RFC 2544).
SERVER_ADDRESS: Final = "198.18.0.1"
CLIENT_ADDRESS: Final = "198.18.0.2"


def _cases(skeyd: Told, peer: Told) -> dict[str, Case]:
    cases: dict[str, Case] = {"c++": lambda: peer.do("get", vm=VM, chunk=CHUNK)}
    for name, offer in OFFERS.items():
        cases[name] = lambda offer=offer: skeyd.do("get", vm=VM, chunk=CHUNK, encodings=offer)  # type: ignore[misc]
    return cases


def _summary(found: dict[str, list[dict[str, Any]]], count: int) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "of_cpp": ratio(values(found["c++"]), values(samples)),
            "keys_a_second": round(count / statistics.median(values(samples))),
            "bytes_a_key": round(statistics.median(values(samples, "bytes")) / count, 6),
            "encoded": samples[0]["encoded"],
        }
        for name, samples in found.items()
    }


def _lines(report: Report, where: str, mix: str, summary: dict[str, dict[str, Any]]) -> None:
    for name, one in summary.items():
        times = one["of_cpp"]
        chosen = ", ".join(
            f"{chunks} {encoding.removeprefix('ENCODING_')}" for encoding, chunks in one["encoded"].items()
        )
        report.line(
            where,
            mix,
            name,
            f"{one['keys_a_second'] / 1e6:.0f} M",
            f"{times['median']:.3f} ({times['least']:.2f} to {times['most']:.2f})",
            f"{one['bytes_a_key']:.5f}",
            chosen,
        )


def on_loopback(options: argparse.Namespace, processes: Processes, report: Report) -> None:
    """Measure every mix in every encoding over loopback."""
    count = options.mib * MIB
    daemon: Daemon = processes.enter(Daemon(processes.directory))
    daemon.create_vm(count)
    peer: Peer = processes.enter(Peer(processes.directory, count))
    skeyd_client: Told = processes.enter(cpp_client(daemon.tcp))
    peer_client: Told = processes.enter(cpp_client(peer.tcp))
    keys = processes.directory / "keys"
    report.line("where", "mix", "offered", "keys/s", "of C++ raw", "bytes/key", "chunks")
    for mix in MIXES:
        write(mix, keys, count)
        for client in (skeyd_client, peer_client):
            client.do("set", vm=VM, file=keys, chunk=CHUNK)
        found = rounds_of(options.rounds, _cases(skeyd_client, peer_client))
        summary = _summary(found, count)
        report.results[mix] = {"mean_run": round(mean_run(keys), 2), "summary": summary, "samples": found}
        _lines(report, "loopback", mix, summary)
        if mix == "one":
            report.at_least(f"one key throughout ({HELD}), of C++ raw", 2.0, summary[HELD]["of_cpp"]["median"])
        if mix == "random":
            raw = values(found["raw"])
            for name in ("runs", "zstd", "both"):
                report.at_least(
                    f"random keys with {name} offered, of skeyd raw", 0.95, ratio(raw, values(found[name]))["median"]
                )


@contextlib.contextmanager
def _link() -> Iterator[tuple[list[str], list[str], Path]]:
    # Two namespaces with a link between them: what to put before commands on each side, and where the receiver counts.
    ip, tc = tool("ip"), tool("tc")
    names = [f"skeyd-b-{os.getpid()}-{side}" for side in ("server", "client")]
    inside = [[ip, "netns", "exec", name] for name in names]
    made: list[str] = []

    def do(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"{' '.join(command)}: {done.stderr.strip()}")

    try:
        for name in names:
            do(ip, "netns", "add", name)
            made.append(name)
        do(ip, "-n", names[0], "link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", names[1])
        for name, address in zip(names, (SERVER_ADDRESS, CLIENT_ADDRESS), strict=True):
            do(ip, "-n", name, "address", "add", f"{address}/30", "dev", "up0")
            do(ip, "-n", name, "link", "set", "lo", "up")
            do(ip, "-n", name, "link", "set", "up0", "up")
            do(
                tc,
                "-n",
                name,
                "qdisc",
                "add",
                "dev",
                "up0",
                "root",
                "tbf",
                "rate",
                RATE,
                "burst",
                "128k",
                "latency",
                "10ms",
            )
        yield inside[0], inside[1], Path("/sys/class/net/up0/statistics/rx_bytes")
    finally:
        # A link goes with either of its namespaces.
        for name in made:
            subprocess.run([ip, "netns", "delete", name], capture_output=True, check=False)


def over_link(options: argparse.Namespace, processes: Processes, report: Report) -> None:
    """Measure guests' mixes over a link of 1 Gbit/s."""
    if os.geteuid():
        raise BenchmarkError("network namespaces need root")
    count = options.link_mib * MIB
    at_server, at_client, counter = processes.enter(_link())
    address = f"{SERVER_ADDRESS}:50051"
    daemon: Daemon = processes.enter(
        Daemon(processes.directory, tcp=address, options=["--any-address"], inside=at_server)
    )
    daemon.create_vm(count)
    peer: Peer = processes.enter(Peer(processes.directory, count, tcp_host=SERVER_ADDRESS, inside=at_server))
    setters: list[Told] = [processes.enter(cpp_client(one.unix)) for one in (daemon, peer)]
    skeyd_client: Told = processes.enter(cpp_client(daemon.tcp, at_client))
    peer_client: Told = processes.enter(cpp_client(peer.tcp, at_client))

    def received() -> int:
        done = subprocess.run([*at_client, tool("cat"), str(counter)], stdout=subprocess.PIPE, check=True)
        return int(done.stdout)

    def counted(case: Case) -> Case:
        def measured() -> dict[str, Any]:
            before = received()
            sample = case()
            return {**sample, "bytes": received() - before}

        return measured

    keys = processes.directory / "link-keys"
    for mix in LINK_MIXES:
        write(mix, keys, count)
        for setter in setters:
            setter.do("set", vm=VM, file=keys, chunk=CHUNK)
        cases = {name: counted(case) for name, case in _cases(skeyd_client, peer_client).items()}
        found = rounds_of(options.rounds, cases)
        summary = _summary(found, count)
        report.results[f"{mix}, {RATE}"] = {"summary": summary, "samples": found}
        _lines(report, RATE, mix, summary)
        if mix == "linux-like":
            fewer = summary[HELD]["bytes_a_key"] / summary["c++"]["bytes_a_key"]
            report.at_least(f"{mix} over {RATE} ({HELD}), of C++ raw", 4.0, summary[HELD]["of_cpp"]["median"])
            report.at_most(f"{mix} over {RATE} ({HELD}), bytes of C++ raw", 0.1, round(fewer, 4))


def main(options: argparse.Namespace, processes: Processes, report: Report) -> None:
    """Measure on loopback, then over a link."""
    on_loopback(options, processes, report)
    over_link(options, processes, report)


if __name__ == "__main__":
    run("encodings", str(__doc__).partition("\n")[0], main, mib=256, link_mib=128)
