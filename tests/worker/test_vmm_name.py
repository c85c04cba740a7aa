"""A guest's name on a command line, as QEMU reads it; and command lines that are meant to be trouble."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from skeyd.worker.vmm_name import COMMAND_MAX, NAME_MAX, is_name, name_in, name_of
from tests.processes import wait_for_end


@contextmanager
def process(*arguments: bytes | str) -> Iterator[int]:
    """Run a process with more arguments that it doesn't look at."""
    source = "import sys; print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", source, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"\n"
        yield running.pid


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("-name web", "web"),
        ("--name web", "web"),
        ("-name=web", "web"),
        ("--name=guest=web,process=x", "web"),
        ("-name guest=web,debug-threads=on", "web"),
        ("-name debug-threads=on,guest=web", "web"),
        ("-name web,debug-threads=on", "web"),
        ("-m 64M -name a,,b -S", "a,b"),
        ("-name guest=a,,,,b,,,process=x", "a,,b,"),
        ("-name a=b", ""),
        ("-name a,,b=c", "a,b=c"),
        ("-name guest=a=b", "a=b"),
        ("-name process=x,flag", ""),
        ("-name process=x,web", ""),
        ("-name ,guest=web", "web"),
        ("-name a,guest=b", "b"),
        ("-name a -name process=x", "a"),
        ("-name a -name guest=b", "b"),
        ("-name é -S", "é"),
        ("-name", ""),
        ("-name ", ""),
        ("-names web", ""),
        ("---name web", ""),
        ("name web", ""),
        ("", ""),
    ],
)
def test_a_name_is_what_qemu_takes_for_it(arguments: str, name: str) -> None:
    assert name_in([b"qemu", *arguments.encode().split(b" ")]) == name


def test_the_programs_own_name_is_no_option() -> None:
    assert name_in([b"-name", b"web"]) == ""
    assert name_in([]) == ""


@pytest.mark.parametrize(
    "value",
    [
        b"\xff",
        b"web\xff",
        b"a\nb",
        b"a\x1b[2Jb",
        "a\u202eb".encode(),
        "\ud800".encode("utf-8", "surrogatepass"),
        b"a\tb",
    ],
)
def test_what_cannot_be_shown_whole_is_no_name(value: bytes) -> None:
    assert name_in([b"qemu", b"-name", value]) == ""
    assert name_in([b"qemu", b"-name", b"a", b"-name", value]) == ""


def test_a_name_has_so_many_characters_and_no_more() -> None:
    assert name_in([b"qemu", b"-name", "é".encode() * NAME_MAX]) == "é" * NAME_MAX
    assert name_in([b"qemu", b"-name", b"a" * (NAME_MAX + 1)]) == ""
    assert not is_name("")


@pytest.mark.parametrize(
    "value", [b"," * COMMAND_MAX, b"a" * COMMAND_MAX, b"a,,=" * (COMMAND_MAX // 4), b"a=,b" * (COMMAND_MAX // 4)]
)
def test_the_longest_value_takes_no_time_to_speak_of(value: bytes) -> None:
    begin = time.process_time()
    name_in([b"qemu", b"-name", value])
    assert time.process_time() - begin < 2


def test_a_command_line_is_read_as_the_kernel_has_it() -> None:
    with process("-name", "guest=a b,,c,x=y", "-S") as pid:
        assert name_of(pid) == "a b,c"
    with process(b"-name", b"\xff") as pid:
        assert name_of(pid) == ""


def test_of_a_command_line_that_is_too_long_the_beginning_counts() -> None:
    # The kernel allows one argument 128 KiB, and all of them together some MiB.
    filler = ["x" * 100_000] * 20
    with process("-name", "web", *filler) as pid:
        assert name_of(pid) == "web"
    with process(*filler, "-name", "web") as pid:
        assert name_of(pid) == ""


def test_a_name_that_is_cut_is_no_name() -> None:
    with process("-c", "") as pid, open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123  a file of the kernel
        before = len(file.read())
    # Of "-name\0webx" the last character is beyond.
    room = COMMAND_MAX - before - len(b"-name\0web")
    fillers = ["x" * 99_999] * (room // 100_000)
    fillers.append("x" * (room - 100_000 * len(fillers) - 1))
    with process("-c", "", *fillers, "-name", "webx") as pid:
        assert name_of(pid) == ""
    fillers[-1] = fillers[-1][:-2]
    with process("-c", "", *fillers, "-name", "webx") as pid:
        assert name_of(pid) == "webx"


def test_a_process_that_has_ended_has_none() -> None:
    with process() as pid:
        pidfd = os.pidfd_open(pid)
    wait_for_end(pidfd)
    os.close(pidfd)
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        name_of(pid)


def test_who_asks_for_a_vmm_of_that_name_is_none() -> None:
    asks = [b"vm", b"adopt", b"guest", b"--name", b"web"]
    for command in ([b"skeyctl"], [b"sudo", b"skeyctl", b"--target", b"unix:/run/x"]):
        assert name_in([*command, *asks]) == ""
    assert name_in([b"qemu", b"adopt", b"vm", b"-name", b"web"]) == "web"
