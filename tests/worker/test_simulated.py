"""The simulated kernels, rule by rule, and against a model that goes frame by frame as the kernel's source does."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.kvm.errors import KvmError
from skeyd.worker.protocol import MAX_MEMORY, MAX_MEMORY_SLOTS, SIMULATED_KERNELS, SlotSpec, Spec
from skeyd.worker.simulated import Generation, SimulatedProcess, SimulatedVm
from tests.examples import examples
from tests.worker.specs import MIB, UID, simulated

MAX = 1_048_576
SEGMENT = 256
TOP = 1 << 64

every_generation = pytest.mark.parametrize("kernel", ["4.19", "7.0", "7.2"])


def _vm(kernel: str, *slots: tuple[int, int]) -> SimulatedVm:
    return SimulatedVm(simulated(*(slots or [(0, 4)]), kernel=kernel))


def _set(vm: SimulatedVm, start: int, keys: bytes) -> None:
    vm.set_skeys(start, memoryview(bytearray(keys)))


def _get(vm: SimulatedVm, start: int, count: int) -> bytes | None:
    buffer = bytearray(b"\xee" * count)
    if not vm.get_skeys(start, memoryview(buffer)):
        assert buffer == b"\xee" * count, "the buffer of a keyless guest was touched"
        return None
    return bytes(buffer)


def _refusal(vm: SimulatedVm, call: str, start: int, keys: bytes) -> KvmError:
    with pytest.raises(KvmError) as refused:
        getattr(vm, call)(start, memoryview(bytearray(keys)))
    assert refused.value.ioctl == ("KVM_S390_GET_SKEYS" if call == "get_skeys" else "KVM_S390_SET_SKEYS")
    return refused.value


def _enabled(kernel: str, *slots: tuple[int, int]) -> SimulatedVm:
    # Enabled and nothing else: a SET of a zero key makes no page table.
    vm = _vm(kernel, *slots)
    _set(vm, vm.memory_map.slots[0].frames.start, b"\0")
    return vm


# --- what it is ----------------------------------------------------------------------------------------------------


def test_the_generations_are_those_that_can_be_asked_for() -> None:
    assert tuple(one.value for one in Generation) == SIMULATED_KERNELS


@pytest.mark.parametrize(("kernel", "said"), [("4.19", "4.19 to 6.19"), ("7.0", "7.0 and 7.1"), ("7.2", "7.2")])
def test_a_simulated_vm_says_so_and_whose_rules_it_follows(kernel: str, said: str) -> None:
    assert _vm(kernel).kernel == f"simulated Linux {said}"


def test_nothing_is_behind_a_simulated_vms_memory_whatever_was_asked_for() -> None:
    vm = SimulatedVm(Spec("web", UID, "simulated", (SlotSpec(0, MIB, "file", "/no/such/file"),), 0))
    assert [(one.frames, one.backing) for one in vm.memory_map.slots] == [(GfnRange(0, 256), "none")]


def test_slots_that_no_kernel_takes_are_refused() -> None:
    with pytest.raises(SkeydError) as refused:
        _vm("7.2", (0, 2), (1, 2))
    assert refused.value.reason is Reason.MEMORY_INVALID


@every_generation
def test_a_new_guest_uses_no_keys_and_a_guest_that_does_has_zeros(kernel: str) -> None:
    vm = _vm(kernel)
    assert _get(vm, 0, 8) is None
    _set(vm, 0, b"\0")
    assert _get(vm, 0, 8) == bytes(8)


def test_closing_twice_is_fine() -> None:
    vm = _vm("4.19")
    vm.close()
    vm.close()


# --- the lost key --------------------------------------------------------------------------------------------------


def test_up_to_6_19_the_first_non_zero_key_of_each_untouched_segment_is_lost_and_no_other() -> None:
    vm = _vm("4.19")
    keys = bytearray(b"\x10" * 4 * SEGMENT)
    keys[0:3] = bytes(3)  # the first non-zero key of segment 0 is its fourth
    keys[2 * SEGMENT : 3 * SEGMENT] = bytes(SEGMENT)  # nothing to lose in segment 2
    _set(vm, 0, bytes(keys))

    expected = bytearray(keys)
    for lost in (3, SEGMENT, 3 * SEGMENT):
        expected[lost] = 0
    assert _get(vm, 0, len(keys)) == bytes(expected)


def test_up_to_6_19_a_second_set_repairs_what_the_first_lost() -> None:
    vm = _vm("4.19")
    keys = bytes(range(0, 256, 2)) * 8
    _set(vm, 0, keys)
    assert _get(vm, 0, len(keys)) != keys
    _set(vm, 0, keys)
    assert _get(vm, 0, len(keys)) == keys


def test_up_to_6_19_a_zero_key_makes_no_page_table() -> None:
    vm = _enabled("4.19")
    _set(vm, 0, bytes(SEGMENT))
    _set(vm, 0, b"\0\x20\x30")
    assert _get(vm, 0, 3) == b"\0\0\x30"


def test_up_to_6_19_a_segment_loses_one_key_once() -> None:
    vm = _vm("4.19")
    _set(vm, 5, b"\x50")
    _set(vm, 0, b"\x10")
    _set(vm, SEGMENT - 1, b"\x20\x30")
    # The table of segment 0 was made by frame 5; segment 1 had none.
    assert _get(vm, 0, 6) == b"\x10\0\0\0\0\0"
    assert _get(vm, SEGMENT - 1, 2) == b"\x20\0"


def test_up_to_6_19_a_lost_key_leaves_the_frame_as_it_was() -> None:
    vm = _vm("4.19")
    _set(vm, 0, b"\x10\x10")
    _set(vm, 0, b"\x10\x10")
    # The table is there now: nothing is lost in this segment any more, whichever key it is.
    _set(vm, 0, b"\x20\x30")
    assert _get(vm, 0, 2) == b"\x20\x30"


def test_up_to_6_19_segments_are_those_of_the_guest_and_not_of_the_call() -> None:
    vm = _vm("4.19", (8, 2))
    start = 8 * SEGMENT + 200
    _set(vm, start, b"\x10" * 100)
    assert _get(vm, start, 100) == b"\0" + b"\x10" * 55 + b"\0" + b"\x10" * 43


@pytest.mark.parametrize("kernel", ["7.0", "7.2"])
def test_from_7_0_on_no_key_is_lost(kernel: str) -> None:
    vm = _vm(kernel)
    keys = bytes(range(0, 256, 2)) * 8
    _set(vm, 0, keys)
    assert _get(vm, 0, len(keys)) == keys


# --- bad keys and holes --------------------------------------------------------------------------------------------


def test_up_to_6_19_the_keys_before_a_bad_one_stay_set() -> None:
    vm = _enabled("4.19")
    _set(vm, 0, b"\x10" * 4)
    assert _refusal(vm, "set_skeys", 0, b"\x20\x30\x41\x50").errno == errno.EINVAL
    assert _get(vm, 0, 4) == b"\x20\x30\x10\x10"


@pytest.mark.parametrize("kernel", ["7.0", "7.2"])
def test_from_7_0_on_nothing_is_set_where_a_key_is_bad(kernel: str) -> None:
    vm = _enabled(kernel)
    _set(vm, 0, b"\x10" * 4)
    assert _refusal(vm, "set_skeys", 0, b"\x20\x30\x40\x51").errno == errno.EINVAL
    assert _get(vm, 0, 4) == b"\x10" * 4


@every_generation
def test_the_keys_before_a_hole_stay_set(kernel: str) -> None:
    vm = _enabled(kernel, (0, 1), (2, 1))
    _set(vm, SEGMENT - 2, b"\x10\x10")
    _set(vm, SEGMENT - 2, b"\x10\x10")
    _refusal(vm, "set_skeys", SEGMENT - 2, b"\x20\x30\x40")
    assert _get(vm, SEGMENT - 2, 2) == b"\x20\x30"


@pytest.mark.parametrize("kernel", ["7.0", "7.2"])
def test_from_7_0_on_a_bad_key_is_seen_before_a_hole(kernel: str) -> None:
    vm = _enabled(kernel, (0, 1))
    assert _refusal(vm, "set_skeys", SEGMENT - 1, b"\x20\x20\x01").errno == errno.EINVAL
    assert _get(vm, SEGMENT - 1, 1) == b"\0"


@pytest.mark.parametrize(
    ("keys", "number"),
    [
        (b"\x10\x10\x11", errno.EFAULT),  # the hole comes first
        (b"\x11\x10\x10", errno.EINVAL),  # the bad key comes first
        (b"\x10\x11\x10", errno.EFAULT),  # both at one frame: it is looked up before its key is looked at
    ],
)
def test_up_to_6_19_what_comes_first_stops_it(keys: bytes, number: int) -> None:
    vm = _enabled("4.19", (0, 1))
    assert _refusal(vm, "set_skeys", SEGMENT - 1, keys).errno == number


@every_generation
@pytest.mark.parametrize("call", ["get_skeys", "set_skeys"])
@pytest.mark.parametrize(
    ("start", "count"),
    [
        pytest.param(SEGMENT - 1, 2, id="into a hole"),
        pytest.param(SEGMENT, 1, id="in a hole"),
        pytest.param(SEGMENT - 1, 2 * SEGMENT + 2, id="across a hole"),
        pytest.param(3 * SEGMENT - 1, 2, id="out of a hole"),
        pytest.param(4 * SEGMENT - 1, 2, id="beyond the last slot"),
        pytest.param(1 << 52, 1, id="beyond every address"),
        pytest.param(TOP - 2, 2, id="up to 2^64"),
        pytest.param(TOP - 1, 2, id="across 2^64"),
    ],
)
def test_a_frame_in_no_slot_is_efault_and_5_on_7_0(kernel: str, call: str, start: int, count: int) -> None:
    refusal = _refusal(_enabled(kernel, (0, 1), (3, 1)), call, start, bytes(count))
    assert refusal.errno == errno.EFAULT
    assert refusal.returned == (5 if kernel == "7.0" else None)


@every_generation
def test_slots_that_touch_are_crossed(kernel: str) -> None:
    vm = _enabled(kernel, (0, 1), (1, 1))
    for _ in range(2):
        _set(vm, SEGMENT - 2, b"\x10\x20\x30\x40")
    assert _get(vm, SEGMENT - 2, 4) == b"\x10\x20\x30\x40"


@every_generation
def test_memory_at_the_top_of_the_address_space_has_keys(kernel: str) -> None:
    last = (TOP // 4096) - 1
    vm = _enabled(kernel, (TOP // MIB - 1, 1))
    for _ in range(2):
        _set(vm, last, b"\x38")
    assert _get(vm, last, 1) == b"\x38"
    _refusal(vm, "get_skeys", last, bytes(2))


# --- counts, enabling, all or nothing ------------------------------------------------------------------------------


@every_generation
@pytest.mark.parametrize(("start", "count"), [(0, 0), (0, MAX + 1), (SEGMENT * 4, 1), (TOP - 1, 2)])
def test_a_keyless_guest_is_keyless_whatever_is_asked(kernel: str, start: int, count: int) -> None:
    assert _get(_vm(kernel), start, count) is None


@every_generation
@pytest.mark.parametrize("count", [0, MAX + 1])
def test_a_count_outside_its_bounds_is_einval_and_enables_nothing(kernel: str, count: int) -> None:
    vm = _vm(kernel)
    assert _refusal(vm, "set_skeys", 0, bytes(count)).errno == errno.EINVAL
    assert _get(vm, 0, 1) is None
    _set(vm, 0, b"\0")
    assert _refusal(vm, "get_skeys", 0, bytes(count)).errno == errno.EINVAL


@every_generation
def test_a_mebi_of_keys_is_the_most_in_a_call(kernel: str) -> None:
    vm = _enabled(kernel, (0, MAX // SEGMENT))
    keys = b"\x08\x10" * (MAX // 2)
    for _ in range(2):
        _set(vm, 0, keys)
    assert _get(vm, 0, MAX) == keys


@every_generation
@pytest.mark.parametrize(("start", "keys"), [(0, b"\x01"), (SEGMENT * 4, b"\0"), (TOP - 1, b"\0")])
def test_a_set_that_fails_on_a_key_or_a_hole_enables_keys_all_the_same(kernel: str, start: int, keys: bytes) -> None:
    vm = _vm(kernel)
    _refusal(vm, "set_skeys", start, keys)
    assert _get(vm, 0, 1) == b"\0"


@every_generation
def test_a_get_that_fails_leaves_the_whole_buffer_untouched(kernel: str) -> None:
    vm = _enabled(kernel, (0, 1))
    buffer = bytearray(b"\xee" * (SEGMENT + 1))
    with pytest.raises(KvmError):
        vm.get_skeys(0, memoryview(buffer))
    assert buffer == b"\xee" * (SEGMENT + 1)


# --- what the process does -----------------------------------------------------------------------------------------


def _in_one_process(kernel: str) -> tuple[SimulatedVm, SimulatedVm]:
    process = SimulatedProcess()
    return SimulatedVm(simulated((0, 2), kernel=kernel), process), SimulatedVm(
        simulated((0, 2), kernel=kernel), process
    )


@pytest.mark.parametrize(("kernel", "together"), [("4.19", True), ("7.0", False), ("7.2", False)])
def test_up_to_6_19_all_vms_of_a_process_use_keys_once_one_does(kernel: str, together: bool) -> None:
    one, other = _in_one_process(kernel)
    _set(one, 0, b"\0")
    assert _get(one, 0, 1) == b"\0"
    assert _get(other, 0, 1) == (b"\0" if together else None)


@every_generation
def test_the_keys_of_two_vms_of_a_process_are_their_own(kernel: str) -> None:
    one, other = _in_one_process(kernel)
    for _ in range(2):
        _set(one, 0, b"\x10\x20")
        _set(other, 0, b"\x30\x40")
    one.close()
    assert _get(other, 0, 2) == b"\x30\x40"


def test_up_to_6_19_a_frame_that_was_touched_has_a_page_table_and_loses_no_key() -> None:
    vm = _vm("4.19")
    vm.touch(3, write=False)
    _set(vm, 0, b"\x10" * 2 * SEGMENT)
    assert _get(vm, 0, 2 * SEGMENT) == b"\x10" * SEGMENT + b"\0" + b"\x10" * (SEGMENT - 1)


def test_up_to_6_19_enabling_keys_gives_referenced_and_changed_to_every_frame_of_a_page_table() -> None:
    vm = _vm("4.19")
    vm.touch(SEGMENT + 3, write=False)
    _set(vm, 0, b"\0")
    assert _get(vm, 0, 4 * SEGMENT) == bytes(SEGMENT) + b"\x06" * SEGMENT + bytes(2 * SEGMENT)


@pytest.mark.parametrize(("write", "key"), [(False, 0x34), (True, 0x36)])
def test_up_to_6_19_an_access_of_the_process_is_seen_in_the_key(write: bool, key: int) -> None:
    vm = _vm("4.19")
    for _ in range(2):
        _set(vm, 7, b"\x30\x30")
    vm.touch(7, write=write)
    assert _get(vm, 6, 3) == bytes([0, key, 0x30])


@pytest.mark.parametrize("kernel", ["7.0", "7.2"])
def test_from_7_0_on_no_access_of_the_process_is_seen_in_a_key(kernel: str) -> None:
    vm = _vm(kernel)
    vm.touch(7, write=True)
    _set(vm, 7, b"\x30")
    vm.touch(7, write=True)
    assert _get(vm, 6, 2) == b"\0\x30"


@every_generation
def test_memory_that_is_not_there_cannot_be_touched(kernel: str) -> None:
    with pytest.raises(KeyError):
        _vm(kernel).touch(4 * SEGMENT, write=False)


# --- the model -----------------------------------------------------------------------------------------------------


class Model:
    """The kernel's two loops, frame by frame."""

    def __init__(self, kernel: str, slots: list[tuple[int, int]]) -> None:
        self.kernel = kernel
        self.keys = {gfn: 0 for mib, size in slots for gfn in range(mib * SEGMENT, (mib + size) * SEGMENT)}
        self.page_tables: set[int] = set()
        self.enabled = False

    def set(self, start: int, keys: bytes) -> int:
        self.enabled = True
        if self.kernel != "4.19" and any(key & 1 for key in keys):
            return errno.EINVAL
        for gfn, key in enumerate(keys, start):
            if gfn not in self.keys:
                return errno.EFAULT
            if key & 1:
                return errno.EINVAL
            if self.kernel == "4.19" and key and gfn // SEGMENT not in self.page_tables:
                self.page_tables.add(gfn // SEGMENT)  # the fault that forgets the key
                continue
            self.keys[gfn] = key
        return 0

    def get(self, start: int, count: int) -> bytes | int | None:
        if not self.enabled:
            return None
        found = [self.keys.get(gfn) for gfn in range(start, start + count)]
        return errno.EFAULT if None in found else bytes(key for key in found if key is not None)


_LAYOUTS = [[(0, 3)], [(0, 1), (1, 1), (3, 1)], [(1, 2), (4, 1)]]
_runs = st.lists(
    st.tuples(st.sampled_from([0, 0, 0x10, 0x38, 0xF6, 0x41]), st.integers(1, 300)), min_size=1, max_size=4
).map(lambda runs: b"".join(bytes([key]) * count for key, count in runs))


@every_generation
@given(st.sampled_from(_LAYOUTS), st.lists(st.tuples(st.integers(0, 5 * SEGMENT + 10), _runs), max_size=5))
@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_sequence_of_sets_ends_as_the_kernels_loops_would_end_it(
    kernel: str, slots: list[tuple[int, int]], calls: list[tuple[int, bytes]]
) -> None:
    vm, model = _vm(kernel, *slots), Model(kernel, slots)
    for start, keys in calls:
        try:
            _set(vm, start, keys)
            number = 0
        except KvmError as error:
            number = error.errno
        assert number == model.set(start, keys)
    for mib, size in slots:
        assert _get(vm, mib * SEGMENT, size * SEGMENT) == model.get(mib * SEGMENT, size * SEGMENT)
    for start, keys in calls:
        expected = model.get(start, len(keys))
        if isinstance(expected, int):
            assert _refusal(vm, "get_skeys", start, bytes(len(keys))).errno == expected
        else:
            assert _get(vm, start, len(keys)) == expected
    vm.close()


# --- cost ----------------------------------------------------------------------------------------------------------


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@every_generation
def test_a_guest_as_large_as_can_be_costs_no_more_than_what_of_it_is_used(kernel: str) -> None:
    # 256 TiB and 64 Gi keys.
    slots = tuple(SlotSpec(number * (MAX_MEMORY + MIB), MAX_MEMORY, "anonymous") for number in range(MAX_MEMORY_SLOTS))
    before = _resident()
    vm = SimulatedVm(Spec("web", UID, "simulated", slots, 0, kernel))
    try:
        for slot in vm.memory_map.slots:
            for _ in range(2):
                _set(vm, slot.frames.end - 1, b"\x38")
            assert _get(vm, slot.frames.end - 2, 2) == b"\0\x38"
        # Two pages a slot, and some for what counts them.
        assert _resident() - before < 8 * MIB
    finally:
        vm.close()
