"""Keys that stay: what the kernel loses is set again, and what can't be right never reaches it."""

from __future__ import annotations

import errno
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.kvm.errors import KvmError
from skeyd.worker.backend import Backend
from skeyd.worker.keys import REPAIRS, Keys, Written
from skeyd.worker.simulated import SimulatedVm
from tests.examples import examples
from tests.worker.backends import Changing, Forgetful, Recording, Refusing
from tests.worker.specs import simulated

SEGMENT = 256
GET, SET = "KVM_S390_GET_SKEYS", "KVM_S390_SET_SKEYS"


def _write(backend: Backend, start: int, keys: bytes, allow_enable: bool = True) -> Written:
    return Keys(backend).write(GfnRange(start, len(keys)), keys, allow_enable)


def _read(backend: Backend, start: int, count: int) -> bytes | None:
    buffer = bytearray(count)
    return bytes(buffer) if Keys(backend).read(GfnRange(start, count), memoryview(buffer)) else None


def _refusal(backend: Backend, start: int, keys: bytes, allow_enable: bool = True) -> SkeydError:
    with pytest.raises(SkeydError) as refused:
        _write(backend, start, keys, allow_enable)
    return refused.value


# --- no key is lost ------------------------------------------------------------------------------------------------

_runs = st.lists(
    st.tuples(st.sampled_from([0, 0x02, 0x06, 0x10, 0x38, 0xF0, 0xFE]), st.integers(1, 400)), min_size=1, max_size=4
).map(lambda runs: b"".join(bytes([key]) * count for key, count in runs))


@pytest.mark.parametrize("kernel", ["4.19", "7.0", "7.2"])
@given(st.lists(st.tuples(st.integers(0, 500), _runs), min_size=1, max_size=4))
@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_was_written_is_what_is_read_whatever_the_kernel_loses(
    kernel: str, writes: list[tuple[int, bytes]]
) -> None:
    vm = SimulatedVm(simulated((0, 5), (5, 4), kernel=kernel))
    expected = bytearray(9 * SEGMENT)
    for start, keys in writes:
        _write(vm, start, keys)
        expected[start : start + len(keys)] = keys
    assert _read(vm, 0, len(expected)) == bytes(expected)
    vm.close()


def test_keys_that_were_lost_are_counted() -> None:
    assert _write(Recording(kernel="4.19"), 10, b"\x10" * 700).repaired == 3


def test_only_what_was_lost_is_set_again() -> None:
    backend = Forgetful({3: 1, 4: 1, 9: 2})
    written = _write(backend, 0, b"\x30" * 20)
    assert written == Written(repaired=3, enabled=False)
    assert backend.sets() == [GfnRange(0, 20), GfnRange(3, 2), GfnRange(9, 1), GfnRange(9, 1)]
    assert _read(backend, 0, 20) == b"\x30" * 20


def test_keys_that_the_kernel_kept_are_set_once() -> None:
    backend = Recording()
    assert _write(backend, 0, b"\x30" * 20) == Written(repaired=0, enabled=True)
    assert backend.sets() == [GfnRange(0, 20)]


def test_a_key_that_stays_after_the_last_repair_is_written() -> None:
    backend = Forgetful({7: REPAIRS})
    assert _write(backend, 0, b"\x30" * 20).repaired == 1
    assert _read(backend, 7, 1) == b"\x30"


def test_a_key_that_never_stays_is_an_error_that_names_it_and_how_many_there_are() -> None:
    backend = Forgetful({7: 99, 8: 99, 11: 99})
    refusal = _refusal(backend, 0, b"\x30" * 20)
    assert refusal.reason is Reason.KEYS_NOT_STORED
    assert refusal.metadata == {"gfn": "0x7", "count": "3", "uncertain": "0x0-0x13"}
    # The first SET and the repairs, each of two runs; none that nobody would look at.
    assert len(backend.sets()) == 1 + 2 * REPAIRS


@pytest.mark.parametrize("lost", [0, 1, REPAIRS, REPAIRS + 1, 99])
def test_after_the_last_set_the_keys_are_always_read_back(lost: int) -> None:
    backend = Forgetful({7: lost})
    with suppress(SkeydError):
        _write(backend, 0, b"\x30" * 20)
    assert backend.calls[-1] == ("get", GfnRange(0, 20))


def test_a_kernel_that_says_keyless_after_a_set_has_stored_nothing() -> None:
    class Keyless(Recording):
        def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
            return False

    refusal = _refusal(Keyless(), 0, b"\x30")
    assert refusal.reason is Reason.KEYS_NOT_STORED
    assert refusal.metadata["uncertain"] == "0x0-0x0"


@pytest.mark.parametrize("bits", [0x06, 0x04, 0x02])
def test_referenced_and_changed_that_came_along_are_no_loss(bits: int) -> None:
    # Up to 6.19 any access by the process sets them.
    backend = Changing(lambda key: key | bits)
    assert _write(backend, 0, b"\x30\x00\xf8").repaired == 0
    assert len(backend.sets()) == 1


def test_a_lost_key_of_referenced_and_changed_alone_is_set_again() -> None:
    backend = Recording(kernel="4.19")
    assert _write(backend, 0, b"\x06\x06").repaired == 1
    assert _read(backend, 0, 2) == b"\x06\x06"


def test_referenced_and_changed_that_stay_away_are_the_guests_doing_and_no_error() -> None:
    backend = Changing(lambda key: key & 0xF8)
    assert _write(backend, 0, b"\x36\x30").repaired == 1
    assert len(backend.sets()) == 1 + REPAIRS


@pytest.mark.parametrize("bits", [0x10, 0x80, 0x08])
def test_access_control_and_fetch_protection_must_come_back_as_they_were(bits: int) -> None:
    for change in (lambda key: key ^ bits, lambda key: key | bits, lambda key: key & ~bits):
        refusal = _refusal(Changing(change), 0, b"\x00\xf8")
        assert refusal.reason is Reason.KEYS_NOT_STORED


def test_referenced_and_changed_are_set_as_they_were_given() -> None:
    backend = Recording()
    _write(backend, 0, b"\x36\x02")
    assert _read(backend, 0, 2) == b"\x36\x02"


# --- enabling ------------------------------------------------------------------------------------------------------


def test_keys_are_not_enabled_unless_that_is_allowed_and_nothing_is_set() -> None:
    backend = Recording()
    refusal = _refusal(backend, 0, b"\x30", allow_enable=False)
    assert refusal.reason is Reason.SKEYS_NOT_ENABLED
    assert "uncertain" not in refusal.metadata
    assert backend.sets() == []
    assert not Keys(backend).uses_keys()


def test_the_first_write_says_that_it_enabled_keys_and_the_second_that_it_did_not() -> None:
    backend = Recording()
    assert _write(backend, 0, b"\x30", allow_enable=True).enabled
    assert not _write(backend, 0, b"\x30", allow_enable=True).enabled
    assert not _write(backend, 0, b"\x30", allow_enable=False).enabled


def test_asking_whether_keys_are_used_changes_nothing_and_asks_for_a_frame_with_memory() -> None:
    backend = Recording((5, 1), (9, 1))
    assert not Keys(backend).uses_keys()
    _write(backend, 9 * SEGMENT, b"\0")
    backend.calls.clear()
    assert Keys(backend).uses_keys()
    assert backend.calls == [("get", GfnRange(5 * SEGMENT, 1))]


# --- what never reaches the kernel ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "at", "bad"), [(b"\x01", 0, "0x01"), (b"\x10\x10\xff\x01", 2, "0xff")])
def test_a_key_with_the_reserved_bit_never_reaches_the_kernel(keys: bytes, at: int, bad: str) -> None:
    backend = Recording()
    refusal = _refusal(backend, 0x40, keys)
    assert refusal.reason is Reason.KEY_RESERVED_BIT
    assert refusal.metadata == {"gfn": hex(0x40 + at)}
    assert bad in refusal.message
    assert backend.calls == []


@pytest.mark.parametrize(
    ("frames", "missing"),
    [
        (GfnRange(4 * SEGMENT, 1), 4 * SEGMENT),
        (GfnRange(4 * SEGMENT - 1, 2), 4 * SEGMENT),
        (GfnRange((1 << 64) - 1, 1), (1 << 64) - 1),
    ],
)
def test_a_frame_without_memory_never_reaches_the_kernel(frames: GfnRange, missing: int) -> None:
    backend = Recording()
    with pytest.raises(SkeydError) as not_written:
        Keys(backend).write(frames, bytes(frames.count), allow_enable=True)
    with pytest.raises(SkeydError) as not_read:
        Keys(backend).read(frames, memoryview(bytearray(frames.count)))
    for refused in (not_written, not_read):
        assert refused.value.reason is Reason.GFN_NOT_MAPPED
        assert refused.value.metadata == {"gfn": hex(missing)}
    assert backend.calls == []


def test_a_guest_that_uses_no_keys_is_an_answer_and_the_buffer_stays_untouched() -> None:
    buffer = bytearray(b"\xee" * 4)
    assert not Keys(Recording()).read(GfnRange(0, 4), memoryview(buffer))
    assert buffer == b"\xee" * 4


# --- the kernel's refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EFAULT, Reason.GFN_NOT_MAPPED),
        (errno.EIO, Reason.VM_DEAD),
        (errno.ENOMEM, Reason.OUT_OF_MEMORY),
        (errno.ENOTTY, Reason.CAP_S390_SKEYS_MISSING),
        (errno.EINVAL, Reason.KERNEL_REFUSED),
    ],
)
def test_a_refused_get_is_a_reason_with_the_kernels_error_as_its_cause(number: int, reason: Reason) -> None:
    error = KvmError(GET, number)
    backend = Refusing({("get", 0): error})
    with pytest.raises(SkeydError) as refused:
        Keys(backend).read(GfnRange(8, 2), memoryview(bytearray(2)))
    assert refused.value.reason is reason
    assert refused.value.__cause__ is error
    assert "uncertain" not in refused.value.metadata


@pytest.mark.parametrize("which", [("set", 0), ("get", 1), ("set", 1), ("get", 2)])
def test_a_refusal_in_the_middle_of_a_write_says_which_frames_are_uncertain(which: tuple[str, int]) -> None:
    class Both(Refusing, Forgetful):
        def __init__(self) -> None:
            Forgetful.__init__(self, {9: 1})
            self.errors = {which: KvmError(SET, errno.EIO)}

    refusal = _refusal(Both(), 8, b"\x30" * 4)
    assert refusal.reason is Reason.VM_DEAD
    assert refusal.metadata["uncertain"] == "0x8-0xb"


def test_a_write_that_fails_says_whether_it_enabled_keys_all_the_same() -> None:
    backend = Refusing({("get", 1): KvmError(GET, errno.ENOMEM)})  # the read-back
    assert _refusal(backend, 0, b"\x30").metadata["enabled"] == "true"
    backend = Refusing({("set", 0): KvmError(SET, errno.ENOMEM)})  # before the kernel came that far
    assert "enabled" not in _refusal(backend, 0, b"\x30").metadata
    backend = Refusing({("set", 1): KvmError(SET, errno.ENOMEM)})
    _write(backend, 0, b"\x30")
    assert "enabled" not in _refusal(backend, 0, b"\x30").metadata


def test_a_vm_that_cannot_say_whether_it_was_enabled_still_says_what_went_wrong() -> None:
    dead = KvmError(GET, errno.EIO)
    backend = Refusing({("get", 1): dead, ("get", 2): dead})
    refusal = _refusal(backend, 0, b"\x30")
    assert refusal.reason is Reason.VM_DEAD
    assert refusal.metadata["uncertain"] == "0x0-0x0"
    assert "enabled" not in refusal.metadata


def test_a_refusal_before_anything_was_set_leaves_nothing_uncertain() -> None:
    backend = Refusing({("get", 0): KvmError(GET, errno.EIO)})
    refusal = _refusal(backend, 8, b"\x30" * 4)
    assert refusal.reason is Reason.VM_DEAD
    assert "uncertain" not in refusal.metadata
    assert backend.sets() == []
