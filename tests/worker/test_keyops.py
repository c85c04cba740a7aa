"""One frame's key by KEYOP: proved like every other, and never for a guest that uses no keys."""

from __future__ import annotations

import errno

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.kvm import abi
from skeyd.kvm.errors import KvmError
from skeyd.worker.keyops import KeyOps
from skeyd.worker.keys import REPAIRS, Keys
from tests.worker.backends import Recording, Refusing

KEYOP = "KVM_S390_KEYOP"
EVERY = ("read", "reset_referenced", "write")


class Forgetful(Recording):
    """Keeps the keys of SSKE only after so many of them, and then the bits of a mask."""

    def __init__(self, forgets: int, kept: int = 0xFF) -> None:
        super().__init__()
        self.forgets = forgets
        self.kept = kept
        enable(self)

    def keyop(self, operation: int, gfn: int, key: int = 0) -> int:
        if operation != abi.KVM_S390_KEYOP_SSKE:
            return super().keyop(operation, gfn, key)
        old = self.vm.keyop(abi.KVM_S390_KEYOP_ISKE, gfn)
        self.forgets -= 1
        super().keyop(operation, gfn, old if self.forgets >= 0 else key & self.kept)
        return old


def enable(backend: Recording) -> None:
    """Set keys 0x36 and 0x42 in frames 1 and 2, unseen."""
    backend.vm.set_skeys(0, memoryview(bytearray(b"\x00\x36\x42")))


def ops(backend: Recording) -> KeyOps:
    return KeyOps(backend, Keys(backend))


def call(backend: Recording, name: str, gfn: int, key: int = 0x50) -> object:
    return getattr(ops(backend), name)(gfn, *([key] if name == "write" else []))


def refusal(backend: Recording, name: str, gfn: int, key: int = 0x50) -> SkeydError:
    with pytest.raises(SkeydError) as refused:
        call(backend, name, gfn, key)
    return refused.value


def key_of(backend: Recording, gfn: int) -> int:
    buffer = bytearray(1)
    assert backend.vm.get_skeys(gfn, memoryview(buffer))
    return buffer[0]


def test_a_key_is_read_where_it_is() -> None:
    backend = Recording()
    enable(backend)
    assert [ops(backend).read(gfn) for gfn in range(4)] == [0, 0x36, 0x42, 0]


def test_a_key_is_set_and_the_old_one_returned() -> None:
    backend = Recording()
    enable(backend)
    assert ops(backend).write(1, 0xF8) == (0x36, False)
    assert [key_of(backend, gfn) for gfn in range(4)] == [0, 0xF8, 0x42, 0]
    assert backend.calls[-2:] == [("sske", GfnRange(1, 1)), ("iske", GfnRange(1, 1))]


def test_r_is_reset_and_r_and_c_are_returned_as_they_were() -> None:
    backend = Recording()
    enable(backend)
    assert (ops(backend).reset_referenced(1), key_of(backend, 1)) == (0x06, 0x32)
    assert (ops(backend).reset_referenced(1), key_of(backend, 1)) == (0x02, 0x32)


@pytest.mark.parametrize("name", EVERY)
def test_a_guest_that_uses_no_keys_is_not_touched(name: str) -> None:
    backend = Recording()
    assert call(backend, name, 1) is None
    assert [what for what, _ in backend.calls] == ["get"]
    assert not backend.vm.get_skeys(0, memoryview(bytearray(1)))


def test_whether_a_guest_uses_keys_is_asked_until_it_does_and_never_again() -> None:
    backend = Recording()
    keyops = ops(backend)
    assert (keyops.read(1), keyops.read(1)) == (None, None)
    enable(backend)
    assert (keyops.read(1), keyops.read(1)) == (0x36, 0x36)
    assert [what for what, _ in backend.calls] == ["get", "get", "get", "iske", "iske"]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("gfn", [1024, 1 << 52, (1 << 64) - 1])
def test_a_frame_in_no_slot_never_reaches_the_kernel_which_might_make_up_a_key(name: str, gfn: int) -> None:
    backend = Recording(kernel="7.0")
    enable(backend)
    assert refusal(backend, name, gfn).reason is Reason.GFN_NOT_MAPPED
    assert backend.calls == []


@pytest.mark.parametrize("name", EVERY)
def test_without_keyop_it_is_said_that_there_is_none(name: str) -> None:
    backend = Recording(kernel="4.19")
    enable(backend)
    assert refusal(backend, name, 1).reason is Reason.CAP_S390_KEYOP_MISSING
    assert backend.calls == []


@pytest.mark.parametrize("name", EVERY)
def test_a_kernel_that_denies_what_it_promised_has_none(name: str) -> None:
    instruction = {"read": "iske", "reset_referenced": "rrbe", "write": "sske"}[name]
    backend = Refusing({(instruction, 0): KvmError(KEYOP, errno.ENOTTY)})
    enable(backend)
    assert refusal(backend, name, 1).reason is Reason.CAP_S390_KEYOP_MISSING


def test_the_reserved_bit_never_reaches_the_kernel_which_would_drop_it() -> None:
    backend = Recording()
    enable(backend)
    error = refusal(backend, "write", 1, 0x31)
    assert (error.reason, error.metadata) == (Reason.KEY_RESERVED_BIT, {"gfn": "0x1"})
    assert backend.calls == []


@pytest.mark.parametrize("times", range(1, REPAIRS + 1))
def test_a_key_that_is_lost_is_set_again(times: int) -> None:
    backend = Forgetful(times)
    assert ops(backend).write(1, 0x50) == (0x36, True)
    assert key_of(backend, 1) == 0x50


def test_a_key_that_is_lost_every_time_is_an_error_that_names_it() -> None:
    backend = Forgetful(REPAIRS + 1)
    error = refusal(backend, "write", 1)
    assert error.reason is Reason.KEYS_NOT_STORED
    assert error.metadata == {"gfn": "0x1", "count": "1", "uncertain": "0x1-0x1"}
    assert [what for what, _ in backend.calls].count("sske") == REPAIRS + 1


def test_r_and_c_that_go_missing_may_be_the_guests_doing() -> None:
    assert ops(Forgetful(0, kept=0xF8)).write(1, 0x56) == (0x36, True)


@pytest.mark.parametrize("operation", ["sske", "iske"])
def test_a_refusal_in_the_middle_of_a_write_leaves_the_frame_uncertain(operation: str) -> None:
    backend = Refusing({(operation, 0): KvmError(KEYOP, errno.EIO)})
    enable(backend)
    error = refusal(backend, "write", 1)
    assert (error.reason, error.metadata["uncertain"]) == (Reason.VM_DEAD, "0x1-0x1")


@pytest.mark.parametrize("name", ["read", "reset_referenced"])
def test_any_other_refusal_is_said_as_it_is(name: str) -> None:
    backend = Refusing({("iske", 0): KvmError(KEYOP, errno.ENOMEM), ("rrbe", 0): KvmError(KEYOP, errno.ENOMEM)})
    enable(backend)
    error = refusal(backend, name, 1)
    assert (error.reason, "uncertain" in error.metadata) == (Reason.OUT_OF_MEMORY, False)
