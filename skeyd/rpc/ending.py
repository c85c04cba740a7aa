"""The end of a call is the end of the worker's part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from skeyd.errors import SkeydError
from skeyd.rpc.calls import Cancelled
from skeyd.vms.hang_up import HangUp


class Call(Protocol):
    """What a grpc.ServicerContext says of the call."""

    def is_active(self) -> bool:
        """Whether the client is still there and its deadline has not passed."""
        ...

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Have a function called when the call ends, however that is; False: it has ended."""
        ...


@contextmanager
def hanging_up(call: Call) -> Iterator[HangUp]:
    """Give what hangs up when the call ends, to open a session with: what then waits for a worker ends with Cancelled.

    Entered before the front connects, so that a worker that never says hello keeps no call that has ended.
    """
    hang_up = HangUp()
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
