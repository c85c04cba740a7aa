"""skeyctl keys summary."""

from __future__ import annotations

from dataclasses import asdict

import click

from skeyd.cli.freezing import Freeze, freeze_options
from skeyd.cli.interrupts import connect
from skeyd.cli.options import KEY_HEADS, RANGE, json_option, key_columns, show_json, vm_name
from skeyd.gfn import GfnRange, Ranges
from skeyd.storage_key import StorageKey


@click.command()
@click.argument("vm_id", metavar="VM")
@click.argument("ranges", metavar="[RANGE]...", type=RANGE, nargs=-1)
@freeze_options
@json_option
@click.pass_obj
def summary(target: str, vm_id: str, ranges: tuple[GfnRange, ...], freeze: Freeze, as_json: bool) -> None:
    """Count keys, of all frames or of RANGEs: a line for each key that a frame has, and how the keys lie."""
    name = vm_name(vm_id)
    with connect(target) as client:
        found = client.summarize_skeys(name, Ranges(ranges), **asdict(freeze))
    summed = found.summary
    longest = summed.longest_run
    if as_json:
        run = longest and {"start_gfn": longest.frames.start, "count": longest.frames.count, "key": longest.key}
        show_json(
            {
                "vm": name,
                "uses_storage_keys": found.uses_storage_keys,
                "keys": summed.keys,
                "gap_frames": found.gap_frames,
                "counts": [
                    {"key": key, "count": count, **asdict(StorageKey.from_byte(key))}
                    for key, count in summed.counts.items()
                ],
                "runs": summed.runs,
                "longest_run": run,
                "frozen": freeze.frozen,
            }
        )
        return
    if longest is None:
        click.echo("the guest uses no storage keys")
        return
    click.echo(f"{KEY_HEADS}  {'COUNT':>14}  {'SHARE':>6}")
    for key, count in summed.counts.items():
        click.echo(f"{key_columns(key)}  {count:>14}  {_share(count, summed.keys):>6}")
    click.echo(f"{summed.keys} keys of {name} in {summed.runs} runs of one key, ", nl=False)
    click.echo(f"{summed.keys / summed.runs:.1f} frames on average;")
    click.echo(f"the longest is {longest.frames} with {longest.frames.count} frames of {longest.key:#04x}", nl=False)
    click.echo(f"; {found.gap_frames} frames are in no memory slot" if found.gap_frames else "")


def _share(count: int, of: int) -> str:
    # What is not all is not shown as all, nor what there is as nothing.
    if 0 < of - count < of / 1000:
        return ">99.9%"
    if count < of / 1000:
        return "<0.1%"
    return f"{100 * count / of:.1f}%"
