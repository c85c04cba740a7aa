"""What this host can do, asked of the kernel: yes, no, or don't know. Never guessed from a version."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from skeyd.kvm import abi
from skeyd.kvm.errors import KvmError
from skeyd.kvm.system import DEVICE, Kvm

SYSCTL_PGSTE: Final = "/proc/sys/vm/allocate_pgste"
"""Exists on s390x up to Linux 6.19; 1 gives PGSTE page tables to every process started from then on."""

PGSTE_REMEDY: Final = (
    "set the sysctl vm.allocate_pgste=1, which every program started from then on pays for with memory, "
    "or start skeyd with --worker-launcher=/usr/libexec/skeyd/skeyd-pgste, "
    "a program linked with --s390-pgste that workers are started through"
)
"""Both count for workers that are started afterwards. A test holds the path to that of skeyd.vms.launcher."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    answer: bool | None
    """None: don't know."""
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class HostReport:
    """All that was looked at, and what it comes to."""

    can_own_vms: bool | None
    """Whether owned VMs can be created here; None: don't know."""
    findings: tuple[Finding, ...]


def probe_host(open_kvm: Callable[[], Kvm] = Kvm, machine: str | None = None) -> HostReport:
    """Look at /dev/kvm, the capabilities and PGSTE. Creates a VM for a moment where that is the only way to know."""
    machine = machine or os.uname().machine
    try:
        kvm = open_kvm()
    except (OSError, KvmError) as error:
        device = Finding("kvm_device", *_why_not_open(error))
        unknown = "not asked: the KVM device could not be used"
        findings = [device] + [Finding(name, None, unknown) for name in ("cap_s390_skeys", "cap_s390_keyop", "pgste")]
        return HostReport(_all([finding.answer for finding in findings[:2]]), tuple(findings))
    with kvm:
        skeys = _capability(
            kvm,
            "cap_s390_skeys",
            abi.KVM_CAP_S390_SKEYS,
            "use an IBM Z or LinuxONE host; elsewhere VMs can only be simulated",
        )
        keyop = _capability(kvm, "cap_s390_keyop", abi.KVM_CAP_S390_KEYOP, "")
        pgste = _pgste(kvm) if skeys.answer else _no_pgste_needed(machine)
        device = Finding("kvm_device", True, f"{DEVICE} can be used")
    return HostReport(
        _all([device.answer, skeys.answer, pgste.answer]),
        (device, skeys, keyop, pgste),
    )


def _all(answers: list[bool | None]) -> bool | None:
    if False in answers:
        return False
    return None if None in answers else True


def _why_not_open(error: OSError | KvmError) -> tuple[bool | None, str, str]:
    if isinstance(error, KvmError):
        return False, f"{DEVICE}: {error}", "check that it is the kernel's KVM device"
    match error.errno:
        case errno.ENOENT | errno.ENODEV | errno.ENXIO:
            return False, f"{DEVICE}: {error.strerror}", "load KVM (modprobe kvm) on a host that has it"
        case errno.EACCES | errno.EPERM:
            return None, f"{DEVICE}: {error.strerror}", "let the workers' user use it (group kvm)"
    return None, f"{DEVICE}: {error.strerror}", ""


def _capability(kvm: Kvm, name: str, number: int, remedy: str) -> Finding:
    try:
        answer = kvm.check_extension(number)
    except KvmError as error:
        return Finding(name, None, str(error))
    if answer:
        return Finding(name, True, f"capability {number} is {answer}")
    return Finding(name, False, f"capability {number} is 0", remedy)


def _no_pgste_needed(machine: str) -> Finding:
    return Finding("pgste", None, f"not asked: {machine} without the storage-key calls")


def _pgste(kvm: Kvm) -> Finding:
    # Whether a VM can be created is the only answer that counts: the property may come from the sysctl, from a
    # launcher or from a parent, and since Linux 7.0 it is not needed.
    sysctl = _read_sysctl()
    try:
        kvm.create_vm().close()
    except KvmError as error:
        if error.errno == errno.EINVAL:
            return Finding("pgste", False, f"{error}; vm.allocate_pgste is {sysctl}", PGSTE_REMEDY)
        return Finding("pgste", None, str(error))
    how = ", so this process has its page tables from its launcher or from the daemon" if sysctl == "0" else ""
    return Finding("pgste", True, f"a VM can be created; vm.allocate_pgste is {sysctl}{how}")


def _read_sysctl() -> str:
    try:
        with open(SYSCTL_PGSTE, encoding="ascii") as file:  # noqa: PTH123  pathlib would double the worker's start
            return file.read().strip()
    except FileNotFoundError:
        return "not there (Linux 7.0 and later need none)"
    except OSError as error:
        return f"unreadable ({error.strerror})"
