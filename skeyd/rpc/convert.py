"""Between the messages of skeyd.v1 and skeyd's own values. Requests are checked here, field by field."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Collection, Iterable
from pathlib import Path

from google.protobuf.duration_pb2 import Duration

from skeyd import limits
from skeyd.encoding import codec
from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, MemorySlot, Ranges
from skeyd.v1 import host_service_pb2, vm_pb2, vm_service_pb2
from skeyd.vms.vm import Vm, VmState
from skeyd.worker.adoption import FD_MAX, HOLD_MAX_MS, PID_MAX, Adoption, Vmm
from skeyd.worker.outcomes import LastWrite
from skeyd.worker.packets import TEXT_MAX, Fields
from skeyd.worker.protocol import VM_ID, SlotSpec, Spec
from skeyd.worker.slots import check_slots
from skeyd.worker.vmm_name import NAME_MAX, is_name

_KINDS = {
    vm_pb2.VM_KIND_OWNED: "owned",
    vm_pb2.VM_KIND_SIMULATED: "simulated",
}
_KINDS_BACK = {**{word: number for number, word in _KINDS.items()}, "adopted": vm_pb2.VM_KIND_ADOPTED}
_BACKINGS = {
    vm_pb2.MEMORY_BACKING_UNSPECIFIED: "anonymous",
    vm_pb2.MEMORY_BACKING_ANONYMOUS: "anonymous",
    vm_pb2.MEMORY_BACKING_MEMFD: "memfd",
    vm_pb2.MEMORY_BACKING_FILE: "file",
    vm_pb2.MEMORY_BACKING_NONE: "none",
}
_BACKINGS_BACK = {
    "anonymous": vm_pb2.MEMORY_BACKING_ANONYMOUS,
    "memfd": vm_pb2.MEMORY_BACKING_MEMFD,
    "file": vm_pb2.MEMORY_BACKING_FILE,
    "none": vm_pb2.MEMORY_BACKING_NONE,
    "vmm": vm_pb2.MEMORY_BACKING_VMM,
}
_SIMULATED_KERNELS = {
    vm_pb2.SIMULATED_KERNEL_UNSPECIFIED: "7.2",
    vm_pb2.SIMULATED_KERNEL_LINUX_4_19: "4.19",
    vm_pb2.SIMULATED_KERNEL_LINUX_7_0: "7.0",
    vm_pb2.SIMULATED_KERNEL_LINUX_7_2: "7.2",
}
_STATES = {
    VmState.CREATING: vm_pb2.VM_STATE_CREATING,
    VmState.READY: vm_pb2.VM_STATE_READY,
    VmState.QUARANTINED: vm_pb2.VM_STATE_QUARANTINED,
    VmState.DEAD: vm_pb2.VM_STATE_DEAD,
}
_OUTCOMES = {
    "applied": vm_pb2.WRITE_OUTCOME_APPLIED,
    "rolling_back": vm_pb2.WRITE_OUTCOME_ROLLING_BACK,
    "rolled_back": vm_pb2.WRITE_OUTCOME_ROLLED_BACK,
    "dirty": vm_pb2.WRITE_OUTCOME_DIRTY,
    "kept": vm_pb2.WRITE_OUTCOME_KEPT,
}
_ACCESSES = {
    vm_pb2.ACCESS_UNSPECIFIED: "",
    vm_pb2.ACCESS_INJECTION: "injection",
    vm_pb2.ACCESS_QMP: "qmp",
}
_ACCESSES_BACK = {word: number for number, word in _ACCESSES.items()}
_MEMORY_SOURCES = {
    "named": vm_pb2.MEMORY_SOURCE_NAMED,
    "qmp": vm_pb2.MEMORY_SOURCE_QMP,
    "probed": vm_pb2.MEMORY_SOURCE_PROBED,
}
_ANSWERS = {
    None: host_service_pb2.ANSWER_UNSPECIFIED,
    True: host_service_pb2.ANSWER_YES,
    False: host_service_pb2.ANSWER_NO,
}

_NAME_MAX = 255
"""Bytes in a file's name, on every file system of Linux."""


def vm_id_of(name: str) -> str:
    """Take "vms/{vm}" apart. VM_ID_INVALID."""
    prefix, _, vm_id = name.partition("/")
    if prefix != "vms" or not VM_ID.fullmatch(vm_id):
        raise SkeydError(Reason.VM_ID_INVALID, f"a VM's name has the form vms/ID, not {name[:80]!r}")
    return vm_id


def spec_of(request: vm_service_pb2.CreateVmRequest, memory_dir: Path | None) -> Spec:
    """Make the spec of a VM to create, with a new uid. VM_ID_INVALID, REQUEST_INVALID, MEMORY_INVALID."""
    _check_id(request.vm_id)
    if request.kind not in _KINDS:
        raise SkeydError(Reason.REQUEST_INVALID, f"kind must be owned or simulated, not {request.kind}")
    if request.simulated_kernel not in _SIMULATED_KERNELS:
        raise SkeydError(Reason.REQUEST_INVALID, f"there is no simulated kernel {request.simulated_kernel}")
    if request.simulated_kernel and request.kind != vm_pb2.VM_KIND_SIMULATED:
        raise SkeydError(Reason.REQUEST_INVALID, "simulated_kernel is for VMs of kind simulated")
    simulated = _KINDS[request.kind] == "simulated"
    slots = tuple(_slot_spec(number, slot, memory_dir, simulated) for number, slot in enumerate(request.memory_slots))
    check_slots(slots)
    return Spec(
        vm_id=request.vm_id,
        uid=str(uuid.uuid4()),
        kind=_KINDS[request.kind],
        slots=slots,
        created=int(time.time()),
        simulated_kernel=_SIMULATED_KERNELS[request.simulated_kernel],
    )


def adoption_spec_of(request: vm_service_pb2.AdoptVmRequest) -> Spec:
    """Make the spec of a VM to adopt, with a new uid. VM_ID_INVALID, REQUEST_INVALID, MEMORY_INVALID."""
    _check_id(request.vm_id)
    qmp_socket, access = _qmp_of(request)
    if bool(request.pid or qmp_socket) == bool(request.name):
        raise SkeydError(
            Reason.REQUEST_INVALID, "a VMM is known by its pid, its QMP socket, or both, or else by its name"
        )
    if request.name and not is_name(request.name):
        raise SkeydError(
            Reason.REQUEST_INVALID, f"name has 1 to {NAME_MAX} printable characters, not {request.name[:80]!r}"
        )
    if not 0 <= request.pid <= PID_MAX:
        raise SkeydError(Reason.REQUEST_INVALID, f"pid is that of a process, not {request.pid}")
    if request.HasField("vm_fd") and request.vm_fd > FD_MAX:
        raise SkeydError(Reason.REQUEST_INVALID, f"vm_fd is a descriptor, not {request.vm_fd}")
    for number, slot in enumerate(request.memory_slots):
        if slot.backing or slot.file:
            raise SkeydError(Reason.REQUEST_INVALID, f"memory slot {number}: the memory is the VMM's; no backing")
    slots = tuple(SlotSpec(slot.guest_phys_addr, slot.memory_size, "vmm") for slot in request.memory_slots)
    if slots:
        check_slots(slots)
    hold_ms = round(limits.DEFAULT_HOLD_SECONDS * 1000)
    if request.HasField("max_hold_time"):
        wanted = request.max_hold_time
        hold_ms = wanted.seconds * 1000 + wanted.nanos // 1_000_000
        if not 0 <= wanted.nanos < 1_000_000_000 or not 1 <= hold_ms <= HOLD_MAX_MS:
            raise SkeydError(Reason.REQUEST_INVALID, f"max_hold_time is 1 to {HOLD_MAX_MS} ms")
    return Spec(
        vm_id=request.vm_id,
        uid=str(uuid.uuid4()),
        kind="adopted",
        slots=slots,
        created=int(time.time()),
        adoption=Adoption(
            request.pid,
            request.start_time,
            request.vm_fd if request.HasField("vm_fd") else -1,
            hold_ms,
            request.name,
            qmp_socket,
            access,
        ),
    )


def _qmp_of(request: vm_service_pb2.AdoptVmRequest) -> tuple[str, str]:
    # The socket of a monitor, if there is to be one, and the way to the keys.
    path = request.qmp_socket
    if path and (not path.startswith("/") or not path.isprintable() or len(path) > TEXT_MAX):
        raise SkeydError(
            Reason.REQUEST_INVALID,
            f"qmp_socket is a printable absolute path of at most {TEXT_MAX} characters, not {path[:80]!r}",
        )
    if request.access not in _ACCESSES:
        raise SkeydError(Reason.REQUEST_INVALID, f"there is no access {request.access}")
    access = _ACCESSES[request.access]
    if access == "qmp" and (not path or request.HasField("vm_fd")):
        raise SkeydError(Reason.REQUEST_INVALID, "access over QMP takes a qmp_socket, and no vm_fd")
    return path, access


def _check_id(vm_id: str) -> None:
    if not VM_ID.fullmatch(vm_id):
        raise SkeydError(
            Reason.VM_ID_INVALID,
            "a VM's id is a lower-case letter and up to 62 lower-case letters, digits and hyphens, no hyphen last, "
            f"not {vm_id[:80]!r}",
        )


def _slot_spec(number: int, slot: vm_service_pb2.MemorySlotSpec, memory_dir: Path | None, simulated: bool) -> SlotSpec:
    if slot.backing not in _BACKINGS:
        raise SkeydError(Reason.REQUEST_INVALID, f"memory slot {number}: there is no backing {slot.backing}")
    backing = "none" if simulated and not slot.backing else _BACKINGS[slot.backing]
    if simulated != (backing == "none"):
        raise SkeydError(
            Reason.REQUEST_INVALID,
            f"memory slot {number}: a simulated VM has no memory, and only it has none; its backing can't be {backing}",
        )
    path = ""
    if backing == "file":
        if memory_dir is None:
            raise SkeydError(
                Reason.MEMORY_FILE_UNUSABLE,
                f"memory slot {number}: files are off; the daemon was started without --memory-dir",
            )
        name = slot.file
        if name in ("", ".", "..") or os.sep in name or not name.isprintable() or len(name.encode()) > _NAME_MAX:
            raise SkeydError(
                Reason.REQUEST_INVALID,
                f"memory slot {number}: file is a printable name in the daemon's --memory-dir, not {name[:80]!r}",
            )
        path = str(memory_dir / name)
    elif slot.file:
        raise SkeydError(Reason.REQUEST_INVALID, f"memory slot {number}: file is for MEMORY_BACKING_FILE")
    return SlotSpec(slot.guest_phys_addr, slot.memory_size, backing, path)


def ranges_of(messages: Collection[vm_pb2.GfnRange]) -> Ranges:
    """Check the ranges of a request. RANGE_EMPTY, RANGE_OVERFLOW, RANGES_NOT_ASCENDING, REQUEST_INVALID."""
    # Counted first: a message of 4 MiB holds a million, and an object for each would take a hundred.
    if len(messages) > limits.MAX_RANGES:
        raise SkeydError(
            Reason.REQUEST_INVALID,
            f"{len(messages)} ranges are more than {limits.MAX_RANGES}; ask in several calls",
        )
    return Ranges(GfnRange(one.start_gfn, one.count) for one in messages)


def chunk_keys_of(max_chunk_keys: int) -> int:
    """Check the chunk size of a request. REQUEST_INVALID."""
    if max_chunk_keys > limits.MAX_CHUNK_KEYS:
        raise SkeydError(
            Reason.REQUEST_INVALID, f"max_chunk_keys is at most {limits.MAX_CHUNK_KEYS}, not {max_chunk_keys}"
        )
    return max_chunk_keys or limits.DEFAULT_CHUNK_KEYS


def encodings_of(offered: Iterable[int]) -> tuple[int, ...]:
    """Return the encodings that a client offered and that are known here, ENCODING_RAW always. REQUEST_INVALID."""
    wanted = {codec.RAW, *offered}
    if 0 in wanted:
        raise SkeydError(Reason.REQUEST_INVALID, "encodings has ENCODING_UNSPECIFIED, which is none")
    return tuple(one for one in codec.KNOWN if one in wanted)


def slice_seconds_of(duration: Duration | None) -> float:
    """Return how long an ioctl may take, for a request that says so or doesn't. REQUEST_INVALID."""
    if duration is None:
        return limits.DEFAULT_SLICE_SECONDS
    # As google.protobuf.Duration is defined; only what is over 0 is of use.
    if duration.seconds < 0 or not 0 <= duration.nanos < 1_000_000_000 or not (duration.seconds or duration.nanos):
        raise SkeydError(
            Reason.REQUEST_INVALID,
            f"max_slice_time is a time over 0, not {duration.seconds} s and {duration.nanos} ns",
        )
    return min(duration.seconds + duration.nanos / 1e9, limits.MAX_SLICE_SECONDS)


def duration_message(seconds: float) -> Duration:
    """Write a time of less than some days down."""
    whole, nanos = divmod(round(seconds * 1e9), 1_000_000_000)
    return Duration(seconds=whole, nanos=nanos)


def range_message(frames: GfnRange) -> vm_pb2.GfnRange:
    """Write a range down."""
    return vm_pb2.GfnRange(start_gfn=frames.start, count=frames.count)


def slot_message(slot: MemorySlot) -> vm_pb2.MemorySlot:
    """Write a memory slot down."""
    return vm_pb2.MemorySlot(
        slot=slot.slot,
        start_gfn=slot.frames.start,
        count=slot.frames.count,
        backing=_BACKINGS_BACK[slot.backing],
    )


def kind_message(kind: str) -> vm_pb2.VmKind.ValueType:
    """Write a kind down."""
    return _KINDS_BACK.get(kind, vm_pb2.VM_KIND_UNSPECIFIED)


def vm_message(vm: Vm) -> vm_pb2.Vm:
    """Write a VM down."""
    message = vm_pb2.Vm(
        name=f"vms/{vm.vm_id}",
        uid=vm.uid,
        incarnation=vm.incarnation,
        kind=kind_message(vm.kind),
        state=_STATES[vm.state],
        state_reason=vm.state_reason,
        memory_slots=[slot_message(slot) for slot in vm.slots],
        uses_storage_keys=vm.uses_keys,
        kernel=vm.kernel,
        worker_version=vm.worker_version,
        worker_pid=vm.worker_pid,
    )
    if vm.created:
        message.create_time.seconds = vm.created
    if vm.vmm is not None:
        message.vmm.CopyFrom(_vmm_message(vm.vmm))
    if vm.last_write is not None:
        message.last_write.CopyFrom(_last_write_message(vm.last_write))
    return message


def _vmm_message(vmm: Vmm) -> vm_pb2.Vmm:
    return vm_pb2.Vmm(
        pid=vmm.pid,
        start_time=vmm.start_time,
        uid=vmm.uid,
        executable=vmm.executable,
        vm_fd=None if vmm.fd < 0 else vmm.fd,
        name=vmm.name,
        memory_source=_MEMORY_SOURCES[vmm.memory_source],
        access=_ACCESSES_BACK[vmm.access],
    )


def _last_write_message(last: LastWrite) -> vm_pb2.LastWrite:
    return vm_pb2.LastWrite(
        request_id=last.request_id,
        outcome=_OUTCOMES[last.outcome],
        next_gfn=last.end if last.outcome == "kept" else 0,
        keys_set=last.keys_set,
        dirty=[range_message(one) for one in last.dirty],
    )


def answer_of(fields: Fields, name: str) -> host_service_pb2.Answer.ValueType:
    """Take a yes, no or don't know from a worker's report."""
    return _ANSWERS[fields.boolean(name) if fields.has(name) else None]
