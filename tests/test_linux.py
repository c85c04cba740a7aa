"""Locks that die with their holder, sealed memory, who is at the other end, and signals that nobody misses."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from skeyd.linux import (
    MAP_NORESERVE,
    Peer,
    is_sealed_memfd,
    lock_is_held,
    peer_of,
    sealed_memfd,
    signals_by_socket,
    take_lock,
    wide_pipe,
    write_in_vain,
)
from tests.daemon import DaemonProcess

SIZE = 1 << 20

_HOLDER = """
import os, sys
from skeyd.linux import take_lock
fd = os.open(sys.argv[1], os.O_RDWR)
print(take_lock(fd), flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def no_fd_left(open_fds: None) -> None:
    """Hold every test of this file to it."""


@pytest.fixture
def lock_fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    yield fd
    os.close(fd)


@contextmanager
def _holder(path: Path) -> Iterator[tuple[subprocess.Popen[str], bool]]:
    # A lock is a process's, so another process is needed: (it, whether it got the lock).
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline() == "True\n"
        process.kill()


# --- locks ---------------------------------------------------------------------------------------------------------


def test_a_lock_that_another_process_holds_is_seen_and_not_taken(tmp_path: Path, lock_fd: int) -> None:
    with _holder(tmp_path / "lock") as (_, got_it):
        assert got_it
        assert lock_is_held(lock_fd)
        assert not take_lock(lock_fd)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_is_free_once_its_holder_is_gone_however_it_went(
    tmp_path: Path, lock_fd: int, number: signal.Signals
) -> None:
    with _holder(tmp_path / "lock") as (process, got_it):
        assert got_it
        process.send_signal(number)
        process.wait(30)
        assert not lock_is_held(lock_fd)
        assert take_lock(lock_fd)


def test_looking_at_a_lock_takes_nothing(tmp_path: Path, lock_fd: int) -> None:
    assert not lock_is_held(lock_fd)
    with _holder(tmp_path / "lock") as (_, got_it):
        assert got_it


def test_a_lock_taken_keeps_others_out(tmp_path: Path, lock_fd: int) -> None:
    assert take_lock(lock_fd)
    with _holder(tmp_path / "lock") as (_, got_it):
        assert not got_it


@pytest.mark.parametrize("use", [take_lock, lock_is_held])
def test_what_cannot_be_locked_is_an_error_and_neither_yes_nor_no(use: Callable[[int], bool]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    with pytest.raises(OSError, match="Bad file descriptor"):
        use(reader)


def test_a_lock_needs_a_file_opened_for_writing(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    fd = os.open(tmp_path / "lock", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            take_lock(fd)
    finally:
        os.close(fd)


# --- sealed memory -------------------------------------------------------------------------------------------------


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = sealed_memfd("skeyd-test", SIZE)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1, 16 * SIZE])
def test_a_sealed_memfd_is_neither_cut_nor_grown(memfd: int, size: int) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(memfd, size)
    assert os.fstat(memfd).st_size == SIZE


def test_a_write_beyond_its_end_does_not_grow_a_sealed_memfd(memfd: int) -> None:
    with pytest.raises(PermissionError):
        os.pwrite(memfd, b"x", SIZE)


def test_the_seals_of_a_sealed_memfd_are_final(memfd: int) -> None:
    with pytest.raises(PermissionError):
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_sealed_memfd_is_zero_writable_shared_and_not_inherited(memfd: int) -> None:
    assert not os.get_inheritable(memfd)
    with mmap.mmap(memfd, SIZE) as one, mmap.mmap(memfd, SIZE) as other:
        assert one[:] == bytes(SIZE)
        one[-1] = 0x38
        assert other[-1] == 0x38


def test_a_sealed_memfd_is_known_as_one(memfd: int) -> None:
    assert is_sealed_memfd(memfd, SIZE)


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1])
def test_a_sealed_memfd_of_another_size_is_not_trusted(memfd: int, size: int) -> None:
    assert not is_sealed_memfd(memfd, size)


@pytest.mark.parametrize(
    "seals",
    [
        0,
        fcntl.F_SEAL_SHRINK,
        fcntl.F_SEAL_GROW,
        fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW,  # not final
        fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK,
        fcntl.F_SEAL_SEAL | fcntl.F_SEAL_GROW,
        fcntl.F_SEAL_SEAL,
    ],
)
def test_a_memfd_that_lacks_a_seal_is_not_trusted(seals: int) -> None:
    fd = os.memfd_create("skeyd-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, SIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        assert not is_sealed_memfd(fd, SIZE)
    finally:
        os.close(fd)


def test_files_pipes_and_sockets_are_no_sealed_memory() -> None:
    with ExitStack() as undo:
        file = undo.enter_context(tempfile.TemporaryFile())
        file.truncate(SIZE)
        reader, writer = os.pipe()
        undo.callback(os.close, reader)
        undo.callback(os.close, writer)
        one, other = socket.socketpair()
        undo.enter_context(one)
        undo.enter_context(other)
        assert not any(is_sealed_memfd(fd, SIZE) for fd in (file.fileno(), reader, writer, one.fileno()))


def test_sealed_memory_that_cannot_be_had_is_an_error_that_leaves_nothing_open() -> None:
    # The fixture that holds this file to its descriptors is what fails if one is left.
    with pytest.raises(OSError, match="Invalid argument"):
        sealed_memfd("skeyd-test", -1)


# --- the rest ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [0, MAP_NORESERVE])
def test_memory_is_mapped_without_reserve_exactly_where_the_flag_says_so(flag: int) -> None:
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flag) as memory:
        byte = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(byte)
        del byte
        # "nr" is the kernel's own word for it, in the mapping's line of flags.
        blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]
        (own,) = (one for one in blocks if _covers(one, address))
        flags = re.search(r"^VmFlags:(.*)$", own, re.MULTILINE)
    assert flags is not None
    assert ("nr" in flags[1].split()) == bool(flag)


def _covers(block: str, address: int) -> bool:
    start, end = block.split(" ", 1)[0].split("-")
    return int(start, 16) <= address < int(end, 16)


def test_the_peer_of_a_socket_is_known_by_the_kernels_word() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        assert peer_of(one) == peer_of(other) == Peer(os.getpid(), os.geteuid(), os.getegid())


def test_who_connects_learns_who_listened_and_not_who_accepts(runtime_dir: Path) -> None:
    listen = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); "
        "s.bind(sys.argv[1]); s.listen(); print(flush=True); sys.stdin.read()"
    )
    path = str(runtime_dir / "socket")
    with (
        subprocess.Popen(
            [sys.executable, "-c", listen, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
    ):
        assert listener.stdout is not None
        listener.stdout.readline()
        connection.connect(path)
        assert peer_of(connection).pid == listener.pid


# --- signals -------------------------------------------------------------------------------------------------------


def test_signals_wait_for_whoever_comes_late_each_by_its_number_in_order() -> None:
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGUSR2)
    try:
        with signals_by_socket([signal.SIGUSR1, signal.SIGUSR2]) as (told, teller):
            os.kill(os.getpid(), signal.SIGUSR2)
            os.kill(os.getpid(), signal.SIGUSR1)
            teller.send(b"\0")
            told.settimeout(10)
            assert told.recv(3) == bytes([signal.SIGUSR2, signal.SIGUSR1, 0])
        assert signal.set_wakeup_fd(-1) == -1, "nothing is written to a number that may be another's by now"
    finally:
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGUSR2, before[1])


def test_a_signal_that_comes_just_before_the_wait_ends_the_daemon(runtime_dir: Path) -> None:
    # The wait for a lock that was here before lost some of these.
    daemon = DaemonProcess(runtime_dir)
    try:
        for _ in range(3):
            daemon.start()
            daemon.terminate()
            assert daemon.wait() == 0
    finally:
        daemon.end_everything()


# --- writing to who doesn't read -----------------------------------------------------------------------------------


def write_for_ever(fd: int) -> None:
    while True:
        os.write(fd, bytes(4096))


def test_a_full_pipe_keeps_nobody_waiting_and_its_other_writers_have_it_as_it_was() -> None:
    reader, fd = os.pipe()
    others = os.dup(fd)
    try:
        write_in_vain(fd)
        with pytest.raises(BlockingIOError):
            write_for_ever(fd)
        assert os.get_blocking(others)
        assert not os.get_inheritable(fd)
        os.set_inheritable(others, True)
        write_in_vain(others)
        assert os.get_inheritable(others)
        assert not os.get_blocking(others)
    finally:
        for one in (reader, fd, others):
            os.close(one)


def test_a_full_socket_keeps_nobody_waiting_for_long() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        write_in_vain(ours.fileno())
        with pytest.raises(BlockingIOError):
            write_for_ever(ours.fileno())


def test_files_and_pipes_without_a_reader_are_left_as_they_are(tmp_path: Path) -> None:
    reader, fd = os.pipe()
    os.close(reader)
    file = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        write_in_vain(fd)
        with pytest.raises(BrokenPipeError):
            os.write(fd, b"a")
        os.write(file, b"a")
        write_in_vain(file)
        os.write(file, b"b")
        assert (tmp_path / "log").read_bytes() == b"ab"
    finally:
        os.close(fd)
        os.close(file)


@pytest.mark.parametrize("size", [1 << 12, 1 << 20])
def test_a_pipe_for_a_stranger_is_opened_by_its_path_and_never_waited_for(size: int) -> None:
    read, write = wide_pipe(size)
    try:
        with pytest.raises(BlockingIOError):
            os.read(read, 1)
        assert os.fstat(write).st_mode & 0o777 == 0o622
        assert fcntl.fcntl(read, fcntl.F_GETPIPE_SZ) >= min(size, 1 << 16)
        assert not os.get_inheritable(read)
        assert not os.get_inheritable(write)
        anew = os.open(f"/proc/self/fd/{write}", os.O_WRONLY | os.O_CLOEXEC)
        os.close(write)
        write = anew
        assert os.write(write, b"x") == 1
        assert os.read(read, 2) == b"x"
    finally:
        os.close(read)
        os.close(write)
