"""skeyctl keys."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from skeyd.cli.freezing import Freeze, freeze_options, shown
from skeyd.cli.interrupts import connect
from skeyd.cli.options import (
    KEY_HEADS,
    RANGE,
    json_option,
    key_columns,
    key_of,
    key_options,
    set_options,
    show_json,
    vm_name,
)
from skeyd.client import Gap, Keys, KeyStream, SetOptions, SetResult, Snapshot, write_snapshot
from skeyd.client.writing import repeated
from skeyd.gfn import GfnRange, Ranges
from skeyd.storage_key import StorageKey, runs_of_equal


@click.group()
def keys() -> None:
    """Get, set, dump, load, count and compare storage keys.

    A RANGE of guest frames is FIRST-LAST, FIRST+COUNT or one gfn, decimal or 0x…: 0x100-0x1ff is 256 frames.
    """


@dataclass(frozen=True, slots=True)
class _Run:
    # Frames that follow one another and have one key; None: they are in no memory slot.
    frames: GfnRange
    key: int | None


@keys.command()
@click.argument("vm_id", metavar="VM")
@click.argument("ranges", metavar="[RANGE]...", type=RANGE, nargs=-1)
@freeze_options
@json_option
@click.pass_obj
def get(target: str, vm_id: str, ranges: tuple[GfnRange, ...], freeze: Freeze, as_json: bool) -> None:
    """Show keys, of all frames or of RANGEs: a line for each run of frames with one key."""
    with connect(target) as client, client.get_skeys(vm_name(vm_id), Ranges(ranges), **asdict(freeze)) as stream:
        runs = _runs(stream)
        if as_json:
            show_json(_runs_json(stream, runs))
        elif not stream.uses_storage_keys:
            click.echo("the guest uses no storage keys")
        else:
            _show_runs(runs)
            if stream.frozen:
                click.echo(shown(stream.frozen_seconds).removeprefix("; "))


@keys.command("set")
@click.argument("vm_id", metavar="VM")
@click.argument("ranges", metavar="RANGE...", type=RANGE, nargs=-1, required=True)
@key_options
@set_options
@json_option
@click.pass_obj
def set_(
    target: str, /, vm_id: str, ranges: tuple[GfnRange, ...], how: SetOptions, as_json: bool, **options: Any
) -> None:
    """Give every frame of RANGEs one key, and verify it. All get it, or none."""
    wanted = Ranges(ranges)
    result = _set(target, vm_id, wanted, repeated(key_of(**options), wanted), how)
    _show_result(vm_name(vm_id), result, as_json)


@keys.command()
@click.argument("vm_id", metavar="VM")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("ranges", metavar="[RANGE]...", type=RANGE, nargs=-1)
@freeze_options
@json_option
@click.pass_obj
def dump(target: str, vm_id: str, file: Path, ranges: tuple[GfnRange, ...], freeze: Freeze, as_json: bool) -> None:
    """Save keys, of all frames or of RANGEs, into FILE. It appears when it is whole."""
    name, place = vm_name(vm_id), _replaceable(file)
    with connect(target) as client, client.get_skeys(name, Ranges(ranges), **asdict(freeze)) as stream:
        with _progress("dumping", stream.frames()) as told:
            saved = write_snapshot(place, stream, told)
        uses_keys = stream.uses_storage_keys
    if as_json:
        done = {"vm": name, "file": str(file), "keys": saved, "uses_storage_keys": uses_keys}
        show_json({**done, "frozen": stream.frozen, "frozen_seconds": stream.frozen_seconds})
    elif uses_keys:
        click.echo(f"{saved} keys of {name} saved in {click.format_filename(file)}{shown(stream.frozen_seconds)}")
    else:
        click.echo(f"{name} uses no storage keys; {click.format_filename(file)} says so")


@keys.command()
@click.argument("vm_id", metavar="VM")
@click.argument("file", type=click.Path(path_type=Path))
@set_options
@json_option
@click.pass_obj
def load(target: str, vm_id: str, file: Path, how: SetOptions, as_json: bool) -> None:
    """Set the keys that `dump` saved in FILE, all or none. The whole file is checked before the first key is set."""
    with Snapshot(file) as snapshot:
        ranges = snapshot.verify()
        if not snapshot.uses_storage_keys:
            raise click.UsageError(f"{file} was taken from a guest that uses no storage keys; there is nothing to load")
        result = _set(target, vm_id, ranges, snapshot.keys(), how)
    _show_result(vm_name(vm_id), result, as_json)


def _replaceable(file: Path) -> Path:
    # What is there is replaced, not written to: what a link leads to, and never a directory, a device or a FIFO.
    place = Path(os.path.realpath(file))
    if place.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    if place.exists() and not place.is_file():
        raise FileExistsError(errno.EEXIST, "not a regular file, and so not one to replace", str(file))
    return place


def _set(target: str, vm_id: str, ranges: Ranges, chunks: Iterable[Keys], how: SetOptions) -> SetResult:
    with connect(target) as client, _progress("setting", ranges.frames()) as told:
        return client.set_skeys(vm_name(vm_id), ranges, chunks, how, progress=told)


def _show_result(name: str, result: SetResult, as_json: bool) -> None:
    if as_json:
        show_json({"vm": name, **asdict(result)})
        return
    if result.validated_only:
        click.echo(f"{result.keys_set} keys for {name} checked; nothing was set")
        return
    click.echo(f"{result.keys_set} keys of {name} set and verified", nl=False)
    click.echo(f"; the kernel had lost {result.keys_repaired}, set again" if result.keys_repaired else "", nl=False)
    click.echo("; the guest uses storage keys from now on" if result.enabled else "")


def _runs(parts: Iterable[Keys | Gap]) -> Iterator[_Run]:
    # Runs go on across chunks.
    last: _Run | None = None
    for part in parts:
        found: list[_Run] = [_Run(part.frames, None)]
        if isinstance(part, Keys):
            start = part.frames.start
            found = [_Run(GfnRange(start + index, count), key) for index, count, key in runs_of_equal(part.keys)]
        for run in found:
            if last is not None and last.key == run.key and last.frames.end == run.frames.start:
                last = _Run(GfnRange(last.frames.start, last.frames.count + run.frames.count), run.key)
                continue
            if last is not None:
                yield last
            last = run
    if last is not None:
        yield last


def _show_runs(runs: Iterable[_Run]) -> None:
    click.echo(f"{'FRAMES':<29}{'COUNT':>10}  {KEY_HEADS}")
    for run in runs:
        line = f"{run.frames!s:<29}{run.frames.count:>10}  "
        if run.key is None:
            click.echo(line + "no memory")
            continue
        click.echo(line + key_columns(run.key))


def _runs_json(stream: KeyStream, runs: Iterable[_Run]) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    gaps: list[dict[str, int]] = []
    for run in runs:
        where = {"start_gfn": run.frames.start, "count": run.frames.count}
        if run.key is None:
            gaps.append(where)
        else:
            found.append({**where, "key": run.key, **asdict(StorageKey.from_byte(run.key))})
    header = stream.header
    return {
        "vm": header.vm,
        "uid": header.uid,
        "kernel": header.kernel,
        "uses_storage_keys": stream.uses_storage_keys,
        "runs": found,
        "gaps": gaps,
        "frozen": stream.frozen,
        "frozen_seconds": stream.frozen_seconds,
    }


@contextmanager
def _progress(what: str, frames: int) -> Iterator[Callable[[int], None]]:
    # A bar on a terminal, on standard error so that output stays output; elsewhere nothing.
    if not sys.stderr.isatty() or not frames:
        yield lambda _: None
        return
    with click.progressbar(length=frames, label=what, file=sys.stderr) as bar:
        yield lambda done: bar.update(done - bar.pos)
