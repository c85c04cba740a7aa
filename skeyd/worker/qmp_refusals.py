"""What keeps a VMM's QMP monitor from being used, as skeyd's reasons. By itself: only workers that use one load it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from skeyd.errors import Reason, SkeydError
from skeyd.qmp.errors import BusyError, QmpError, UnreachableError
from skeyd.worker.packets import ProtocolError


@contextmanager
def told() -> Iterator[None]:
    """Raise as SkeydErrors what goes wrong within: QMP_UNREACHABLE, QMP_BUSY, QMP_FAILED."""
    try:
        yield
    except UnreachableError as error:
        raise SkeydError(Reason.QMP_UNREACHABLE, str(error)) from error
    except BusyError as error:
        raise SkeydError(Reason.QMP_BUSY, str(error)) from error
    except QmpError as error:
        raise SkeydError(Reason.QMP_FAILED, str(error)) from error
    except ProtocolError as error:
        raise SkeydError(Reason.QMP_FAILED, f"the QMP monitor's answer is none: {error}") from error
