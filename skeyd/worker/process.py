"""The life of a worker process: lock, VM, socket, ready, serve, end."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Final, NamedTuple

import skeyd
from skeyd.capabilities import CAP_SYS_PTRACE, give_up
from skeyd.errors import Reason, SkeydError, exhausted
from skeyd.kvm.probe import probe_host
from skeyd.linux import open_unnamed, signals_by_socket, take_lock
from skeyd.worker.adoption import Vmm
from skeyd.worker.backend import Backend, Printing
from skeyd.worker.channel import address_in
from skeyd.worker.owned import OwnedVm
from skeyd.worker.packets import MESSAGE_MAX, ProtocolError, decode, error_message
from skeyd.worker.protocol import LOCK, SOCKET, Hello, Spec
from skeyd.worker.service import HasFileno, Service
from skeyd.worker.simulated import SimulatedVm
from skeyd.worker.worker_log import log_traceback

_BACKLOG: Final = 64


class _Vm(NamedTuple):
    backend: Backend
    ends: list[HasFileno] = []  # noqa: RUF012  nobody changes it
    """What becomes readable once the VM has ended by itself."""
    release: Callable[[], None] | None = None
    """What is to be done before its worker may end."""
    vmm: Vmm | None = None
    print_keys: Callable[[float], Printing] | None = None
    """How all of its keys are read at once, where that is the way to them."""


def serve_vm(directory_fd: int) -> int:
    """Make the VM whose Spec is on standard input and serve it from a directory. Returns the exit status.

    Says {"ok": {}} or an error on standard output, once. After that the standard streams are no concern of its own:
    whoever started it may be gone.
    """
    with ExitStack() as resources:
        try:
            service, wake, ends = _prepare(directory_fd, resources)
        except SkeydError as error:
            _say(error_message(error))
            return 1
        except Exception as error:
            short = exhausted(error) if isinstance(error, OSError) else None
            if short is not None:
                _say(error_message(short))
                return 1
            log_traceback()
            _say(error_message(SkeydError(Reason.WORKER_FAILED, f"the worker failed to start: {error!r}")))
            return 1
        _say({"ok": {}})
        service.run(wake, ends)
    return 0


def report_host() -> int:
    """Say on standard output what this host can do; for HostService, whose process may not open /dev/kvm."""
    give_up(CAP_SYS_PTRACE)
    report = probe_host()
    _say(
        {
            "ok": {
                "can_own_vms": report.can_own_vms,
                "findings": [
                    {"name": one.name, "answer": one.answer, "detail": one.detail, "remedy": one.remedy}
                    for one in report.findings
                ],
            }
        }
    )
    return 0


def report_candidates() -> int:
    """Say on standard output which processes hold VMs, as skeyd.worker.candidates has it: the front may see none."""
    # Here, so that VMs' workers don't pay for what they never use.
    from skeyd.worker.vmm_search import find_candidates

    _say({"ok": find_candidates().to_message()})
    return 0


def _prepare(directory_fd: int, resources: ExitStack) -> tuple[Service, HasFileno, list[HasFileno]]:
    try:
        spec = Spec.from_message(decode(sys.stdin.buffer.read(MESSAGE_MAX + 1), "the spec"))
    except ProtocolError as error:
        raise SkeydError(Reason.WORKER_FAILED, str(error)) from error
    if spec.adoption is None:
        give_up(CAP_SYS_PTRACE)
    # The lock says "alive" from here to the end of the process, however it ends: it is never unlocked or closed.
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=directory_fd)
    if not take_lock(lock):
        raise SkeydError(Reason.VM_EXISTS, f"another worker serves {spec.vm_id}")
    # SIGTERM (systemd's stop) ends the worker in order; a terminal's signals are meant for the front.
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    wake, _ = resources.enter_context(signals_by_socket([signal.SIGTERM]))
    vm = _vm(spec)
    resources.callback(vm.backend.close)
    if vm.print_keys is not None:
        # It traces nobody, and what QEMU prints is a stranger's words. Up to here it took the right to see whose it is.
        give_up(CAP_SYS_PTRACE)
    hello = Hello(
        vm_id=spec.vm_id,
        uid=spec.uid,
        incarnation=os.urandom(16).hex(),
        kind=spec.kind,
        kernel=vm.backend.kernel,
        version=skeyd.__version__,
        pid=os.getpid(),
        created=spec.created,
        slots=vm.backend.memory_map.slots,
        keyop=vm.backend.has_keyop,
        vmm=vm.vmm,
        freezes=vm.print_keys is None,
    )
    listener = resources.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    listener.bind(address_in(directory_fd, SOCKET))
    listener.listen(_BACKLOG)
    journal = partial(open_unnamed, directory_fd)
    return Service(listener, hello, vm.backend, journal, vm.release, vm.print_keys), wake, vm.ends


def _vm(spec: Spec) -> _Vm:
    match spec.kind:
        case "owned":
            return _Vm(OwnedVm(spec))
        case "adopted":
            # Here, so that other kinds' workers don't pay for what they never use.
            from skeyd.worker.adopting import adopt

            vm = adopt(spec)
            return _Vm(vm, [vm], vm.release, vm.vmm, vm.print_keys)
    return _Vm(SimulatedVm(spec))


def _say(message: dict[str, Any]) -> None:
    try:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()
    except OSError:
        pass  # nobody listens any more; the VM is found again by its directory
    finally:
        # Keep number 1 taken, but by nothing that blocks or breaks.
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
