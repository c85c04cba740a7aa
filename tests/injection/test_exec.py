"""A process that executes another program while it is held: nothing of the old one's is written into the new one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import pytest

from skeyd.injection import proc
from skeyd.injection.errors import GoneError, InjectionError, UnsupportedError
from skeyd.injection.injection import Injection
from skeyd.injection.registers import Call, Saved
from skeyd.injection.target import Target
from tests.injection.test_calls import GETPID as GETPID_NUMBER
from tests.injection.test_calls import X86
from tests.injection.victims import SECONDS, Victim, wait_for

pytestmark = [pytest.mark.usefixtures("victims"), pytest.mark.timeout(120)]

EXECVE: Final = 59 if X86 else 11
GETPPID: Final = 110 if X86 else 64
GETPID: Final = Call("getpid", GETPID_NUMBER, ())

# Its first thread waits; a word has another one execute the new program, and it says where the arguments for that lie.
PROGRAM: Final = """
import ctypes, os, sys, threading
words = [ctypes.create_string_buffer(word) for word in (b"/bin/sh", b"-c", b"echo new; read word; echo $word")]
given = (ctypes.c_void_p * 4)(*map(ctypes.addressof, words), None)
def execute():
    sys.stdin.readline()
    os.execv("/bin/sh", ["sh", "-c", "echo new; read word; echo $word"])
threading.Thread(target=execute).start()
print("ready", flush=True)
print(ctypes.addressof(words[0]), ctypes.addressof(given), flush=True)
os.read(os.pipe()[0], 1)
"""


def program() -> Victim:
    return Victim(command=[sys.executable, "-c", PROGRAM])


def require_new(victim: Victim, target: Target) -> None:
    """Require that the new program runs as if nobody had been there, and that nobody is."""
    assert victim.line() == "new"
    assert proc.status(victim.pid, victim.pid)["TracerPid"] == "0"
    with pytest.raises(GoneError, match="runs another program now"):
        target.memory.read(0x1000, 8)
    with pytest.raises(GoneError, match="runs another program now"):
        target.memory.write(0x1000, b"x")
    with pytest.raises(GoneError):
        Injection(target, seconds=SECONDS).__enter__()
    victim.say("hello")
    assert victim.line() == "hello"


def test_another_thread_executes_it() -> None:
    with program() as victim, Target(victim.pid) as target:
        victim.line()
        program_file = Path(f"/proc/{victim.pid}/exe")
        old = program_file.readlink()

        def executes_another() -> bool:
            try:
                return program_file.readlink() != old
            except FileNotFoundError:
                return False  # it is between the two

        def hold() -> None:
            with Injection(target, seconds=SECONDS) as injection:
                assert injection.call(GETPID) == victim.pid
                victim.say("go")
                wait_for(executes_another)
                injection.call(GETPID)

        with pytest.raises(GoneError):
            hold()
        require_new(victim, target)


def make(target: Target, call: Call) -> int:
    with Injection(target, seconds=SECONDS) as injection:
        return injection.call(call)


def other_call(monkeypatch: pytest.MonkeyPatch, target: Target, call: Call) -> None:
    """Have the thread make this call, whatever it was to make: as if another one had written to the stub."""
    real = target.machine.enter

    def enter(tid: int, saved: Saved, stub: int, block: int, wanted: Call) -> None:
        real(tid, saved, stub, block, call)

    monkeypatch.setattr(target.machine, "enter", enter)


def test_the_thread_that_is_held_executes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with program() as victim, Target(victim.pid) as target:
        path, given = map(int, victim.line().split())
        with monkeypatch.context() as patched:
            other_call(patched, target, Call("execve", EXECVE, (path, given, 0)))
            with pytest.raises(GoneError, match="runs another program now"):
                make(target, GETPID)
        require_new(victim, target)


@pytest.mark.parametrize(
    "call", [Call("getppid", GETPPID, ()), Call("getpid", GETPID_NUMBER, (7,))], ids=["another call", "other arguments"]
)
def test_a_call_that_is_another_one_gives_no_result(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    wanted = Call("getpid", GETPID_NUMBER, (8,))
    with Victim("loop") as victim, Target(victim.pid) as target:
        before = victim.look()
        with monkeypatch.context() as patched:
            other_call(patched, target, call)
            with pytest.raises(UnsupportedError, match="in the place of getpid"):
                make(target, wanted)
        assert make(target, wanted) == victim.pid
        assert victim.ping() == 0
        assert victim.look().keys() == before.keys()


def test_a_thread_that_cant_be_put_back_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is at the stub then, and restores itself."""

    def fails(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with Victim("loop") as victim, Target(victim.pid) as target:
        with monkeypatch.context() as patched:
            patched.setattr(target.machine, "restore", fails)
            with pytest.raises(InjectionError, match="Input/output error"):
                make(target, GETPID)
        assert proc.status(victim.pid, victim.pid)["TracerPid"] == "0"
        assert victim.ping() == 0
