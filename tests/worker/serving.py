"""A Service in a thread of this process, over any backend, and fronts that talk with it."""

from __future__ import annotations

import mmap
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from skeyd.linux import open_unnamed
from skeyd.worker.backend import Backend, Printing
from skeyd.worker.protocol import SOCKET, Hello
from skeyd.worker.service import Service
from tests.worker.processes import SECONDS, Front
from tests.worker.specs import UID


def _open_journal(directory: Path) -> int:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return open_unnamed(fd)
    finally:
        os.close(fd)


@contextmanager
def serving(
    directory: Path,
    backend: Backend,
    open_journal: Callable[[], int] | None = None,
    release: Callable[[], None] | None = None,
    print_keys: Callable[[float], Printing] | None = None,
) -> Iterator[Callable[[], None]]:
    """Serve a backend at a directory's socket; give what tells the service to stop."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wake, sender = socket.socketpair()
    with listener, wake, sender:
        listener.bind(str(directory / SOCKET))
        listener.listen()
        hello = Hello("web", UID, "0" * 32, "owned", "6.1", "0", os.getpid(), 0, backend.memory_map.slots)
        journal = open_journal or partial(_open_journal, directory)
        service = Service(listener, hello, backend, journal, release, print_keys)
        thread = threading.Thread(target=service.run, args=(wake,))
        thread.start()
        try:
            yield lambda: sender.sendall(b"x")
        finally:
            sender.sendall(b"x")
            thread.join(SECONDS)
            assert not thread.is_alive()
    backend.close()


@contextmanager
def met(directory: Path) -> Iterator[Front]:
    """Connect, and take the hello."""
    with Front(directory) as front:
        front.hello()
        yield front


@contextmanager
def attached(directory: Path) -> Iterator[tuple[Front, mmap.mmap]]:
    """Connect, and share memory for keys."""
    with met(directory) as front, front.shared() as buffers:
        yield front, buffers
