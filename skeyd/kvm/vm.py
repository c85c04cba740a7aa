"""A VM's file descriptor: memory slots and the storage-key ioctls, exactly as the kernel makes them.

Nothing is repaired, sliced or retried at this level: what the kernel loses here is lost (skeyd/worker/keys.py is
where it is not).
"""

from __future__ import annotations

import ctypes
import errno
import os
from types import TracebackType
from typing import Self

from skeyd.kvm import abi, ioctl
from skeyd.kvm.errors import ClosedError, KvmError
from skeyd.kvm.memory import GuestMemory
from skeyd.storage_key import FRAME_SIZE


def take_skeys(request: int, result: int) -> bool:
    """Return whether the guest uses storage keys, by what GET or SET returned. KvmError where that is no result."""
    if request == abi.KVM_S390_GET_SKEYS and result == abi.KVM_S390_GET_SKEYS_NONE:
        return False
    if result == 0:
        return True
    stands_for = errno.EFAULT if result == abi.PGM_ADDRESSING else errno.EIO
    raise KvmError(abi.NAMES[request], stands_for, returned=result)


def take_keyop(result: int, argument: bytes | bytearray) -> int:
    """Return the key that KEYOP has written into its argument. KvmError where what it returned is no result."""
    if result:
        raise KvmError(abi.NAMES[abi.KVM_S390_KEYOP], errno.EIO, returned=result)
    found: int = abi.kvm_s390_keyop.unpack(argument)[1]
    return found


class Vm:
    """A VM that this process created; made by Kvm.create_vm only.

    Closing drops the fd; closing twice is fine, and any other use after it is a ClosedError that the kernel never sees.

    Synchronization: the kernel serialises; two SETs of the same frames at once leave either's keys.
    """

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    def check_extension(self, capability: int) -> int:
        """Ask KVM_CHECK_EXTENSION of the VM: 0 for no."""
        return ioctl.call(self._open_fd(), abi.KVM_CHECK_EXTENSION, capability)

    def set_memory(self, slot: int, guest_phys_addr: int, memory: GuestMemory) -> None:
        """KVM_SET_USER_MEMORY_REGION: lay `memory` at a guest address in bytes. KvmError EINVAL, EEXIST, ENOMEM."""
        ioctl.call(
            self._open_fd(),
            abi.KVM_SET_USER_MEMORY_REGION,
            # SAFETY: the address is a live mapping of `size` bytes; should it go, the kernel answers EFAULT.
            abi.kvm_userspace_memory_region.pack(slot, 0, guest_phys_addr, memory.size, memory.address),
        )

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """KVM_S390_GET_SKEYS: fill `buffer`, writable bytes, with the keys of as many frames from `start_gfn` on.

        False where the guest uses no storage keys (the buffer is then untouched), True where it does.
        KvmError EFAULT: a frame in no memory slot; EINVAL: no key or over KVM_S390_SKEYS_MAX of them; EIO: another
        process's VM, or the VM is dead. All or nothing: after an error the buffer is untouched.
        """
        return self._skeys(abi.KVM_S390_GET_SKEYS, start_gfn, buffer)

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
        """KVM_S390_SET_SKEYS: set the keys of as many frames from `start_gfn` on as `buffer`, writable bytes, has.

        Enables storage keys for the guest, for good, even when it then fails. KvmError as for get_skeys, EINVAL also
        for a reserved bit. Not transactional, and on Linux 4.19 to 6.19 keys are lost silently (docs/kernel.md).
        """
        self._skeys(abi.KVM_S390_SET_SKEYS, start_gfn, buffer)

    def keyop(self, operation: int, gfn: int, key: int = 0) -> int:
        """KVM_S390_KEYOP on one frame: the key that the operation gives (abi.KVM_S390_KEYOP_*).

        Works on a guest that uses no storage keys too, and enables nothing; what it sets there is lost when they are
        enabled. KvmError ENOTTY before Linux 7.0, EINVAL for an operation that is none, EFAULT for a frame in no memory
        slot; but Linux 7.0 and 7.1 *give a key* for such a frame (docs/kernel.md), so it must be known to be in one.
        """
        argument = bytearray(abi.kvm_s390_keyop.pack(gfn * FRAME_SIZE, key, operation))
        return take_keyop(ioctl.call(self._open_fd(), abi.KVM_S390_KEYOP, argument), argument)

    def _skeys(self, request: int, start_gfn: int, buffer: memoryview) -> bool:
        # SAFETY: the kernel reads or writes len(buffer) bytes at this address; `keys` holds the buffer's memory in
        # place until the call is over.
        keys = (ctypes.c_ubyte * buffer.nbytes).from_buffer(buffer)
        argument = abi.kvm_s390_skeys.pack(start_gfn, buffer.nbytes, ctypes.addressof(keys), 0)
        try:
            result = ioctl.call(self._open_fd(), request, argument)
        finally:
            # Also on an error, whose traceback would otherwise keep the buffer from being closed while it is told of.
            del keys
        return take_skeys(request, result)

    def close(self) -> None:
        """Close the fd. The VM ends with it."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def _open_fd(self) -> int:
        if self._fd is None:
            raise ClosedError("this Vm is closed")
        return self._fd

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
