"""The ABI's table: sizes, every offset, every number, as the kernel's headers have them."""

from __future__ import annotations

import ctypes
import struct

import pytest

from skeyd.kvm import abi

# What the kernel's headers declare, with their names; ctypes lays structures out as a C compiler does. u64 is aligned
# to 8 bytes on s390x and x86-64 alike.


class KvmUserspaceMemoryRegion(ctypes.Structure):
    # include/uapi/linux/kvm.h: struct kvm_userspace_memory_region
    _fields_ = (
        ("slot", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("guest_phys_addr", ctypes.c_uint64),
        ("memory_size", ctypes.c_uint64),
        ("userspace_addr", ctypes.c_uint64),
    )


class KvmS390Skeys(ctypes.Structure):
    # include/uapi/linux/kvm.h: struct kvm_s390_skeys
    _fields_ = (
        ("start_gfn", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("skeydata_addr", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32 * 9),
    )


class KvmS390Keyop(ctypes.Structure):
    # include/uapi/linux/kvm.h @ v7.0: struct kvm_s390_keyop
    _fields_ = (
        ("guest_addr", ctypes.c_uint64),
        ("key", ctypes.c_uint8),
        ("operation", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 6),
    )


LAYOUTS = [
    (
        abi.kvm_userspace_memory_region,
        KvmUserspaceMemoryRegion,
        32,
        {
            "slot": (0, 4),
            "flags": (4, 4),
            "guest_phys_addr": (8, 8),
            "memory_size": (16, 8),
            "userspace_addr": (24, 8),
        },
    ),
    (
        abi.kvm_s390_skeys,
        KvmS390Skeys,
        64,
        {"start_gfn": (0, 8), "count": (8, 8), "skeydata_addr": (16, 8), "flags": (24, 4)},
    ),
    (abi.kvm_s390_keyop, KvmS390Keyop, 16, {"guest_addr": (0, 8), "key": (8, 1), "operation": (9, 1)}),
]

layouts = pytest.mark.parametrize(
    ("layout", "declared", "size", "fields"), LAYOUTS, ids=[one[1].__name__ for one in LAYOUTS]
)


@layouts
def test_a_structure_has_the_kernels_size(
    layout: struct.Struct, declared: type[ctypes.Structure], size: int, fields: dict[str, tuple[int, int]]
) -> None:
    assert layout.size == ctypes.sizeof(declared) == size


@layouts
def test_every_field_lies_where_the_kernel_reads_it_and_nothing_else_is_written(
    layout: struct.Struct, declared: type[ctypes.Structure], size: int, fields: dict[str, tuple[int, int]]
) -> None:
    for number, (name, (offset, width)) in enumerate(fields.items()):
        # All ones in one field, so that the bytes that change are that field's, whatever the byte order.
        values = [0] * len(fields)
        values[number] = (1 << 8 * width) - 1
        assert layout.pack(*values) == bytes(offset) + b"\xff" * width + bytes(size - offset - width), name
        in_c = getattr(declared, name)
        assert (in_c.offset, in_c.size) == (offset, width), name


@layouts
def test_a_structure_is_in_the_byte_order_of_this_machine(
    layout: struct.Struct, declared: type[ctypes.Structure], size: int, fields: dict[str, tuple[int, int]]
) -> None:
    # Distinct bytes throughout: 0x0102… in the first field and so on.
    values = [int.from_bytes(bytes(range(offset + 1, offset + width + 1))) for offset, width in fields.values()]
    assert layout.pack(*values) == bytes(declared(*values))


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("KVM_GET_API_VERSION", 0xAE00),
        ("KVM_CREATE_VM", 0xAE01),
        ("KVM_CHECK_EXTENSION", 0xAE03),
        ("KVM_SET_USER_MEMORY_REGION", 0x4020AE46),
        ("KVM_S390_KEYOP", 0xC010AE53),
        ("KVM_S390_GET_SKEYS", 0x4040AEB2),
        ("KVM_S390_SET_SKEYS", 0x4040AEB3),
        ("KVM_API_VERSION", 12),
        ("KVM_CAP_NR_MEMSLOTS", 10),
        ("KVM_CAP_S390_SKEYS", 110),
        ("KVM_CAP_S390_KEYOP", 247),
        ("KVM_S390_GET_SKEYS_NONE", 1),
        ("KVM_S390_SKEYS_MAX", 1_048_576),
        ("PGM_ADDRESSING", 5),
        ("MEMORY_ALIGNMENT", 1_048_576),
    ],
)
def test_a_number_is_the_kernels(name: str, number: int) -> None:
    assert getattr(abi, name) == number


def test_every_request_of_the_table_is_called_by_its_kernel_name() -> None:
    requests = {
        name: value
        for name, value in vars(abi).items()
        # Requests carry KVM's type byte; capabilities and limits don't.
        if name.startswith("KVM_") and value >> 8 & 0xFF == 0xAE
    }
    assert {number: name for name, number in requests.items()} == abi.NAMES
    assert len(requests) == 7
