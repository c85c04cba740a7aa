"""Keys of a VM whose VMM prints them: QMP's dump-skeys. They can be read, and not set. docs/qmp.md has how and why."""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from typing import Final, NoReturn

from skeyd.errors import Reason, SkeydError, read_only
from skeyd.gfn import GfnRange, MemoryMap
from skeyd.qmp.errors import BusyError, QmpError
from skeyd.qmp.monitor import Monitor
from skeyd.storage_key import FRAME_SIZE, RESERVED
from skeyd.worker import qmp_refusals
from skeyd.worker.adoption import Vmm, VmmProcess
from skeyd.worker.dump import DumpParser
from skeyd.worker.dump_capture import DumpCapture, DumpPipe
from skeyd.worker.packets import printable
from skeyd.worker.protocol import Spec
from skeyd.worker.qmp_vmm import missing_threads
from skeyd.worker.slots import memory_map

ONE_KEY_SECONDS: Final = 3.0
"""How long it may take to read one key, and to begin a dump; less than a front waits for a short answer."""

BUSY_SECONDS: Final = 2.0
"""For so long a monitor that had no greeting is not asked again."""

DUMP_SECONDS: Final = 40.0
"""How long a dump may take of which somebody wants a slice at once."""

# Of people's words, since QEMU has no others for these (hw/s390x/s390-skeys.c @ v7.2 and v10.0).
_NO_KEYS: Final = "not using storage keys"
_ONE_KEY: Final = re.compile(r"\s*key: 0x([0-9A-F]{1,2})\s*")
_NO_MEMORY: Final = "address is not valid"


class DumpedVm:
    """A Backend over QMP, to read. Each call connects anew, since a monitor takes one client at a time.

    SkeydErrors: QMP's, VM_DEAD where the VMM has ended, BACKEND_READ_ONLY for all that sets a key.
    """

    has_keyop = False

    def __init__(self, spec: Spec, process: VmmProcess, memory_source: str, kernel: str) -> None:
        """Take a spec that names the process and memory slots; `kernel` is what is below the VM, in words."""
        adoption = spec.adoption
        if adoption is None:
            raise SkeydError(Reason.WORKER_FAILED, "an adopted VM's spec says of no process whose it is")
        self._vm_id = spec.vm_id
        self._path = adoption.qmp_socket
        self.kernel = printable(kernel)
        self.memory_map: MemoryMap = memory_map(spec.slots, "vmm")
        try:
            self._pidfd = os.pidfd_open(adoption.pid)
        except ProcessLookupError as error:
            raise self._gone(adoption.pid) from error
        self._pid = adoption.pid
        self._pipe: DumpPipe | None = None
        self._busy, self._busy_until = "", 0.0
        with ExitStack() as undo:
            undo.callback(self.close)
            self.vmm = Vmm.of(process, -1, memory_source, "qmp")
            # The process that the monitor was asked about is that of the pidfd, if its CPU threads are there now.
            with self._monitor(ONE_KEY_SECONDS):
                undo.pop_all()

    def fileno(self) -> int:
        """Return a descriptor that is readable once the VMM has ended; it stays this object's."""
        return self._pidfd

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """Read keys as they are now, one by `info skeys`, several by a dump of all. False: the guest uses none."""
        key = self._one_key(start_gfn)
        if key is None:
            return False
        if len(buffer) == 1:
            buffer[0] = key
            return True
        with closing(self.print_keys(DUMP_SECONDS)) as dump:
            while dump.step() is None:
                select.select([dump], [], [], dump.seconds_left())
            dump.keys.read(GfnRange(start_gfn, len(buffer)), buffer)
        return True

    def print_keys(self, seconds: float) -> DumpCapture:
        """Have the VMM print all keys, in so many seconds at most. The guest uses some."""
        connect = partial(self._monitor, ONE_KEY_SECONDS)
        return DumpCapture(connect, self._pipe_in, self._drop_pipe, DumpParser(self.memory_map), seconds)

    def capture(self, frames: Sequence[GfnRange], into: memoryview, seconds: float, slice_seconds: float) -> NoReturn:  # noqa: ARG002  a Backend's
        """Refuse: FREEZE_UNSUPPORTED."""
        raise SkeydError(Reason.FREEZE_UNSUPPORTED, f"the keys of vms/{self._vm_id} are reached over QMP")

    def prepare_set(self, start_gfn: int, keys: bytes | bytearray) -> None:  # noqa: ARG002  a Backend's
        """Refuse: BACKEND_READ_ONLY."""
        raise read_only(self._vm_id)

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:  # noqa: ARG002  likewise
        """Refuse: BACKEND_READ_ONLY."""
        raise read_only(self._vm_id)

    def keyop(self, operation: int, gfn: int, key: int = 0) -> int:  # noqa: ARG002  likewise
        """Refuse: BACKEND_READ_ONLY."""
        raise read_only(self._vm_id)

    def release(self) -> None:
        """Have the VMM forget what it was given, if it answers; what else it keeps is its own doing (docs/qmp.md)."""
        if self._pipe is not None:
            with suppress(SkeydError), self._monitor(ONE_KEY_SECONDS) as monitor:
                self._pipe.forget(monitor)
            self._drop_pipe()

    def close(self) -> None:
        """Let the VMM go."""
        self._drop_pipe()
        if self._pidfd >= 0:
            fd, self._pidfd = self._pidfd, -1
            os.close(fd)

    @contextmanager
    def _monitor(self, seconds: float) -> Iterator[Monitor]:
        with qmp_refusals.told():
            try:
                with self._connected(seconds) as monitor:
                    if monitor.peer.pid != self._pid and missing_threads(monitor, self._pid):
                        raise self._gone(self._pid, "another's monitor is at its QMP socket")
                    yield monitor
            except QmpError as error:
                if self._has_ended():
                    raise self._gone(self._pid) from error
                raise

    def _connected(self, seconds: float) -> Monitor:
        # Who looks at a VM waits some seconds for its worker, and several may look: so not each waits for the monitor.
        if time.monotonic() < self._busy_until:
            raise BusyError(self._busy)
        try:
            return Monitor(self._path, seconds)
        except BusyError as error:
            self._busy, self._busy_until = str(error), time.monotonic() + BUSY_SECONDS
            raise

    def _has_ended(self) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def _one_key(self, gfn: int) -> int | None:
        with self._monitor(ONE_KEY_SECONDS) as monitor:
            line = f"info skeys {gfn * FRAME_SIZE:#x}"
            said = monitor.execute("human-monitor-command", {"command-line": line})
        if isinstance(said, str):
            found = _ONE_KEY.fullmatch(said)
            if found is not None:
                return int(found[1], 16) & ~RESERVED
            if _NO_KEYS in said:
                return None
            if _NO_MEMORY in said:
                where = {"gfn": hex(gfn), "count": "1"}
                raise SkeydError(Reason.GFN_NOT_MAPPED, f"the VMM has no memory at gfn {gfn:#x}", where)
        # Not what may be nested without end.
        found_instead = said[:200] if isinstance(said, str) else type(said).__name__
        raise SkeydError(Reason.QMP_FAILED, f"the VMM answers {line!r} with no key: {found_instead!r}")

    def _pipe_in(self, monitor: Monitor) -> DumpPipe:
        # One that a paused guest's QEMU was left with is used again.
        if self._pipe is not None and not self._pipe.is_in(monitor):
            self._drop_pipe()
        if self._pipe is None:
            self._pipe = DumpPipe(monitor)
        return self._pipe

    def _drop_pipe(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def _gone(self, pid: int, why: str = "it has ended") -> SkeydError:
        return SkeydError(Reason.VM_DEAD, f"the VM's VMM is gone: process {pid}: {why}", {"vmm_pid": str(pid)})
