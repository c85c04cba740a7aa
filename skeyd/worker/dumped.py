"""Keys of a VM whose VMM prints them: QMP's dump-skeys. They can be read, and not set. docs/qmp.md has how and why."""

from __future__ import annotations

import os
import re
import select
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

from skeyd.errors import Reason, SkeydError, read_only
from skeyd.gfn import GfnRange, MemoryMap
from skeyd.linux import wide_pipe
from skeyd.qmp.errors import QmpError, RefusedError
from skeyd.qmp.monitor import Monitor
from skeyd.storage_key import FRAME_SIZE, RESERVED
from skeyd.worker import qmp_refusals
from skeyd.worker.adoption import Vmm
from skeyd.worker.dump import DumpParser, Snapshot
from skeyd.worker.packets import Fields, printable
from skeyd.worker.protocol import Spec
from skeyd.worker.qmp_vmm import missing_threads
from skeyd.worker.slots import memory_map

ONE_KEY_SECONDS: Final = 3.0
"""How long it may take to read one key; less than a front waits for a short answer."""

DUMP_SECONDS: Final = 40.0
"""How long a dump may take; with END_SECONDS less than a front waits for a slice."""

END_SECONDS: Final = 10.0
"""How long a VMM may take to end a dump that nobody reads any more."""

PIPE_BYTES: Final = 1 << 20
"""What fs.pipe-max-size allows anybody."""

_FD_MAX: Final = (1 << 31) - 1
_FDSET_MAX: Final = (1 << 63) - 1
_FDSETS_MAX: Final = 1 << 16

# Of people's words, since QEMU has no others for these (hw/s390x/s390-skeys.c @ v7.2 and v10.0).
_NO_KEYS: Final = "not using storage keys"
_ONE_KEY: Final = re.compile(r"\s*key: 0x([0-9A-F]{1,2})\s*")
_NO_MEMORY: Final = "address is not valid"


class DumpedVm:
    """A Backend over QMP, to read. Each call connects anew, since a monitor takes one client at a time.

    SkeydErrors: QMP's, VM_DEAD where the VMM has ended, BACKEND_READ_ONLY for all that sets a key.
    """

    has_keyop = False

    def __init__(self, spec: Spec, memory_source: str, kernel: str) -> None:
        """Take a spec that names a process and memory slots; `kernel` is what is below the VM, in words."""
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
        self._pipe: _Pipe | None = None
        with ExitStack() as undo:
            undo.callback(self.close)
            self.vmm = Vmm(
                adoption.pid,
                adoption.start_time,
                _uid(adoption.pid),
                printable(_executable(adoption.pid)),
                -1,
                memory_source,
                "qmp",
            )
            # The process that the monitor was asked about is that of the pidfd, if its CPU threads are there now.
            with self._monitor(ONE_KEY_SECONDS):
                undo.pop_all()

    def fileno(self) -> int:
        """Return a descriptor that is readable once the VMM has ended; it stays this object's."""
        return self._pidfd

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """Read keys as they are now, one by `info skeys`, several by a dump of all. False: the guest uses none."""
        if len(buffer) == 1:
            key = self._one_key(start_gfn)
            if key is not None:
                buffer[0] = key
            return key is not None
        snapshot = self.snapshot()
        if snapshot is not None:
            snapshot.read(GfnRange(start_gfn, len(buffer)), buffer)
        return snapshot is not None

    def snapshot(self) -> Snapshot | None:
        """Have the VMM print all keys once. None: the guest uses none."""
        parser = DumpParser(self.memory_map)
        with self._monitor(DUMP_SECONDS) as monitor:
            if not self._dump(monitor, parser):
                return None
        return parser.finish()

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
        """Leave nothing in the VMM, where there is nothing but what it keeps itself (docs/qmp.md)."""

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
                with Monitor(self._path, seconds) as monitor:
                    if monitor.peer.pid != self._pid and missing_threads(monitor, self._pid):
                        raise self._gone(self._pid, "another's monitor is at its QMP socket")
                    yield monitor
            except QmpError as error:
                if self._has_ended():
                    raise self._gone(self._pid) from error
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
        raise SkeydError(Reason.QMP_FAILED, f"the VMM answers {line!r} with no key: {str(said)[:200]!r}")

    def _dump(self, monitor: Monitor, parser: DumpParser) -> bool:
        # False: there is nothing to print, and nothing was.
        pipe = self._pipe_in(monitor)
        try:
            # By its path, which opens it anew. As /dev/fdset/N it would be cut, which no pipe can be (util/osdep.c,
            # qemu_dup_flags; seen with 7.2: EINVAL).
            monitor.begin("dump-skeys", {"filename": f"/proc/self/fd/{pipe.there}"})
            pipe.read_into(parser, monitor)
            monitor.answer()
        except RefusedError as error:
            if _NO_KEYS in error.description:
                return False
            self._drop_pipe()
            raise
        except BaseException:
            # It may be writing still: without a reader it gets EPIPE, and goes on to the end (seen).
            self._drop_pipe()
            raise
        finally:
            with suppress(QmpError):
                monitor.allow(END_SECONDS)
                monitor.settle()
                monitor.execute("remove-fd", {"fdset-id": pipe.fdset, "fd": pipe.there})
        return True

    def _pipe_in(self, monitor: Monitor) -> _Pipe:
        # While its guest is paused, QEMU up to 9.0 keeps what it was given, whatever it is told (monitor/fds.c,
        # monitor_fdset_cleanup; seen with 7.2). So a pipe that is there still is used again, and there is one at most.
        if self._pipe is not None and not self._pipe.is_in(monitor):
            self._drop_pipe()
        if self._pipe is None:
            self._pipe = _Pipe(monitor)
        return self._pipe

    def _drop_pipe(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def _gone(self, pid: int, why: str = "it has ended") -> SkeydError:
        return SkeydError(Reason.VM_DEAD, f"the VM's VMM is gone: process {pid}: {why}", {"vmm_pid": str(pid)})


class _Pipe:
    # A pipe whose other end a VMM has as a descriptor of its own.

    def __init__(self, monitor: Monitor) -> None:
        self._read, write = wide_pipe(PIPE_BYTES)
        self._name = f"skeyd-{os.urandom(8).hex()}"
        try:
            told = Fields(monitor.execute("add-fd", {"opaque": self._name}, write), "add-fd")
            self.there = told.integer("fd", 0, _FD_MAX)
            """Its number in the VMM."""
            self.fdset = told.integer("fdset-id", 0, _FDSET_MAX)
        except BaseException:
            os.close(self._read)
            raise
        finally:
            os.close(write)

    def is_in(self, monitor: Monitor) -> bool:
        """Whether the VMM has it still."""
        sets = Fields({"return": monitor.execute("query-fdsets")}, "query-fdsets").objects("return", _FDSETS_MAX)
        return any(
            fd.has("opaque") and (fd.text("opaque"), fd.integer("fd", 0, _FD_MAX)) == (self._name, self.there)
            for one in sets
            for fd in one.objects("fds", _FDSETS_MAX)
        )

    def read_into(self, parser: DumpParser, monitor: Monitor) -> None:
        """Read until the monitor has answered, and then what is left; never longer than the monitor has time."""
        look = select.poll()
        look.register(self._read, select.POLLIN)
        look.register(monitor, select.POLLIN)
        while not monitor.is_answered():
            look.poll(monitor.seconds_left() * 1000)
            if not self._read_all(parser, monitor):
                look.unregister(self._read)  # nobody has the other end any more, and the answer is on its way
                while not monitor.is_answered():
                    look.poll(monitor.seconds_left() * 1000)
        self._read_all(parser, monitor)

    def _read_all(self, parser: DumpParser, monitor: Monitor) -> bool:
        while monitor.seconds_left():
            try:
                part = os.read(self._read, PIPE_BYTES)
            except BlockingIOError:
                return True
            if not part:
                return False
            parser.feed(part)
        return True

    def close(self) -> None:
        os.close(self._read)


def _uid(pid: int) -> int:
    return os.stat(f"/proc/{pid}").st_uid  # noqa: PTH116  a worker has no pathlib loaded


def _executable(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe")  # noqa: PTH115  likewise
    except OSError:
        return ""
