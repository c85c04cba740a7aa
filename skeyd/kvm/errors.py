"""What can go wrong between skeyd and the kernel."""

from __future__ import annotations

import errno as errno_names
import os


class KvmError(Exception):
    """The kernel refused an ioctl.

    `ioctl` is the request's kernel name and `errno` the number it answered. `returned` is set where the kernel returned
    a positive number that is no result instead of an errno; `errno` then is what it stands for.
    """

    def __init__(self, ioctl: str, errno: int, returned: int | None = None) -> None:
        self.ioctl = ioctl
        self.errno = errno
        self.returned = returned
        name = errno_names.errorcode.get(errno, str(errno))
        how = f"{name} ({os.strerror(errno)})" if returned is None else f"{returned}, which stands for {name}"
        super().__init__(f"{ioctl} answered {how}")


class ClosedError(Exception):
    """A Kvm, a Vm or a memory was used after it was closed. The kernel saw nothing of it."""
