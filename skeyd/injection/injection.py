"""Calls that a thread of another process makes: it is stopped once, makes them one after another, and is let go."""

from __future__ import annotations

import errno
import signal
import time
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Final, Self

from skeyd.injection import proc, ptrace, rseq
from skeyd.injection.cave import Cave
from skeyd.injection.errors import (
    FaultedError,
    GoneError,
    InjectionError,
    RefusedError,
    TimedOutError,
    UnsupportedError,
)
from skeyd.injection.registers import INTERRUPTED, WORD, Call, Saved
from skeyd.injection.target import Target
from skeyd.injection.tracee import Stop, Tracee

FOREVER: Final = float("inf")

_FAULTS: Final = frozenset((signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS))
# BUS_MCEERR_AO and TRAP_PERF: include/uapi/asm-generic/siginfo.h @ v6.12
_NOT_AT_ONCE: Final = frozenset(((signal.SIGBUS, 5), (signal.SIGTRAP, 6)))
_MOST_ERRNO: Final = 4095


class Injection:
    """One slice: a thread of a process is held from entering the context to leaving it, and makes calls meanwhile.

    `seconds` is for all of it, from the first request on. On every way out the thread has its registers and whatever it
    was in the middle of again, interrupted system calls included; if this process is killed at any instant, the thread
    restores itself (docs/injection.md). A signal that comes meanwhile is delivered to the thread at once, as if nobody
    had stopped it, and it is stopped again.

    Entering: GoneError, AlreadyTracedError, NotAllowedError, UnsupportedError, TimedOutError.
    Synchronization: none; the thread that enters it makes the calls and leaves it.
    """

    def __init__(self, target: Target, tid: int | None = None, seconds: float = 1.0) -> None:
        self.target = target
        self._machine = target.machine
        self._wanted = tid
        self._seconds = seconds
        self._deadline = 0.0
        self._tracee: Tracee | None = None
        self._cave: Cave | None = None
        self._saved: Saved | None = None
        self._block = 0
        self._below = b""

    def __enter__(self) -> Self:
        self._deadline = time.monotonic() + self._seconds
        self.target.check()
        tid = self.target.choose_thread() if self._wanted is None else self._wanted
        self._tracee = Tracee.seize(self.target.pid, tid)
        try:
            # Afterwards: of two that come at once at least one sees the other. Whoever passes is alone in the process.
            self.target.check_untraced(tid)
            self.target.check()
            if not proc.status(self.target.pid, tid):
                raise GoneError(tid, f"{tid} is no thread of process {self.target.pid}")
            # Before it is stopped: to look through the mappings of a large process takes longer than all else.
            self._cave = Cave.find(self.target.pid, self.target.memory, self._machine)
            self._tracee.stop(self._deadline)
            self._leave_stub(self._cave)
            self._hold()
            if self._cave.write_stub(tid):
                self.target.stub_is_ours = True
        except OSError as error:
            self._end()
            self._tracee.failed(error)
        except BaseException:
            self._end()
            raise
        return self

    @property
    def tid(self) -> int:
        """The thread that makes the calls."""
        return self._held().tid

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end()
        except InjectionError:
            if error is None:
                raise

    def call(self, call: Call) -> int:
        """Have the thread make a call, and return what it returned: an errno as a negative number.

        RefusedError where a sandbox raised SIGSYS. FaultedError where the thread got a fault. GoneError. TimedOutError:
        the call was interrupted, or never begun, and the thread was let go; no more calls then.
        """
        tracee = self._held()
        cave = self._stub()
        wanted = call
        while True:
            saved = self._hold()
            try:
                if wanted.in_block:
                    # Each time: where a signal has come the block lies elsewhere now.
                    self.target.memory.write(self._block, wanted.in_block)
                    call = replace(wanted, arguments=(self._block,))
                self._machine.enter(tracee.tid, saved, cave.address, self._block, call)
            except OSError as error:
                tracee.failed(error)
            tracee.go_on_to_syscall()
            result = self._result(tracee, call)
            if result is not None:
                return result
            self._require_time(f"{call.name}, which signals interrupt again and again")

    def ioctl(self, fd: int, request: int, argument: int = 0) -> int:
        """Make an ioctl on a descriptor of the process; `argument` is a number, or an address there.

        Returns what it returned, 0 or more. RefusedError with the errno; the others as `call`.
        """
        return self.checked(Call("ioctl", self._machine.IOCTL, (fd, request, argument)))

    def munmap(self, address: int, size: int) -> None:
        """Unmap. Errors as ioctl."""
        self.checked(Call("munmap", self._machine.MUNMAP, (address, size)))

    def mmap(self, address: int, size: int, protection: int, flags: int) -> int:
        """Map private anonymous memory, and return where. Errors as ioctl."""
        return self.checked(self._machine.mmap(address, size, protection, flags)) & WORD

    def checked(self, call: Call) -> int:
        """As `call`, with an errno as RefusedError."""
        result = self.call(call)
        if -_MOST_ERRNO <= result < 0:
            raise RefusedError(self.target.pid, call.name, -result)
        return result

    def note(self) -> tuple[int, int, int]:
        """Return what is noted in the process: a buffer's address and size in bytes, and its owner; address 0: none."""
        return self._stub().note()

    def write_note(self, address: int, size: int, owner: int) -> None:
        """Note a buffer before it is mapped, or with zeros that there is none any more. GoneError."""
        tracee = self._held()
        try:
            self._stub().write_note(tracee.tid, address, size, owner)
        except OSError as error:
            tracee.failed(error)

    # --- the steps -------------------------------------------------------------------------------------------------

    def _held(self) -> Tracee:
        if self._tracee is None or not self._tracee.traced:
            raise InjectionError(self.target.pid, "no thread of it is held any more")
        return self._tracee

    def _stub(self) -> Cave:
        if self._cave is None:
            raise InjectionError(self.target.pid, "no thread of it is held yet")
        return self._cave

    def _leave_stub(self, cave: Cave) -> None:
        """Get the thread out of the stub, where a tracer that was killed has left it."""
        tracee = self._held()
        while True:
            at, stack = self._machine.place(tracee.tid)
            if not cave.holds(at):
                return
            if at == cave.address + self._machine.AFTER_CALL and self._machine.is_interrupted(tracee.tid):
                block = self.target.memory.read(stack, self._machine.block_size())
                self._machine.rescue(tracee.tid, block)
                return
            # Some ten instructions; it is let go on before it is asked to stop, else it would not come to run one.
            self._require_time("to get out of the stub")
            tracee.go_on()
            tracee.stop(self._deadline)

    def _hold(self) -> Saved:
        """Have the thread stopped, its registers saved, and the block it would restore itself from in place."""
        if self._saved is not None:
            return self._saved
        tracee = self._held()
        if tracee.stopped is None or tracee.stopped.why is not Stop.EVENT:
            self._stop_or_end(tracee)
        try:
            while rseq.is_inside(self.target.memory, tracee.tid, self._machine.place(tracee.tid)[0]):
                # Having stopped there is enough for the kernel to take it out of it.
                self._require_time("to leave a restartable sequence")
                tracee.go_on()
                self._stop_or_end(tracee)
            info = ptrace.get_syscall_info(tracee.tid)
            if info.arch != self._machine.AUDIT_ARCH:
                raise UnsupportedError(tracee.tid, f"thread {tracee.tid} makes system calls of another architecture")
            saved = self._machine.capture(tracee.tid)
        except OSError as error:
            tracee.failed(error)
        except ValueError as error:
            raise UnsupportedError(tracee.tid, f"thread {tracee.tid} can't make calls: {error}") from error
        block, content = self._machine.block(saved)
        try:
            below = self.target.memory.read(block, len(content))
            self.target.memory.write(block, content)
        except OSError as error:
            raise UnsupportedError(
                tracee.tid, f"thread {tracee.tid} has no room on its stack for {len(content)} bytes"
            ) from error
        self._saved, self._block, self._below = saved, block, below
        return saved

    def _require_time(self, what: str) -> None:
        """Let the thread go where the time is over: a process may do its worst to be held for ever. TimedOutError."""
        if time.monotonic() < self._deadline:
            return
        tid = self._held().tid
        self._end()
        raise TimedOutError(tid, f"thread {tid} took longer than {self._seconds} s {what}")

    def _stop_or_end(self, tracee: Tracee) -> None:
        try:
            tracee.stop(self._deadline)
        except TimedOutError:
            self._end()
            raise

    def _result(self, tracee: Tracee, call: Call) -> int | None:
        """Return what the call returned, or None: a signal came first, was delivered, and it is to be made again."""
        while True:
            try:
                stopped = tracee.wait(self._deadline)
            except TimedOutError:
                return self._give_up(tracee, call)
            match stopped.why:
                case Stop.SIGNAL:
                    self._keep_faults(tracee, stopped.signal, call)
                    self._put_back(tracee)
                    # Before it goes on, so that it stops again in front of the handler's first instruction.
                    tracee.interrupt()
                    tracee.go_on(stopped.signal)
                    return None
                case Stop.SYSCALL:
                    result = self._exit_of(tracee, call)
                    if result is not None and result not in INTERRUPTED:
                        return result
            # On to the exit; or to the signal that has interrupted the call; or into the call again.
            tracee.go_on_to_syscall()

    def _exit_of(self, tracee: Tracee, call: Call) -> int | None:
        try:
            info = ptrace.get_syscall_info(tracee.tid)
        except OSError as error:
            tracee.failed(error)
        if info.op != ptrace.SYSCALL_INFO_EXIT:
            self._require_own(tracee, info, call)
            return None
        # A call that seccomp answers with SIGSYS "returns" what its register held, its number on x86_64, or -ENOSYS on
        # s390x; the signal comes next.
        if info.result in (-errno.ENOSYS, call.number, *call.arguments[:1]) and self._is_pending(tracee, signal.SIGSYS):
            return None
        return info.result

    def _require_own(self, tracee: Tracee, info: ptrace.SyscallInfo, call: Call) -> None:
        """Let the thread go where it makes another call than it was to: another thread has written to the stub."""
        arguments = tuple(argument & WORD for argument in call.arguments)
        is_call = info.number == call.number and info.arguments[: len(arguments)] == arguments
        if info.op == ptrace.SYSCALL_INFO_ENTRY and (is_call or info.number == self._machine.RESTART_SYSCALL):
            return
        tid = tracee.tid
        self._end()
        raise UnsupportedError(tid, f"thread {tid} made the system call {info.number} in the place of {call.name}")

    def _is_pending(self, tracee: Tracee, number: int) -> bool:
        pending = int(proc.status(self.target.pid, tracee.tid).get("SigPnd", "0"), 16)
        return bool(pending >> (number - 1) & 1)

    def _is_fault(self, tracee: Tracee, number: int) -> bool:
        """Whether a signal is the thread's own doing, and so ours: while it is held it runs nothing but the stub."""
        if number not in _FAULTS or self._saved is None:
            return False
        try:
            _, code = ptrace.get_siginfo(tracee.tid)
        except OSError as error:
            tracee.failed(error)
        # Otherwise somebody has sent it, or it tells of something else: memory elsewhere that is broken, a counter.
        return code > 0 and (number, code) not in _NOT_AT_ONCE

    def _keep_faults(self, tracee: Tracee, number: int, call: Call) -> None:
        if not self._is_fault(tracee, number):
            return
        self._let_go(tracee)
        if number == signal.SIGSYS:
            raise RefusedError(self.target.pid, call.name, errno.ENOSYS, by_seccomp=True)
        name = signal.Signals(number).name
        raise FaultedError(tracee.tid, f"thread {tracee.tid} got {name} while it made the call {call.name}")

    def _give_up(self, tracee: Tracee, call: Call) -> int:
        """Interrupt a call that takes too long. Returns its result where it has one after all.

        One that can't be interrupted is waited for: nobody else could let the thread go, and once it has been asked to
        stop it stops, and stays so while its tracer lives.
        """
        tid = tracee.tid
        tracee.interrupt()
        while True:
            stopped = tracee.wait(FOREVER)
            if stopped.why is Stop.SYSCALL:
                result = self._exit_of(tracee, call)
                if result is not None and result not in INTERRUPTED:
                    return result
                tracee.interrupt()
                tracee.go_on()
                continue
            if stopped.why is Stop.SIGNAL:
                self._keep_faults(tracee, stopped.signal, call)
            self._let_go(tracee, stopped.signal)
            raise TimedOutError(tid, f"{call.name} in thread {tid} took longer than {self._seconds} s")

    def _put_back(self, tracee: Tracee) -> None:
        """Give the thread all that it had. It must be stopped where signals are looked for."""
        if self._saved is None:
            return
        saved, self._saved = self._saved, None
        try:
            self._machine.restore(tracee.tid, saved)
        except OSError as error:
            tracee.failed(error)
        with suppress(OSError):  # below its stack: nothing of the thread's
            self.target.memory.write(self._block, self._below)

    def _let_go(self, tracee: Tracee, number: int = 0) -> None:
        """Put the thread back, take the stub away where nobody needs it, and detach."""
        try:
            self._put_back(tracee)
            cave = self._cave
            # One that was there before is that of a tracer that was killed: a thread may have been left in it, and a
            # signal's handler that runs at this moment may be going to return there. This thread may be in it still, as
            # such a tracer has left it, where there was no time to get it out.
            ours = cave is not None and self.target.stub_is_ours and not cave.note()[0]
            if cave is not None and ours and not cave.holds(self._machine.place(tracee.tid)[0]):
                cave.erase(tracee.tid)
        except (OSError, GoneError):
            pass  # it has ended, or is about to; detach takes note
        finally:
            # Whatever happened: a thread that is at the stub restores itself, and one that is held stands still.
            tracee.detach(number)

    def _end(self) -> None:
        """Let the thread go, and wait for as long as that takes. Once it is on its own, nothing happens."""
        tracee = self._tracee
        if tracee is None or not tracee.traced:
            return
        while tracee.traced:
            stopped = tracee.stopped
            if stopped is not None and stopped.why is not Stop.SYSCALL:
                self._let_go(tracee, 0 if self._is_fault(tracee, stopped.signal) else stopped.signal)
                return
            tracee.interrupt()
            if stopped is not None:
                tracee.go_on()
            tracee.wait(FOREVER)
