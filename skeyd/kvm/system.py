"""/dev/kvm: capabilities, and the making of VMs."""

from __future__ import annotations

import errno
import os
from types import TracebackType
from typing import Final, Self

from skeyd.kvm import abi, ioctl
from skeyd.kvm.errors import ClosedError, KvmError
from skeyd.kvm.vm import Vm

DEVICE: Final = "/dev/kvm"


class Kvm:
    """An open /dev/kvm.

    OSError from the constructor: the device is missing (ENOENT: KVM isn't loaded) or not for this user (EACCES).
    KvmError: it is no KVM device, or another API than the one all kernels since 2.6.22 have.

    Synchronization: none needed; every call is one ioctl.
    """

    def __init__(self, path: str = DEVICE) -> None:
        self._fd: int | None = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            version = ioctl.call(self._fd, abi.KVM_GET_API_VERSION)
            if version != abi.KVM_API_VERSION:
                raise KvmError(abi.NAMES[abi.KVM_GET_API_VERSION], errno.ENOTSUP, returned=version)
        except BaseException:
            self.close()
            raise

    def check_extension(self, capability: int) -> int:
        """Ask KVM_CHECK_EXTENSION: 0 for no, 1 or a number that depends on the capability for yes."""
        return ioctl.call(self._open_fd(), abi.KVM_CHECK_EXTENSION, capability)

    def create_vm(self) -> Vm:
        """KVM_CREATE_VM. The VM belongs to this process's address space: others get EIO from its fd.

        KvmError EINVAL on s390x up to Linux 6.19: the process has no PGSTE page tables (docs/kernel.md).
        """
        return Vm(ioctl.call(self._open_fd(), abi.KVM_CREATE_VM, 0))

    def close(self) -> None:
        """Close it; VMs made from it live on. Closing twice is fine."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def _open_fd(self) -> int:
        if self._fd is None:
            raise ClosedError("this Kvm is closed")
        return self._fd

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
