"""What a benchmark found, and on what machine: as a table, as JSON, held against what it was to be."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent


def machine() -> dict[str, Any]:
    """Describe the machine and what runs on it."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    pkg_config = shutil.which("pkg-config")
    grpc_cpp = ""
    if pkg_config:
        done = subprocess.run([pkg_config, "--modversion", "grpc++"], capture_output=True, text=True, check=False)
        grpc_cpp = done.stdout.strip()
    git = shutil.which("git")
    commit = ""
    if git:
        done = subprocess.run(
            [git, "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
        commit = done.stdout.strip()
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "grpcio": metadata.version("grpcio"),
        "protobuf": metadata.version("protobuf"),
        "libgrpc++": grpc_cpp,
        "commit": commit,
    }


def _cpu_stall() -> float:
    # Seconds since boot in which something was ready to run and had no CPU; 0 where the kernel doesn't count them.
    try:
        some = Path("/proc/pressure/cpu").read_text().splitlines()[0]
    except OSError:
        return 0.0
    return int(some.rpartition("total=")[2]) / 1e6


@dataclass
class Report:
    """What a benchmark found, as JSON and as a table."""

    name: str
    rounds: int
    results: dict[str, Any] = field(default_factory=dict)
    _lines: list[tuple[str, ...]] = field(default_factory=list)
    _targets: list[dict[str, Any]] = field(default_factory=list)
    _load: float = field(default_factory=lambda: os.getloadavg()[0])
    _begun: float = field(default_factory=time.time)
    _stall: float = field(default_factory=lambda: _cpu_stall())

    def line(self, *cells: object) -> None:
        """Add a line to the table."""
        self._lines.append(tuple(map(str, cells)))

    def target(self, what: str, wanted: str, got: float, reached: bool) -> None:
        """Say whether a figure was reached."""
        self._targets.append({"what": what, "wanted": wanted, "got": got, "reached": reached})
        self.line("reached" if reached else "NOT REACHED", what, f"wanted {wanted}", f"got {got:g}")

    def at_least(self, what: str, wanted: float, got: float) -> None:
        """Hold a figure against a least one."""
        self.target(what, f">= {wanted:g}", got, got >= wanted)

    def at_most(self, what: str, wanted: float, got: float) -> None:
        """Hold a figure against a most one."""
        self.target(what, f"<= {wanted:g}", got, got <= wanted)

    def show(self, path: Path | None) -> None:
        """Print the table, then the JSON; into a file too if one is named."""
        columns = max((len(line) for line in self._lines), default=0)
        widths = [max((len(line[at]) for line in self._lines if at < len(line)), default=0) for at in range(columns)]
        for line in self._lines:
            padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=False))
            sys.stdout.write("  ".join(padded).rstrip() + "\n")
        whole = {
            "benchmark": self.name,
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._begun)),
            "took_seconds": round(time.time() - self._begun, 1),
            "rounds": self.rounds,
            "machine": machine(),
            "cpu_pressure": round((_cpu_stall() - self._stall) / (time.time() - self._begun), 3),
            "load": {"before": round(self._load, 2), "after": round(os.getloadavg()[0], 2)},
            "targets": self._targets,
            "table": self._lines,
            "results": self.results,
        }
        said = json.dumps(whole, indent=1)
        sys.stdout.write(said + "\n")
        if path is not None:
            path.write_text(said + "\n")
