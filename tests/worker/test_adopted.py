"""An adopted VM in this process, where what is its process's can be anything."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.injection import proc
from skeyd.injection.errors import AlreadyTracedError
from skeyd.kvm.errors import KvmError
from skeyd.worker import adopted
from skeyd.worker.adopted import AdoptedVm
from skeyd.worker.adoption import Adoption
from skeyd.worker.protocol import SlotSpec, Spec
from tests.adoption.owners import owner
from tests.injection.victims import SECONDS
from tests.worker.specs import UID


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EFAULT, Reason.VMM_UNSUITABLE),
        (errno.EACCES, Reason.VMM_UNSUITABLE),
        (errno.EMFILE, Reason.HOST_EXHAUSTED),
        (errno.ENOMEM, Reason.OUT_OF_MEMORY),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else value.name,
)
def test_whatever_fails_in_its_process_is_told_with_whose_it_is(
    monkeypatch: pytest.MonkeyPatch, number: int, reason: Reason
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(adopted, "ForeignVm", fail)
    with owner() as process:
        spec = Spec(
            "guest", UID, "adopted", (SlotSpec(0, 1 << 20, "vmm"),), 0, adoption=Adoption(process.pid, 0, -1, 9)
        )
        with pytest.raises(SkeydError) as refused:
            AdoptedVm(spec)
    assert refused.value.reason is reason
    found = refused.value.metadata
    assert (found["vmm_pid"], found["vmm_uid"]) == (str(process.pid), str(os.getuid()))
    assert {"vmm_start_time", "vmm_executable"} <= found.keys()


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.EIO, Reason.VMM_UNSUITABLE), (errno.EINVAL, Reason.KERNEL_REFUSED)]
)
def test_a_first_call_that_the_kernel_refuses_is_told_with_whose_process_it_was_made_in(
    monkeypatch: pytest.MonkeyPatch, number: int, reason: Reason
) -> None:
    class Refusing:
        def __init__(self, *_: Any) -> None:
            pass

        def check_extension(self, _: int) -> int:
            raise KvmError("KVM_CHECK_EXTENSION", number)

        def close(self) -> None:
            pass

    monkeypatch.setattr(adopted, "ForeignVm", Refusing)
    with owner() as process:
        spec = Spec(
            "guest", UID, "adopted", (SlotSpec(0, 1 << 20, "vmm"),), 0, adoption=Adoption(process.pid, 0, -1, 9)
        )
        with pytest.raises(SkeydError) as refused:
            AdoptedVm(spec)
    assert (refused.value.reason, refused.value.metadata["vmm_pid"]) == (reason, str(process.pid))


@pytest.mark.parametrize("stays", [False, True])
def test_what_an_adoption_that_failed_cant_take_back_is_tried_for_a_while_and_said(
    monkeypatch: pytest.MonkeyPatch, stays: bool
) -> None:
    closes = 0

    class Traced:
        def __init__(self, *_: Any) -> None:
            pass

        def check_extension(self, _: int) -> int:
            raise AlreadyTracedError(5, 6)

        def close(self) -> None:
            nonlocal closes
            closes += 1
            if stays or closes < 3:
                raise AlreadyTracedError(5, 6)

    monkeypatch.setattr(adopted, "ForeignVm", Traced)
    monkeypatch.setattr(adopted, "CLOSING_SECONDS", 0.2 if stays else SECONDS)
    with owner() as process:
        spec = Spec(
            "guest", UID, "adopted", (SlotSpec(0, 1 << 20, "vmm"),), 0, adoption=Adoption(process.pid, 0, -1, 9)
        )
        with pytest.raises(SkeydError) as refused:
            AdoptedVm(spec)
    assert refused.value.reason is Reason.VMM_TRACED
    assert ("left_behind" in refused.value.metadata) == stays
    assert closes >= 3


def test_a_frame_that_has_no_key_is_not_given_one() -> None:
    """Linux 7.0 and 7.1 answer 0 with a key for a frame in no slot, and that it is in one is somebody's word only."""

    class Hole:
        def look_at_skeys(self, start_gfn: int, count: int) -> bool:
            assert (start_gfn, count) == (7, 1)
            raise KvmError("KVM_S390_GET_SKEYS", errno.EFAULT)

        def keyop(self, *_: int) -> int:
            return 5

    vm = AdoptedVm.__new__(AdoptedVm)
    vm._vm = Hole()  # type: ignore[assignment]
    for operation in (1, 2, 3):
        with pytest.raises(KvmError) as refused:
            vm.keyop(operation, 7)
        assert refused.value.errno == errno.EFAULT


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENFILE, Reason.HOST_EXHAUSTED), (errno.ENOMEM, Reason.OUT_OF_MEMORY), (errno.EIO, Reason.VMM_UNSUITABLE)],
)
def test_a_look_at_the_process_that_fails_is_told_as_such(number: int, reason: Reason) -> None:
    class Unlucky:
        def get_skeys(self, *_: Any) -> bool:
            raise OSError(number, os.strerror(number))

    vm = AdoptedVm.__new__(AdoptedVm)
    vm._vm = Unlucky()  # type: ignore[assignment]
    with pytest.raises(SkeydError) as refused:
        vm.get_skeys(0, memoryview(bytearray(1)))
    assert refused.value.reason is reason


def test_the_owner_of_a_buffer_that_cant_be_looked_at_may_live(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(error: type[OSError]) -> Any:
        def start_time(_: int) -> int:
            raise error

        return start_time

    def not_ours(*_: int) -> None:
        raise PermissionError

    me = proc.myself()
    assert proc.is_alive(me)
    assert not proc.is_alive(me ^ 1 << 40), "another with its number"
    # hidepid=1, and hidepid=2.
    with monkeypatch.context() as patched:
        patched.setattr(proc, "start_time", hidden(PermissionError))
        assert proc.is_alive(me)
    monkeypatch.setattr(proc, "start_time", hidden(FileNotFoundError))
    assert not proc.is_alive(me)
    monkeypatch.setattr(os, "kill", not_ours)
    assert proc.is_alive(me)


@pytest.mark.parametrize("number", [0, 1 << 22 | 1, 0xFFFFFFFF, 1 << 63])
def test_a_number_of_no_process_is_no_owner_that_lives(number: int) -> None:
    assert not proc.is_alive(number)
