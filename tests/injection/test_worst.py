"""A process that does its worst: it is held no longer than was said, and takes none of this one's memory."""

from __future__ import annotations

import errno
import os
import platform
import signal
from typing import Any, Final

import pytest

from skeyd.injection import buffer as buffer_module
from skeyd.injection import proc, ptrace
from skeyd.injection.buffer import Buffer
from skeyd.injection.cave import Cave
from skeyd.injection.errors import NotAllowedError, TimedOutError
from skeyd.injection.frozen import Frozen
from skeyd.injection.injection import Injection
from skeyd.injection.maps import mappings
from skeyd.injection.memory import Memory
from skeyd.injection.registers import Call
from skeyd.injection.target import Target
from skeyd.injection.tracee import Tracee
from tests.injection.victims import SECONDS, Victim, differences, wait_for

pytestmark = pytest.mark.usefixtures("victims")

GETPID: Final = Call("getpid", 39 if platform.machine() == "x86_64" else 20, ())
PROT_READ_WRITE: Final = 1 | 2
MAP_PRIVATE_ANONYMOUS: Final = 0x02 | 0x20
MIB: Final = 1 << 20


def test_memory_is_mapped_as_was_asked_though_a_signal_comes_first() -> None:
    # On s390x the call reads its arguments from memory below the stack, where the signal's frame goes.
    with Victim("loop") as victim, Target(victim.pid) as target:
        assert victim.ping() == 0  # its other thread maps memory of its own when it first answers
        before = victim.look()
        for number in range(20):
            with Injection(target, seconds=SECONDS) as injection:
                assert injection.call(GETPID) == victim.pid
                os.kill(victim.pid, signal.SIGUSR1)
                at = injection.mmap(0, 3 * MIB, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS)
                (found,) = [one for one in mappings(victim.pid) if one.start <= at < one.end]
                assert (found.access, found.end >= at + 3 * MIB) == ("rw-p", True)
                injection.munmap(at, 3 * MIB)
            # One that came before the handler of the last has returned would be no other.
            wait_for(lambda number=number: victim.ping() == number + 1)
        assert differences(before, victim.look()) == {}


def test_what_is_noted_to_be_a_buffer_and_is_larger_than_any_is_not_looked_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []

    def recorded(memory: Memory, address: int, size: int) -> bytes:
        read.append(size)
        return real(memory, address, size)

    real = Memory.read
    with Victim("loop") as victim, Target(victim.pid) as target, Injection(target, seconds=SECONDS) as injection:
        large = injection.mmap(0, 64 * MIB, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS)
        injection.write_note(large, 64 * MIB, 0)
        monkeypatch.setattr(Memory, "read", recorded)
        buffer = Buffer.open(injection, 5000)
        assert max(read) <= 4 * MIB
        assert not large <= buffer.address < large + 64 * MIB
        buffer.close(injection)
        # It is the process's own, as far as anybody knows.
        assert [one for one in mappings(victim.pid) if one.start <= large and large + 64 * MIB <= one.end]


@pytest.mark.parametrize(("start", "size"), [(1, 8192), (0, 8191), (0, 4096), (0, (4 << 20) + 4096)])
def test_what_no_skeyd_has_noted_is_no_buffer(start: int, size: int) -> None:
    with Victim("loop") as victim, Target(victim.pid) as target, Injection(target, seconds=SECONDS) as injection:
        at = injection.mmap(0, 8 * MIB, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS)
        target.memory.write(at + start, buffer_module.MARK)
        injection.write_note(at + start, size, 0)
        Buffer.open(injection, 5000).close(injection)
        (found,) = [one for one in mappings(victim.pid) if one.start <= at < one.end]
        assert found.end >= at + 8 * MIB, "and nothing of it was unmapped"


def test_a_thread_that_stays_in_the_stub_is_let_go_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with Victim("loop") as victim, Target(victim.pid) as target:
        with monkeypatch.context() as patched:
            patched.setattr(Cave, "holds", lambda *_: True)
            with pytest.raises(TimedOutError, match=r"to get out of the stub|did not stop in time"):
                Injection(target, seconds=0.3).__enter__()
        assert victim.ping() == 0


def test_a_call_that_is_interrupted_again_and_again_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Injection, *arguments: Any) -> None:
        real(self, *arguments)

    real = Injection._result
    with Victim("loop") as victim, Target(victim.pid) as target:
        with monkeypatch.context() as patched, Injection(target, seconds=0.3) as injection:
            patched.setattr(Injection, "_result", interrupted)
            with pytest.raises(TimedOutError, match="took longer than"):
                injection.call(GETPID)
        assert victim.ping() == 0


@pytest.mark.parametrize(
    ("number", "code", "is_ours"),
    [
        (signal.SIGSEGV, 1, True),
        (signal.SIGBUS, 4, True),
        (signal.SIGBUS, 5, False),  # BUS_MCEERR_AO: memory that is broken elsewhere
        (signal.SIGTRAP, 1, True),
        (signal.SIGTRAP, 6, False),  # TRAP_PERF
        (signal.SIGSEGV, 0, False),  # somebody's kill()
        (signal.SIGUSR1, 1, False),
    ],
)
def test_a_signal_that_tells_of_something_else_is_the_process_own(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int, is_ours: bool
) -> None:
    with Victim("loop") as victim, Target(victim.pid) as target, Injection(target, seconds=SECONDS) as injection:
        injection.call(GETPID)
        monkeypatch.setattr(ptrace, "get_siginfo", lambda _: (int(number), code))
        assert injection._is_fault(injection._held(), number) is is_ours
        monkeypatch.undo()


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES])
def test_a_kernel_or_a_security_module_that_allows_no_tracing_is_told_from_other_errors(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    with Victim("loop") as victim, Target(victim.pid) as target:
        monkeypatch.setattr(ptrace, "seize", refuse)
        with pytest.raises(NotAllowedError, match="does not allow tracing"):
            Injection(target, seconds=SECONDS).__enter__()


def test_a_thread_whose_number_is_another_processs_by_then_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(self: Frozen, listed: list[int]) -> list[Tracee]:
        # The list has a thread that has ended since, and whose number is the other's by now.
        lists.append(listed)
        return real(self, [*listed, other.pid])

    real = Frozen._asked_to_stop
    lists: list[list[int]] = []
    monkeypatch.setattr(Frozen, "_asked_to_stop", asked)
    with Victim("loop") as other, Victim("threads") as victim, Target(victim.pid) as target:
        with Frozen(target, SECONDS) as injection:
            assert proc.status(other.pid, other.pid)["TracerPid"] == "0"
            assert other.ping() == 0
            assert injection.call(GETPID) == victim.pid
        assert len(lists) > 1
        assert other.ping() == 0
