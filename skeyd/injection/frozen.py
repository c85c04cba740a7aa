"""A process that stands still: all of its threads are held at once, and one of them makes calls meanwhile."""

from __future__ import annotations

import time
from contextlib import suppress
from types import TracebackType

from skeyd.injection import proc
from skeyd.injection.errors import GoneError, InjectionError, TimedOutError
from skeyd.injection.injection import Injection
from skeyd.injection.target import Target
from skeyd.injection.tracee import Tracee


class Frozen:
    """All threads of a process, from entering the context to leaving it; entering gives the Injection that calls.

    No thread runs an instruction of the process meanwhile; `seconds` is for all of it, as an Injection's. Leaving it
    lets go of every thread that has stopped. One that doesn't stop, in vfork or in a call that nothing ends, is let go
    by the end of this process and by nothing else: so this is for a process that ends then
    (skeyd.worker.held_capture). docs/injection.md says why no thread slips through, and what calls can be made.

    Entering: as an Injection; TimedOutError where a thread doesn't stop, AlreadyTracedError where another traces one.
    Synchronization: none; the thread that enters it makes the calls and leaves it.
    """

    def __init__(self, target: Target, seconds: float) -> None:
        self._target = target
        self._deadline = time.monotonic() + seconds
        # The thread that all of skeyd takes comes first, so that of two that freeze one process only one gets on.
        self._caller = Injection(target, seconds=seconds)
        self._others: dict[int, Tracee] = {}

    def __enter__(self) -> Injection:
        self._caller.__enter__()
        try:
            self._hold_the_others()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self._caller

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for tracee in self._others.values():
                _let_go(tracee)
            self._caller.__exit__(kind, error, trace)
        finally:
            for tracee in self._others.values():
                # Those that were asked to stop and had not been waited for, for as long as there is time.
                with suppress(InjectionError):
                    if tracee.traced:
                        tracee.stop(self._deadline)
                _let_go(tracee)

    def _hold_the_others(self) -> None:
        """Hold whoever is there until nobody new is.

        Only a thread of the process makes another. So when all that were listed stand still, and a whole list that is
        read after that has nobody else, there is nobody else.
        """
        while True:
            listed = proc.threads(self._target.pid)
            fresh = self._asked_to_stop(listed)
            for tracee in fresh:
                try:
                    tracee.stop(self._deadline)
                except GoneError:
                    del self._others[tracee.tid]
            if not fresh and self._is_whole(listed):
                return
            if time.monotonic() >= self._deadline:
                pid = self._target.pid
                raise TimedOutError(pid, f"the threads of process {pid} did not all stop in time: more and more come")

    def _asked_to_stop(self, listed: list[int]) -> list[Tracee]:
        # All are asked before one is waited for, so that they stop as closely together as they can.
        fresh = []
        for tid in listed:
            if tid == self._caller.tid or tid in self._others:
                continue
            try:
                tracee = Tracee.seize(self._target.pid, tid)
                if not proc.status(self._target.pid, tid):
                    # The thread had ended, and its number is another process's: that one is none of ours.
                    tracee.stop(self._deadline)
                    _let_go(tracee)
                    continue
                self._others[tid] = tracee
                tracee.interrupt()
            except GoneError:
                # It has ended, or is a first thread that has and stays on the list.
                self._others.pop(tid, None)
                continue
            fresh.append(tracee)
        return fresh

    def _is_whole(self, listed: list[int]) -> bool:
        # The kernel cuts the list short where a thread ends while it is read (next_tid() in fs/proc/base.c @ v6.12).
        return int(proc.status(self._target.pid, self._target.pid).get("Threads", "0")) == len(listed)


def _let_go(tracee: Tracee) -> None:
    # It is stopped where signals are looked for, by nothing but our request.
    if tracee.traced and tracee.stopped is not None:
        with suppress(OSError):
            tracee.detach()
