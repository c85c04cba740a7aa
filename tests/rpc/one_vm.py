"""GetSkeys without a daemon, of a VM whose worker is a test's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from skeyd.errors import Reason
from skeyd.rpc.get_skeys import get_skeys
from skeyd.rpc.slots import CallSlots
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.vms.hang_up import HangUp
from skeyd.vms.session import Session


class _OneVm:
    """A registry of the one VM whose worker listens in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextmanager
    def session(self, _: str, hang_up: HangUp) -> Iterator[Session]:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with Session.connect(fd, hang_up) as session:
                try:
                    yield session
                finally:
                    hang_up.let_go()
        finally:
            os.close(fd)


class GetCall:
    """A call that can be ended from outside."""

    def __init__(self, directory: Path, request: pb.GetSkeysRequest) -> None:
        self.slots = CallSlots(1, "streams", Reason.TOO_MANY_STREAMS)
        self._end: Callable[[], None] | None = None
        registry: Any = _OneVm(directory)
        self.parts = get_skeys(registry, self.slots, request, self)

    def is_active(self) -> bool:
        return True

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self._end = callback
        return True

    def end(self) -> None:
        assert self._end is not None
        self._end()
