"""skeyctl host."""

from __future__ import annotations

import click

from skeyd.cli.interrupts import connect
from skeyd.cli.options import json_option, show_json, show_table
from skeyd.v1 import host_service_pb2 as pb

_ANSWERS = {pb.ANSWER_YES: "yes", pb.ANSWER_NO: "no"}


@click.command()
@json_option
@click.pass_obj
def host(target: str, as_json: bool) -> None:
    """Say what the host can do for storage keys, and what to do about what it can't."""
    with connect(target) as client:
        found = client.host()
    if as_json:
        show_json(
            {
                "kernel_release": found.kernel_release,
                "machine": found.machine,
                "versions": {
                    "skeyd": found.skeyd_version,
                    "python": found.python_version,
                    "grpc": found.grpc_version,
                    "protobuf": found.protobuf_version,
                },
                "can_own_vms": _ANSWERS.get(found.can_own_vms),
                "findings": [
                    {
                        "name": one.name,
                        "answer": _ANSWERS.get(one.answer),
                        "detail": one.detail,
                        "remedy": one.remedy or None,
                    }
                    for one in found.findings
                ],
                "limits": {field.name: getattr(found.limits, field.name) for field in found.limits.DESCRIPTOR.fields},
            }
        )
        return
    click.echo(f"Linux {found.kernel_release} on {found.machine}; skeyd {found.skeyd_version}, ", nl=False)
    click.echo(f"Python {found.python_version}, grpcio {found.grpc_version}, protobuf {found.protobuf_version}")
    click.echo(f"owned VMs can be created here: {_word(found.can_own_vms)}\n")
    show_table(("LOOKED AT", "ANSWER", "SEEN"), [(one.name, _word(one.answer), one.detail) for one in found.findings])
    for one in found.findings:
        if one.remedy and one.answer != pb.ANSWER_YES:
            click.echo(f"\n{one.name}: {one.remedy}")


def _word(answer: pb.Answer.ValueType) -> str:
    return _ANSWERS.get(answer, "don't know")
