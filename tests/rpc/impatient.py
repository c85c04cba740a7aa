"""Becomes a daemon with other limits of time.

``impatient.py IDLE_SECONDS KEEPALIVE_SECONDS python -m skeyd.server …``
"""

from __future__ import annotations

import runpy
import sys

from skeyd import limits

if __name__ == "__main__":
    limits.IDLE_SECONDS, limits.KEEPALIVE_SECONDS = map(float, sys.argv[1:3])  # type: ignore[misc]
    sys.argv = sys.argv[5:]
    runpy.run_module("skeyd.server", run_name="__main__", alter_sys=True)


def through(idle_seconds: float, keepalive_seconds: float) -> tuple[str, ...]:
    """Return what DaemonProcess is to go through."""
    return (sys.executable, __file__, str(idle_seconds), str(keepalive_seconds))
