"""What a VMM says of itself over QMP, and whether the monitor is its own.

The kernel says who called listen on a monitor's socket last (SO_PEERCRED). A QEMU that gets a listening socket, as
libvirt gives it one, calls listen again (seen with 7.2), so that it is QEMU then too. Whoever else listens there is
found out where no pid is named: the CPU threads that the monitor names must be those of the process that listens. Where
a pid is, it may be anybody who knows that process's threads, which are public: who may write into the socket's folder
must be trusted.
"""

from __future__ import annotations

import os
from typing import Any, Final

from skeyd.errors import Reason, SkeydError
from skeyd.injection import proc
from skeyd.injection.errors import GoneError
from skeyd.qmp.monitor import Monitor
from skeyd.storage_key import GFN_LIMIT
from skeyd.worker.adoption import PID_MAX
from skeyd.worker.packets import Fields, printable
from skeyd.worker.protocol import SlotSpec
from skeyd.worker.slots import check_slots
from skeyd.worker.vmm_name import name_of

MACHINE: Final = "s390-ccw-virtio"
"""What the types of its machines begin with: s390-ccw-virtio-7.2-machine."""

_CPUS_MAX: Final = 1024
_DEVICES_MAX: Final = 1024


def process_of(monitor: Monitor, pid: int, start_time: int) -> tuple[int, int]:
    """Return the process whose monitor it is and when it was started, in clock ticks since boot. VMM_NOT_FOUND.

    It is `pid`, or for 0 the one that listens; with a `start_time` that isn't 0 it must be its.
    """
    wanted = pid or monitor.peer.pid
    if not wanted:
        raise _not_found(0, "the process that listens at the QMP socket is in another PID namespace; name its pid")
    try:
        # Before its threads are looked at: a later process of this number has another.
        started = proc.start_time(wanted)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise _not_found(wanted, f"there is no process {wanted}") from error
    except PermissionError as error:
        raise _not_found(wanted, f"process {wanted} can't be looked at") from error
    if start_time not in (0, started):
        raise _not_found(wanted, f"process {wanted} was started at {started}, and not at {start_time}")
    missing = missing_threads(monitor, wanted)
    if missing:
        what = f"the CPU threads that the QMP monitor tells of ({min(missing)} for one) are not of process {wanted}"
        if not pid:
            what += ", which listens at its socket: if it does for another, name that one's pid too"
        raise _not_found(wanted, what)
    return wanted, started


def looks_of(pid: int) -> tuple[int, str, str]:
    """Return a process's uid, its program, "" where that can't be known, and its guest's name. VMM_NOT_FOUND."""
    try:
        uid, name = os.stat(f"/proc/{pid}").st_uid, name_of(pid)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise _not_found(pid, f"process {pid} has ended") from error
    try:
        executable = os.readlink(f"/proc/{pid}/exe")
    except OSError:
        executable = ""
    return uid, printable(executable), name


def missing_threads(monitor: Monitor, pid: int) -> set[int]:
    """Return the CPU threads that a monitor names and a process doesn't have; none: it is the monitor's own."""
    threads = {one.integer("thread-id", 1, PID_MAX) for one in _objects(monitor, "query-cpus-fast", _CPUS_MAX)}
    if not threads:
        raise _not_found(pid, "the QMP monitor tells of no CPU, and so of no process")
    # The numbers are those of the process's own PID namespace, which most often is this one.
    if all(os.access(f"/proc/{pid}/task/{tid}", os.F_OK) for tid in threads):
        return set()
    try:
        own = {proc.status(pid, tid).get("NSpid", "0").split()[-1] for tid in proc.threads(pid)}
    except GoneError as error:
        raise _not_found(pid, str(error)) from error
    return {tid for tid in threads if str(tid) not in own}


def memory_slots(monitor: Monitor) -> tuple[SlotSpec, ...]:
    """Return where the guest has memory, if that can be told exactly. VMM_UNSUITABLE.

    A machine s390-ccw-virtio has its RAM from 0 on in one piece (hw/s390x/s390-virtio-ccw.c, s390_memory_init; seen
    with 7.2 in `info mtree -f`). Memory devices (virtio-mem, since 10.0), all else that has keys, come and go.
    """
    machine = monitor.execute("qom-get", {"path": "/machine", "property": "type"})
    if not isinstance(machine, str) or not machine.startswith(MACHINE):
        raise _unsuitable("only machines s390-ccw-virtio have memory of which QMP says where it is")
    summary = Fields(monitor.execute("query-memory-size-summary"), "query-memory-size-summary")
    plugged = summary.integer("plugged-memory", 0, GFN_LIMIT) if summary.has("plugged-memory") else 0
    if plugged or _objects(monitor, "query-memory-devices", _DEVICES_MAX):
        raise _unsuitable("the guest has memory devices (virtio-mem), which change as it runs: name the memory slots")
    slots = (SlotSpec(0, summary.integer("base-memory", 1, GFN_LIMIT - 1), "vmm"),)
    try:
        check_slots(slots)
    except SkeydError as error:
        raise _unsuitable(f"the memory that it tells of can't be: {error.message}") from error
    return slots


def has_kvm(monitor: Monitor) -> bool:
    """Whether the guest runs in KVM."""
    return Fields(monitor.execute("query-kvm"), "query-kvm").boolean("enabled")


def _objects(monitor: Monitor, command: str, most: int) -> list[Fields]:
    answer: Any = {"return": monitor.execute(command)}
    return Fields(answer, command).objects("return", most)


def _not_found(pid: int, what: str) -> SkeydError:
    return SkeydError(Reason.VMM_NOT_FOUND, what, {"vmm_pid": str(pid)} if pid else {})


def _unsuitable(what: str) -> SkeydError:
    return SkeydError(Reason.VMM_UNSUITABLE, f"its memory slots are not known from QMP: {what}")
