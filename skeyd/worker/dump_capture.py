"""All keys of a VM while its VMM prints them: a capture that reads along, a part a step, and never waits."""

from __future__ import annotations

import os
import re
import select
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Final

from skeyd.errors import SkeydError
from skeyd.injection import proc
from skeyd.linux import wide_pipe
from skeyd.qmp.errors import BusyError, QmpError, RefusedError
from skeyd.qmp.monitor import Monitor
from skeyd.worker.dump import DumpParser, Snapshot
from skeyd.worker.packets import Fields, ProtocolError

END_SECONDS: Final = 10.0
"""How long a VMM may take to end a dump that nobody reads any more, and to forget what it was given."""

PIPE_BYTES: Final = 1 << 20
"""What fs.pipe-max-size allows anybody."""

_FD_MAX: Final = (1 << 31) - 1
_FDSET_MAX: Final = (1 << 63) - 1
_FDSETS_MAX: Final = 1 << 16

_NAME: Final = re.compile(r"skeyd-([0-9]{1,20})-([0-9]{1,10})-([0-9]{1,20})-[0-9a-f]{16}")
"""What a pipe's end is called in the VMM: by its worker's PID namespace, pid and start time in clock ticks."""


class DumpPipe:
    """A pipe whose other end a VMM has as a descriptor of its own. QmpErrors, ProtocolError."""

    def __init__(self, monitor: Monitor) -> None:
        _forget_stale_ones(monitor)
        pid = os.getpid()
        self._name = f"skeyd-{_pid_namespace()}-{pid}-{proc.start_time(pid)}-{os.urandom(8).hex()}"
        self._read, write = wide_pipe(PIPE_BYTES)
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
        return any((name, fd) == (self._name, self.there) for name, _, fd in _given(monitor))

    def forget(self, monitor: Monitor) -> None:
        """Have the VMM close its end, and not use the pipe again."""
        monitor.execute("remove-fd", {"fdset-id": self.fdset, "fd": self.there})

    def fileno(self) -> int:
        """Return the end that is read."""
        return self._read

    def read(self) -> bytes | None:
        """Return what comes next; None: nothing is there now. Empty: nobody has the other end any more."""
        try:
            return os.read(self._read, PIPE_BYTES)
        except BlockingIOError:
            return None

    def close(self) -> None:
        """Let it go: a VMM that writes still gets EPIPE, and goes on to the end (seen)."""
        os.close(self._read)


_Connect = Callable[[], AbstractContextManager[Monitor]]
_PipeIn = Callable[[Monitor], DumpPipe]


def _given(monitor: Monitor) -> Iterator[tuple[str, int, int]]:
    # What the VMM was given and has still: by which name, in which set, as which descriptor.
    sets = Fields({"return": monitor.execute("query-fdsets")}, "query-fdsets").objects("return", _FDSETS_MAX)
    for one in sets:
        for fd in one.objects("fds", _FDSETS_MAX):
            try:
                name = fd.text("opaque", _NAME)
            except ProtocolError:
                continue  # another's
            yield name, one.integer("fdset-id", 0, _FDSET_MAX), fd.integer("fd", 0, _FD_MAX)


def _forget_stale_ones(monitor: Monitor) -> None:
    # A worker that is killed in the middle of a dump can't do it itself, nor can one whose VMM no longer answers; and
    # QEMU forgets what a client gave it only when nobody is connected to any of its monitors (monitor/fds.c,
    # monitor_fdset_cleanup; seen with 7.2). This process's own are stale too: it has one at a time, and none now.
    for name, fdset, fd in list(_given(monitor)):
        found = _NAME.fullmatch(name)
        if found is not None and int(found[1]) == _pid_namespace() and not _is_used(int(found[2]), int(found[3])):
            with suppress(RefusedError):
                monitor.execute("remove-fd", {"fdset-id": fdset, "fd": fd})


def _is_used(pid: int, start_time: int) -> bool:
    try:
        return pid != os.getpid() and proc.start_time(pid) == start_time
    except (FileNotFoundError, ProcessLookupError):
        return False
    except PermissionError:
        return True  # nobody knows


def _pid_namespace() -> int:
    # What a pid means elsewhere can't be known.
    return os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116  a worker has no pathlib loaded


class DumpCapture:
    """A Printing. What it takes is a monitor that is connected to, and a pipe in its VMM, by two functions.

    `drop_pipe` is called where the pipe can't be used again, and may be more than once. SkeydErrors and QmpErrors as
    `connect` has them: from the constructor, which begins the dump, and from `step`.
    """

    def __init__(
        self,
        connect: _Connect,
        pipe_in: _PipeIn,
        drop_pipe: Callable[[], None],
        parser: DumpParser,
        seconds: float,
    ) -> None:
        self._parser = parser
        self._drop_pipe = drop_pipe
        self._monitor: Monitor | None = None
        self._look = select.epoll()
        self._steps = self._all(connect, pipe_in, seconds)
        self._goes_on_at_once = False
        try:
            self.step()
        except BaseException:
            self.close()
            raise

    @property
    def keys(self) -> Snapshot:
        """They are whole once `step` has returned 0."""
        return self._parser.snapshot

    def fileno(self) -> int:
        """Return a descriptor that is readable when the VMM has printed or said something."""
        return self._look.fileno()

    def seconds_left(self) -> float:
        """Return how long the VMM may be silent; 0: there is something to do."""
        return 0.0 if self._goes_on_at_once or self._monitor is None else self._monitor.seconds_left()

    def step(self) -> int | None:
        """Take a part of what was printed. The VM's owner never stands still: 0 at the end."""
        try:
            self._goes_on_at_once = next(self._steps)
        except StopIteration:
            self.close()
            return 0
        except BaseException:
            self.close()
            raise
        return None

    def cancel(self) -> None:
        """Go on to the end all the same: a VMM is not hurried by a reader that is gone."""

    def close(self) -> None:
        """Hang up, in the middle of a dump too."""
        self._steps.close()
        self._look.close()

    def _all(self, connect: _Connect, pipe_in: _PipeIn, seconds: float) -> Generator[bool, None, None]:
        # Each yield says whether to go on at once, or when something is readable.
        with connect() as monitor:
            self._monitor = monitor
            pipe = pipe_in(monitor)
            failure: Exception | None = None
            is_lost = False
            try:
                monitor.allow(seconds)
                # By its path, which opens it anew. As /dev/fdset/N it would be cut, which no pipe can be
                # (util/osdep.c, qemu_dup_flags; seen with 7.2: EINVAL).
                monitor.begin("dump-skeys", {"filename": f"/proc/self/fd/{pipe.there}"})
                self._look.register(monitor, select.EPOLLIN)
                self._look.register(pipe, select.EPOLLIN)
                yield True  # so that the constructor has begun it, and no more
                yield from self._read_along(monitor, pipe)
                monitor.answer()
                self._parser.finish()
            except RefusedError as error:
                # It doesn't write, and what it had written was read: the pipe can be used again.
                failure = error
            except (QmpError, SkeydError, OSError) as error:
                failure = error
                # It may be writing still.
                is_lost = True
                self._drop_pipe()
            except BaseException:
                self._drop_pipe()
                raise
            try:
                monitor.allow(END_SECONDS)
                yield from self._answered(monitor)
                monitor.settle()
                monitor.begin("query-status")
                yield from self._answered(monitor)
                status = Fields(monitor.answer(), "query-status")
                # While its guest is paused, QEMU up to 9.0 doesn't close what it is told to, and does when it runs
                # (monitor/fds.c, monitor_fdset_cleanup; seen with 7.2). Used again meanwhile, the number could be a
                # disk's in the middle of a dump. So it is left to be used again, or told of and never used again.
                if status.boolean("running") or is_lost:
                    self._drop_pipe()
                    monitor.begin("remove-fd", {"fdset-id": pipe.fdset, "fd": pipe.there})
                    yield from self._answered(monitor)
                    monitor.answer()
            except (QmpError, ProtocolError):
                # The keys are there all the same.
                self._drop_pipe()
            if failure is not None:
                raise failure

    def _read_along(self, monitor: Monitor, pipe: DumpPipe) -> Generator[bool, None, None]:
        is_open = True
        while True:
            # Asked first, so that all it printed before is in the pipe by now.
            is_answered = monitor.is_answered()
            while is_open:
                part = pipe.read()
                if part is None:
                    break
                if not part:
                    # Nobody has the other end any more, and the answer is on its way.
                    self._look.unregister(pipe)
                    is_open = False
                    break
                if not monitor.seconds_left():
                    # Also after the answer: whoever has the other end may go on for ever.
                    raise BusyError("the VMM has printed for longer than it may")
                self._parser.feed(part)
                yield True
            if is_answered:
                if is_open:
                    self._look.unregister(pipe)  # nobody looks at what comes now
                return
            yield False

    def _answered(self, monitor: Monitor) -> Generator[bool, None, None]:
        while monitor.is_asked() and not monitor.is_answered():
            yield False
