"""Images to boot: a kernel and its first file system, built once from Debian packages and cached.

``python -m tests.emulated.image SUITE [--force]``, from the checkout's root, builds what is absent and prints
where it is.
"""

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.emulated import qemu, recipe
from tests.emulated.archive import whole_suites
from tests.emulated.cache import CachedDirectory, cache_directory

HERE = Path(__file__).parent
BUILD_LOG = "build.log"
NOT_FETCHED = "E: Failed to fetch"  # apt's words for a package that its index names and the mirror hasn't
CAP_SYS_ADMIN = 21  # include/uapi/linux/capability.h

# What each of debian-packages is for: the program, or file, by which it is known to be installed.
EVIDENCE = {
    "qemu-system-s390x": qemu.PROGRAM,
    "mmdebstrap": "mmdebstrap",
    "arch-test": "arch-test",
    "qemu-user-static": "/usr/lib/binfmt.d/qemu-s390x.conf",
    "kmod": "depmod",
    "xz-utils": "xz",
}


class BuildFailed(Exception):  # noqa: N818 (says what happened)
    """An image or a QEMU could not be built; the message carries the end of the build's log."""


@dataclass(frozen=True)
class Image:
    """A suite's kernel and first file system, built or not.

    Raises ValueError for a suite that is not in `recipe.SUITES`.
    Synchronization: any number of processes may build the same image; one does, and the others wait.
    """

    suite: str

    def __post_init__(self) -> None:
        if self.suite not in recipe.SUITES:
            raise ValueError(f"{self.suite!r} is none of {', '.join(recipe.SUITES)}")

    @property
    def directory(self) -> Path:
        """Where it is once it is built."""
        return self._cached.path

    @property
    def kernel(self) -> Path:
        """The kernel, for QEMU's -kernel."""
        return self.directory / recipe.KERNEL

    @property
    def initrd(self) -> Path:
        """The first file system, an uncompressed cpio archive."""
        return self.directory / recipe.INITRD

    @property
    def _cached(self) -> CachedDirectory:
        return CachedDirectory(self.suite, recipe.recipe_digest(self.suite))

    def is_built(self) -> bool:
        """Tell whether it is cached, with the QEMU that it needs."""
        return self._cached.is_finished() and (not qemu.needs_newer(self.suite) or qemu.newer_qemu().is_finished())

    def missing(self) -> str | None:
        """Say in a sentence what this machine lacks to boot or else to build it, and what remedies that; None: nothing.

        Builds nothing, and changes nothing on the machine.
        """
        if self.is_built():
            if qemu.needs_newer(self.suite) or qemu.installed_version() is not None:
                return None
            return _missing_packages(["qemu-system-s390x"])
        return _missing_to_build()

    def build(self, *, again: bool = False) -> Path:
        """Build it, and the QEMU that it needs, where absent or wanted again; return its directory.

        Takes 4 to 10 minutes on 2 cores.

        Raises:
            BuildFailed: something is missing, a tool failed, or the kernel can't be patched; the message says so.
        """
        if (again or not self.is_built()) and (reason := _missing_to_build()):
            raise BuildFailed(reason)
        if qemu.needs_newer(self.suite):
            qemu.newer_qemu().obtain(lambda directory, lock: _build("qemu", directory, lock))
        return self._cached.obtain(lambda directory, lock: _build(self.suite, directory, lock), again=again)


def _missing_to_build() -> str | None:
    return _missing_packages(list(EVIDENCE)) or _missing_mirror() or _missing_rights()


def _missing_packages(packages: list[str]) -> str | None:
    absent = [package for package in packages if not _is_installed(EVIDENCE[package])]
    if not absent:
        return None
    names = " ".join(absent)
    if shutil.which("apt-get") is None:
        return f"The emulated host is built from Debian packages on a Debian machine, and this one lacks {names}."
    return f"The emulated host lacks {names}: apt-get install -y --no-install-recommends {names}"


def _is_installed(evidence: str) -> bool:
    return Path(evidence).exists() if evidence.startswith("/") else shutil.which(evidence) is not None


def _missing_mirror() -> str | None:
    if _mirror() is None:
        return (
            "The emulated host needs a Debian mirror, and apt knows none: add one to sources.list, then apt-get update."
        )
    return None


def _mirror() -> str | None:
    # The archive that this machine uses; its -updates and -security may be out of step there.
    if shutil.which("apt-get") is None:
        return None
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)"], stdout=subprocess.PIPE, text=True, check=False
    ).stdout
    return next((line for line in listed.splitlines() if line.endswith("/debian/")), None)


def _own_architecture() -> str:
    return subprocess.run(
        ["dpkg", "--print-architecture"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


def _missing_rights() -> str | None:
    if os.geteuid() != 0:
        where = f"XDG_CACHE_HOME={cache_directory().parents[1]}"
        return f"The emulated host's image is built by root, once: sudo {where} python3 -m tests.emulated.image SUITE"
    status = Path("/proc/self/status").read_text()
    capabilities = int(status.partition("CapEff:")[2].split()[0], 16)
    if not capabilities >> CAP_SYS_ADMIN & 1:
        return "The emulated host's image is built with mounts, and this root has no CAP_SYS_ADMIN: grant it."
    registered = Path("/proc/sys/fs/binfmt_misc/qemu-s390x").exists()
    if not registered and "binfmt_misc" not in Path("/proc/filesystems").read_text().split():
        return "The emulated host's image needs binfmt_misc, which this kernel has not got: modprobe binfmt_misc"
    return None


def _build(kind: str, directory: Path, lock: int) -> None:
    mirror = _mirror()
    assert mirror is not None
    names = whole_suites(mirror, *((recipe.QEMU_SUITE, _own_architecture()) if kind == "qemu" else (kind, "s390x")))
    for name in names:
        for left in directory.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        status, said = _build_from(name, kind, directory, mirror, lock)
        if status == 0:
            return
        if NOT_FETCHED not in said:
            break
    end = "\n".join(said.splitlines()[-30:])
    raise BuildFailed(f"building {kind} failed:\n{end}")


def _build_from(name: str, kind: str, directory: Path, mirror: str, lock: int) -> tuple[int, str]:
    log = directory / BUILD_LOG
    with log.open("wb") as stream:
        finished = subprocess.run(
            [
                # Should this process die, the guard ends the namespaces, and with them all processes and
                # mounts.
                *(sys.executable, "-I", "-S", str(HERE / "guard.py"), str(os.getpid())),
                *("unshare", "--mount", "--pid", "--fork", "--kill-child"),
                *(sys.executable, "-m", "tests.emulated.recipe", kind, str(directory), mirror, name),
            ],
            cwd=HERE.parents[1],
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            pass_fds=[lock],
            start_new_session=True,
            check=False,
        )
    return finished.returncode, log.read_text(errors="replace")


def main(arguments: list[str] | None = None) -> int:
    """Build an image where it is absent, and print its directory."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.emulated.image", description=main.__doc__)
    parser.add_argument("suite", choices=recipe.SUITES, help="Debian's release, which decides the kernel")
    parser.add_argument("--force", action="store_true", help="build it again even if it is cached")
    options = parser.parse_args(arguments)
    try:
        directory = Image(options.suite).build(again=options.force)
    except BuildFailed as failure:
        sys.stderr.write(f"{failure}\n")
        return 1
    sys.stdout.write(f"{directory}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
