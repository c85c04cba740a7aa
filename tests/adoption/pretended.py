"""A worker that says it serves an adopted VM, and whose, over a simulated one: adopted VMs without storage keys."""

from __future__ import annotations

import json
import os
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Final

from skeyd.vms.runtime import VmDirectory
from skeyd.worker.adoption import Adoption, Vmm
from skeyd.worker.protocol import SlotSpec, Spec
from tests.injection.victims import Victim

MIB: Final = 1 << 20
_WORKER: Final = """
import json, os, socket, sys
from dataclasses import replace
from functools import partial
from skeyd.errors import Reason, SkeydError
from skeyd.linux import open_unnamed, take_lock
from skeyd.worker.channel import address_in
from skeyd.worker.packets import decode
from skeyd.worker.protocol import LOCK, SOCKET, Hello, Spec
from skeyd.worker.service import Service
from skeyd.worker.simulated import SimulatedVm

directory = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)
spec = Spec.from_message(decode(sys.argv[2].encode(), "the spec"))
lock = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o600, dir_fd=directory)
assert take_lock(lock)
vm = SimulatedVm(replace(spec, kind="simulated"))
hello = Hello(spec.vm_id, spec.uid, os.urandom(16).hex(), "adopted", "7.2", "0", os.getpid(), spec.created,
              vm.memory_map.slots, vm.has_keyop, spec.vmm)
def release():
    if sys.argv[3]:
        raise SkeydError(Reason[sys.argv[3]], "not now")
stop, _never = socket.socketpair()
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
    listener.bind(address_in(directory, SOCKET))
    listener.listen(64)
    print("ready", flush=True)
    Service(listener, hello, vm, partial(open_unnamed, directory), release).run(stop)
"""


def spec_of(vm_id: str, vmm: Vmm | None = None) -> Spec:
    """Make the spec of an adopted VM with a slot of 1 MiB."""
    return Spec(
        vm_id,
        str(uuid.uuid4()),
        "adopted",
        (SlotSpec(0, MIB, "vmm"),),
        1_700_000_000,
        adoption=Adoption(4711, 0, -1, 1000),
        vmm=vmm,
    )


def worker_of(directory: Path, spec: Spec, vmm: Vmm, refusal: str = "") -> Victim:
    """Make the worker of a VM's directory. `refusal`: the name of the Reason for which it lets nobody go."""
    message = json.dumps(replace(spec, vmm=vmm).to_message())
    return Victim(command=[sys.executable, "-c", _WORKER, str(directory), message, refusal])


def adopted(runtime_dir: Path, vm_id: str, vmm: Vmm, refusal: str = "") -> Victim:
    """Make an adopted VM in the runtime directory of a daemon that runs, and its worker."""
    path = runtime_dir / "vms" / vm_id
    path.mkdir(mode=0o700)
    spec = spec_of(vm_id, vmm)
    directory = VmDirectory(vm_id, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    try:
        directory.write_record(spec)
    finally:
        directory.close()
    return worker_of(path, spec, vmm, refusal)
