"""Write what the kernel unpacks as its first file system: cpio archives in the "newc" format.

Python has no writer for them, and the cpio program would be one more thing to install where an image is only
booted. The format is Documentation/driver-api/early-userspace/buffer-format.rst of Linux.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TRAILER = "TRAILER!!!"


class CpioWriter:
    """Appends entries to an archive; the kernel accepts several archives one after the other.

    Leaving the context ends the archive. The stream stays open.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._inode = 0

    def __enter__(self) -> "CpioWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._entry(TRAILER, 0, b"")

    def directory(self, name: str, mode: int = 0o755) -> None:
        """Add a directory; `name` is relative to the root, as in "etc/systemd"."""
        self._entry(name, stat.S_IFDIR | mode, b"")

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a file of root's."""
        self._entry(name, stat.S_IFREG | mode, data)

    def symlink(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def tree(self, root: Path) -> None:
        """Add `root` and all that is below it, in order of name, with owners, modes, times and device numbers.

        A file with several names becomes several files: few have, and the kernel's rules for them are subtle.
        """
        for path in (root, *_below(root)):
            status = path.lstat()
            data = b""
            if stat.S_ISREG(status.st_mode):
                data = path.read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                data = os.fsencode(path.readlink())
            self._entry(
                str(path.relative_to(root)),
                status.st_mode,
                data,
                owner=(status.st_uid, status.st_gid),
                time=int(status.st_mtime),
                device=status.st_rdev,
            )

    def _entry(
        self,
        name: str,
        mode: int,
        data: bytes,
        *,
        owner: tuple[int, int] = (0, 0),
        time: int = 0,
        device: int = 0,
    ) -> None:
        self._inode += 1
        raw_name = os.fsencode(name) + b"\0"
        fields = (
            self._inode,
            mode,
            *owner,
            1,  # links
            time,
            len(data),
            0,  # the device that the file is on, major
            0,  # and minor
            os.major(device),
            os.minor(device),
            len(raw_name),
            0,  # checksum, unused in this format
        )
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._stream.write(_padded(header + raw_name))
        self._stream.write(_padded(data))


def _below(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _below(path)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
