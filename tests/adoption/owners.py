"""Processes that have KVM VMs without memory, for who looks for such."""

from __future__ import annotations

import os
import sys
from typing import Final

from tests.injection.victims import Victim, cannot

_OWNER: Final = """
import fcntl, os, sys, threading
kvm = os.open("/dev/kvm", os.O_RDWR)
vms = [fcntl.ioctl(kvm, 0xAE01, 0) for _ in range(int(sys.argv[1]))]
vcpus = [fcntl.ioctl(vms[0], 0xAE41, number) for number in range(int(sys.argv[2]))]
counters = [fcntl.ioctl(vcpu, 0xAECE, 0) for vcpu in vcpus]
lock = sys.argv[3] and os.open(sys.argv[3], os.O_RDWR | os.O_CREAT)
threading.Thread(target=threading.Event().wait, daemon=True).start()
print("ready", flush=True)
for _ in sys.stdin: print("pong", len(vms), flush=True)
"""


def owner(vms: int = 1, *arguments: str | bytes, vcpus: int = 0, lock: str = "") -> Victim:
    """Make a process with so many VMs, from descriptor 4 on, and two threads.

    `vcpus` of the first VM, with a descriptor of each one's counters (KVM_GET_STATS_FD, Linux 5.14); `lock`: a file
    that it has open; more arguments, which it doesn't look at. Skips or fails where there is no KVM.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        cannot("/dev/kvm is missing, or not for this user")
    more = [one.decode(errors="surrogateescape") if isinstance(one, bytes) else one for one in arguments]
    return Victim(command=[sys.executable, "-c", _OWNER, str(vms), str(vcpus), lock, *more])
