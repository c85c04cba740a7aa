"""What nobody foresaw, and what nobody else will know, written to the worker's log."""

from __future__ import annotations

import sys
import traceback
from contextlib import suppress


def log_traceback() -> None:
    """Write the exception that is being handled to standard error, if that takes it.

    The log may lie on a disk that is full, and no VM ends for want of a log.
    """
    with suppress(OSError):
        traceback.print_exc()


def log_line(text: str) -> None:
    """Write a line there, if it is taken."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)  # noqa: T201  that is the log
