"""The end of a call is the end of the worker's part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

from skeyd.errors import SkeydError
from skeyd.rpc.calls import Cancelled
from skeyd.vms.hang_up import HangUp, HangUps

_Told = TypeVar("_Told", HangUp, HangUps)


class Call(Protocol):
    """What a grpc.ServicerContext says of the call."""

    def is_active(self) -> bool:
        """Whether the client is still there and its deadline has not passed."""
        ...

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Have a function called when the call ends, however that is; False: it has ended."""
        ...


def hanging_up(call: Call) -> AbstractContextManager[HangUp]:
    """Give what hangs up when the call ends, to open a session with: what then waits for a worker ends with Cancelled.

    Entered before the front connects, so that a worker that never says hello keeps no call that has ended.
    """
    return _told(call, HangUp())


def all_hanging_up(call: Call) -> AbstractContextManager[HangUps]:
    """As `hanging_up`, for several sessions at once."""
    return _told(call, HangUps())


@contextmanager
def _told(call: Call, hang_up: _Told) -> Iterator[_Told]:
    if not call.add_callback(hang_up.now):
        raise Cancelled
    try:
        yield hang_up
    except SkeydError:
        if hang_up.was_told:
            raise Cancelled from None  # what failed was cut off on purpose
        raise


def require_active(call: Call) -> None:
    """Raise Cancelled where nobody waits for the answer any more."""
    if not call.is_active():
        raise Cancelled
