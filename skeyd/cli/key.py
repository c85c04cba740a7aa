"""skeyctl key: one frame."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

import click

from skeyd.cli.interrupts import connect
from skeyd.cli.options import (
    GFN,
    KEY_HEADS,
    allow_enable_option,
    json_option,
    key_columns,
    key_of,
    key_options,
    show_json,
    vm_name,
)
from skeyd.storage_key import StorageKey

_CALLS: Final = {"keyop": "KVM_S390_KEYOP", "skeys": "the calls for ranges"}


@click.group()
def key() -> None:
    """Look at, set and reset the storage key of one frame.

    GFN is a guest frame number, decimal or 0x…: the guest address divided by 4096. Uses KVM_S390_KEYOP where the
    guest's kernel has it (Linux 7.0 and later); `keys` is for more than one frame.
    """


@key.command()
@click.argument("vm_id", metavar="VM")
@click.argument("gfn", type=GFN)
@json_option
@click.pass_obj
def get(target: str, vm_id: str, gfn: int, as_json: bool) -> None:
    """Show the key of frame GFN."""
    name = vm_name(vm_id)
    with connect(target) as client:
        found = client.get_skey(name, gfn)
    if as_json:
        show_json({"vm": name, "gfn": gfn, "call": found.call, **_as_json(found.key)})
    elif found.key is None:
        click.echo("the guest uses no storage keys")
    else:
        click.echo(f"{'GFN':<20}{KEY_HEADS}")
        click.echo(f"{gfn:<#20x}{key_columns(found.key)}")


@key.command("set")
@click.argument("vm_id", metavar="VM")
@click.argument("gfn", type=GFN)
@key_options
@allow_enable_option
@json_option
@click.pass_obj
def set_(target: str, /, vm_id: str, gfn: int, allow_enable: bool, as_json: bool, **options: Any) -> None:
    """Set the key of frame GFN, verify it, and show the old one."""
    name, wanted = vm_name(vm_id), key_of(**options)
    with connect(target) as client:
        done = client.set_skey(name, gfn, wanted, allow_enable=allow_enable)
    if as_json:
        more = {"repaired": done.repaired, "enabled": done.enabled, "call": done.call}
        show_json({"vm": name, "gfn": gfn, "old": _as_json(done.old_key), **more})
        return
    click.echo(f"{'GFN':<20}{'':<5}{KEY_HEADS}")
    if done.old_key is not None:
        click.echo(f"{gfn:<#20x}was  {key_columns(done.old_key)}")
    click.echo(f"{gfn:<#20x}is   {key_columns(wanted)}")
    click.echo(f"set with {_CALLS.get(done.call, 'another call')}, and verified", nl=False)
    click.echo("; the kernel had lost it, set again" if done.repaired else "", nl=False)
    click.echo("; the guest uses storage keys from now on" if done.enabled else "")


@key.command("reset-referenced")
@click.argument("vm_id", metavar="VM")
@click.argument("gfn", type=GFN)
@json_option
@click.pass_obj
def reset_referenced(target: str, vm_id: str, gfn: int, as_json: bool) -> None:
    """Reset the referenced bit of frame GFN, and say what it was.

    Run it twice to see whether the guest used the frame in between. Needs KVM_S390_KEYOP.
    """
    name = vm_name(vm_id)
    with connect(target) as client:
        was_referenced, was_changed = client.reset_referenced(name, gfn)
    if as_json:
        show_json({"vm": name, "gfn": gfn, "was_referenced": was_referenced, "was_changed": was_changed})
    else:
        words = ("was not referenced", "was referenced")[was_referenced], ("not changed", "changed")[was_changed]
        click.echo(f"gfn {gfn:#x} {words[0]}, and {words[1]}")


def _as_json(found: int | None) -> dict[str, Any]:
    if found is None:
        return {"uses_storage_keys": False}
    return {"uses_storage_keys": True, "key": found, **asdict(StorageKey.from_byte(found))}
