"""Keys of one moment of a VM that another process runs: by a process that holds all its threads and ends with that.

Not by the worker: what holds a VMM must be a process that can be killed. The kernel kills it when the budget has
passed, whatever it does or waits for, and when the worker ends; and the end of a tracer lets go of all that it traces,
wherever they are (docs/injection.md). So nothing that front, client or worker do or don't makes a VMM stand still for
longer.
A module of its own, since only an adopted VM's worker loads it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from typing import Final, NoReturn

from skeyd.errors import Reason, SkeydError
from skeyd.injection.errors import TimedOutError
from skeyd.injection.expiry import end_at, end_with_parent
from skeyd.worker.own_capture import expired
from skeyd.worker.packets import MESSAGE_MAX, decode, error_message, take_answer
from skeyd.worker.protocol import NANOSECONDS_MAX
from skeyd.worker.worker_log import log_traceback

_IN_ORDER_SHARE: Final = 0.1
_IN_ORDER_MOST: Final = 0.05
"""So much of a budget, and so many seconds at most, is for letting go in order; the kill comes after that."""


class HeldCapture:
    """A Capture by `read`, which is called in a forked process with the seconds that it may take.

    It returns for how long the VMM stood still, in nanoseconds, when it does no more; it raises TimedOutError where the
    time was too short, and SkeydErrors. OSError where there can be no process. `killed` is called where that process
    ended and may have let go in the middle of something.

    Synchronization: for the thread that made it: it is that thread's end that ends the other process.
    """

    def __init__(self, read: Callable[[float], int], seconds: float, killed: Callable[[], None] = lambda: None) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds
        self._is_over = False
        self._killed = killed
        parent = os.getpid()
        self._told, telling = os.pipe()
        try:
            self._pid = os.fork()
            if not self._pid:
                _hold(read, seconds, self._end, parent, telling)
            try:
                self._pidfd = os.pidfd_open(self._pid)
            except OSError:
                # Nobody would know of its end.
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                killed()
                raise
        except BaseException:
            os.close(self._told)
            raise
        finally:
            os.close(telling)

    def fileno(self) -> int | None:
        """Return the pidfd: readable when that process has ended, and the kernel has let go of what it traced."""
        return self._pidfd

    def seconds_left(self) -> None:
        """Return nothing: the kernel ends it in time."""

    def step(self) -> int | None:
        """Look whether it has ended."""
        ended, status = os.waitpid(self._pid, os.WNOHANG)
        if not ended:
            return None
        said = os.read(self._told, MESSAGE_MAX)
        self._let_go()
        if said:
            return take_answer(decode(said, "what was said of a capture")).integer("ns", 0, NANOSECONDS_MAX)
        self._killed()
        if time.monotonic() >= self._end:
            raise expired(self._seconds, "the process that held the VMM was ended by the kernel")
        what = os.waitstatus_to_exitcode(status)
        raise SkeydError(Reason.WORKER_FAILED, f"the process that held the VMM ended with status {what}")

    def cancel(self) -> None:
        """Have it killed."""
        # It was not waited for, so the number is its own.
        os.kill(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill it, and wait until the kernel has let go of what it traced."""
        if not self._is_over:
            self.cancel()
            os.waitpid(self._pid, 0)
            self._let_go()
            self._killed()

    def _let_go(self) -> None:
        self._is_over = True
        os.close(self._told)
        os.close(self._pidfd)


def _hold(read: Callable[[float], int], seconds: float, end: float, parent: int, telling: int) -> NoReturn:
    try:
        end_with_parent(parent)
        end_at(end)
        # The worker's handlers and sockets are the worker's.
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        in_order = min(seconds * _IN_ORDER_SHARE, _IN_ORDER_MOST)
        try:
            message = {"ok": {"ns": read(max(0.0, end - time.monotonic() - in_order))}}
        except TimedOutError as error:
            message = error_message(expired(seconds, str(error)))
        except SkeydError as error:
            message = error_message(error)
        os.write(telling, json.dumps(message).encode())
    except BaseException:
        log_traceback()
    finally:
        os._exit(0)
