"""The part of KVM's user-space ABI that skeyd uses: one table, kernel names verbatim.

Request numbers are computed from the structures' sizes, which tests/kvm/test_abi.py pins together with every offset
and the resulting number. Structures are in native byte order, as the kernel reads them.
"""

from __future__ import annotations

import struct
from typing import Final

# include/uapi/asm-generic/ioctl.h @ v6.12 (s390 and x86 both use it as it is)
_IOC_WRITE, _IOC_READ = 1, 2
_KVMIO: Final = 0xAE


def _io(nr: int) -> int:
    return _KVMIO << 8 | nr


def _ioc(direction: int, nr: int, layout: struct.Struct) -> int:
    return direction << 30 | layout.size << 16 | _KVMIO << 8 | nr


# --- structures: include/uapi/linux/kvm.h @ v6.12, where nothing else is said -------------------------------------

kvm_userspace_memory_region: Final = struct.Struct("=IIQQQ")
"""u32 slot, u32 flags, u64 guest_phys_addr (bytes), u64 memory_size (bytes), u64 userspace_addr."""

kvm_s390_skeys: Final = struct.Struct("=QQQI36x")
"""u64 start_gfn, u64 count, u64 skeydata_addr, u32 flags, u32 reserved[9].

flags must be 0. reserved is never read by the kernel; zeros are sent. Nothing is ever written back.
"""

kvm_s390_keyop: Final = struct.Struct("=QBB6x")
"""u64 guest_addr (bytes), u8 key, u8 operation, u8 pad[6]. include/uapi/linux/kvm.h @ v7.0. The kernel writes key."""

# --- requests, in the order of their numbers -----------------------------------------------------------------------

KVM_GET_API_VERSION: Final = _io(0x00)
KVM_CREATE_VM: Final = _io(0x01)
KVM_CHECK_EXTENSION: Final = _io(0x03)
KVM_SET_USER_MEMORY_REGION: Final = _ioc(_IOC_WRITE, 0x46, kvm_userspace_memory_region)
# KVM_CAP_S390_KEYOP
KVM_S390_KEYOP: Final = _ioc(_IOC_READ | _IOC_WRITE, 0x53, kvm_s390_keyop)
# KVM_CAP_S390_SKEYS
KVM_S390_GET_SKEYS: Final = _ioc(_IOC_WRITE, 0xB2, kvm_s390_skeys)
# KVM_CAP_S390_SKEYS
KVM_S390_SET_SKEYS: Final = _ioc(_IOC_WRITE, 0xB3, kvm_s390_skeys)

NAMES: Final = {
    KVM_GET_API_VERSION: "KVM_GET_API_VERSION",
    KVM_CREATE_VM: "KVM_CREATE_VM",
    KVM_CHECK_EXTENSION: "KVM_CHECK_EXTENSION",
    KVM_SET_USER_MEMORY_REGION: "KVM_SET_USER_MEMORY_REGION",
    KVM_S390_KEYOP: "KVM_S390_KEYOP",
    KVM_S390_GET_SKEYS: "KVM_S390_GET_SKEYS",
    KVM_S390_SET_SKEYS: "KVM_S390_SET_SKEYS",
}
"""What an error calls a request."""

# --- constants -----------------------------------------------------------------------------------------------------

KVM_API_VERSION: Final = 12

# capabilities, for KVM_CHECK_EXTENSION
KVM_CAP_NR_MEMSLOTS: Final = 10
KVM_CAP_S390_SKEYS: Final = 110
KVM_CAP_S390_KEYOP: Final = 247

# KVM_S390_GET_SKEYS and KVM_S390_SET_SKEYS
KVM_S390_GET_SKEYS_NONE: Final = 1
"""GET's answer where the guest uses no storage keys: a result, not an error."""
KVM_S390_SKEYS_MAX: Final = 1048576
"""Most keys a call."""

# arch/s390/include/asm/kvm_host.h @ v6.12: program interruption "addressing"; Linux 7.0 and 7.1 return it for a hole
PGM_ADDRESSING: Final = 5
"""Returned, positive, by both calls for a frame in no memory slot on Linux 7.0 and 7.1 (source; 7.2 says EFAULT)."""

# KVM_S390_KEYOP's operations: include/uapi/linux/kvm.h @ v7.0
KVM_S390_KEYOP_ISKE: Final = 1
"""Gives the key."""
KVM_S390_KEYOP_RRBE: Final = 2
"""Resets R and gives R and C as they were; the other bits of what it gives are 0."""
KVM_S390_KEYOP_SSKE: Final = 3
"""Sets the key and gives the old one."""

MEMORY_ALIGNMENT: Final = 1 << 20
"""Bytes. Up to Linux 6.19 a slot's size and its address in the process must be multiples of a segment
(kvm_arch_prepare_memory_region), and so must its guest address (gmap_map_segment, whose refusal is only printed).
skeyd asks it of every VM, so that each could exist on every kernel."""
