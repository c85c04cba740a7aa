"""What keeps keys safe, each switched off by a change of the product's text, and the test that must notice.

tests/faults/test_safeties.py does so in a copy. `old` is found exactly once in its file; where it isn't any more, the
safety has moved, and so must its row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Safety:
    """One safety switched off."""

    what: str
    file: str
    """Below skeyd/."""
    old: str
    new: str
    caught_by: str
    """A test, below tests/."""


SAFETIES: Final = (
    Safety(
        "old keys are kept",
        "worker/transactions.py",
        "            current.journal.push(frames, old)\n",
        "",
        "worker/test_transactions.py::test_a_call_that_is_abandoned_leaves_every_key_as_it_was_r_and_c_too",
    ),
    Safety(
        "old keys in the journal have a checksum",
        "worker/journal.py",
        "len(packed) == length and zlib.crc32(packed) == crc32",
        "len(packed) == length",
        "worker/test_journal.py::test_a_damaged_file_gives_no_keys_and_says_which_are_lost",
    ),
    Safety(
        "old keys that are damaged keep no others from being set again",
        "worker/transactions.py",
        "            current.dirty += damaged.frames\n",
        "            current.dirty += [*damaged.frames, *journal.rest()]\n            self._settle()\n",
        "worker/test_rollback.py::test_old_keys_that_are_damaged_are_dirty_frames_and_all_others_are_set_again",
    ),
    Safety(
        "what was set is read back",
        "worker/keys.py",
        """        self._read_back(frames, found)
        lost = lost_runs(wanted, found)
        repaired""",
        """        lost: list[tuple[int, int]] = []
        found[:] = wanted
        repaired""",
        "worker/test_keys.py::test_only_what_was_lost_is_set_again",
    ),
    Safety(
        "old keys that are set again are verified",
        "worker/restoring.py",
        "                self._keys.write_checked(frames, old, uses_keys=True, exact=True)\n",
        "                self._keys._set(frames, memoryview(bytearray(old)))\n",
        "faults/test_worker.py::test_a_key_that_the_kernel_loses_is_set_again",
    ),
    Safety(
        "one call at a time sets keys, and none while another is rolled back",
        "worker/transactions.py",
        """        if self._open is not None:
            what =""",
        """        if self._open is None:
            what =""",
        "worker/test_transactions.py::test_while_a_call_runs_or_is_rolled_back_nobody_else_may_set_a_key",
    ),
    Safety(
        "nothing is spent on a chunk that is out of place",
        "rpc/set_skeys.py",
        "    writing.require_next(frames)\n",
        "",
        "rpc/test_set_refusals.py::test_a_misplaced_chunk_is_refused_before_its_data_is_decoded",
    ),
    Safety(
        "a chunk's keys fit its checksum",
        "vms/writing.py",
        "        if found != crc32:\n",
        "        if False:\n",
        "vms/test_writing.py::test_a_chunk_that_is_wrong_is_refused_before_any_of_it_is_written",
    ),
    Safety(
        "a key has no reserved bit when the kernel is asked",
        "worker/keys.py",
        "        if bad is not None:\n",
        "        if False:\n",
        "worker/test_keys.py::test_a_key_with_the_reserved_bit_never_reaches_the_kernel",
    ),
    Safety(
        "a stream goes on with the VM that it began with, and with no other",
        "rpc/incarnation.py",
        "if meant != hello.incarnation:",
        "if False:",
        "rpc/test_resume.py::test_a_vm_that_was_made_again_is_not_taken_for_the_one_before",
    ),
    Safety(
        "a SetSkeys sets the keys of the VM that it means, and of no other",
        "rpc/set_skeys.py",
        "            if header.incarnation:\n",
        "            if False:\n",
        "rpc/test_set_again.py::test_what_is_sent_again_is_never_applied_to_another_vm_of_that_name",
    ),
    Safety(
        "what QEMU's process has noted to be a buffer is one of skeyd's sizes",
        "injection/buffer.py",
        "    if not _HEAD < size <= _MOST or size % _PAGE or start % _PAGE:\n",
        "    if False:\n",
        "injection/test_worst.py::test_what_no_skeyd_has_noted_is_no_buffer",
    ),
    Safety(
        "a stub that a killed tracer left stays",
        "injection/injection.py",
        "self.target.stub_is_ours and not cave.note()[0]",
        "not cave.note()[0]",
        "injection/test_kills.py::test_a_handler_that_returns_to_where_a_killed_tracer_left_its_thread_finds_the_stub_there",
    ),
    Safety(
        "an ioctl has no more keys than a slice",
        "worker/front_connection.py",
        "min(SLICE_KEYS, BUFFER_KEYS - offset)",
        "BUFFER_KEYS - offset",
        "worker/test_requests.py::test_a_slice_out_of_bounds_ends_its_connection_and_no_other",
    ),
    Safety(
        "a stream reads no farther ahead than a chunk of its own and a slice",
        "vms/read_ahead.py",
        "min(chunk_keys, BUFFER_KEYS) + SLICE_KEYS",
        "BUFFER_KEYS + SLICE_KEYS",
        "vms/test_read_ahead.py::test_a_stream_of_chunks_as_large_as_most_has_two_slices_in_the_front",
    ),
    Safety(
        "a chunk of which one slice is keyless has no keys",
        "vms/read_ahead.py",
        'answer.boolean("uses_keys") and filling.uses_keys',
        'answer.boolean("uses_keys")',
        "rpc/test_get_slices.py::test_a_chunk_of_which_a_slice_is_said_to_be_keyless_is_no_chunk",
    ),
    Safety(
        "no two threads use one compressor",
        "encoding/zstd.py",
        "class _Tools(threading.local):\n",
        "class _Tools:\n",
        "encoding/test_zstd.py::test_threads_that_encode_and_decode_at_once_have_each_their_own_keys",
    ),
    Safety(
        "a slice takes no longer than it may",
        "vms/pacing.py",
        "most = min(fitting, GROWTH * self.keys, SLICE_KEYS)",
        "most = min(GROWTH * self.keys, SLICE_KEYS)",
        "vms/test_pacing.py::test_slices_take_as_long_as_they_may_and_no_longer",
    ),
    Safety(
        "keys that result have the digest that was asked for",
        "vms/writing.py",
        "        if found != resulting.sha256:\n",
        "        if False:\n",
        "rpc/test_set_digests.py::test_keys_that_are_not_those_that_were_to_result_are_rolled_back",
    ),
    Safety(
        "a request_id stands for one request",
        "worker/transactions.py",
        "    if fingerprint != before:\n",
        "    if False:\n",
        "worker/test_repeated_calls.py::test_a_request_id_stands_for_one_request",
    ),
    Safety(
        "a call that was kept goes on only where nobody else has set a key since",
        "worker/service.py",
        "            self._transactions.forget_kept()\n            written = self._keys.write(",
        "            written = self._keys.write(",
        "rpc/test_set_again.py::test_there_is_nothing_to_go_on_with_once_somebody_else_has_set_keys",
    ),
    Safety(
        "what is committed is what the front wanted set",
        "worker/transactions.py",
        "(done.keys_set, done.crc32) != (keys_set, crc32)",
        "False",
        "worker/test_transactions.py::test_a_commit_of_other_keys_than_were_set_is_refused_and_taken_back",
    ),
    Safety(
        "frames that the kernel stopped in the middle of are named",
        "worker/transactions.py",
        'current.uncertain if outcome == "kept" else current.dirty',
        "current.dirty",
        "worker/test_repeated_calls.py::test_a_kept_call_names_the_frames_that_the_kernel_stopped_in_the_middle_of",
    ),
    Safety(
        "an answer that came too late is taken for no other",
        "vms/session.py",
        """        if self._is_lost:
            raise""",
        """        if False:
            raise""",
        "faults/test_worker.py::test_an_answer_that_comes_late_is_not_taken_for_that_to_another_question",
    ),
    Safety(
        "nothing is done any more for a front that has hung up",
        "worker/service.py",
        "        if connection.channel.is_ended():\n",
        "        if False:\n",
        "worker/test_served_calls.py::test_what_a_front_has_asked_for_that_has_hung_up_is_not_done",
    ),
    Safety(
        "no more of a slice is set for a front that has hung up",
        "worker/keys.py",
        "                look()\n",
        "",
        "worker/test_served_calls.py::test_a_front_that_hangs_up_in_the_middle_of_a_slice_has_no_more_of_it_set",
    ),
    Safety(
        "each frame that the kernel takes has its old key again, however many it refuses",
        "worker/restoring.py",
        "if frames.count > 1 and",
        "if frames.count > 16 and",
        "worker/test_rollback.py::test_however_many_frames_are_refused_all_others_have_their_old_keys",
    ),
    Safety(
        "answers that a reader left are taken for no others",
        "vms/session.py",
        "        while self._unanswered and not self._is_lost:\n",
        "        while False:\n",
        "faults/test_worker.py::test_answers_to_what_was_read_ahead_are_not_taken_for_others",
    ),
    Safety(
        "a call ends with its connection",
        "worker/service.py",
        "            connection.close()\n            self._transactions.abandon(connection)\n",
        "            connection.close()\n",
        "faults/test_worker.py::test_a_call_ends_with_its_connection_before_anybody_is_heard_who_comes_after",
    ),
    Safety(
        "a call's end hangs up on the worker",
        "rpc/ending.py",
        "call.add_callback(hang_up.now)",
        "call.add_callback(lambda: None)",
        "rpc/test_ending.py::test_what_fails_since_the_call_ended_is_nobodys_error",
    ),
    Safety(
        "a call's end hangs up before the worker has said hello",
        "vms/session.py",
        "            hang_up.hold(connection)\n",
        "",
        "vms/test_session_requests.py::test_nobody_waits_for_a_hello_for_a_call_that_has_ended",
    ),
    Safety(
        "a call that has ended hangs up on nobody else's connection",
        "vms/registry.py",
        "            hang_up.let_go()\n            if done and",
        "            if done and",
        "vms/test_kept_connections.py::test_a_call_that_ends_later_takes_the_connection_from_nobody",
    ),
    Safety(
        "a kept connection is taken for none to another VM of that name",
        "vms/idle.py",
        "one.evidence != evidence or not one.session.is_quiet()",
        "not one.session.is_quiet()",
        "vms/test_kept_connections.py::test_what_changes_in_a_vms_directory_is_seen_although_there_was_a_connection",
    ),
    Safety(
        "a connection on which an answer is awaited is not kept",
        "vms/session.py",
        "self._is_lost or self._unanswered or look.poll(0)",
        "self._is_lost or look.poll(0)",
        "vms/test_session_answers.py::test_a_session_is_not_quiet_while_an_answer_is_awaited",
    ),
    Safety(
        "no VM has all slots for calls",
        "rpc/slots.py",
        "if sharer and held >= self._free:",
        "if False:",
        "rpc/test_short_calls.py::test_where_its_vm_has_its_share_the_call_is_refused_and_beside_another_it_is_not",
    ),
    Safety(
        "keys are not enabled for a guest unless that is allowed",
        "worker/keys.py",
        "        if not uses_keys and not allow_enable:\n",
        "        if False:\n",
        "worker/test_transactions.py::test_keys_are_not_enabled_unless_that_is_allowed_and_nothing_is_undone_then",
    ),
    Safety(
        "no VM ends for want of a log",
        "worker/worker_log.py",
        "    with suppress(OSError):\n        traceback.print_exc()",
        "    traceback.print_exc()",
        "faults/test_full_disk.py::test_a_log_that_takes_nothing_ends_no_vm",
    ),
    Safety(
        "no key is set while a VM is frozen",
        "worker/service.py",
        """        allow_enable = request.boolean("allow_enable")
        self._captures.require_none()
""",
        """        allow_enable = request.boolean("allow_enable")
""",
        "worker/test_freezing.py::test_while_another_process_reads_nobody_sets_and_who_reads_waits",
    ),
    Safety(
        "the kernel ends who holds a VMM for too long",
        "worker/held_capture.py",
        "        end_at(end)\n",
        "",
        "injection/test_held_capture.py::test_when_the_budget_has_passed_the_kernel_ends_it_and_all_go_on",
    ),
    Safety(
        "who holds a VMM ends with the worker",
        "worker/held_capture.py",
        "        end_with_parent(parent)\n",
        "",
        "injection/test_held_capture.py::test_with_the_worker_it_ends_and_all_go_on",
    ),
    Safety(
        "no key is set of a VM whose VMM prints them",
        "worker/service.py",
        "        if self._is_read_only and op in _SETTING:\n",
        "        if False:\n",
        "worker/test_printing.py::test_nothing_can_be_set",
    ),
    Safety(
        "what a VMM prints is what QEMU writes, page after page",
        "worker/dump.py",
        "        if start < self._next:\n",
        "        if False:\n",
        "worker/test_dump.py::test_pages_ascend",
    ),
    Safety(
        "a monitor is that of the process that was meant",
        "worker/qmp_vmm.py",
        "    missing = missing_threads(monitor, wanted)\n    if missing:\n",
        "    missing = missing_threads(monitor, wanted)\n    if False:\n",
        "worker/test_adopting.py::test_a_monitor_that_tells_of_another_processs_cpus_is_not_taken",
    ),
    Safety(
        "what keeps old keys from being set for a while costs none",
        "worker/transactions.py",
        "            if passes or now < current.failing_since + PATIENCE_SECONDS:\n",
        "            if False:\n",
        "worker/test_rollback.py::test_what_passes_costs_no_key",
    ),
    Safety(
        "a debugger is waited for however long it stays",
        "worker/transactions.py",
        "            if passes or now",
        "            if now",
        "worker/test_rollback.py::test_what_does_not_pass_is_given_up_unless_it_must",
    ),
    Safety(
        "a journal that memory is short for pairs no keys with other frames",
        "worker/journal.py",
        "            del one[length:]\n",
        "            pass\n",
        "worker/test_journal.py::test_wherever_memory_is_short_no_key_is_lost_or_another_frames",
    ),
    Safety(
        "what is left to roll back is what is asked about, however many answers that takes",
        "vms/writing.py",
        "            if left < 0 or last.left < left:\n",
        "            if left < 0:\n",
        "vms/test_writing_ends.py::test_the_old_keys_are_waited_for_until_the_last_of_them_is_back",
    ),
    Safety(
        "a program that a held thread executes is left alone",
        "injection/tracee.py",
        "        if found.si_status >> 8 == ptrace.EVENT_EXEC:\n",
        "        if False:\n",
        "injection/test_exec.py::test_the_thread_that_is_held_executes_it",
    ),
    Safety(
        "a call that is another one gives no result",
        "injection/injection.py",
        "            self._require_own(tracee, info, call)\n",
        "",
        "injection/test_exec.py::test_a_call_that_is_another_one_gives_no_result",
    ),
    Safety(
        "a thread that can't be put back is let go",
        "injection/injection.py",
        "        finally:\n            # Whatever happened",
        "        else:\n            # Whatever happened",
        "injection/test_exec.py::test_a_thread_that_cant_be_put_back_is_let_go",
    ),
    Safety(
        "a frame of an adopted VM that has no key is not given one",
        "worker/adopted.py",
        "            self._vm.look_at_skeys(gfn, 1)\n",
        "",
        "worker/test_adopted.py::test_a_frame_that_has_no_key_is_not_given_one",
    ),
    Safety(
        "no worker but those that trace has the right to",
        "worker/process.py",
        "    if spec.adoption is None:\n",
        "    if False:\n",
        "test_capabilities.py::test_no_thread_of_the_daemon_uses_it_and_no_worker_of_another_kind_has_it",
    ),
)
