"""What each errno of the kernel comes to."""

from __future__ import annotations

import errno
import os

import pytest

from skeyd.errors import Reason
from skeyd.gfn import GfnRange
from skeyd.kvm.errors import KvmError
from skeyd.worker import refusals

FRAMES = GfnRange(0x100, 0x20)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EFAULT, Reason.GFN_NOT_MAPPED),
        (errno.EIO, Reason.VM_DEAD),
        (errno.ENOMEM, Reason.OUT_OF_MEMORY),
        (errno.ENOTTY, Reason.CAP_S390_SKEYS_MISSING),
        (errno.EINVAL, Reason.KERNEL_REFUSED),
        (errno.EPERM, Reason.KERNEL_REFUSED),
        (errno.EBADF, Reason.KERNEL_REFUSED),
        (4095, Reason.KERNEL_REFUSED),
    ],
)
def test_a_refused_key_call_has_a_reason_and_says_where(number: int, reason: Reason) -> None:
    refusal = refusals.of_key_call(KvmError("KVM_S390_SET_SKEYS", number), FRAMES)
    assert refusal.reason is reason
    assert refusal.metadata == {"gfn": "0x100", "count": "32", "errno": str(number)}
    assert "KVM_S390_SET_SKEYS answered" in refusal.message


def test_plus_5_is_a_frame_without_memory() -> None:
    refusal = refusals.of_key_call(KvmError("KVM_S390_GET_SKEYS", errno.EFAULT, returned=5), FRAMES)
    assert refusal.reason is Reason.GFN_NOT_MAPPED
    assert "answered 5" in refusal.message


def test_a_positive_number_that_nobody_has_explained_does_not_make_the_vm_dead() -> None:
    refusal = refusals.of_key_call(KvmError("KVM_S390_GET_SKEYS", errno.EIO, returned=7), FRAMES)
    assert refusal.reason is Reason.KERNEL_REFUSED
    assert "answered 7" in refusal.message


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOENT, "modprobe kvm"), (errno.EACCES, "group kvm"), (errno.EMFILE, "")]
)
def test_a_device_that_cannot_be_opened_has_its_remedy(number: int, remedy: str) -> None:
    refusal = refusals.of_opening_kvm(OSError(number, os.strerror(number)))
    assert refusal.reason is Reason.KVM_UNAVAILABLE
    assert refusal.metadata["errno"] == str(number)
    assert remedy in refusal.metadata["remedy"]
    assert os.strerror(number) in refusal.message
    assert remedy in refusal.message


def test_a_device_that_is_not_kvms_is_unavailable_too() -> None:
    refusal = refusals.of_opening_kvm(KvmError("KVM_GET_API_VERSION", errno.ENOTTY))
    assert refusal.reason is Reason.KVM_UNAVAILABLE
    assert "KVM_GET_API_VERSION answered ENOTTY" in refusal.message


def test_a_host_without_the_calls_is_told_what_it_can_do() -> None:
    refusal = refusals.no_capability()
    assert refusal.reason is Reason.CAP_S390_SKEYS_MISSING
    assert "simulated" in refusal.metadata["remedy"]


def test_want_of_pgste_has_both_remedies() -> None:
    refusal = refusals.of_create_vm(KvmError("KVM_CREATE_VM", errno.EINVAL))
    assert refusal.reason is Reason.PGSTE_UNAVAILABLE
    for remedy in ("vm.allocate_pgste=1", "--s390-pgste"):
        assert remedy in refusal.metadata["remedy"]
        assert remedy in refusal.message


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ENOMEM, Reason.OUT_OF_MEMORY), (errno.EMFILE, Reason.KERNEL_REFUSED)]
)
def test_a_vm_that_was_not_made_for_another_reason_says_which(number: int, reason: Reason) -> None:
    assert refusals.of_create_vm(KvmError("KVM_CREATE_VM", number)).reason is reason


@pytest.mark.parametrize("is_file", [False, True])
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EINVAL, Reason.MEMORY_INVALID),
        (errno.EEXIST, Reason.MEMORY_INVALID),
        (errno.ENOMEM, Reason.OUT_OF_MEMORY),
    ],
)
def test_a_slot_that_the_kernel_did_not_take_is_named(number: int, reason: Reason, is_file: bool) -> None:
    refusal = refusals.of_memory(KvmError("KVM_SET_USER_MEMORY_REGION", number), 3, is_file)
    assert refusal.reason is reason
    assert refusal.metadata == {"slot": "3"}
    assert refusal.message.startswith("memory slot 3: KVM_SET_USER_MEMORY_REGION")


@pytest.mark.parametrize(
    ("error", "is_file", "reason"),
    [
        (OSError(errno.ENOENT, "No such file"), True, Reason.MEMORY_FILE_UNUSABLE),
        (OSError(errno.ELOOP, "links"), True, Reason.MEMORY_FILE_UNUSABLE),
        (OSError(errno.ENOMEM, "no memory"), True, Reason.OUT_OF_MEMORY),
        (ValueError("too short"), True, Reason.MEMORY_FILE_UNUSABLE),
        (OSError(errno.ENOMEM, "no memory"), False, Reason.OUT_OF_MEMORY),
        (OSError(errno.EMFILE, "no descriptors"), False, Reason.OUT_OF_MEMORY),
        (ValueError("not aligned"), False, Reason.MEMORY_INVALID),
    ],
)
def test_memory_that_could_not_be_had_says_which_slot_and_why(
    error: OSError | ValueError, is_file: bool, reason: Reason
) -> None:
    refusal = refusals.of_memory(error, 2, is_file)
    assert refusal.reason is reason
    assert refusal.metadata == {"slot": "2"}
    assert refusal.message == f"memory slot 2: {error.strerror if isinstance(error, OSError) else error}"
