"""Which QEMU runs an emulated host: this machine's, or a newer one that is unpacked into the cache."""

import functools
import re
import shutil
import subprocess
from pathlib import Path

from tests.emulated import recipe
from tests.emulated.cache import CachedDirectory

PROGRAM = "qemu-system-s390x"
# The major version that a suite's kernel needs at least. QEMU 7.2 emulates two vector instructions wrong: since Linux
# 6.9 they compute the checksums of packets, so no connection is ever made, and 7.2 oopses in KVM's vcpu ioctls.
NEEDED_VERSION = {"trixie": 10, "forky": 10}


def newer_qemu() -> CachedDirectory:
    """Return where the newer QEMU is unpacked, or would be."""
    return CachedDirectory("qemu", recipe.recipe_digest("qemu"))


def needs_newer(suite: str) -> bool:
    """Tell whether this machine's QEMU is absent or too old for a suite that needs a certain one."""
    return suite in NEEDED_VERSION and (installed_version() or 0) < NEEDED_VERSION[suite]


@functools.cache
def installed_version() -> int | None:
    """Return the major version of this machine's QEMU, None if there is none."""
    program = shutil.which(PROGRAM)
    if program is None:
        return None
    printed = subprocess.run([program, "--version"], stdout=subprocess.PIPE, text=True, check=False).stdout
    version = re.search(r"version (\d+)\.", printed)
    return int(version[1]) if version else None


def command(suite: str) -> list[str]:
    """Return what to start for a suite; QEMU's own arguments go after it.

    Raises FileNotFoundError if it is neither installed nor unpacked.
    """
    if needs_newer(suite):
        return _unpacked(newer_qemu().path / "root")
    if (program := shutil.which(PROGRAM)) is None:
        raise FileNotFoundError(f"{PROGRAM} is not installed")
    return [program]


def _unpacked(root: Path) -> list[str]:
    # Run by its own release's loader and with its libraries: this machine's may be older.
    loader = next(iter(sorted(root.glob("usr/lib*/ld-linux*.so.*"))), None)
    if loader is None:
        raise FileNotFoundError(f"no QEMU is unpacked in {root}")
    libraries = ":".join(str(path) for path in sorted(root.glob("usr/lib/*-linux-gnu")))
    return [
        *(str(loader), "--library-path", libraries),
        *(str(root / "usr/bin" / PROGRAM), "-L", str(root / "usr/share/qemu")),
    ]
