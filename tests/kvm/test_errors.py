"""What an error of the kernel says."""

from __future__ import annotations

import errno

import pytest

from skeyd.kvm.errors import KvmError


def test_an_error_names_the_ioctl_and_the_errno() -> None:
    error = KvmError("KVM_S390_SET_SKEYS", errno.EFAULT)
    assert (error.ioctl, error.errno, error.returned) == ("KVM_S390_SET_SKEYS", errno.EFAULT, None)
    assert str(error) == "KVM_S390_SET_SKEYS answered EFAULT (Bad address)"


def test_an_error_that_was_a_positive_number_says_the_number_and_what_it_stands_for() -> None:
    error = KvmError("KVM_S390_GET_SKEYS", errno.EFAULT, returned=5)
    assert str(error) == "KVM_S390_GET_SKEYS answered 5, which stands for EFAULT"


@pytest.mark.parametrize("number", [0, 4095])
def test_an_errno_without_a_name_is_said_by_number(number: int) -> None:
    assert f"answered {number} (" in str(KvmError("KVM_CREATE_VM", number))
