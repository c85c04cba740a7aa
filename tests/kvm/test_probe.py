"""What the host can do: yes, no or don't know, never a guess."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from skeyd.kvm import abi, probe
from skeyd.kvm.errors import KvmError
from skeyd.kvm.probe import Finding, HostReport, probe_host
from skeyd.kvm.system import Kvm
from skeyd.kvm.vm import Vm


class FakeVm(Vm):
    """A VM without a kernel; it remembers whether it was closed."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


class FakeKvm(Kvm):
    """A host: what its capabilities are and what KVM_CREATE_VM answers."""

    def __init__(
        self, skeys: int | KvmError = 1, keyop: int | KvmError = 0, create: FakeVm | KvmError | None = None
    ) -> None:
        self.answers = {abi.KVM_CAP_S390_SKEYS: skeys, abi.KVM_CAP_S390_KEYOP: keyop}
        self.create = create
        self.closed = False

    def check_extension(self, capability: int) -> int:
        answer = self.answers[capability]
        if isinstance(answer, KvmError):
            raise answer
        return answer

    def create_vm(self) -> Vm:
        assert self.create is not None, "nobody should have created a VM"
        if isinstance(self.create, KvmError):
            raise self.create
        return self.create

    def close(self) -> None:
        self.closed = True


def _opens(kvm: FakeKvm) -> Callable[[], Kvm]:
    return lambda: kvm


def _fails(error: Exception) -> Callable[[], Kvm]:
    def open_kvm() -> Kvm:
        raise error

    return open_kvm


def _by_name(report: HostReport) -> dict[str, Finding]:
    assert [one.name for one in report.findings] == ["kvm_device", "cap_s390_skeys", "cap_s390_keyop", "pgste"]
    return {one.name: one for one in report.findings}


def _answers(report: HostReport) -> list[bool | None]:
    return [one.answer for one in report.findings]


def test_a_host_that_has_everything_is_a_yes_throughout() -> None:
    kvm = FakeKvm(skeys=1, keyop=1, create=FakeVm())
    report = probe_host(_opens(kvm))
    assert report.can_own_vms is True
    assert _answers(report) == [True, True, True, True]


def test_the_keyop_capability_is_not_needed() -> None:
    report = probe_host(_opens(FakeKvm(skeys=1, keyop=0, create=FakeVm())))
    assert report.can_own_vms is True
    assert _by_name(report)["cap_s390_keyop"].answer is False


def test_nothing_is_left_of_a_probe() -> None:
    vm = FakeVm()
    kvm = FakeKvm(create=vm)
    probe_host(_opens(kvm))
    assert vm.closed
    assert kvm.closed


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV, errno.ENXIO])
def test_a_device_that_is_not_there_is_a_no_that_says_what_to_do(number: int) -> None:
    report = probe_host(_fails(OSError(number, os.strerror(number))))
    assert report.can_own_vms is False
    assert _answers(report) == [False, None, None, None]
    assert "modprobe kvm" in _by_name(report)["kvm_device"].remedy


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_device_for_others_only_is_a_dont_know_that_says_what_to_do(number: int) -> None:
    report = probe_host(_fails(OSError(number, os.strerror(number))))
    assert report.can_own_vms is None
    assert _answers(report) == [None, None, None, None]
    device = _by_name(report)["kvm_device"]
    assert "group kvm" in device.remedy
    assert os.strerror(number) in device.detail


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EBUSY])
def test_a_device_that_could_not_be_opened_for_another_reason_is_a_dont_know(number: int) -> None:
    report = probe_host(_fails(OSError(number, os.strerror(number))))
    assert report.can_own_vms is None
    assert _answers(report) == [None, None, None, None]
    assert os.strerror(number) in _by_name(report)["kvm_device"].detail


def test_a_device_that_is_not_kvms_is_a_no() -> None:
    report = probe_host(_fails(KvmError("KVM_GET_API_VERSION", errno.ENOTTY)))
    assert report.can_own_vms is False
    assert "KVM_GET_API_VERSION answered ENOTTY" in _by_name(report)["kvm_device"].detail


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_host_without_the_calls_is_a_no_and_no_vm_is_made_to_find_out_more(machine: str) -> None:
    report = probe_host(_opens(FakeKvm(skeys=0)), machine)
    assert report.can_own_vms is False
    assert _answers(report) == [True, False, False, None]
    found = _by_name(report)
    assert "capability 110 is 0" in found["cap_s390_skeys"].detail
    assert "simulated" in found["cap_s390_skeys"].remedy
    assert machine in found["pgste"].detail


def test_a_capability_that_the_kernel_would_not_tell_is_a_dont_know() -> None:
    report = probe_host(_opens(FakeKvm(skeys=KvmError("KVM_CHECK_EXTENSION", errno.EIO))))
    assert report.can_own_vms is None
    assert _answers(report) == [True, None, False, None]
    assert "EIO" in _by_name(report)["cap_s390_skeys"].detail


def test_want_of_pgste_is_a_no_with_both_remedies() -> None:
    kvm = FakeKvm(create=KvmError("KVM_CREATE_VM", errno.EINVAL))
    report = probe_host(_opens(kvm))
    assert report.can_own_vms is False
    assert _answers(report) == [True, True, False, False]
    pgste = _by_name(report)["pgste"]
    assert "vm.allocate_pgste=1" in pgste.remedy
    assert "--s390-pgste" in pgste.remedy
    assert "KVM_CREATE_VM answered EINVAL" in pgste.detail
    assert kvm.closed


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE, errno.EIO])
def test_a_vm_that_could_not_be_made_for_another_reason_is_a_dont_know(number: int) -> None:
    report = probe_host(_opens(FakeKvm(create=KvmError("KVM_CREATE_VM", number))))
    assert report.can_own_vms is None
    assert _answers(report) == [True, True, False, None]
    assert errno.errorcode[number] in _by_name(report)["pgste"].detail


@pytest.mark.parametrize(
    ("content", "said"),
    [("0\n", "vm.allocate_pgste is 0"), ("1\n", "vm.allocate_pgste is 1"), (None, "Linux 7.0 and later need none")],
)
@pytest.mark.parametrize("create", [FakeVm(), KvmError("KVM_CREATE_VM", errno.EINVAL)])
def test_the_sysctl_is_told_and_never_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, said: str, create: FakeVm | KvmError
) -> None:
    sysctl = tmp_path / "allocate_pgste"
    if content is not None:
        sysctl.write_text(content)
    monkeypatch.setattr(probe, "SYSCTL_PGSTE", str(sysctl))
    pgste = _by_name(probe_host(_opens(FakeKvm(create=create))))["pgste"]
    assert said in pgste.detail
    assert pgste.answer is isinstance(create, FakeVm)


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (
            "0\n",
            "a VM can be created; vm.allocate_pgste is 0, "
            "so this process has its page tables from its launcher or from the daemon",
        ),
        ("1\n", "a VM can be created; vm.allocate_pgste is 1"),
        (None, "a VM can be created; vm.allocate_pgste is not there (Linux 7.0 and later need none)"),
    ],
)
def test_a_yes_says_where_the_page_tables_come_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, detail: str
) -> None:
    sysctl = tmp_path / "allocate_pgste"
    if content is not None:
        sysctl.write_text(content)
    monkeypatch.setattr(probe, "SYSCTL_PGSTE", str(sysctl))
    pgste = _by_name(probe_host(_opens(FakeKvm(create=FakeVm()))))["pgste"]
    assert (pgste.answer, pgste.detail, pgste.remedy) == (True, detail, "")


def test_a_sysctl_that_cannot_be_read_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probe, "SYSCTL_PGSTE", str(tmp_path))
    assert "unreadable (Is a directory)" in _by_name(probe_host(_opens(FakeKvm(create=FakeVm()))))["pgste"].detail


def test_every_no_that_stops_owned_vms_has_a_remedy() -> None:
    hosts = [
        _fails(OSError(errno.ENOENT, "gone")),
        _opens(FakeKvm(skeys=0)),
        _opens(FakeKvm(create=KvmError("KVM_CREATE_VM", errno.EINVAL))),
        _fails(KvmError("KVM_GET_API_VERSION", errno.ENOTTY)),
    ]
    for host in hosts:
        report = probe_host(host)
        assert report.can_own_vms is False
        blocking = [one for one in report.findings if one.answer is False and one.name != "cap_s390_keyop"]
        assert blocking
        assert all(one.remedy for one in blocking)


def test_the_real_host_is_looked_at_without_leaving_anything_open(kvm: Kvm) -> None:
    report = probe_host()
    found = _by_name(report)
    assert found["kvm_device"].answer is True
    assert found["cap_s390_skeys"].answer is (os.uname().machine == "s390x")
