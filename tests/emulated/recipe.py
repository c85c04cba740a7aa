"""What an emulated host is made of, and how: the part of the builder that decides what is in the image.

A change of what this file, cpio.py or patch_kvm.py do makes every cached image stale; what decides nothing about
an image (the cache, the command line, what a machine lacks) lives in image.py.

It runs as a process of its own, in mount and process namespaces that end with it; image.py starts it:
``python -m tests.emulated.recipe (SUITE | qemu) DIRECTORY MIRROR NAME``, NAME being the suite's on that mirror
"""

import ast
import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.emulated import patch_kvm
from tests.emulated.cpio import CpioWriter

# Debian's releases, and the Linux each has.
SUITES = {"bookworm": "6.1", "trixie": "6.12", "forky": "7.x"}

# bookworm has QEMU 7.2, which emulates some instructions wrong: see qemu.NEEDED_VERSION.
QEMU_SUITE = "trixie"

KERNEL = "vmlinuz"
INITRD = "initrd.cpio"

PACKAGES = (
    "systemd",
    "systemd-sysv",
    "mount",  # since forky systemd does not depend on it
    "dbus",
    "busybox-static",
    "kmod",
    "iproute2",
    "procps",
    # what skeyd runs on, and its tests
    "python3",
    "python3-grpcio",
    "python3-protobuf",
    "python3-structlog",
    "python3-zstandard",
    "python3-click",
    "python3-pytest",
    "python3-pytest-timeout",
    "python3-hypothesis",
)
# A VMM to be adopted: real QEMU with a real VM fd, paused before its first KVM_RUN.
VMM = {"bookworm": "qemu-system-misc"}
VMM_OTHERWISE = "qemu-system-s390x"

MODULES = ("kvm", "virtio_net", "autofs4")

# Unpacking the image is a third of the boot: what nothing in it reads goes. Patterns below the root.
UNUSED = (
    "boot/*",
    "tmp/*",
    "usr/bin/qemu-pr-helper",
    "usr/bin/qemu-storage-daemon",
    "usr/bin/qemu-system-[!s]*",
    "usr/bin/qemu-system-s[!3]*",
    "usr/lib/*-linux-gnu/gconv",
    "usr/lib/*-linux-gnu/perl",
    "usr/lib/*-linux-gnu/libperl.so*",
    "usr/lib/*-linux-gnu/qemu",
    "usr/lib/python3*/ensurepip",
    "usr/lib/python3*/test",
    "usr/lib/qemu",
    "usr/lib/systemd/catalog",
    "usr/lib/udev/hwdb.d",
    "usr/lib/udev/hwdb.bin",
    "usr/share/bash-completion",
    "usr/share/doc/*",
    "usr/share/icons",
    "usr/share/info",
    "usr/share/locale/*",
    "usr/share/man/*",
    "usr/share/perl",
    "usr/share/qemu/[!s]*",
    "usr/share/qemu/s[!3]*",
    "usr/share/zoneinfo",
    "var/cache/apt/*",
    "var/cache/debconf/*",
    "var/lib/apt/lists/*",
    "var/log/*.log",
    "var/log/apt/*",
)

# Units that take seconds under emulation and do nothing for a machine that lives for minutes.
MASKED_UNITS = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "getty.target",
    "ldconfig.service",
    "systemd-binfmt.service",
    "systemd-firstboot.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-timesyncd.service",
    "systemd-udev-trigger.service",
    "systemd-update-done.service",
)

_log = logging.getLogger(__name__)


def recipe_digest(kind: str) -> str:
    """Digest all that decides what is built for a suite or for "qemu", but for what the mirror has at the time."""
    here = Path(__file__)
    digest = hashlib.sha256(kind.encode())
    for source in (here, here.with_name("patch_kvm.py"), here.with_name("cpio.py")):
        digest.update(_meaning(source.read_text()).encode())
    return digest.hexdigest()[:16]


def _meaning(source: str) -> str:
    # The source without what changes nothing that it does: comments, docstrings, the way it is laid out.
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.unparse(tree)


def build_image(suite: str, directory: Path, mirror: str, name: str) -> None:
    """Make a suite's KERNEL and INITRD in an empty directory; `name` is what the mirror has the suite under.

    Needs root, and takes 4 minutes on 2 cores.

    Raises:
        subprocess.CalledProcessError: a tool failed; what it said is on stderr.
        patch_kvm.UnpatchableKernel: this suite's kernel has changed where it is patched.
    """
    _run_s390x_programs()
    work = directory / "work"
    root, kernel = work / "root", work / "kernel"
    work.mkdir()
    # The kernel first: whether it can be patched is known in half a minute. It is not installed, for then its
    # scripts would build an initramfs.
    _bootstrap(kernel, name, mirror, "extract", ["linux-image-s390x"], architecture="s390x")
    modules = next(path.parent for path in kernel.rglob("modules.order"))
    shutil.copy(next(path for path in kernel.rglob("vmlinuz*") if path.is_file()), directory / KERNEL)
    taken = _extract_modules(modules, work / "modules")
    _log.info("Linux %s with %s", modules.name, ", ".join(taken))
    _patch(work / "modules")
    packages = [*PACKAGES, VMM.get(suite, VMM_OTHERWISE)]
    _bootstrap(root, name, mirror, "essential", packages, architecture="s390x")
    shutil.move(work / "modules", root / "usr/lib/modules" / modules.name)
    _run("depmod", "-b", root, modules.name)
    _configure(root)
    _slim(root)
    with (directory / INITRD).open("wb") as stream, CpioWriter(stream) as archive:
        archive.tree(root)
    shutil.rmtree(work)


def build_qemu(directory: Path, mirror: str, name: str) -> None:
    """Unpack QEMU_SUITE's qemu-system-s390x for this machine into an empty directory; nothing is installed."""
    root = directory / "root"
    _bootstrap(root, name, mirror, "extract", ["qemu-system-s390x"])
    # Its loadable modules would be looked for, and not found to fit, where the machine's own QEMU has them.
    for modules in root.glob("usr/lib/*-linux-gnu/qemu"):
        shutil.rmtree(modules)
    for name in ("var", "usr/share/doc", "usr/share/locale", "usr/share/man"):
        shutil.rmtree(root / name, ignore_errors=True)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def _run_s390x_programs() -> None:
    # The kernel hands s390x programs to qemu-user from here on. The mount is this namespace's own.
    control = Path("/proc/sys/fs/binfmt_misc")
    if not (control / "register").exists():
        _run("mount", "-t", "binfmt_misc", "none", control)
    if not (control / "qemu-s390x").exists():
        (control / "register").write_text(Path("/usr/lib/binfmt.d/qemu-s390x.conf").read_text())


def _bootstrap(
    root: Path, name: str, mirror: str, variant: str, packages: Iterable[str], *, architecture: str = ""
) -> None:
    command = ["mmdebstrap", "--mode=root", f"--variant={variant}", "--components=main"]
    if architecture:
        command.append(f"--architectures={architecture}")
    command += [
        # A mirror may carry a testing suite with a date that has passed.
        '--aptopt=Acquire::Check-Valid-Until "false"',
        '--aptopt=APT::Install-Recommends "false"',
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--include=" + ",".join(packages),
        name,
        str(root),
        f"deb {mirror} {name} main",
    ]
    _run(*command)


def _extract_modules(modules: Path, into: Path) -> list[str]:
    # MODULES and what they depend on, uncompressed, and the lists that depmod wants, out of lib/modules/RELEASE.
    _run("depmod", "-b", modules.parents[2], modules.name)
    dependencies = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, needed = line.partition(":")
        dependencies[path] = needed.split()
    taken: set[str] = set()
    for name in MODULES:
        # A module may be built in, in which case there's no file.
        for path in [path for path in dependencies if Path(path).name.split(".")[0].replace("-", "_") == name]:
            taken |= {path, *dependencies[path]}
    for path in sorted(taken):
        (into / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(modules / path, into / path)
        if path.endswith(".xz"):
            _run("xz", "--decompress", into / path)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(modules / name, into / name)
    return sorted(taken)


def _patch(modules: Path) -> None:
    (module,) = modules.rglob("kvm.ko")
    module.write_bytes(patch_kvm.patch(module.read_bytes()))


def _configure(root: Path) -> None:
    # mmdebstrap took these two over from this machine.
    for name, content in (("hostname", "emulated\n"), ("resolv.conf", "")):
        (root / "etc" / name).unlink(missing_ok=True)
        (root / "etc" / name).write_text(content)
    # With an identity it is not a first boot, and newer than /usr it has nothing to update.
    (root / "etc/machine-id").write_text("5e1e51e5c0de4a11a5e1e51e5c0de4a1\n")
    for name in ("etc/.updated", "var/.updated"):
        (root / name).touch()
    for unit in MASKED_UNITS:
        link = root / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")


def _slim(root: Path) -> None:
    for pattern in UNUSED:
        for path in list(root.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def main(arguments: list[str]) -> None:
    """Build what is named first, in a directory, from a mirror, which has the suite under the name given last."""
    kind, directory, mirror, name = arguments
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.nice(10)
    if kind == "qemu":
        build_qemu(Path(directory), mirror, name)
    else:
        build_image(kind, Path(directory), mirror, name)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except patch_kvm.UnpatchableKernel as unpatchable:
        sys.exit(f"the kernel can't be patched: {unpatchable}")
