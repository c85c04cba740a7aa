"""Where daemon and client meet when nobody says otherwise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

SOCKET: Final = "skeyd.sock"
"""The daemon's gRPC socket in its runtime directory."""


def default_runtime_dir() -> Path:
    """Return /run/skeyd for root, skeyd in the user's own runtime directory for others."""
    if os.geteuid() == 0:
        return Path("/run/skeyd")
    own = os.environ.get("XDG_RUNTIME_DIR")
    return Path(own) / "skeyd" if own else Path(f"/tmp/skeyd-{os.geteuid()}")  # noqa: S108  checked to be private


def default_target() -> str:
    """Return the gRPC target of a daemon that runs with its defaults."""
    return f"unix:{default_runtime_dir() / SOCKET}"
