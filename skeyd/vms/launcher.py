"""The program that workers are started through: which one, and whether it can be trusted.

Up to Linux 6.19 a process needs PGSTE page tables to create a VM. `skeyd-pgste` (deploy/launcher) has them and becomes
the worker, which so has them too; nobody else on the host pays for it, as with the sysctl. docs/kernel.md has the rest.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

DEFAULT: Final = Path("/usr/libexec/skeyd/skeyd-pgste")
"""Where it is installed with PREFIX=/usr, as packages do."""

NONE: Final = "none"
"""What the command line says instead of a path for: no launcher."""


class LauncherError(Exception):
    """The launcher can't be used. The message says why."""


def find_launcher(given: str | None) -> Path | None:
    """Return the launcher that the command line names, DEFAULT where it names none and there is one, or None.

    LauncherError where there is one and it can't be used, DEFAULT too: to go on without it would hide that.
    """
    if given == NONE:
        return None
    if given is None:
        return _checked(DEFAULT) if os.path.lexists(DEFAULT) else None
    path = Path(given)
    if not path.is_absolute():
        raise LauncherError(f"{given!r}: the worker launcher has to be an absolute path, or {NONE}")
    return _checked(path)


def _checked(path: Path) -> Path:
    # It gets every worker's descriptors, so whoever can change or replace it has the guests' memory: the file and all
    # folders above it must be root's or this process's user's. What was checked is what is used: no link is left in it.
    try:
        real = Path(os.path.realpath(path, strict=True))
        if not stat.S_ISREG(real.stat().st_mode):
            raise LauncherError(f"{_name(path, real)}: the worker launcher is no regular file")
        for part in (real, *real.parents, *path.parents):
            _require_own(part, f"{_name(path, real)}: the worker launcher can't be trusted")
    except OSError as error:
        raise LauncherError(f"{path}: the worker launcher can't be used: {error.strerror}") from error
    if not os.access(real, os.X_OK, effective_ids=True):
        raise LauncherError(f"{_name(path, real)}: the worker launcher may not be executed by uid {os.geteuid()}")
    return real


def _name(path: Path, real: Path) -> str:
    return str(path) if path == real else f"{path} (which is {real})"


def _require_own(part: Path, complaint: str) -> None:
    found = part.stat()
    if found.st_uid not in (0, os.geteuid()):
        raise LauncherError(f"{complaint}: {part} belongs to uid {found.st_uid}, neither root's nor {os.geteuid()}")
    # In a folder with the sticky bit, as /tmp, nobody can replace what is another's.
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
        mode = stat.S_IMODE(found.st_mode)
        raise LauncherError(f"{complaint}: others may write to {part} (mode {mode:04o}); chmod go-w")
