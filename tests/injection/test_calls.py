"""Calls that other processes make, and how they go on afterwards: as if nothing had happened."""

from __future__ import annotations

import errno
import os
import platform
import signal
import struct
import time
from pathlib import Path

import pytest

from skeyd.injection.buffer import Buffer
from skeyd.injection.errors import RefusedError, TimedOutError
from skeyd.injection.injection import Injection
from skeyd.injection.registers import Call
from skeyd.injection.target import Target
from skeyd.kvm import abi
from tests.injection.victims import SECONDS, Victim, cannot, differences, python_victim, wait_for

pytestmark = pytest.mark.usefixtures("victims")

X86 = platform.machine() == "x86_64"
GETPID = 39 if X86 else 20
GETTID = 186 if X86 else 236
READ = 0 if X86 else 3
PPOLL = 271 if X86 else 302
POLL = 7 if X86 else 168
NANOSLEEP = {230, 35} if X86 else {262, 162}
VFORK = 58 if X86 else 190
FUTEX = 202 if X86 else 238
PAUSE = 34 if X86 else 29
FIONREAD = 0x541B

SLICES = int(os.environ.get("SKEYD_SLICES", "1000"))


def hold(pid: int, times: int = 1) -> None:
    """Have the first thread make a few calls."""
    with Target(pid) as target:
        for _ in range(times):
            with Injection(target, seconds=SECONDS) as injection:
                assert injection.call(Call("getpid", GETPID, ())) == pid
                assert injection.call(Call("gettid", GETTID, ())) == pid


# --- what a thread was in goes on ------------------------------------------------------------------------------------


def test_all_registers_flags_and_the_memory_below_the_stack_are_what_they_were() -> None:
    with Victim("registers") as victim:
        hold(victim.pid, 50)
        victim.say("wake")
        assert victim.result().value == 0


@pytest.mark.parametrize("mode", ["ppoll", "ppoll-mask", "poll", "nanosleep", "futex"])
def test_a_wait_that_is_interrupted_lasts_as_long_as_it_was_to(mode: str) -> None:
    with Victim(mode, "400") as victim:
        number = {"poll": POLL, "futex": FUTEX}.get(mode, PPOLL)
        if mode != "nanosleep":
            victim.wait_until_in(number)
        hold(victim.pid, 20)
        result = victim.result()
        expected = (-1, errno.ETIMEDOUT) if mode == "futex" else (0, 0)
        assert (result.value, result.errno) == expected
        assert 0.4 <= result.seconds < 0.4 + SECONDS
        assert result.signals == 0


def test_time_spent_waiting_is_not_spent_again() -> None:
    for mode in ("ppoll", "poll", "nanosleep", "futex"):
        with Victim(mode, "3000") as victim:
            end = time.monotonic() + 2.5
            wait_for(lambda end=end: time.monotonic() > end)
            # Once: ppoll's end moves by as long as the thread is held.
            hold(victim.pid)
            # Had the call begun anew, it would be 3 s from then on.
            assert victim.result().seconds < 5.4


@pytest.mark.parametrize(
    ("mode", "number"), [("ppoll", PPOLL), ("ppoll-mask", PPOLL), ("read", READ), ("futex", FUTEX)]
)
def test_a_wait_for_something_ends_with_it(mode: str, number: int) -> None:
    with Victim(mode) as victim:
        victim.wait_until_in(number)
        hold(victim.pid, 20)
        assert victim.ping() == 0
        victim.wait_until_in(number)
        victim.say("wake")
        result = victim.result()
        assert (result.value, result.errno) == ({"read": 5, "futex": 0}.get(mode, 1), 0)


@pytest.mark.parametrize(("mode", "got"), [("handler", "handler 5"), ("alternate", "handler 5"), ("spin-handler", "")])
def test_a_thread_in_a_signal_handler_goes_on_in_it(mode: str, got: str) -> None:
    with Victim(mode) as victim:
        if got:
            victim.wait_until_in(READ)
        hold(victim.pid, 20)
        victim.say("wake")
        if got:
            assert victim.line() == got
        result = victim.result()
        assert result.value == 0


def test_a_loop_of_calls_and_computations_never_notices() -> None:
    with Victim("loop") as victim:
        hold(victim.pid, 300)
        before = victim.total()
        wait_for(lambda: victim.total() > before)


def test_an_interpreter_goes_on() -> None:
    with python_victim() as victim:
        hold(victim.pid, 50)
        assert victim.ping() == 499500


def test_slices_leave_a_process_as_it_was() -> None:
    with Victim("loop") as victim, Target(victim.pid) as target:
        hold(victim.pid)
        wait_for(lambda: victim.total() > 3)
        before = victim.look()
        for _ in range(SLICES):
            with Injection(target, seconds=SECONDS) as injection:
                buffer = Buffer.open(injection, 5000)
                assert injection.ioctl(0, FIONREAD, buffer.address) == 0
                buffer.close(injection)
        assert differences(before, victim.look()) == {}
        assert victim.ping() == 0
        count = victim.total()
        wait_for(lambda: victim.total() > count)


# --- signals ---------------------------------------------------------------------------------------------------------


def test_a_signal_that_comes_while_a_thread_is_held_is_delivered_once() -> None:
    with Victim("loop") as victim, Target(victim.pid) as target:
        for number in range(100):
            with Injection(target, seconds=SECONDS) as injection:
                assert injection.call(Call("getpid", GETPID, ())) == victim.pid
                os.kill(victim.pid, signal.SIGUSR1)
                assert injection.call(Call("getpid", GETPID, ())) == victim.pid
            wait_for(lambda number=number: victim.ping() == number + 1)


@pytest.mark.parametrize("again", [False, True], ids=["between calls", "before it is let go"])
def test_a_call_that_a_signal_should_interrupt_is_interrupted(again: bool) -> None:
    with Victim("pause") as victim, Target(victim.pid) as target:
        victim.wait_until_in(PAUSE)
        hold(victim.pid, 3)
        victim.wait_until_in(PAUSE)
        with Injection(target, seconds=SECONDS) as injection:
            injection.call(Call("getpid", GETPID, ()))
            os.kill(victim.pid, signal.SIGUSR1)
            if again:
                injection.call(Call("getpid", GETPID, ()))
        result = victim.result()
        assert (result.value, result.errno, result.signals) == (-1, errno.EINTR, 1)


def test_a_signal_that_only_ppoll_lets_through_gets_through() -> None:
    with Victim("ppoll-mask") as victim, Target(victim.pid) as target:
        victim.wait_until_in(PPOLL)
        with Injection(target, seconds=SECONDS) as injection:
            injection.call(Call("getpid", GETPID, ()))
            os.kill(victim.pid, signal.SIGUSR1)
            injection.call(Call("getpid", GETPID, ()))
        result = victim.result()
        assert (result.value, result.errno, result.signals) == (-1, errno.EINTR, 1)


def test_a_signal_in_the_middle_of_a_call_is_delivered_and_the_call_made_again() -> None:
    with Victim("loop") as victim, Target(victim.pid) as target:
        empty = next_pipe(victim.pid)
        # As long as a machine that is slow takes to see that it waits.
        with Injection(target, seconds=3) as injection:
            buffer = Buffer.open(injection, 16)
            pid = os.fork()
            if pid == 0:
                # While the read below waits, as /proc tells.
                try:
                    path = Path(f"/proc/{victim.pid}/task/{victim.pid}/syscall")
                    wait_for(lambda: path.read_text().startswith(f"{READ} {empty:#x} "))
                    os.kill(victim.pid, signal.SIGUSR1)
                finally:
                    os._exit(0)
            with pytest.raises(TimedOutError):
                injection.call(Call("read", READ, (empty, buffer.address, 16)))
            os.waitpid(pid, 0)
        assert victim.ping() == 1
        with Injection(target, seconds=SECONDS) as injection:
            buffer.close(injection)


def next_pipe(pid: int) -> int:
    """Return the victim's standard input, whose other end never says anything while nobody does."""
    assert str(Path(f"/proc/{pid}/fd/0").readlink()).startswith("pipe:")
    return 0


def test_a_stopped_process_makes_calls_and_stays_stopped() -> None:
    with Victim("read") as victim:
        os.kill(victim.pid, signal.SIGSTOP)
        state = Path(f"/proc/{victim.pid}/stat")
        wait_for(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")
        hold(victim.pid, 5)
        wait_for(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")
        os.kill(victim.pid, signal.SIGCONT)
        victim.say("wake")
        assert victim.result().value == 5


# --- limits and ends -------------------------------------------------------------------------------------------------


def test_a_thread_that_nothing_stops_is_let_go_once_it_can_be() -> None:
    # In vfork, whose parent waits for the child and for nothing else.
    with Victim("vfork", "2600") as victim, Target(victim.pid) as target:
        victim.wait_until_in(VFORK)
        with pytest.raises(TimedOutError, match="did not stop in time"), Injection(target, seconds=0.05):
            pass
        # Else it would stand still for as long as this process lives.
        result = victim.result()
        assert (result.value, result.signals) == (7, 0)
        assert result.seconds >= 2.6


def test_a_call_that_blocks_is_interrupted_in_time_and_the_thread_goes_on() -> None:
    with Victim("futex") as victim, Target(victim.pid) as target:
        victim.wait_until_in(FUTEX)
        with Injection(target, seconds=SECONDS) as injection:
            buffer = Buffer.open(injection, 16)
        begin = time.monotonic()
        with Injection(target, seconds=0.1) as injection, pytest.raises(TimedOutError, match="read"):
            injection.call(Call("read", READ, (channel(victim.pid), buffer.address, 16)))
        assert time.monotonic() - begin < SECONDS
        with Injection(target, seconds=SECONDS) as injection:
            buffer.close(injection)
        victim.wait_until_in(FUTEX)
        victim.say("wake")
        assert victim.result().value == 0


def channel(pid: int) -> int:
    """Return the reading end of the victim's own pipe."""
    return 3


def test_an_errno_of_a_call_is_told() -> None:
    with Victim("read") as victim, Target(victim.pid) as target, Injection(target, seconds=SECONDS) as injection:
        with pytest.raises(RefusedError, match=r"^ioctl in process \d+ answered ENOTTY") as refused:
            injection.ioctl(0, abi.KVM_CHECK_EXTENSION, 10)
        assert (refused.value.call, refused.value.errno) == ("ioctl", errno.ENOTTY)
        with pytest.raises(RefusedError, match="EBADF"):
            injection.ioctl(999, 0, 0)
        with pytest.raises(RefusedError, match="EFAULT"):
            injection.ioctl(0, FIONREAD, 8)


def test_a_buffer_is_filled_by_a_call_and_read() -> None:
    with Victim("futex") as victim, Target(victim.pid) as target:
        with Injection(target, seconds=SECONDS) as injection:
            buffer = Buffer.open(injection, 3 << 20)
            buffer.write(0, b"x" * (3 << 20))
            injection.ioctl(0, FIONREAD, buffer.address)
        assert buffer.read(0, 4) == struct.pack("=i", 0)
        view = bytearray(4)
        buffer.read_into((3 << 20) - 4, memoryview(view))
        assert view == b"xxxx"
        with pytest.raises(ValueError, match="not within"):
            buffer.read((3 << 20) - 3, 4)
        with Injection(target, seconds=SECONDS) as injection:
            buffer.close(injection)


def test_the_kernels_kvm_answers_through_another_process() -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        cannot("/dev/kvm is missing, or not for this user")
    with Victim("ppoll", "0", "/dev/kvm") as victim, Target(victim.pid) as target:
        links = Path(f"/proc/{victim.pid}/fd").iterdir()
        (fd,) = (int(link.name) for link in links if str(link.readlink()) == "/dev/kvm")
        with Injection(target, seconds=SECONDS) as injection:
            assert injection.ioctl(fd, abi.KVM_GET_API_VERSION) == abi.KVM_API_VERSION
            assert injection.ioctl(fd, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP_NR_MEMSLOTS) > 0
            vm = injection.ioctl(fd, abi.KVM_CREATE_VM)
            assert target.vm_fds() == [vm]
            if X86:
                buffer = Buffer.open(injection, 4096)
                buffer.write(0, abi.kvm_s390_skeys.pack(0, 1, buffer.address + 64, 0))
                for request in (abi.KVM_S390_GET_SKEYS, abi.KVM_S390_SET_SKEYS):
                    with pytest.raises(RefusedError, match="ENOTTY"):
                        injection.ioctl(vm, request, buffer.address)
                buffer.close(injection)
            assert injection.checked(Call("close", 3 if X86 else 6, (vm,))) == 0
        assert target.vm_fds() == []
        victim.say("wake")
        assert victim.result().value == 1
