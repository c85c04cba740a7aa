"""/dev/kvm as an object: the real one where there is one."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from skeyd.kvm import abi
from skeyd.kvm.errors import ClosedError, KvmError
from skeyd.kvm.system import DEVICE, Kvm
from skeyd.kvm.vm import Vm


def test_a_missing_device_is_enoent(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Kvm(str(tmp_path / "kvm"))


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero"])
def test_what_is_no_kvm_device_is_refused_by_the_kernel_and_not_left_open(device: str) -> None:
    with pytest.raises(KvmError) as refused:
        Kvm(device)
    assert refused.value.ioctl == "KVM_GET_API_VERSION"
    assert refused.value.errno == errno.ENOTTY


@pytest.mark.parametrize("version", [0, 11, 13])
def test_another_api_than_the_one_of_all_kernels_is_refused_and_not_left_open(
    monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: version)
    with pytest.raises(KvmError) as refused:
        Kvm("/dev/null")
    assert refused.value.returned == version
    assert refused.value.ioctl == "KVM_GET_API_VERSION"


@pytest.fixture
def null_kvm(monkeypatch: pytest.MonkeyPatch) -> Kvm:
    """Make a Kvm over a device that answers everything with 12, for what needs no kernel."""
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: abi.KVM_API_VERSION)
    return Kvm("/dev/null")


def test_a_closed_kvm_is_closed_and_the_kernel_sees_nothing_more_of_it(
    null_kvm: Kvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    null_kvm.close()
    seen: list[Any] = []
    monkeypatch.setattr(fcntl, "ioctl", lambda *call: seen.append(call))
    with pytest.raises(ClosedError):
        null_kvm.create_vm()
    with pytest.raises(ClosedError):
        null_kvm.check_extension(abi.KVM_CAP_S390_SKEYS)
    assert seen == []


def test_closing_twice_is_fine_and_closes_nobody_elses_descriptor(null_kvm: Kvm) -> None:
    null_kvm.close()
    # The lowest free number: the one that was just given back.
    other = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        null_kvm.close()
        os.fstat(other)
    finally:
        os.close(other)


def test_leaving_the_with_closes_it(null_kvm: Kvm) -> None:
    with null_kvm:
        pass
    with pytest.raises(ClosedError):
        null_kvm.check_extension(0)


def test_the_descriptor_is_nobody_elses(null_kvm: Kvm) -> None:
    with null_kvm:
        assert [name for name in vars(null_kvm) if not name.startswith("_")] == []
        assert not hasattr(null_kvm, "fileno")


def _opened(link: str) -> list[int]:
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            if str(fd.readlink()) == link:
                found.append(int(fd.name))
        except FileNotFoundError:  # the listing's own
            continue
    return found


def test_the_real_device_is_opened_once_and_inherited_by_nobody(kvm: Kvm) -> None:
    (fd,) = _opened(DEVICE)
    assert not os.get_inheritable(fd)


def test_the_real_kernel_has_the_storage_key_calls_exactly_on_s390x(kvm: Kvm) -> None:
    assert (kvm.check_extension(abi.KVM_CAP_S390_SKEYS) > 0) == (os.uname().machine == "s390x")
    assert kvm.check_extension(abi.KVM_CAP_NR_MEMSLOTS) >= 32
    # No kernel has a capability of that number.
    assert kvm.check_extension(0x7FFF_FFFF) == 0


def test_a_real_vm_is_a_descriptor_inherited_by_nobody_and_outlives_the_device(kvm: Kvm, real_vm: Vm) -> None:
    (fd,) = _opened("anon_inode:kvm-vm")
    assert not os.get_inheritable(fd)
    kvm.close()
    assert _opened(DEVICE) == []
    assert real_vm.check_extension(abi.KVM_CAP_NR_MEMSLOTS) >= 32
    real_vm.close()
    assert _opened("anon_inode:kvm-vm") == []
