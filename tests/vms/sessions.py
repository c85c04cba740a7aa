"""A session with a worker of the test's own, and what it is asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from skeyd.errors import SkeydError
from skeyd.gfn import GfnRange
from skeyd.vms.session import Session
from skeyd.worker.outcomes import Begun, LastWrite
from tests.vms.fake_worker import Caller, FakeWorker, Script, hello

OK: dict[str, Any] = {"ok": {}}
READ: dict[str, Any] = {"ok": {"uses_keys": True, "ns": 1}}
"""A good answer to "get"."""
FRAMES = GfnRange(0x100, 4)
Use = Callable[[Session], object]


@contextmanager
def directory_of(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def opened(path: Path) -> Iterator[Session]:
    with directory_of(path) as fd, Session.connect(fd) as session:
        yield session


def read_frames(session: Session) -> list[tuple[GfnRange, bytes | None]]:
    return list(session.read_slices([FRAMES]))


def write_frames(session: Session) -> tuple[int, bool]:
    repaired, enabled, _ = session.write_slice(FRAMES, b"\x10\x20\x30\x40", allow_enable=True)
    return repaired, enabled


def refusal_of(path: Path, script: Script, use: Use) -> SkeydError:
    with FakeWorker(path, script), opened(path) as session, pytest.raises(SkeydError) as refused:
        use(session)
    return refused.value


ONE = {"uses_keys": True, "key": 0x30, "repaired": False}
BEGUN = Begun("begun", 0, 0, 0, False).to_message()
LAST = LastWrite("rolled_back", "mine", 4, 1, False, 4).to_message()


def sske(session: Session) -> object:
    return session.keyop("sske", 7, 0x40)


def rrbe(session: Session) -> object:
    return session.keyop("rrbe", 7)


def begin(session: Session) -> Begun:
    return session.begin("mine", "0" * 64, keep=True, resume=False)


def commit(session: Session) -> Begun:
    return session.commit(8, 2)


def require_unused(session: Session) -> None:
    session.require_unused("mine", "f" * 64)


def begin_nameless(session: Session) -> Begun:
    return session.begin("", "0" * 64, keep=True, resume=True)


def after_attaching(op: str, then: Callable[[Caller], None]) -> Script:
    # A worker that is a good one until it gets the request that matters.
    def script(caller: Caller) -> None:
        caller.say(hello())
        if op in ("get", "set"):
            os.close(caller.attach())
        assert caller.take()["op"] == op
        then(caller)

    return script
