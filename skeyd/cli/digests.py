"""skeyctl keys digest and keys compare: keys compared without being moved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click

from skeyd.cli.freezing import Freeze, freeze_options
from skeyd.cli.interrupts import connect
from skeyd.cli.options import (
    KEY_HEADS,
    RANGE,
    json_option,
    key_columns,
    show_json,
    vm_name,
    with_referenced_changed_option,
)
from skeyd.client import Client, Comparison, Difference, FileSide, Snapshot, VmSide
from skeyd.gfn import GfnRange, Ranges
from skeyd.storage_key import runs_of_equal

EXIT_DIFFERENT: Final = 6
"""`keys compare` found a difference."""


@click.command()
@click.argument("which", metavar="VM|FILE")
@click.argument("ranges", metavar="[RANGE]...", type=RANGE, nargs=-1)
@with_referenced_changed_option
@freeze_options
@json_option
@click.pass_obj
def digest(
    target: str,
    which: str,
    ranges: tuple[GfnRange, ...],
    with_referenced_changed: bool,
    freeze: Freeze,
    as_json: bool,
) -> None:
    """Show the digest of the keys of all frames, or of RANGEs.

    Two guests whose digests are the same have the same keys on the same frames. It covers access-control bits and fetch
    protection. FILE is a snapshot that `dump` made: what has a dot in it, or a slash, as ./web.
    """
    within = Ranges(ranges)
    if _is_file(which):
        if freeze.frozen:
            raise click.UsageError(f"--frozen is for a VM, and {which!r} is a file's name")
        name = click.format_filename(which)
        with Snapshot(Path(which)) as snapshot:
            side = FileSide(snapshot, within, with_referenced_changed=with_referenced_changed)
            found = side.digest()
    else:
        name = vm_name(which)
        with connect(target) as client:
            found = client.digest_skeys(name, within, with_referenced_changed=with_referenced_changed, **asdict(freeze))
    if as_json:
        show_json(
            {
                "of": name,
                "uses_storage_keys": found.uses_storage_keys,
                "with_referenced_changed": with_referenced_changed,
                "digest": found.node.sha256.hex() if found.node else None,
                "keys": found.node.keys if found.node else 0,
                "frozen": freeze.frozen,
            }
        )
    elif not found.uses_storage_keys:
        click.echo(f"{name} uses no storage keys, and so has no digest")
    elif found.node is None:
        click.echo(f"{name} has no keys there, and so no digest")
    else:
        click.echo(f"{found.node.sha256.hex()}  {found.node.keys} keys of {name}")


@click.command()
@click.argument("vm_id", metavar="VM")
@click.argument("other", metavar="OTHER")
@click.argument("ranges", metavar="[RANGE]...", type=RANGE, nargs=-1)
@click.option("--other-target", help="The daemon that has the OTHER VM, as --target names one.")
@with_referenced_changed_option
@json_option
@click.pass_obj
def compare(
    target: str,
    vm_id: str,
    other: str,
    ranges: tuple[GfnRange, ...],
    other_target: str | None,
    with_referenced_changed: bool,
    as_json: bool,
) -> int:
    """Compare the keys of VM with those of OTHER: a line for each run of frames that differ in one way.

    OTHER is a VM, here or with --other-target elsewhere, or a snapshot that `dump` made: what has a dot in it, or a
    slash, as ./web. All frames are compared, or RANGEs; with a snapshot those that were asked for when it was taken.
    Keys are moved only where they differ, 65,536 frames at a time. Exits 6 where there is a difference.
    """
    name, within = vm_name(vm_id), Ranges(ranges)
    with ExitStack() as opened:
        client = opened.enter_context(connect(target))
        if _is_file(other):
            if other_target is not None:
                raise click.UsageError(f"--other-target is for a VM, and {other!r} is a file's name")
            other_name = click.format_filename(other)
            snapshot = opened.enter_context(Snapshot(Path(other)))
            # What is in no memory slot any more differs; it is nothing to refuse.
            left = VmSide(
                client,
                name,
                within or snapshot.ranges(),
                clip=not within,
                with_referenced_changed=with_referenced_changed,
            )
            right: VmSide | FileSide = FileSide(snapshot, within, with_referenced_changed=with_referenced_changed)
        else:
            other_name = vm_name(other)
            other_client: Client = client
            if other_target is not None:
                if not other_target:
                    raise click.BadParameter("it is empty", param_hint="--other-target")
                other_client = opened.enter_context(connect(other_target))
            left = VmSide(client, name, within, with_referenced_changed=with_referenced_changed)
            right = VmSide(other_client, other_name, within, with_referenced_changed=with_referenced_changed)
        comparison = Comparison(left, right)
        runs = _runs(comparison)
        if as_json:
            differences = [
                {"start_gfn": run.frames.start, "count": run.frames.count, "key": run.left, "other_key": run.right}
                for run in runs
            ]
            show_json(
                {
                    "vm": name,
                    "other": other_name,
                    "same": comparison.same,
                    "uses_storage_keys": comparison.left.uses_storage_keys,
                    "other_uses_storage_keys": comparison.right.uses_storage_keys,
                    "with_referenced_changed": with_referenced_changed,
                    "differences": differences,
                    "keys_moved": left.keys_moved + right.keys_moved,
                }
            )
        else:
            differing = _show_runs(runs, name, other_name)
            _show_end(comparison, name, other_name, differing, left.keys_moved + right.keys_moved)
    return 0 if comparison.same else EXIT_DIFFERENT


@dataclass(frozen=True, slots=True)
class _Run:
    # Frames that follow one another and have one key on each side; None: they are not there.
    frames: GfnRange
    left: int | None
    right: int | None


def _is_file(name: str) -> bool:
    # No VM's id has a dot or a slash in it; "vms/ID" is its whole name.
    return "." in name or ("/" in name and not name.startswith("vms/"))


def _runs(differences: Iterable[Difference]) -> Iterator[_Run]:
    # Runs go on across differences.
    last: _Run | None = None
    for difference in differences:
        for run in _runs_of(difference):
            if last is None:
                last = run
            elif (last.left, last.right, last.frames.end) == (run.left, run.right, run.frames.start):
                last = _Run(GfnRange(last.frames.start, last.frames.count + run.frames.count), run.left, run.right)
            else:
                yield last
                last = run
    if last is not None:
        yield last


def _runs_of(difference: Difference) -> Iterator[_Run]:
    count, start = difference.frames.count, difference.frames.start
    lefts, rights = _starts(difference.left), _starts(difference.right)
    left = right = 0
    index = 0
    while index < count:
        ends = [rest[at + 1][0] if at + 1 < len(rest) else count for rest, at in ((lefts, left), (rights, right))]
        end = min(ends)
        yield _Run(GfnRange(start + index, end - index), lefts[left][1], rights[right][1])
        left, right, index = left + (ends[0] == end), right + (ends[1] == end), end


def _starts(keys: bytes | None) -> list[tuple[int, int | None]]:
    # The runs of one side: where each begins, and its key.
    return [(0, None)] if keys is None else [(index, key) for index, _, key in runs_of_equal(keys)]


def _show_runs(runs: Iterable[_Run], name: str, other: str) -> int:
    frames = 0
    for run in runs:
        if not frames:
            click.echo(f"{'':<41}{name:<{len(KEY_HEADS) + 2}}{other}")
            click.echo(f"{'FRAMES':<29}{'COUNT':>10}  {KEY_HEADS}  {KEY_HEADS}")
        frames += run.frames.count
        sides = [f"{'no key':<{len(KEY_HEADS)}}" if key is None else key_columns(key) for key in (run.left, run.right)]
        click.echo(f"{run.frames!s:<29}{run.frames.count:>10}  {'  '.join(sides)}".rstrip())
    return frames


def _show_end(comparison: Comparison, name: str, other: str, differing: int, moved: int) -> None:
    uses = (comparison.left.uses_storage_keys, comparison.right.uses_storage_keys)
    if uses == (False, False):
        click.echo(f"the same: {name} and {other} use no storage keys")
    elif not all(uses):
        with_keys, without = (name, other) if uses[0] else (other, name)
        click.echo(f"{with_keys} uses storage keys and {without} doesn't")
    elif comparison.same:
        keys = comparison.left.node.keys if comparison.left.node else 0
        click.echo(f"the same: {keys} keys of {name} and of {other}")
    elif differing:
        click.echo(f"{differing} frames of {name} and {other} differ; {moved} keys were moved")
    else:
        click.echo(f"{name} and {other} differed, and no more when it was looked where; {moved} keys were moved")
