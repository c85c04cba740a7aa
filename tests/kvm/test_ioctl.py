"""The one seam to the kernel: what goes in, what comes out, and errors by name."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator

import pytest

from skeyd.kvm import abi, ioctl
from skeyd.kvm.errors import KvmError

SKEYS = abi.kvm_s390_skeys.pack(0, 1, 0, 0)


@pytest.fixture
def pipe() -> Iterator[int]:
    reader, writer = os.pipe()
    yield reader
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    ("request_", "argument"),
    [
        (abi.KVM_CHECK_EXTENSION, abi.KVM_CAP_S390_SKEYS),
        (abi.KVM_S390_GET_SKEYS, SKEYS),
        (abi.KVM_S390_SET_SKEYS, SKEYS),
    ],
)
def test_the_real_kernels_enotty_arrives_with_the_ioctls_name(pipe: int, request_: int, argument: int | bytes) -> None:
    with tempfile.TemporaryFile() as file:
        for fd in (pipe, file.fileno()):
            with pytest.raises(KvmError) as refused:
                ioctl.call(fd, request_, argument)
            assert refused.value.errno == errno.ENOTTY
            assert refused.value.ioctl == abi.NAMES[request_]
            assert refused.value.returned is None
            assert abi.NAMES[request_] in str(refused.value)
            assert "ENOTTY" in str(refused.value)


def test_a_closed_descriptor_is_the_kernels_ebadf() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    with pytest.raises(KvmError) as refused:
        ioctl.call(reader, abi.KVM_CREATE_VM)
    assert refused.value.errno == errno.EBADF


def test_the_oserror_is_the_cause_of_the_kvm_error(pipe: int) -> None:
    with pytest.raises(KvmError) as refused:
        ioctl.call(pipe, abi.KVM_CREATE_VM)
    cause = refused.value.__cause__
    assert isinstance(cause, OSError)
    assert cause.errno == errno.ENOTTY


# From here on the kernel is a fake at the one place where there can be one: no file answers these on demand.


class FakeKernel:
    """fcntl.ioctl with answers to give; an exception is raised, a number returned."""

    def __init__(self, *answers: int | OSError) -> None:
        self.answers = list(answers)
        self.arguments: list[int | bytes] = []

    def __call__(self, fd: int, request: int, argument: int | bytearray) -> int:
        assert type(argument) in (int, bytearray), "fcntl would give back the bytes and hide what the kernel returned"
        self.arguments.append(argument if isinstance(argument, int) else bytes(argument))
        if isinstance(argument, bytearray):
            argument[:] = b"\xee" * len(argument)  # a kernel may write to what it is given
        answer = self.answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer


def test_eintr_is_asked_again_with_the_same_argument_until_there_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    eintr = [OSError(errno.EINTR, "interrupted") for _ in range(3)]
    kernel = FakeKernel(*eintr, 0)
    monkeypatch.setattr(fcntl, "ioctl", kernel)

    assert ioctl.call(0, abi.KVM_S390_SET_SKEYS, SKEYS) == 0
    assert kernel.arguments == [SKEYS] * 4


def test_an_error_after_eintr_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel(OSError(errno.EINTR, "interrupted"), OSError(errno.ENOMEM, "no memory"))
    monkeypatch.setattr(fcntl, "ioctl", kernel)

    with pytest.raises(KvmError) as refused:
        ioctl.call(0, abi.KVM_S390_SET_SKEYS, SKEYS)
    assert refused.value.errno == errno.ENOMEM
    assert kernel.answers == []


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EBUSY, errno.EIO, errno.EFAULT])
def test_nothing_but_eintr_is_asked_again(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    kernel = FakeKernel(OSError(number, "no"), 0)
    monkeypatch.setattr(fcntl, "ioctl", kernel)

    with pytest.raises(KvmError):
        ioctl.call(0, abi.KVM_S390_SET_SKEYS, SKEYS)
    assert len(kernel.arguments) == 1


@pytest.mark.parametrize("argument", [0, 110, SKEYS])
@pytest.mark.parametrize("answer", [0, 1, 5, 32764])
def test_what_the_kernel_returns_is_returned(
    monkeypatch: pytest.MonkeyPatch, argument: int | bytes, answer: int
) -> None:
    kernel = FakeKernel(answer)
    monkeypatch.setattr(fcntl, "ioctl", kernel)

    assert ioctl.call(0, abi.KVM_S390_GET_SKEYS, argument) == answer
    assert kernel.arguments == [argument]
