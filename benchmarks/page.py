"""Puts the figures of the last runs into docs/benchmarks.md, between its marks.

    make benchmark-page           (python -m benchmarks.page)

The figures are what `--json benchmarks/figures/NAME.json` wrote; before-NAME.json are those of the release before the
figures were aimed at, for comparison.
"""

from __future__ import annotations

import json
from typing import Any, Final

from benchmarks.report import ROOT

FIGURES: Final = ROOT / "benchmarks" / "figures"
PAGE: Final = ROOT / "docs" / "benchmarks.md"
NAMES: Final = ("streams", "encodings", "latency", "memory", "end_to_end")
_BEGIN: Final = "<!-- figures: made by `make benchmark-page` -->"
_END: Final = "<!-- end of figures -->"


def _load(name: str) -> dict[str, Any] | None:
    path = FIGURES / f"{name}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _machine(run: dict[str, Any]) -> str:
    about, load, pressure = run["machine"], run["load"], run["cpu_pressure"]
    waited = "" if pressure is None else f", something waited for a CPU in {pressure:.0%} of the time"
    return (
        f"{run['when']}, {run['rounds']} rounds, commit {about['commit']}; {about['cpus']} CPUs ({about['cpu']}), "
        f"{about['memory_mib'] >> 10} GiB, Linux {about['kernel']}, Python {about['python']}, "
        f"grpcio {about['grpcio']}, protobuf {about['protobuf']}, libgrpc++ {about['libgrpc++']}; "
        f"load average {load['before']} before and {load['after']} after{waited}"
    )


def _table(run: dict[str, Any]) -> list[str]:
    # Runs of lines with as many cells are a table; the targets are shown by themselves.
    shown = [line for line in run["table"] if line[0] not in ("reached", "NOT REACHED")]
    widths = [max(len(line[at]) for line in shown if at < len(line)) for at in range(max(map(len, shown)))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip() for line in shown]


def _section(name: str) -> list[str]:
    last, before = _load(name), _load(f"before-{name}")
    run = last or before
    if run is None:
        return []
    lines = [f"### {name}", "", f"Last: {_machine(last)}." if last else "Not measured since.", ""]
    if before:
        lines += [f"Before: {_machine(before)}.", ""]
    lines += ["| figure | wanted | before | last | |", "| --- | --- | --- | --- | --- |"]
    earlier = {one["what"]: one for one in (before or {"targets": []})["targets"]}
    now = {one["what"]: one for one in (last or {"targets": []})["targets"]}
    for what in {**earlier, **now}:
        old, new = earlier.get(what), now.get(what)
        one = new or old
        if one is None:
            continue
        verdict = "" if new is None else "reached" if new["reached"] else "**not reached**"
        cells = ["-" if which is None else f"{which['got']:g}" for which in (old, new)]
        lines.append(f"| {what} | {one['wanted']} | {cells[0]} | {cells[1]} | {verdict} |")
    return [*lines, "", "```", *_table(run), "```", ""]


def main() -> None:
    """Write the figures into the page."""
    page = PAGE.read_text()
    head, _, rest = page.partition(_BEGIN)
    _, _, tail = rest.partition(_END)
    lines = [line for name in NAMES for line in _section(name)]
    PAGE.write_text("\n".join([head + _BEGIN, "", *lines, _END]) + tail)


if __name__ == "__main__":
    main()
