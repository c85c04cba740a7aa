"""The processes of this host that hold KVM VMs, found in /proc and not touched: nothing is stopped or traced.

A process is one pid and one start time: what was read of another that got its number meanwhile is thrown away. Whatever
a process can choose itself (its command line, its file's name, how many descriptors it has) is bounded or checked.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterator
from typing import Final

from skeyd.errors import Reason, SkeydError
from skeyd.injection import proc
from skeyd.injection.machine import this_machine
from skeyd.injection.target import VCPU_LINK, VM_LINK
from skeyd.injection.tracee import why_not_allowed
from skeyd.worker.candidates import CANDIDATES_BYTES, CANDIDATES_MAX, FDS_MAX, Candidate, Found
from skeyd.worker.packets import printable
from skeyd.worker.protocol import is_skeyd_worker
from skeyd.worker.vmm_name import name_of
from skeyd.worker.vmm_refusals import TRACE_REMEDY

SECONDS: Final = 20.0
"""For one search: less than a front waits for it."""
DESCRIPTORS_MAX: Final = 65_536
"""Most descriptors of a process that are looked at; a QEMU has some hundreds."""
_THREADS_MAX: Final = 1024
"""Most threads of a process that are asked who traces them."""
_TOLD_MAX: Final = 16
"""Most pids that an error names."""
_MARGIN: Final = 1024
"""Bytes of an answer that are no candidates."""

_KERNEL_THREAD: Final = 0x00200000
"""PF_KTHREAD, include/linux/sched.h @ v6.12: it has no descriptors, and nobody but root may know."""
_PAGE_SIZE: Final = (6, 4096)
"""AT_PAGESZ of an auxiliary vector, include/uapi/linux/auxvec.h @ v6.12."""
_PAIR: Final = struct.Struct("=QQ")


class _TooManyError(Exception):
    """A process has more descriptors than are looked at."""


def find_candidates(seconds: float = SECONDS) -> Found:
    """Look at every process there is, for so long."""
    until = time.monotonic() + seconds
    candidates: list[Candidate] = []
    unreadable = left_out = workers = 0
    room = CANDIDATES_BYTES - _MARGIN
    for pid, start_time in _processes():
        if time.monotonic() > until:
            left_out += 1
            continue
        try:
            links = _links(pid)
            vms = sorted(fd for fd, link in links.items() if link == VM_LINK)
            if not vms:
                continue
            if is_skeyd_worker(links.values()):
                workers += _is_still(pid, start_time)
                continue
            candidate = _candidate(pid, start_time, vms, links)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        except PermissionError:
            unreadable += 1
            continue
        except _TooManyError:
            left_out += 1
            continue
        if not _is_still(pid, start_time):
            continue
        # With what a list puts between two.
        size = len(json.dumps(candidate.to_message())) + 2
        if len(candidates) < CANDIDATES_MAX and size <= room:
            candidates.append(candidate)
            room -= size
        else:
            left_out += 1
    return Found(tuple(candidates), unreadable, left_out, workers)


def only_one_named(name: str, seconds: float = SECONDS) -> tuple[int, int]:
    """Return pid and start time (clock ticks since boot) of the one process that has a VM and says it is named so.

    SkeydError VMM_NOT_FOUND: there is none, or several, which the error lists, or no time to look at all there are. One
    whose descriptors can't be read counts as well: it may be the one that was meant.
    """
    until = time.monotonic() + seconds
    found: list[tuple[int, int]] = []
    for pid, start_time in _processes():
        if time.monotonic() > until:
            raise SkeydError(Reason.VMM_NOT_FOUND, f"there are more processes than could be looked at in {seconds:g} s")
        try:
            if name_of(pid) != name:
                continue
            may_be_it = VM_LINK in _links(pid).values()
        except (FileNotFoundError, ProcessLookupError):
            continue
        except (PermissionError, _TooManyError):
            may_be_it = True
        if may_be_it and _is_still(pid, start_time):
            found.append((pid, start_time))
    if len(found) == 1:
        return found[0]
    where = {"vmm_name": name}
    if not found:
        raise SkeydError(Reason.VMM_NOT_FOUND, f"no process that has a VM is named {name!r}", where)
    pids = [str(pid) for pid, _ in found]
    listed = ", ".join(pids[:_TOLD_MAX]) + (", …" if len(pids) > _TOLD_MAX else "")
    raise SkeydError(
        Reason.VMM_NOT_FOUND,
        f"{len(pids)} processes are named {name!r}, and it could be any: {listed}; name a pid",
        {**where, "vmm_pids": listed},
    )


def _processes() -> Iterator[tuple[int, int]]:
    # Pids and start times of those that live and may have descriptors, in order of pid.
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        fields = _stat(pid)
        if fields and fields[0] not in "ZX" and not int(fields[6]) & _KERNEL_THREAD:
            yield pid, int(fields[19])


def _stat(pid: int) -> list[str]:
    # /proc/PID/stat from the state on; empty where there is no such process.
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _is_still(pid: int, start_time: int) -> bool:
    fields = _stat(pid)
    return bool(fields) and int(fields[19]) == start_time


def _links(pid: int) -> dict[int, str]:
    found: dict[int, str] = {}
    # Not listed first: there may be millions.
    with os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            if len(found) >= DESCRIPTORS_MAX:
                raise _TooManyError
            try:
                found[int(entry.name)] = os.readlink(entry.path)
            except FileNotFoundError:
                continue  # closed meanwhile
    return found


def _candidate(pid: int, start_time: int, vms: list[int], links: dict[int, str]) -> Candidate:
    status = proc.status(pid, pid)
    if not status:
        raise ProcessLookupError
    refusal, detail = _refusal(pid)
    return Candidate(
        pid=pid,
        start_time=start_time,
        uid=os.stat(f"/proc/{pid}").st_uid,
        executable=printable(os.readlink(f"/proc/{pid}/exe")),
        name=name_of(pid),
        vm_fds=tuple(vms[:FDS_MAX]),
        vcpus=sum(link.startswith(VCPU_LINK) for link in links.values()),
        mapped=_bytes(status, "VmSize"),
        resident=_bytes(status, "VmRSS"),
        refusal=refusal.name if refusal else "",
        refusal_detail=printable(detail),
    )


def _bytes(status: dict[str, str], name: str) -> int:
    # "1234 kB", where a kB has 1,024 bytes; a process that is about to end has none.
    return int(status.get(name, "0 kB").split()[0]) * 1024


def _refusal(pid: int) -> tuple[Reason | None, str]:
    # What AdoptVm would say, as far as it can be known from outside. A sandbox is known when it refuses something only.
    machine = this_machine()
    if machine is None:
        return Reason.VMM_UNSUITABLE, f"skeyd can't have processes make calls on {os.uname().machine}"
    why = machine.why_not(pid)
    if why is None and not _is_plain_64_bit(pid):
        why = "it is no 64-bit process with pages of 4 KiB"
    if why is not None:
        return Reason.VMM_UNSUITABLE, f"process {pid} can't be made to call without harm: {why}"
    for tid in proc.threads(pid)[:_THREADS_MAX]:
        tracer = proc.status(pid, tid).get("TracerPid", "0")
        if tracer != "0":
            return Reason.VMM_TRACED, f"{tid} is traced by process {tracer}"
    if not _may_trace(pid):
        return Reason.VMM_NOT_TRACEABLE, f"{why_not_allowed(pid)}; {TRACE_REMEDY}"
    return None, ""


def _is_plain_64_bit(pid: int) -> bool:
    # By its auxiliary vector and not by its program, which may lie on any file system.
    with open(f"/proc/{pid}/auxv", "rb") as file:
        return _is_plain_vector(file.read(8192))


def _is_plain_vector(vector: bytes) -> bool:
    # That of a 32-bit process has pairs of half the size.
    return _PAGE_SIZE in _PAIR.iter_unpack(vector[: len(vector) // _PAIR.size * _PAIR.size])


def _may_trace(pid: int) -> bool:
    # For this file the kernel asks what it asks of who attaches (PTRACE_MODE_ATTACH, lock_trace() in fs/proc/base.c @
    # v6.12), Yama included, and it does nothing to the process.
    try:
        with open(f"/proc/{pid}/personality", "rb") as file:
            file.read()
    except PermissionError:
        return False
    return True
