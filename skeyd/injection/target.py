"""A process that is to make calls: which one it is for certain, its threads, and the VMs that it holds."""

from __future__ import annotations

import os
import re
import select
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from skeyd.injection import proc
from skeyd.injection.errors import AlreadyTracedError, GoneError, UnsupportedError
from skeyd.injection.machine import Machine, this_machine
from skeyd.injection.memory import Memory

VM_LINK: Final = "anon_inode:kvm-vm"
VCPU_LINK: Final = "anon_inode:kvm-vcpu:"
"""A number follows. "kvm-vcpu-stats:" is a vCPU's counters, which later QEMUs have open, and 7.2 has not (seen)."""
_KVM_RUN: Final = 0xAE80
"""_IO(KVMIO, 0x80): what a vCPU thread is in while its guest runs."""
_VCPU_NAME: Final = re.compile(r"CPU \d+/KVM")
"""What QEMU calls them, where it names its threads."""


@dataclass(frozen=True, slots=True)
class Thread:
    """A thread of a process."""

    tid: int
    name: str
    is_vcpu: bool
    """Whether it is known to run a guest's CPU. False is no proof that it isn't, but of a process's first thread."""


class Target:
    """A running process, told apart from a later one of the same number by its pidfd, which `close` gives back.

    GoneError where there is none; UnsupportedError where there is no way without harm on this machine or for it.
    """

    def __init__(self, pid: int) -> None:
        try:
            self._pidfd: int | None = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise GoneError(pid, f"there is no process {pid}") from error
        self.pid = pid
        self._memory: Memory | None = None
        self.stub_is_ours = False
        """Whether the stub is there since this one had it written: no tracer before it has left a thread in it."""
        try:
            self.machine = _machine(pid)
            self.name = proc.status(pid, pid).get("Name", "")
            self.start_time = proc.start_time(pid)
            """The start time is in clock ticks since boot, as /proc/PID/stat has it."""
            self.uid = os.stat(f"/proc/{pid}").st_uid
            try:
                self.executable = os.readlink(f"/proc/{pid}/exe")
            except PermissionError:
                self.executable = ""
            # All of this was read of the process that the pidfd is for, if that one lives still.
            self.check()
        except (FileNotFoundError, ProcessLookupError) as error:
            self.close()
            raise GoneError(pid, f"process {pid} has ended") from error
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """GoneError where the process has ended."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        if poll.poll(0):
            raise GoneError(self.pid, f"process {self.pid} has ended")

    def fileno(self) -> int:
        """Return the pidfd: readable once the process has ended. GoneError after `close`."""
        if self._pidfd is None:
            raise GoneError(self.pid, f"process {self.pid} is nobody's target any more")
        return self._pidfd

    @property
    def memory(self) -> Memory:
        """The memory of the program that it ran when this was asked first. NotAllowedError, GoneError."""
        if self._memory is None:
            found = Memory.open(self.pid)
            try:
                self.check()  # so it was this process's
            except BaseException:
                found.close()
                raise
            self._memory = found
        return self._memory

    def threads(self) -> list[Thread]:
        """Return its threads that live, the first one first. GoneError."""
        return [thread for tid in proc.threads(self.pid) if (thread := self._thread(tid)) is not None]

    def _thread(self, tid: int) -> Thread | None:
        status = proc.status(self.pid, tid)
        if status.get("State", "Z")[0] in "ZX":
            return None  # a first thread that has ended stays as long as others are there
        name = status["Name"]
        return Thread(tid, name, _VCPU_NAME.fullmatch(name) is not None or self._runs_a_vcpu(tid))

    def choose_thread(self) -> int:
        """Return the thread that is to make calls: the first, which waits for events in QEMU and most programs.

        All of skeyd takes the same one, so that a second tracer is told of the first. Where that one runs a vCPU, or
        has ended, it is the next that does not.
        """
        # Most often it is the first that is asked for; a QEMU may have hundreds.
        for tid in proc.threads(self.pid):
            thread = self._thread(tid)
            if thread is not None and not thread.is_vcpu:
                return tid
        raise UnsupportedError(self.pid, f"process {self.pid} has no thread that is no vCPU's")

    def check_untraced(self, tid: int) -> None:
        """AlreadyTracedError where another process traces another thread than this one."""
        for other in proc.threads(self.pid):
            tracer = int(proc.status(self.pid, other).get("TracerPid", "0"))
            if other != tid and tracer not in (0, threading.get_native_id()):
                raise AlreadyTracedError(other, tracer)

    def vm_fds(self) -> list[int]:
        """Return the descriptors of the process that are KVM VMs, ascending. GoneError; PermissionError."""
        return [fd for fd, link in sorted(self.links().items()) if link == VM_LINK]

    def is_vm(self, fd: int) -> bool:
        """Tell whether a descriptor of the process is a KVM VM. PermissionError."""
        try:
            return os.readlink(f"/proc/{self.pid}/fd/{fd}") == VM_LINK
        except (FileNotFoundError, ProcessLookupError):
            return False

    def links(self) -> dict[int, str]:
        """Return what its descriptors are, by number, as /proc/PID/fd has it. GoneError; PermissionError."""
        directory = f"/proc/{self.pid}/fd"
        found = {}
        try:
            names = os.listdir(directory)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise GoneError(self.pid, f"process {self.pid} has ended") from error
        for name in names:
            try:
                found[int(name)] = os.readlink(f"{directory}/{name}")
            except (FileNotFoundError, ProcessLookupError):
                continue  # closed meanwhile
        return found

    def _runs_a_vcpu(self, tid: int) -> bool:
        try:
            call = proc.system_call(self.pid, tid)
            if call is None or call[0] != self.machine.IOCTL or call[2] != _KVM_RUN:
                return False
            return os.readlink(f"/proc/{self.pid}/fd/{call[1]}").startswith(VCPU_LINK)
        except OSError:
            return False

    def close(self) -> None:
        """Close the pidfd, and its memory."""
        if self._memory is not None:
            memory, self._memory = self._memory, None
            memory.close()
        if self._pidfd is not None:
            fd, self._pidfd = self._pidfd, None
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _machine(pid: int) -> Machine:
    machine = this_machine()
    if machine is None:
        raise UnsupportedError(pid, f"skeyd can't have processes make calls on {os.uname().machine}")
    why = machine.why_not(pid)
    if why is not None:
        raise UnsupportedError(pid, f"process {pid} can't be made to call without harm: {why}")
    return machine
