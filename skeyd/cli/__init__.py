"""skeyctl: storage keys from a desk."""

from __future__ import annotations

import os
import signal
import sys
import threading
from functools import partial
from typing import NoReturn


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run skeyctl and exit with its code. For the main thread of a process that does nothing else."""
    _open_missing_streams()
    # Its own log goes to standard error, where programs look for one JSON object. Read when grpc is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # A thread of grpc can trip over a call that an interrupt cuts off (seen with 1.85), and would say so there too.
    threading.excepthook = lambda _: None
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until there is a handler that says so in a word: no traceback out of the middle of an import.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from skeyd.cli import interrupts, skeyctl

    interrupts.run(
        partial(skeyctl.main, arguments), partial(skeyctl.say_interrupted, arguments), skeyctl.EXIT_INTERRUPTED
    )


def _open_missing_streams() -> None:
    # Who is started with a standard stream closed has None there, and its number goes to the next socket or file.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115  a name, not a path; for good


__all__ = ["main"]
