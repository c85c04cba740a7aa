"""VMs to look at: real workers to be killed and stopped, locks that are held, and what is asked of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.vms import registry as registry_module
from skeyd.vms import session as session_module
from skeyd.vms.registry import Registry
from skeyd.vms.vm import Vm
from skeyd.worker.protocol import LOCK
from tests.processes import wait_for_end

OTHER_UID = "11111111-2222-3333-4444-555555555555"
STATUS = ("status", {"ok": {"uses_keys": False}})

_LOCKER = """
import os, sys
from skeyd.linux import take_lock
print(take_lock(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)), flush=True)
sys.stdin.read()
"""


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (session_module, registry_module):
        monkeypatch.setattr(module, "WORKER_HELLO_SECONDS", 0.05)


@contextmanager
def held_lock(directory: Path) -> Iterator[None]:
    # A worker that lives, as far as its lock says. Locks are a process's.
    with subprocess.Popen(
        [sys.executable, "-c", _LOCKER, str(directory / LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        yield
        process.kill()


def kill_worker(vm: Vm) -> None:
    pidfd = os.pidfd_open(vm.worker_pid)
    try:
        os.kill(vm.worker_pid, signal.SIGKILL)
        wait_for_end(pidfd)
    finally:
        os.close(pidfd)


def stop_worker(vm: Vm) -> None:
    os.kill(vm.worker_pid, signal.SIGSTOP)
    os.waitid(os.P_PID, vm.worker_pid, os.WSTOPPED | os.WNOWAIT)


def require_refusal(reason: Reason, use: Callable[[], object]) -> SkeydError:
    with pytest.raises(SkeydError) as refused:
        use()
    assert refused.value.reason is reason, refused.value
    return refused.value


def talk(registry: Registry, vm_id: str = "web") -> bool:
    with registry.session(vm_id) as session:
        return session.uses_keys()


def write_key(registry: Registry, vm_id: str = "web") -> None:
    with registry.writing(vm_id) as session:
        session.write_slice(GfnRange(0, 1), b"\x30", allow_enable=True)
