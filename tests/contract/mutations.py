"""Ways to break the simulation, each in one rule, and the test of the contract that must catch it.

tests/contract/test_mutations.py breaks it so. `old` is found exactly once in skeyd/worker/simulated.py; where it isn't
any more, the rule has moved, and so must the mutation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Mutation:
    """One rule broken."""

    rule: str
    """As it is broken."""
    old: str
    new: str
    caught_by: str
    """FILE::TEST in tests/contract."""
    shows: str = "AssertionError"
    """What the test fails with: a mutation that is no more than nonsense must not pass for one that was caught."""


MUTATIONS: Final = (
    Mutation(
        "GET looks at the count before it looks whether keys are used",
        """        if not self._process.uses_keys:
            return False  # whatever count and start are
        self._check_count(_GET, buffer)
""",
        """        self._check_count(_GET, buffer)
        if not self._process.uses_keys:
            return False
""",
        "test_get.py::test_a_keyless_guest_answers_1_whatever_was_asked_for",
    ),
    Mutation(
        "a count of 0 is taken",
        "if not 1 <= buffer.nbytes <=",
        "if not 0 <= buffer.nbytes <=",
        "test_get.py::test_a_count_outside_1_to_max_is_einval_before_any_frame_is_looked_at",
    ),
    Mutation(
        "a count over MAX is taken",
        "<= abi.KVM_S390_SKEYS_MAX:",
        "<= abi.KVM_S390_SKEYS_MAX + 1:",
        "test_set.py::test_a_count_outside_1_to_max_is_einval_and_enables_nothing",
    ),
    Mutation(
        "MAX itself is refused",
        "<= abi.KVM_S390_SKEYS_MAX:",
        "< abi.KVM_S390_SKEYS_MAX:",
        "test_set.py::test_as_many_keys_as_max_are_set_in_one_call",
    ),
    Mutation(
        "a SET with a bad count enables keys",
        """        self._check_count(_SET, buffer)
        keys = bytes(buffer)
        self._process.enable()  # even if it then fails
""",
        """        self._process.enable()
        self._check_count(_SET, buffer)
        keys = bytes(buffer)
""",
        "test_set.py::test_a_count_outside_1_to_max_is_einval_and_enables_nothing",
    ),
    Mutation(
        "a SET that fails enables nothing",
        """        self._process.enable()  # even if it then fails
        parts, reached = self._parts(start_gfn, len(keys))
""",
        """        parts, reached = self._parts(start_gfn, len(keys))
        if reached == len(keys) and first_reserved(keys) is None:
            self._process.enable()
""",
        "test_set.py::test_a_set_that_fails_on_a_hole_or_on_a_reserved_bit_enables_keys_all_the_same",
    ),
    Mutation(
        "GET gives the keys before a hole",
        """        if reached < buffer.nbytes:
            raise self._hole(_GET)
        for slot, first, at, count in parts:
            with memoryview(slot.keys) as keys:  # a bytearray's slice would be a copy more
                buffer[at : at + count] = keys[first : first + count]
""",
        """        for slot, first, at, count in parts:
            with memoryview(slot.keys) as keys:  # a bytearray's slice would be a copy more
                buffer[at : at + count] = keys[first : first + count]
        if reached < buffer.nbytes:
            raise self._hole(_GET)
""",
        "test_get.py::test_a_frame_in_no_slot_fails_the_whole_call_and_the_buffer_is_left_alone",
    ),
    Mutation(
        "SET applies nothing where a hole follows",
        "        for slot, first, at, count in parts:\n            if at < stop:",
        "        for slot, first, at, count in parts:\n            if at < stop and reached == len(keys):",
        "test_set.py::test_the_keys_before_a_hole_stay_set_and_those_after_it_are_not",
    ),
    Mutation(
        "SET goes on behind a hole",
        "if at < count and slot.frames.start <= gfn < slot.frames.end:",
        "if at < count and gfn < slot.frames.end and (at := max(at, slot.frames.start - start_gfn)) < count:",
        "test_set.py::test_the_keys_before_a_hole_stay_set_and_those_after_it_are_not",
    ),
    Mutation(
        "up to 6.19 reserved bits are looked for before anything is set",
        "        checks_keys_first=False,\n",
        "        checks_keys_first=True,\n",
        "test_set.py::test_up_to_6_19_the_keys_before_a_reserved_bit_stay_set",
    ),
    Mutation(
        "since 7.2 the keys before a reserved bit stay set",
        '"7.2", loses_keys=False, checks_keys_first=True',
        '"7.2", loses_keys=False, checks_keys_first=False',
        "test_set.py::test_since_7_0_a_reserved_bit_anywhere_sets_nothing",
    ),
    Mutation(
        "up to 6.19 a reserved bit wins over a hole at the same frame",
        "raise self._hole(_SET) if stop == reached else",
        "raise self._hole(_SET) if stop != bad else",
        "test_set.py::test_up_to_6_19_what_comes_first_stops_it",
    ),
    Mutation(
        "7.0 says EFAULT for a hole",
        "        hole_returns=abi.PGM_ADDRESSING,",
        "        hole_returns=None,",
        "test_set.py::test_a_frame_in_no_slot_fails_the_call",
    ),
    Mutation(
        "up to 6.19 no key is lost",
        "        loses_keys=True,\n",
        "        loses_keys=False,\n",
        "test_lost_keys.py::test_up_to_6_19_one_key_of_each_untouched_segment_is_lost_and_the_answer_is_0",
    ),
    Mutation(
        "7.2 loses keys",
        '"7.2", loses_keys=False,',
        '"7.2", loses_keys=True,',
        "test_lost_keys.py::test_since_7_0_no_key_is_lost",
    ),
    Mutation(
        "it is the first key of a segment that is lost, zero or not",
        'zeros = len(part) - len(part.lstrip(b"\\0"))',
        "zeros = 0",
        "test_lost_keys.py::test_up_to_6_19_it_is_the_first_key_that_is_not_0_wherever_in_the_segment",
    ),
    Mutation(
        "a zero key makes a page table",
        """                if zeros < len(part):
                    slot.has_page_table[segment] = 1
""",
        """                slot.has_page_table[segment] = 1
                if zeros < len(part):
""",
        "test_lost_keys.py::test_up_to_6_19_a_zero_key_makes_no_page_table_and_so_saves_no_other",
    ),
    Mutation(
        "a lost key makes no page table",
        """                if zeros < len(part):
                    slot.has_page_table[segment] = 1
""",
        """                if zeros < len(part):
""",
        "test_lost_keys.py::test_up_to_6_19_a_second_set_of_the_same_keys_loses_none",
    ),
    Mutation(
        "segments are counted from the call's first frame",
        "here = min(len(keys) - at, (segment + 1) * SEGMENT_FRAMES - first - at)",
        "here = min(len(keys) - at, SEGMENT_FRAMES)",
        "test_lost_keys.py::test_up_to_6_19_segments_are_those_of_the_guest_and_not_of_the_call",
    ),
    Mutation(
        "touching memory makes no page table",
        "        slot.has_page_table[segment] = 1\n        if self._process",
        "        if self._process",
        "test_lost_keys.py::test_up_to_6_19_a_segment_of_which_any_frame_was_touched_loses_none",
    ),
    Mutation(
        "a write sets C only",
        "|= REFERENCED | CHANGED if write else REFERENCED",
        "|= CHANGED if write else REFERENCED",
        "test_drift.py::test_up_to_6_19_a_read_sets_r_and_a_write_sets_r_and_c",
    ),
    Mutation(
        "a read sets C too",
        "|= REFERENCED | CHANGED if write else REFERENCED",
        "|= REFERENCED | CHANGED",
        "test_drift.py::test_up_to_6_19_a_read_sets_r_and_a_write_sets_r_and_c",
    ),
    Mutation(
        "an access enables keys",
        "        segment = frame // SEGMENT_FRAMES\n        slot",
        "        segment = frame // SEGMENT_FRAMES\n        self._process.enable()\n        slot",
        "test_drift.py::test_an_access_enables_nothing",
    ),
    Mutation(
        "on 7.2 the host's accesses change keys",
        '"7.2", loses_keys=False, checks_keys_first=True, hole_returns=None, host_page_tables=False',
        '"7.2", loses_keys=False, checks_keys_first=True, hole_returns=None, host_page_tables=True',
        "test_drift.py::test_since_7_0_no_access_of_the_host_changes_a_key",
    ),
    Mutation(
        "enabling keys leaves R and C of touched segments alone",
        "bytes([REFERENCED | CHANGED]) * SEGMENT_FRAMES",
        "bytes(SEGMENT_FRAMES)",
        "test_drift.py::test_up_to_6_19_enabling_gives_r_and_c_to_every_frame_of_a_touched_segment",
    ),
    Mutation(
        "up to 6.19 whether keys are used is each VM's own",
        "self._process = process if process and self._rules.host_page_tables else SimulatedProcess()",
        "self._process = SimulatedProcess()",
        "test_keyedness.py::test_up_to_6_19_one_set_enables_keys_for_all_vms_of_the_process",
    ),
    Mutation(
        "since 7.0 whether keys are used is the process's",
        "self._process = process if process and self._rules.host_page_tables else SimulatedProcess()",
        "self._process = process or SimulatedProcess()",
        "test_keyedness.py::test_since_7_0_a_set_enables_keys_for_its_own_vm_only",
    ),
    Mutation(
        "a VM made later is keyless",
        "        self._process.slots.extend(self._slots)\n",
        "        self._process.slots.extend(self._slots)\n        self._process.uses_keys = False\n",
        "test_keyedness.py::test_up_to_6_19_a_vm_made_later_uses_keys_from_its_beginning_even_when_the_first_is_gone",
    ),
    Mutation(
        "4.19 has KEYOP",
        "        has_keyop=False,\n",
        "        has_keyop=True,\n",
        "test_keyop.py::test_up_to_6_19_it_is_not_there_and_the_capability_says_so",
    ),
    Mutation(
        "KEYOP looks at the frame before it looks at the operation",
        """            raise KvmError(_KEYOP, errno.EINVAL)
        parts, _ = self._parts(gfn, 1)
        if not parts:
""",
        """            parts = []
        else:
            parts, _ = self._parts(gfn, 1)
        if not parts:
""",
        "test_keyop.py::test_an_operation_that_is_none_is_einval_wherever",
    ),
    Mutation(
        "SSKE keeps the reserved bit",
        "slot.keys[frame] = key & ~RESERVED",
        "slot.keys[frame] = key",
        "test_keyop.py::test_sske_drops_the_reserved_bit_where_set_refuses_it",
    ),
    Mutation(
        "RRBE gives the whole key",
        "return old & (REFERENCED | CHANGED)",
        "return old",
        "test_keyop.py::test_rrbe_gives_the_old_r_and_c_of_each_of_the_128_keys_and_takes_r_away",
    ),
    Mutation(
        "KEYOP enables keys",
        "            slot.set_keyless.add(frame)\n",
        "            self._process.enable()\n",
        "test_keyop.py::test_it_works_on_a_keyless_guest_and_enables_nothing",
    ),
    Mutation(
        "what KEYOP set for a keyless guest outlives the enabling",
        "            self.keys[frame] = 0\n",
        "            pass\n",
        "test_keyop.py::test_a_key_that_sske_gave_a_keyless_guest_is_gone_once_keys_are_enabled",
    ),
    Mutation(
        "7.0 refuses KEYOP in a hole",
        "        leaked = self._rules.hole_returns\n        if leaked is None:",
        "        leaked = self._rules.hole_returns\n        if leaked is None or leaked:",
        "test_keyop.py::test_7_0_takes_the_number_of_an_interruption_for_the_key_of_a_frame_in_no_slot",
    ),
    Mutation(
        "KEYOP works on the first slot whatever the frame",
        """        slot, frame, _, _ = parts[0]
        old""",
        """        slot, frame, _, _ = parts[0]
        slot = self._slots[0]
        old""",
        "test_several_slots.py::test_since_7_0_keyop_finds_the_slot_of_its_frame",
    ),
    Mutation(
        "SSKE gives a keyless guest's old key as 0",
        """        slot.keys[frame] = key & ~RESERVED
        return old""",
        """        slot.keys[frame] = key & ~RESERVED
        return old if self._process.uses_keys else 0""",
        "test_several_slots.py::test_since_7_0_keyop_keeps_keys_of_a_keyless_guest_until_they_are_enabled",
    ),
    Mutation(
        "RRBE resets nothing for a keyless guest",
        """            slot.keys[frame] = old & ~REFERENCED
""",
        """            slot.keys[frame] = old & ~REFERENCED if self._process.uses_keys else old
""",
        "test_several_slots.py::test_since_7_0_keyop_keeps_keys_of_a_keyless_guest_until_they_are_enabled",
    ),
    Mutation(
        "a second SSKE on a keyless guest is ignored",
        """        slot.keys[frame] = key & ~RESERVED
""",
        """        slot.keys[frame] = key & ~RESERVED if self._process.uses_keys or not old else old
""",
        "test_several_slots.py::test_since_7_0_keyop_keeps_keys_of_a_keyless_guest_until_they_are_enabled",
    ),
    Mutation(
        "KEYOP finds a key before the first slot",
        """        if not parts:
            return self._keyop_in_hole""",
        """        if not parts and gfn < self._slots[0].frames.start:
            return 0
        if not parts:
            return self._keyop_in_hole""",
        "test_several_slots.py::test_since_7_2_a_frame_before_between_or_behind_slots_has_no_key",
    ),
    Mutation(
        "only ISKE is ENOTTY up to 6.19",
        """        if not self._rules.has_keyop:
""",
        """        if not self._rules.has_keyop and operation == abi.KVM_S390_KEYOP_ISKE:
""",
        "test_several_slots.py::test_up_to_6_19_there_is_no_keyop_whatever_it_is_asked",
    ),
    Mutation(
        "touching works on the first slot whatever the frame",
        """        slot, frame, _, _ = parts[0]
        segment""",
        """        slot, frame, _, _ = parts[0]
        slot, frame = self._slots[0], frame % self._slots[0].frames.count
        segment""",
        "test_several_slots.py::test_up_to_6_19_an_access_changes_the_key_of_its_own_frame_in_its_own_slot",
    ),
    Mutation(
        "touching makes the page table of the slot's first segment",
        """        slot.has_page_table[segment] = 1
        if self._process""",
        """        slot.has_page_table[0] = 1
        if self._process""",
        "test_several_slots.py::test_up_to_6_19_a_touch_saves_the_key_of_its_own_segment_in_its_own_slot",
    ),
    Mutation(
        "enabling gives R and C to one slot of the process only",
        """            for slot in self.slots:
                slot.enable()""",
        """            for slot in self.slots[-1:]:
                slot.enable()""",
        "test_several_slots.py::test_up_to_6_19_enabling_gives_r_and_c_to_touched_segments_of_all_slots_of_all_vms",
    ),
    Mutation(
        "of a SET over two slots and into a hole the first slot is applied only",
        """        for slot, first, at, count in parts:
            if at < stop:""",
        """        for slot, first, at, count in parts:
            if at < stop and not (at and stop < len(keys)):""",
        "test_several_slots.py::test_the_keys_before_a_hole_stay_set_in_each_slot",
    ),
    Mutation(
        "a SET over two slots loses no key in the second",
        """            if at < stop:
                self._store(slot""",
        """            if at < stop and at:
                slot.has_page_table[0] = 1
            if at < stop:
                self._store(slot""",
        "test_several_slots.py::test_up_to_6_19_each_slot_of_a_call_loses_its_keys",
    ),
    Mutation(
        "a reserved bit in the second slot is judged as the hole behind it",
        "        stop = reached if bad is None else min(bad, reached)",
        "        stop = reached if bad is None or bad >= parts[0][3] else min(bad, reached)",
        "test_several_slots.py::test_a_reserved_bit_in_the_second_slot_is_told_before_a_hole_behind_it",
    ),
    Mutation(
        "a VM made later wipes the keys of the process's other VMs",
        "        self._process.slots.extend(self._slots)\n",
        """        for slot in self._process.slots:
            slot.keys[:] = bytes(len(slot.keys))
        self._process.slots.extend(self._slots)
""",
        "test_keyedness.py::test_a_vm_made_later_leaves_the_keys_of_the_others_alone",
    ),
    Mutation(
        "closing a VM wipes the keys of the others",
        """        self._slots = []
""",
        """        self._slots = []
        for slot in self._process.slots:
            slot.keys[:] = bytes(len(slot.keys))
""",
        "test_keyedness.py::test_closing_a_vm_leaves_the_keys_of_the_others_alone",
    ),
    Mutation(
        "a VM that is closed leaves its slots in the process",
        """            self._process.slots.remove(slot)
""",
        "",
        "test_keyedness.py::test_keys_are_enabled_as_ever_when_a_vm_whose_memory_was_touched_is_gone",
        shows="ValueError: mmap closed or invalid",
    ),
    Mutation(
        "enabling gives R and C to one touched segment of a slot only",
        "for segment in self.touched_keyless:",
        "for segment in list(self.touched_keyless)[:1]:",
        "test_drift.py::test_up_to_6_19_enabling_gives_r_and_c_to_every_touched_segment_of_a_slot",
    ),
    Mutation(
        "a reserved bit from the thousandth key of a SET on is ignored",
        "bad = first_reserved(keys)",
        "bad = first_reserved(keys[:1000])",
        "test_set.py::test_a_reserved_bit_is_einval_however_late_in_the_call",
    ),
    Mutation(
        "only the first 8 segments of a SET lose keys",
        "if not slot.has_page_table[segment]:",
        "if not slot.has_page_table[segment] and at < 8 * SEGMENT_FRAMES:",
        "test_lost_keys.py::test_up_to_6_19_each_of_the_segments_of_the_longest_set_loses_its_key",
    ),
    Mutation(
        "GET gives zeros for slots that begin 64 Ki frames and more into the call",
        "buffer[at : at + count] = keys[first : first + count]",
        "buffer[at : at + count] = keys[first : first + count] if at < 65536 else bytes(count)",
        "test_several_slots.py::test_one_call_reads_the_keys_of_all_slots_however_far_from_its_first_frame_they_begin",
    ),
    Mutation(
        "a SET that fails enables keys, and gives R and C to no touched segment",
        """        self._process.enable()  # even if it then fails
        parts, reached = self._parts(start_gfn, len(keys))
""",
        """        parts, reached = self._parts(start_gfn, len(keys))
        if reached < len(keys) or first_reserved(keys) is not None:
            for slot in self._process.slots:
                slot.touched_keyless.clear()
        self._process.enable()
""",
        "test_drift.py::test_up_to_6_19_a_set_that_fails_gives_r_and_c_to_touched_segments_all_the_same",
    ),
    Mutation(
        "a SET that fails enables keys, and wipes none that KEYOP has set",
        """        self._process.enable()  # even if it then fails
        parts, reached = self._parts(start_gfn, len(keys))
""",
        """        parts, reached = self._parts(start_gfn, len(keys))
        if reached < len(keys) or first_reserved(keys) is not None:
            for slot in self._process.slots:
                slot.set_keyless.clear()
        self._process.enable()
""",
        "test_several_slots.py::test_since_7_0_a_set_that_fails_wipes_what_keyop_has_set_all_the_same",
    ),
    Mutation(
        "a SET whose first key is bad enables keys for its own VM only",
        """        self._process.enable()  # even if it then fails
""",
        """        if keys[0] & RESERVED and self._rules.host_page_tables and not self._process.uses_keys:
            self._process.slots = [slot for slot in self._process.slots if slot not in self._slots]
            self._process = SimulatedProcess()
            self._process.slots = list(self._slots)
        self._process.enable()
""",
        "test_keyedness.py::test_up_to_6_19_a_set_that_fails_in_one_vm_enables_keys_for_the_others_too",
    ),
    Mutation(
        "enabling wipes what KEYOP has set in one slot only",
        """            for slot in self.slots:
                slot.enable()""",
        """            for slot in self.slots if not any(slot.set_keyless for slot in self.slots) else self.slots[:1]:
                slot.enable()""",
        "test_several_slots.py::test_since_7_0_enabling_wipes_what_keyop_has_set_in_all_slots_of_its_own_vm_only",
    ),
    Mutation(
        "ISKE takes R away",
        """        if operation == abi.KVM_S390_KEYOP_ISKE:
            return old
""",
        """        if operation == abi.KVM_S390_KEYOP_ISKE:
            slot.keys[frame] = old & ~REFERENCED
            return old
""",
        "test_keyop.py::test_iske_changes_nothing",
    ),
    Mutation(
        "SSKE drops fetch protection",
        "slot.keys[frame] = key & ~RESERVED",
        "slot.keys[frame] = key & 0xF6",
        "test_keyop.py::test_each_of_the_128_keys_goes_through_keyop_as_it_is",
    ),
    Mutation(
        "a SET sets the first key of the next segment to 0",
        """            slot.keys[first + at : first + at + here] = part
""",
        """            slot.keys[first + at : first + at + here] = part
            if (segment + 1) * SEGMENT_FRAMES < slot.frames.count:
                slot.keys[(segment + 1) * SEGMENT_FRAMES] = 0
""",
        "test_set.py::test_a_set_changes_the_keys_of_its_own_frames_and_no_others",
    ),
    Mutation(
        "the SET that enables keys loses none",
        "        self._process.enable()  # even if it then fails\n",
        """        if not self._process.uses_keys and self._rules.loses_keys:
            for slot in self._slots:
                slot.has_page_table[:] = b"\\1" * len(slot.has_page_table)
        self._process.enable()
""",
        "test_lost_keys.py::test_up_to_6_19_the_first_set_of_a_process_loses_keys_too",
    ),
    Mutation(
        "a segment whose first 128 keys are 0 loses none",
        "                if zeros < len(part):\n",
        "                if zeros < min(len(part), 128):\n",
        "test_lost_keys.py::test_up_to_6_19_a_key_is_lost_however_many_0s_come_before_it",
    ),
    Mutation(
        "a key without ACC and F makes a page table and is kept",
        """                if zeros < len(part):
                    slot.has_page_table[segment] = 1
""",
        """                if zeros < len(part):
                    slot.has_page_table[segment] = 1
                if zeros < len(part) and part[zeros] & 0xF8:
""",
        "test_lost_keys.py::test_up_to_6_19_a_key_is_lost_whichever_of_its_bits_are_set",
    ),
    Mutation(
        "a page table of one VM saves the keys of the others at the same frames",
        "        slot.has_page_table[segment] = 1\n        if self._process",
        """        for one in self._process.slots:
            if segment < len(one.has_page_table):
                one.has_page_table[segment] = 1
        if self._process""",
        "test_lost_keys.py::test_up_to_6_19_a_page_table_saves_no_key_of_another_vm",
    ),
    Mutation(
        "a VM made when keys are used gets R and C only once they are enabled",
        """        if self._process.uses_keys:
            slot.keys[frame] |=""",
        """        if self._process.uses_keys and slot in self._process.slots[:1]:
            slot.keys[frame] |=""",
        "test_keyedness.py::test_up_to_6_19_an_access_to_a_vm_made_later_changes_its_key_at_once",
    ),
    Mutation(
        "a process forgets that it uses keys when its last VM is closed",
        """        self._slots = []
""",
        """        self._slots = []
        self._process.uses_keys = bool(self._process.slots) and self._process.uses_keys
""",
        "test_keyedness.py::test_up_to_6_19_a_vm_made_later_uses_keys_from_its_beginning_even_when_the_first_is_gone",
    ),
    Mutation(
        "a SET of more than 64 Ki keys sets those only",
        "            if at < stop:\n                self._store(slot, first, keys[at : min(at + count, stop)])",
        "            if at < stop:\n                self._store(slot, first, keys[at : min(at + count, stop, 65536)])",
        "test_several_slots.py::test_one_call_sets_the_keys_of_all_slots_however_far_from_its_first_frame_they_begin",
    ),
    Mutation(
        "up to 6.19 the keys of the segment before a reserved bit are not set",
        "        stop = reached if bad is None else min(bad, reached)",
        "        stop = reached if bad is None else min(bad - bad % SEGMENT_FRAMES if bad > 256 else bad, reached)",
        "test_set.py::test_up_to_6_19_all_keys_before_a_late_reserved_bit_stay_set",
    ),
    Mutation(
        "a keyless guest has no frame in a hole that 7.0 gives a key",
        """        leaked = self._rules.hole_returns
        if leaked is None:""",
        """        leaked = self._rules.hole_returns if self._process.uses_keys else None
        if leaked is None:""",
        "test_keyop.py::test_7_0_finds_that_number_in_a_keyless_guest_too",
    ),
    Mutation(
        "keys are enabled for the first 8 VMs of a process only",
        "            self.uses_keys = True\n            for slot in self.slots:",
        "            self.uses_keys = len(self.slots) < 9\n            for slot in self.slots:",
        "test_keyedness.py::test_up_to_6_19_one_set_enables_keys_for_many_vms",
    ),
    Mutation(
        "a byte with the reserved bit and no other is a key",
        "bad = first_reserved(keys)",
        'bad = first_reserved(keys.replace(b"\\1", b"\\0"))',
        "test_set.py::test_none_of_the_128_bytes_with_the_reserved_bit_is_a_key",
    ),
    Mutation(
        "only the first 16 slots of a VM have keys of their own",
        "            self._slots = [_Slot(slot.frames) for slot in self.memory_map.slots]",
        """            self._slots = [_Slot(slot.frames) for slot in self.memory_map.slots]
            for number, slot in enumerate(self._slots[16:]):
                slot.keys = self._slots[number].keys""",
        "test_several_slots.py::test_each_of_32_slots_has_keys_of_its_own",
    ),
    Mutation(
        "touching makes page tables in a slot's first 16 segments only",
        "        slot.has_page_table[segment] = 1\n        if self._process",
        "        slot.has_page_table[segment] = segment < 16\n        if self._process",
        "test_lost_keys.py::test_up_to_6_19_of_64_segments_those_that_were_touched_lose_none",
    ),
    Mutation(
        "touching does nothing from the third slot on",
        "        slot, frame, _, _ = parts[0]\n        segment",
        """        slot, frame, _, _ = parts[0]
        if slot in self._slots[2:]:
            return
        segment""",
        "test_several_slots.py::test_up_to_6_19_an_access_is_seen_in_each_of_32_slots",
    ),
    Mutation(
        "KEYOP finds 0 from the third slot on",
        "        slot, frame, _, _ = parts[0]\n        old",
        "        slot, frame, _, _ = parts[0]\n        if slot in self._slots[2:]:\n            return 0\n        old",
        "test_several_slots.py::test_since_7_0_keyop_works_in_each_of_32_slots",
    ),
    Mutation(
        "a GET of more than 300 keys sets R",
        "        return True\n",
        "            if count > 300:\n                slot.keys[first] |= REFERENCED\n        return True\n",
        "test_drift.py::test_a_long_get_sets_neither_r_nor_c_and_enables_nothing",
    ),
    Mutation(
        "a GET of more than 300 keys enables keys",
        "            return False  # whatever count and start are\n",
        "            self._process.uses_keys = buffer.nbytes > 300\n            return False\n",
        "test_drift.py::test_a_long_get_sets_neither_r_nor_c_and_enables_nothing",
    ),
    Mutation(
        "enabling gives R and C to the last 32 touched segments of a slot",
        "            slot.touched_keyless.add(segment)\n",
        "            slot.touched_keyless = {*sorted(slot.touched_keyless)[-31:], segment}\n",
        "test_drift.py::test_up_to_6_19_enabling_gives_r_and_c_to_each_of_60_touched_segments",
    ),
    Mutation(
        "enabling wipes the last 100 keys only that KEYOP has set",
        "            slot.set_keyless.add(frame)\n",
        "            slot.set_keyless = {*sorted(slot.set_keyless)[-99:], frame}\n",
        "test_keyop.py::test_all_keys_that_sske_gave_a_keyless_guest_are_gone_once_keys_are_enabled",
    ),
    Mutation(
        "a hole 64 Ki frames or more into a GET is no error",
        "        if reached < buffer.nbytes:\n            raise",
        "        if reached < buffer.nbytes and reached < 65536:\n            raise",
        "test_get.py::test_a_hole_fails_the_call_however_late_in_it",
    ),
    Mutation(
        "a hole 64 Ki frames or more into a SET is no error",
        "            raise self._hole(_SET) if stop == reached else",
        """            if stop == reached and stop >= 65536:
                return
            raise self._hole(_SET) if stop == reached else""",
        "test_set.py::test_a_hole_fails_a_set_however_late_in_it",
    ),
    Mutation(
        "touching does nothing from gfn 2^33 on",
        "        if not self._rules.host_page_tables:\n            return\n",
        "        if not self._rules.host_page_tables or gfn >= 1 << 33:\n            return\n",
        "test_drift.py::test_up_to_6_19_an_access_far_up_changes_the_key_of_its_frame_and_no_other",
    ),
    Mutation(
        "a read of a frame with ACC 5 sets C too",
        "|= REFERENCED | CHANGED if write else REFERENCED",
        "|= REFERENCED | CHANGED if write or slot.keys[frame] >> 4 == 5 else REFERENCED",
        "test_drift.py::test_up_to_6_19_an_access_changes_each_of_the_128_keys_in_r_and_c_alone",
    ),
    Mutation(
        "enabling skips the first slot of a process with more than 4",
        "            for slot in self.slots:\n                slot.enable()",
        "            for slot in self.slots[2 * (len(self.slots) > 4) :]:\n                slot.enable()",
        "test_several_slots.py::test_up_to_6_19_enabling_gives_r_and_c_to_the_touched_segments_of_9_vms",
    ),
    Mutation(
        "a GET of a keyless guest wipes what KEYOP has set",
        "            return False  # whatever count and start are\n",
        "            for slot in self._slots:\n                slot.enable()\n            return False\n",
        "test_keyop.py::test_a_get_of_a_keyless_guest_leaves_the_key_that_sske_gave_it",
    ),
    Mutation(
        "a SET with a bad count wipes what KEYOP has set",
        "        self._check_count(_SET, buffer)\n",
        """        if not 1 <= buffer.nbytes <= abi.KVM_S390_SKEYS_MAX:
            for slot in self._slots:
                slot.enable()
        self._check_count(_SET, buffer)
""",
        "test_keyop.py::test_a_set_with_a_bad_count_leaves_the_key_that_sske_gave_a_keyless_guest",
    ),
    Mutation(
        "since 7.0 the host's writes change the keys of a keyless guest",
        "        if not self._rules.host_page_tables:\n            return\n",
        """        if not self._rules.host_page_tables:
            if write and not self._process.uses_keys:
                slot, frame, _, _ = parts[0]
                slot.keys[frame] |= REFERENCED | CHANGED
            return
""",
        "test_keyop.py::test_no_access_of_the_host_changes_what_iske_finds_in_a_keyless_guest",
    ),
    Mutation(
        "KEYOP finds no frame from gfn 2^32 on",
        "        parts, _ = self._parts(gfn, 1)\n        if not parts:\n            return self._keyop_in_hole",
        """        parts, _ = self._parts(gfn & 0xFFFFFFFF, 1)
        if not parts:
            return self._keyop_in_hole""",
        "test_keyop.py::test_keyop_works_far_up_on_its_frame_and_no_other",
    ),
    Mutation(
        "no key is lost from gfn 2^32 on",
        "if not slot.has_page_table[segment]:",
        "if not slot.has_page_table[segment] and slot.frames.start < 1 << 32:",
        "test_lost_keys.py::test_up_to_6_19_far_up_too_a_key_is_lost_where_nothing_was_touched",
    ),
    Mutation(
        "enabling gives R and C to no segment from gfn 2^32 on",
        "            slot.touched_keyless.add(segment)\n",
        "            if gfn < 1 << 32:\n                slot.touched_keyless.add(segment)\n",
        "test_drift.py::test_up_to_6_19_enabling_gives_r_and_c_to_a_touched_segment_far_up",
    ),
    Mutation(
        "closing a VM has the process forget what was touched in the others",
        "        self._slots = []\n",
        """        self._slots = []
        for slot in self._process.slots:
            slot.touched_keyless.clear()
""",
        "test_keyedness.py::test_up_to_6_19_touched_segments_get_r_and_c_though_other_vms_come_and_go",
    ),
    Mutation(
        "a VM made later has the process forget what was touched in the others",
        "        self._process.slots.extend(self._slots)\n",
        """        for slot in self._process.slots:
            slot.touched_keyless.clear()
        self._process.slots.extend(self._slots)
""",
        "test_keyedness.py::test_up_to_6_19_touched_segments_get_r_and_c_though_other_vms_come_and_go",
    ),
    Mutation(
        "a SET of a guest that uses keys may have any count",
        """        self._check_count(_SET, buffer)
        keys = bytes(buffer)
""",
        """        if not self._process.uses_keys:
            self._check_count(_SET, buffer)
        keys = bytes(buffer)
""",
        "test_failures.py::test_a_set_with_a_count_outside_1_to_max_sets_nothing_wherever_it_begins",
    ),
    Mutation(
        "a SET looks at frames before it looks at the count",
        """        self._check_count(_SET, buffer)
        keys = bytes(buffer)
""",
        """        if self._process.uses_keys and self._parts(start_gfn, buffer.nbytes)[1] < buffer.nbytes:
            raise self._hole(_SET)
        self._check_count(_SET, buffer)
        keys = bytes(buffer)
""",
        "test_failures.py::test_a_set_with_a_count_outside_1_to_max_sets_nothing_wherever_it_begins",
    ),
    Mutation(
        "a SET beyond memory's last address goes on at frame 0",
        """        self._process.enable()  # even if it then fails
""",
        """        self._process.enable()
        if start_gfn >= 1 << 52:
            for one, first, at, count in self._parts(start_gfn % (1 << 52), len(keys))[0]:
                one.keys[first : first + count] = keys[at : at + count]
""",
        "test_failures.py::test_a_set_that_meets_a_hole_sets_the_keys_before_it_and_no_others",
    ),
    Mutation(
        "bit 40 of a gfn is lost",
        """        parts: list[tuple[_Slot, int, int, int]] = []
        at = 0
""",
        """        parts: list[tuple[_Slot, int, int, int]] = []
        at = 0
        start_gfn &= ~(1 << 40)
""",
        "test_failures.py::test_no_bit_of_a_gfn_is_lost_on_its_way",
    ),
    Mutation(
        "a bad key takes R and C from its frame",
        """        if stop < len(keys):
            raise""",
        """        if stop < len(keys):
            for slot, first, at, count in parts:
                if at <= stop < at + count:
                    slot.keys[first + stop - at] &= 0xF8
            raise""",
        "test_failures.py::test_a_bad_key_leaves_its_frame_the_key_it_has_in_all_bits",
    ),
    Mutation(
        "up to 6.19 a bad key behind a hole is told first",
        "stop = reached if bad is None else min(bad, reached)",
        "stop = reached if bad is None else bad if not reached else min(bad, reached)",
        "test_failures.py::test_up_to_6_19_a_hole_is_told_before_a_bad_key_behind_it",
    ),
    Mutation(
        "SSKE in a hole sets the key of the first frame",
        "        leaked = self._rules.hole_returns\n",
        """        leaked = self._rules.hole_returns
        if operation == abi.KVM_S390_KEYOP_SSKE:
            self._slots[0].keys[0] = key & ~RESERVED
""",
        "test_failures.py::test_keyop_in_a_hole_changes_no_key",
    ),
    Mutation(
        "RRBE in a hole takes R from the last frame",
        "        leaked = self._rules.hole_returns\n",
        """        leaked = self._rules.hole_returns
        if operation == abi.KVM_S390_KEYOP_RRBE:
            self._slots[-1].keys[-1] &= ~REFERENCED
""",
        "test_failures.py::test_keyop_in_a_hole_changes_no_key",
    ),
    Mutation(
        "7.0 drops the reserved bit of a key for a hole",
        ".get(operation, key)",
        ".get(operation, key & ~RESERVED)",
        "test_failures.py::test_keyop_in_a_hole_changes_no_key",
    ),
    Mutation(
        "KEYOP up to the first slot finds its first frame",
        """        parts, _ = self._parts(gfn, 1)
        if not parts:
            return self._keyop_in_hole""",
        """        parts, _ = self._parts(max(gfn, self._slots[0].frames.start), 1)
        if not parts:
            return self._keyop_in_hole""",
        "test_failures.py::test_keyop_in_a_hole_changes_no_key",
    ),
    Mutation(
        "up to 6.19 a SET that fails on a hole enables keys for its own VM only",
        "        self._process.enable()  # even if it then fails\n",
        """        if self._rules.host_page_tables and self._parts(start_gfn, len(keys))[1] < len(keys):
            if not self._process.uses_keys:
                self._process.slots = [one for one in self._process.slots if one not in self._slots]
                self._process = SimulatedProcess()
                self._process.slots.extend(self._slots)
        self._process.enable()
""",
        "test_keyedness.py::test_up_to_6_19_a_set_that_fails_in_one_vm_enables_keys_for_the_others_too",
    ),
    Mutation(
        "a SET that fails gives R and C to touched segments of its own VM only",
        "        self._process.enable()  # even if it then fails\n",
        """        if self._parts(start_gfn, len(keys))[1] < len(keys) or first_reserved(keys) is not None:
            for one in self._process.slots:
                if one not in self._slots:
                    one.touched_keyless.clear()
        self._process.enable()
""",
        "test_keyedness.py::test_up_to_6_19_a_set_that_fails_in_one_vm_gives_r_and_c_to_touched_segments_of_the_others_too",
    ),
    Mutation(
        "a VM takes what its failed SET has enabled along when it goes",
        "        for slot in self._slots:\n            self._process.slots.remove(slot)\n",
        """        if not any(any(one.keys[:]) for one in self._process.slots):
            self._process.uses_keys = False
        for slot in self._slots:
            self._process.slots.remove(slot)
""",
        "test_keyedness.py::test_up_to_6_19_what_a_set_that_failed_has_enabled_outlives_its_vm",
    ),
    Mutation(
        "a SET of more than one key that lies in a hole enables nothing",
        "        self._process.enable()  # even if it then fails\n",
        """        if len(keys) == 1 or self._parts(start_gfn, 1)[0]:
            self._process.enable()
""",
        "test_keyedness.py::test_a_set_that_lies_in_a_hole_altogether_enables_keys_however_long_it_is",
    ),
    Mutation(
        "closing a VM takes R and C from the keys of the others",
        "            self._process.slots.remove(slot)\n",
        """            self._process.slots.remove(slot)
            for other in self._process.slots:
                for frame in range(SEGMENT_FRAMES):
                    other.keys[frame] &= 0xF8
""",
        "test_keyedness.py::test_closing_a_vm_leaves_the_keys_of_the_others_alone",
    ),
    Mutation(
        "closing a VM takes the page tables of the others",
        "            self._process.slots.remove(slot)\n",
        """            self._process.slots.remove(slot)
            for other in self._process.slots:
                other.has_page_table[:] = bytes(len(other.has_page_table))
""",
        "test_page_tables.py::test_up_to_6_19_a_page_table_made_once_keys_were_enabled_stays",
    ),
    Mutation(
        "a VM that is made takes the page tables of the others",
        "        self._process.slots.extend(self._slots)\n",
        """        for other in self._process.slots:
            other.has_page_table[:] = bytes(len(other.has_page_table))
        self._process.slots.extend(self._slots)
""",
        "test_page_tables.py::test_up_to_6_19_a_page_table_made_before_keys_were_enabled_stays",
    ),
    Mutation(
        "enabling takes the page tables that were there",
        "        self.touched_keyless.clear()\n",
        """        for segment in self.touched_keyless:
            self.has_page_table[segment] = 0
        self.touched_keyless.clear()
""",
        "test_page_tables.py::test_up_to_6_19_a_page_table_made_before_keys_were_enabled_stays",
    ),
    Mutation(
        "a bad key that is not the first of its call makes a page table",
        "stop = reached if bad is None else min(bad, reached)\n",
        """stop = reached if bad is None else min(bad, reached)
        if bad:
            for slot, first, at, count in self._parts(start_gfn + bad, 1)[0]:
                slot.has_page_table[first // SEGMENT_FRAMES] = 1
""",
        "test_page_tables.py::test_up_to_6_19_a_bad_key_makes_no_page_table_wherever_in_its_call",
    ),
    Mutation(
        "a SET in a hole makes the last page table",
        """        if stop < len(keys):
            raise""",
        """        if not parts:
            self._slots[0].has_page_table[len(self._slots[0].has_page_table) - 1] = 1
        if stop < len(keys):
            raise""",
        "test_page_tables.py::test_up_to_6_19_a_key_in_a_hole_makes_no_page_table",
    ),
    Mutation(
        "a GET takes the page tables of segments whose keys are 0",
        "        for slot, first, at, count in parts:\n            with memoryview",
        """        for slot, first, at, count in parts:
            if not any(slot.keys[first : first + count]):
                slot.has_page_table[:] = bytes(len(slot.has_page_table))
            with memoryview""",
        "test_page_tables.py::test_up_to_6_19_a_page_table_made_once_keys_were_enabled_stays",
    ),
    Mutation(
        "a touch of the last frame of a slot does nothing",
        "        slot, frame, _, _ = parts[0]\n        segment = frame",
        """        slot, frame, _, _ = parts[0]
        if frame == slot.frames.count - 1:
            return
        segment = frame""",
        "test_page_tables.py::test_up_to_6_19_the_last_frame_of_each_slot_is_like_the_others",
    ),
    Mutation(
        "the key of the last frame of a slot is never lost",
        "                if zeros < len(part):\n",
        "                if zeros < len(part) and first + at + zeros < slot.frames.count - 1:\n",
        "test_page_tables.py::test_up_to_6_19_the_last_frame_of_each_slot_is_like_the_others",
    ),
    Mutation(
        "no key is lost from the third slot on",
        "            if not slot.has_page_table[segment]:\n",
        "            if not slot.has_page_table[segment] and slot in self._slots[:2]:\n",
        "test_page_tables.py::test_up_to_6_19_a_key_is_lost_in_each_of_five_slots",
    ),
    Mutation(
        "a call reaches over 8 slots at most",
        "            if at < count and slot",
        "            if len(parts) < 8 and at < count and slot",
        "test_several_slots.py::test_a_call_reaches_over_as_many_slots_as_lie_end_to_end",
    ),
    Mutation(
        "a GET is not told of a hole behind two slots",
        "        if reached < buffer.nbytes:\n",
        "        if reached < buffer.nbytes and len(parts) < 2:\n",
        "test_several_slots.py::test_a_call_reaches_over_as_many_slots_as_lie_end_to_end",
    ),
    Mutation(
        "KEYOP doesn't find the last frame of the last slot",
        """        parts, _ = self._parts(gfn, 1)
        if not parts:
            return self._keyop_in_hole""",
        """        parts, _ = self._parts(gfn, 1)
        if not parts or gfn == self._slots[-1].frames.end - 1:
            return self._keyop_in_hole""",
        "test_keyop.py::test_keyop_works_on_the_first_and_the_last_frame_of_each_slot",
    ),
    Mutation(
        "an operation that is none is taken for SSKE in a keyless guest",
        "        if operation not in (abi.",
        "        if self._process.uses_keys and operation not in (abi.",
        "test_keyop.py::test_an_operation_that_is_none_is_einval_in_a_keyless_guest_too",
    ),
    Mutation(
        "SSKE leaves a keyless guest the reserved bit",
        "        slot.keys[frame] = key & ~RESERVED\n",
        "        slot.keys[frame] = key & ~RESERVED if self._process.uses_keys else key\n",
        "test_keyop.py::test_sske_drops_the_reserved_bit_and_no_other_in_a_keyless_guest_too",
    ),
    Mutation(
        "SSKE drops R and C in a keyless guest",
        "        slot.keys[frame] = key & ~RESERVED\n",
        "        slot.keys[frame] = key & ~RESERVED if self._process.uses_keys else key & 0xF8\n",
        "test_keyop.py::test_sske_drops_the_reserved_bit_and_no_other_in_a_keyless_guest_too",
    ),
    Mutation(
        "enabling leaves a keyless guest the keys without ACC",
        "        for frame in self.set_keyless:\n            self.keys[frame] = 0\n",
        """        for frame in self.set_keyless:
            if self.keys[frame] & 0xF0:
                self.keys[frame] = 0
""",
        "test_keyop.py::test_enabling_takes_away_whatever_key_sske_gave_a_keyless_guest_in_each_slot",
    ),
    Mutation(
        "enabling leaves the keys of a keyless guest from the third slot on",
        "            for slot in self.slots:\n                slot.enable()\n",
        "            for slot in self.slots[:2]:\n                slot.enable()\n",
        "test_keyop.py::test_enabling_takes_away_whatever_key_sske_gave_a_keyless_guest_in_each_slot",
    ),
    Mutation(
        "RRBE gives F too for keys without ACC",
        "            return old & (REFERENCED | CHANGED)\n",
        "            return old & (REFERENCED | CHANGED | (0x08 if old < 0x10 else 0))\n",
        "test_keyop.py::test_rrbe_gives_the_old_r_and_c_of_each_of_the_128_keys_and_takes_r_away",
    ),
    Mutation(
        "up to 6.19 KEYOP on a keyless guest is EINVAL",
        "            raise KvmError(_KEYOP, errno.ENOTTY)\n",
        "            raise KvmError(_KEYOP, errno.ENOTTY if self._process.uses_keys else errno.EINVAL)\n",
        "test_keyop.py::test_up_to_6_19_it_is_enotty_for_a_keyless_guest_too_whatever_is_asked",
    ),
    Mutation(
        "enabling by a zero key gives no R and C to its own segment",
        "        self._process.enable()  # even if it then fails\n",
        """        if keys == b"\\0":
            for one, first, _, _ in self._parts(start_gfn, 1)[0]:
                one.touched_keyless.discard(first // SEGMENT_FRAMES)
        self._process.enable()
""",
        "test_drift.py::test_up_to_6_19_a_zero_key_too_gives_the_rest_of_its_touched_segment_r_and_c",
    ),
    Mutation(
        "closing the first VM has the process forget what was touched in the others",
        "            self._process.slots.remove(slot)\n",
        """            if self._process.slots[0] is slot:
                for other in self._process.slots:
                    other.touched_keyless.clear()
            self._process.slots.remove(slot)
""",
        "test_keyedness.py::test_up_to_6_19_whichever_vm_is_closed_the_touched_segments_of_the_others_get_r_and_c",
    ),
)
