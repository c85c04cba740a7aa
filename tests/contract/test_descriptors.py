"""What the calls answer on descriptors that are no VM's: real kernels only."""

from __future__ import annotations

import json
from typing import Final

import pytest

from tests.contract.kernels import every_real_kernel
from tests.contract.real import RealKernel

PROGRAM: Final = """
import errno, fcntl, json, os
from skeyd.kvm import abi

KVM_CREATE_VCPU = 0xAE41  # include/uapi/linux/kvm.h @ v6.12

def device(path):
    return os.open(path, os.O_RDWR)

def vm():
    return fcntl.ioctl(device("/dev/kvm"), abi.KVM_CREATE_VM, 0)

def vcpu():
    return fcntl.ioctl(vm(), KVM_CREATE_VCPU, 0)

def answer(descriptor, request):
    try:
        return fcntl.ioctl(descriptor, request, bytearray(64))
    except OSError as error:
        return errno.errorcode[error.errno]

descriptor = {descriptor}
calls = (abi.KVM_S390_GET_SKEYS, abi.KVM_S390_SET_SKEYS, abi.KVM_S390_KEYOP)
print(json.dumps([answer(descriptor, call) for call in calls]))
"""


@every_real_kernel
@pytest.mark.parametrize(
    ("descriptor", "answer"),
    [('device("/dev/kvm")', "EINVAL"), ('device("/dev/null")', "ENOTTY"), ("vcpu()", "ENOTTY")],
)
def test_kvms_own_descriptor_is_einval_and_others_that_are_no_vms_are_enotty(
    real: RealKernel, descriptor: str, answer: str
) -> None:
    with real.allocate_pgste(on=True):
        assert json.loads(real.run(PROGRAM.format(descriptor=descriptor))) == [answer] * 3
