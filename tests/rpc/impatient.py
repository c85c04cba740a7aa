"""Becomes a daemon that waits for no client for longer than a second: ``impatient.py python -m skeyd.server …``."""

from __future__ import annotations

import runpy
import sys

from skeyd import limits

if __name__ == "__main__":
    limits.IDLE_SECONDS = 1.0  # type: ignore[misc]
    sys.argv = sys.argv[3:]
    runpy.run_module("skeyd.server", run_name="__main__", alter_sys=True)
