"""skeyctl vm."""

from __future__ import annotations

import sys
from typing import Any, Final

import click

from skeyd.cli.candidates import candidates
from skeyd.cli.interrupts import connect
from skeyd.cli.options import json_option, require_utf8, show_json, show_table, size_of, vm_name
from skeyd.gfn import GfnRange
from skeyd.storage_key import FRAME_SIZE
from skeyd.v1 import vm_pb2, vm_service_pb2

_KINDS = {"owned": vm_pb2.VM_KIND_OWNED, "simulated": vm_pb2.VM_KIND_SIMULATED}
_ALL_KINDS = {**_KINDS, "adopted": vm_pb2.VM_KIND_ADOPTED}
_BACKINGS = {
    "anonymous": vm_pb2.MEMORY_BACKING_ANONYMOUS,
    "memfd": vm_pb2.MEMORY_BACKING_MEMFD,
    "file": vm_pb2.MEMORY_BACKING_FILE,
    "none": vm_pb2.MEMORY_BACKING_NONE,
}
_ALL_BACKINGS = {**_BACKINGS, "vmm": vm_pb2.MEMORY_BACKING_VMM}
_SIMULATED = {
    "4.19": vm_pb2.SIMULATED_KERNEL_LINUX_4_19,
    "7.0": vm_pb2.SIMULATED_KERNEL_LINUX_7_0,
    "7.2": vm_pb2.SIMULATED_KERNEL_LINUX_7_2,
}
_ACCESSES = {"injection": vm_pb2.ACCESS_INJECTION, "qmp": vm_pb2.ACCESS_QMP}
# What a request holds; what makes sense is the daemon's to say.
_INT64: Final = (1 << 63) - 1
_UINT64: Final = (1 << 64) - 1
_UINT32: Final = (1 << 32) - 1
_STATES = {number: name.removeprefix("VM_STATE_").lower() for name, number in vm_pb2.VmState.items() if number}
_YES_OR_NO: dict[bool | None, str] = {True: "yes", False: "no"}
_MEMORY_SOURCES = {
    number: name.removeprefix("MEMORY_SOURCE_").lower() for name, number in vm_pb2.MemorySource.items() if number
}
_WRITE_OUTCOMES = {
    number: name.removeprefix("WRITE_OUTCOME_").lower() for name, number in vm_pb2.WriteOutcome.items() if number
}


@click.group()
def vm() -> None:
    """Create, adopt, list, show and delete VMs."""


vm.add_command(candidates)


@vm.command()
@click.argument("vm_id", metavar="ID")
@click.option("--kind", type=click.Choice(list(_KINDS)), required=True, help="owned needs a KVM host on IBM Z.")
@click.option(
    "--memory",
    "memories",
    metavar="SIZE[@ADDRESS][:BACKING]",
    multiple=True,
    required=True,
    help="A memory slot: 256M, 1G@4G, 64M@8G:memfd, 1G:file=NAME. Without an address it follows the one before.",
)
@click.option("--simulated-kernel", type=click.Choice(list(_SIMULATED)), help="Whose rules a simulated VM follows.")
@json_option
@click.pass_obj
def create(
    target: str, vm_id: str, kind: str, memories: tuple[str, ...], simulated_kernel: str | None, as_json: bool
) -> None:
    """Create a VM named ID."""
    request = vm_service_pb2.CreateVmRequest(
        vm_id=require_utf8(vm_id), kind=_KINDS[kind], memory_slots=_slots(memories, with_backing=True)
    )
    if simulated_kernel is not None:
        request.simulated_kernel = _SIMULATED[simulated_kernel]
    with connect(target) as client:
        made = client.create_vm(request)
    if as_json:
        show_json(_as_json(made))
    else:
        click.echo(f"{made.name} created: {made.kernel}, {_memory(made)}")


@vm.command()
@click.argument("vm_id", metavar="ID")
@click.option("--pid", type=click.IntRange(1, _INT64), help="The process that owns the VM, a QEMU's.")
@click.option("--name", help="The same by its libvirt domain's name, or what QEMU's -name says.")
@click.option(
    "--qmp-socket",
    metavar="PATH",
    help="The unix socket of its QMP monitor, without another client: it says which process and memory it is.",
)
@click.option(
    "--access",
    type=click.Choice(list(_ACCESSES)),
    help="qmp: the VMM prints its keys, and none can be set. Default: injection where that is allowed.",
)
@click.option(
    "--start-time",
    type=click.IntRange(1, _UINT64),
    metavar="TICKS",
    help="When the process was started, as `vm candidates --json` says: another that has its pid by now is refused.",
)
@click.option("--fd", type=click.IntRange(0, _UINT32), help="Its descriptor of the VM, where it has several.")
@click.option(
    "--memory",
    "memories",
    metavar="SIZE[@ADDRESS]",
    multiple=True,
    help="A memory slot as the VMM made it: 4G, 1G@64G. Without an address it follows the one before. Without "
    "this option they are asked for over QMP, or found, if the guest uses storage keys.",
)
@click.option("--max-hold-ms", type=click.IntRange(1, _UINT32), help="How long a call may hold the VMM's thread.")
@json_option
@click.pass_obj
def adopt(
    target: str,
    vm_id: str,
    pid: int | None,
    name: str | None,
    qmp_socket: str | None,
    access: str | None,
    start_time: int | None,
    fd: int | None,
    memories: tuple[str, ...],
    max_hold_ms: int | None,
    as_json: bool,
) -> None:
    """Adopt a VM of another process, named ID: a thread of that process makes the calls, or its VMM prints its keys."""
    if (name is None) == (pid is None and qmp_socket is None):
        raise click.UsageError("say whose VM it is: either --pid, --qmp-socket or both, or --name")
    request = vm_service_pb2.AdoptVmRequest(
        vm_id=require_utf8(vm_id),
        pid=pid or 0,
        name=require_utf8(name or ""),
        qmp_socket=require_utf8(qmp_socket or ""),
        access=_ACCESSES[access] if access else vm_pb2.ACCESS_UNSPECIFIED,
        start_time=start_time or 0,
        vm_fd=fd,
        memory_slots=_slots(memories, with_backing=False),
    )
    if max_hold_ms is not None:
        request.max_hold_time.FromMilliseconds(max_hold_ms)
    with connect(target) as client:
        made = client.adopt_vm(request)
    if as_json:
        show_json(_as_json(made))
    else:
        click.echo(f"{made.name} adopted from {_vmm(made)}: {made.kernel}, {_memory(made)}")


@vm.command("list")
@json_option
@click.pass_obj
def list_(target: str, as_json: bool) -> None:
    """List all VMs, those from before a restart of the daemon included."""
    with connect(target) as client:
        vms = client.list_vms()
    if as_json:
        show_json([_as_json(one) for one in vms])
        return
    rows = [
        (
            one.name.removeprefix("vms/"),
            (_kind(one) or "unknown") + (", read-only" if _is_read_only(one) else ""),
            _state(one) or "unknown",
            _memory(one) if one.memory_slots else "-",
            _YES_OR_NO.get(_uses_keys(one), "-"),
            one.state_reason or one.kernel,
        )
        for one in vms
    ]
    show_table(("ID", "KIND", "STATE", "MEMORY", "USES KEYS", "KERNEL, OR WHAT IS WRONG"), rows)


@vm.command()
@click.argument("vm_id", metavar="VM")
@json_option
@click.pass_obj
def show(target: str, vm_id: str, as_json: bool) -> None:
    """Show one VM."""
    with connect(target) as client:
        found = client.get_vm(vm_name(vm_id))
    if as_json:
        show_json(_as_json(found))
        return
    lines = {
        "name": found.name,
        "state": (_state(found) or "unknown") + (f": {found.state_reason}" if found.state_reason else ""),
        "kind": (_kind(found) or "unknown") + (", read-only" if _is_read_only(found) else ""),
        "kernel": found.kernel,
        "uses keys": _YES_OR_NO.get(_uses_keys(found), ""),
        "uid": found.uid,
        "incarnation": found.incarnation,
        "created": found.create_time.ToJsonString() if found.HasField("create_time") else "",
        "worker": f"pid {found.worker_pid}, skeyd {found.worker_version}" if found.worker_pid else "",
        "VMM": _vmm(found),
        "last write": _last_write(found),
    }
    for name, value in lines.items():
        if value:
            click.echo(f"{name + ':':<13}{value}")
    if found.memory_slots:
        click.echo()
        rows = [
            (str(one.slot), str(GfnRange(one.start_gfn, one.count)), _size(one.count * FRAME_SIZE), _backing(one))
            for one in found.memory_slots
        ]
        show_table(("SLOT", "FRAMES", "SIZE", "BACKING"), rows)


@vm.command()
@click.argument("vm_id", metavar="VM")
@click.option("--yes", is_flag=True, help="Don't ask. Needed where there is nobody to ask.")
@json_option
@click.pass_obj
def delete(target: str, vm_id: str, yes: bool, as_json: bool) -> None:
    """End a VM: it, its memory and its keys are gone. An adopted one is let go, and its process has it as before."""
    name = vm_name(vm_id)
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError(f"deleting {name} can't be undone; off a terminal say --yes")
        with connect(target) as client:
            is_adopted = client.get_vm(name).kind == vm_pb2.VM_KIND_ADOPTED
        _confirm(
            f"Let go of {name}? Its process keeps the guest, and the keys as they are."
            if is_adopted
            else f"Delete {name}, its memory and its keys?"
        )
    with connect(target) as client:
        client.delete_vm(name)
    if as_json:
        show_json({"deleted": name})
    else:
        click.echo(f"{name} deleted")


def _confirm(question: str) -> None:
    # Not click.confirm: up to 8.3 it writes a space to standard output, which is for the answer.
    click.echo(f"{question} [y/N]: ", nl=False, err=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise click.Abort


def _slots(memories: tuple[str, ...], with_backing: bool) -> list[vm_service_pb2.MemorySlotSpec]:
    slots: list[vm_service_pb2.MemorySlotSpec] = []
    for text in memories:
        if ":" in text and not with_backing:
            raise click.BadParameter("the memory is the VMM's: SIZE[@ADDRESS]", param_hint="--memory")
        following = slots[-1].guest_phys_addr + slots[-1].memory_size if slots else 0
        slots.append(_slot(text, following))
    return slots


def _slot(text: str, following: int) -> vm_service_pb2.MemorySlotSpec:
    where, colon, backing = text.partition(":")
    size, at, address = where.partition("@")
    backing, equals, file = backing.partition("=")
    if colon and backing not in _BACKINGS:
        raise click.BadParameter(f"{backing!r} is none of {', '.join(_BACKINGS)}", param_hint="--memory")
    if not (backing == "file") == bool(file) == bool(equals):
        raise click.BadParameter("a file and only a file has a name: 1G:file=NAME", param_hint="--memory")
    try:
        return vm_service_pb2.MemorySlotSpec(
            guest_phys_addr=size_of(address) if at else following,
            memory_size=size_of(size),
            backing=_BACKINGS[backing] if colon else vm_pb2.MEMORY_BACKING_UNSPECIFIED,
            file=require_utf8(file),
        )
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--memory") from error


def _as_json(vm: vm_pb2.Vm) -> dict[str, Any]:
    return {
        "name": vm.name,
        "uid": vm.uid or None,
        "incarnation": vm.incarnation or None,
        "kind": _kind(vm),
        "state": _state(vm),
        "state_reason": vm.state_reason or None,
        "memory_slots": [
            {"slot": one.slot, "start_gfn": one.start_gfn, "count": one.count, "backing": _backing(one)}
            for one in vm.memory_slots
        ],
        "uses_storage_keys": _uses_keys(vm),
        "kernel": vm.kernel or None,
        "worker_version": vm.worker_version or None,
        "worker_pid": vm.worker_pid or None,
        "create_time": vm.create_time.ToJsonString() if vm.HasField("create_time") else None,
        "vmm": _vmm_json(vm),
        "last_write": _last_write_json(vm),
    }


# What isn't known is None; a daemon that is newer than this program can know of kinds and states that it doesn't.


def _kind(vm: vm_pb2.Vm) -> str | None:
    return next((word for word, number in _ALL_KINDS.items() if number == vm.kind), None)


def _state(vm: vm_pb2.Vm) -> str | None:
    return _STATES.get(vm.state)


def _uses_keys(vm: vm_pb2.Vm) -> bool | None:
    return vm.uses_storage_keys if vm.HasField("uses_storage_keys") else None


def _is_read_only(vm: vm_pb2.Vm) -> bool:
    return vm.vmm.access == vm_pb2.ACCESS_QMP


def _backing(slot: vm_pb2.MemorySlot) -> str:
    return next((word for word, number in _ALL_BACKINGS.items() if number == slot.backing), "unknown")


def _memory(vm: vm_pb2.Vm) -> str:
    return _size(sum(one.count for one in vm.memory_slots) * FRAME_SIZE)


def _size(size: int) -> str:
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB")):
        if size >= unit and not size % unit:
            return f"{size // unit} {name}"
    return f"{size // (1 << 20)} MiB"


def _vmm(vm: vm_pb2.Vm) -> str:
    if not vm.HasField("vmm"):
        return ""
    named = f" ({vm.vmm.name})" if vm.vmm.name else ""
    how = f"VM descriptor {vm.vmm.vm_fd}" if vm.vmm.HasField("vm_fd") else "keys over QMP"
    return f"pid {vm.vmm.pid}{named}, {vm.vmm.executable or 'unknown'}, uid {vm.vmm.uid}, {how}"


def _vmm_json(vm: vm_pb2.Vm) -> dict[str, Any] | None:
    if not vm.HasField("vmm"):
        return None
    return {
        "pid": vm.vmm.pid,
        "start_time": vm.vmm.start_time,
        "uid": vm.vmm.uid,
        "executable": vm.vmm.executable or None,
        "vm_fd": vm.vmm.vm_fd if vm.vmm.HasField("vm_fd") else None,
        "name": vm.vmm.name or None,
        "memory_source": _MEMORY_SOURCES.get(vm.vmm.memory_source),
        "access": next((word for word, one in _ACCESSES.items() if one == vm.vmm.access), None),
    }


def _last_write(vm: vm_pb2.Vm) -> str:
    if not vm.HasField("last_write"):
        return ""
    last = vm.last_write
    text = f"{_WRITE_OUTCOMES.get(last.outcome, 'unknown')}, {last.keys_set} keys were set"
    if last.dirty:
        text += "; dirty: " + ", ".join(str(GfnRange(one.start_gfn, one.count)) for one in last.dirty)
    return text + (f"; request {last.request_id}" if last.request_id else "")


def _last_write_json(vm: vm_pb2.Vm) -> dict[str, Any] | None:
    if not vm.HasField("last_write"):
        return None
    last = vm.last_write
    return {
        "outcome": _WRITE_OUTCOMES.get(last.outcome),
        "request_id": last.request_id or None,
        "keys_set": last.keys_set,
        "next_gfn": last.next_gfn if last.outcome == vm_pb2.WRITE_OUTCOME_KEPT else None,
        "dirty": [{"start_gfn": one.start_gfn, "count": one.count} for one in last.dirty],
    }
