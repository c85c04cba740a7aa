"""The program that workers are started through: which one, and whether it can be trusted.

Up to Linux 6.19 a process needs PGSTE page tables to create a VM. `skeyd-pgste` (deploy/launcher) has them and becomes
the worker, which so has them too; nobody else on the host pays for it, as with the sysctl. docs/kernel.md has the rest.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

DEFAULT: Final = Path("/usr/libexec/skeyd/skeyd-pgste")
"""Where it is installed with PREFIX=/usr, as packages do."""

NONE: Final = "none"
"""What the command line says instead of a path for: no launcher."""

LINKS_MAX: Final = 40
"""On the way to it, as many as the kernel follows."""


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
    # It gets every worker's descriptors, so whoever can change or replace it has the guests' memory: the file, and all
    # folders and links on the way to it, must be root's or this process's user's. What was checked is what is used: no
    # link is left in it.
    try:
        way = _way(path)
        real, found = way[-1]
        if not stat.S_ISREG(found.st_mode):
            raise LauncherError(f"{_name(path, real)}: the worker launcher is no regular file")
        for part, about in reversed(way):
            _require_own(part, about, f"{_name(path, real)}: the worker launcher can't be trusted")
    except OSError as error:
        raise LauncherError(f"{path}: the worker launcher can't be used: {error.strerror}") from error
    if not os.access(real, os.X_OK, effective_ids=True):
        raise LauncherError(f"{_name(path, real)}: the worker launcher may not be executed by uid {os.geteuid()}")
    return real


def _way(path: Path) -> list[tuple[Path, os.stat_result]]:
    # Each folder and link that the kernel would pass, from the root on, and last the file itself. os.path.realpath()
    # tells of the end alone, and a link in between decides what that is.
    here = Path("/")
    passed = [(here, os.lstat(here))]
    ahead = [*reversed(path.parts[1:])]
    links = 0
    while ahead:
        part = here / ahead.pop()
        found = os.lstat(part)
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > LINKS_MAX:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            passed.append((part, found))
            target = part.readlink()
            # The root of an absolute one takes the place of `here`, as / does for paths.
            ahead.extend(reversed(target.parts))
        elif part.name == "..":
            here = here.parent
        else:
            here = part
            passed.append((here, found))
    return passed if passed[-1][0] == here else [*passed, (here, os.lstat(here))]


def _name(path: Path, real: Path) -> str:
    return str(path) if path == real else f"{path} (which is {real})"


def _require_own(part: Path, found: os.stat_result, complaint: str) -> None:
    if found.st_uid not in (0, os.geteuid()):
        raise LauncherError(f"{complaint}: {part} belongs to uid {found.st_uid}, neither root's nor {os.geteuid()}")
    if stat.S_ISLNK(found.st_mode):
        return  # its mode says nothing: who may change it is said by its folder's
    # In a folder with the sticky bit, as /tmp, nobody can replace what is another's.
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
        mode = stat.S_IMODE(found.st_mode)
        raise LauncherError(f"{complaint}: others may write to {part} (mode {mode:04o}); chmod go-w")
