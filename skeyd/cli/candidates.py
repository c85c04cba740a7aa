"""skeyctl vm candidates."""

from __future__ import annotations

from typing import Any

import click

from skeyd.cli.interrupts import connect
from skeyd.cli.options import json_option, show_json, show_table
from skeyd.v1 import vm_service_pb2 as pb


@click.command()
@json_option
@click.pass_obj
def candidates(target: str, as_json: bool) -> None:
    """List the processes of this host whose VMs can be adopted. None of them is touched."""
    with connect(target) as client:
        found = client.list_vm_candidates()
    if as_json:
        show_json(
            {
                "candidates": [_as_json(one) for one in found.candidates],
                "unreadable_processes": found.unreadable_processes,
                "left_out": found.left_out,
                "skeyd_workers": found.skeyd_workers,
            }
        )
        return
    rows = [
        (
            str(one.pid),
            one.name or "-",
            str(one.uid),
            ",".join(map(str, one.vm_fds)),
            str(one.vcpu_fds),
            f"{one.mapped_bytes >> 20} MiB",
            f"{one.resident_bytes >> 20} MiB",
            one.executable or "unknown",
            _state(one),
        )
        for one in found.candidates
    ]
    show_table(("PID", "NAME", "UID", "VM FDS", "VCPUS", "MAPPED", "RESIDENT", "EXECUTABLE", "ADOPTED"), rows)
    for count, what in (
        (found.unreadable_processes, "that skeyd has no right to look at, each of which may have a VM"),
        (found.left_out, "left out, since there are too many of them or of their descriptors"),
        (found.skeyd_workers, "with a VM that are workers of skeyd, and so no candidates"),
    ):
        if count:
            click.echo(f"\nprocesses {what}: {count}")


def _state(one: pb.VmCandidate) -> str:
    if one.adopted_as:
        return f"as {one.adopted_as}"
    return f"no, and can't be now: {one.refusal_detail} [{one.refusal}]" if one.refusal else "no"


def _as_json(one: pb.VmCandidate) -> dict[str, Any]:
    return {
        "pid": one.pid,
        "start_time": one.start_time,
        "uid": one.uid,
        "executable": one.executable or None,
        "name": one.name or None,
        "vm_fds": list(one.vm_fds),
        "vcpu_fds": one.vcpu_fds,
        "mapped_bytes": one.mapped_bytes,
        "resident_bytes": one.resident_bytes,
        "adopted_as": one.adopted_as or None,
        "refusal": one.refusal or None,
        "refusal_detail": one.refusal_detail or None,
    }
