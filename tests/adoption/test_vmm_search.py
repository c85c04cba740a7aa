"""Which processes have VMs, looked up in the real /proc; and that whoever is there can't be trouble for the search."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.injection import proc
from skeyd.injection.target import VM_LINK
from skeyd.injection.tracee import Tracee
from skeyd.worker import adopted, vmm_search
from skeyd.worker.adopted import _found
from skeyd.worker.adoption import Adoption
from skeyd.worker.candidates import CANDIDATES_BYTES, CANDIDATES_MAX, FDS_MAX, Candidate, Found
from skeyd.worker.packets import TEXT_MAX, Fields
from skeyd.worker.protocol import LOCK
from skeyd.worker.vmm_name import NAME_MAX
from skeyd.worker.vmm_search import find_candidates, only_one_named
from tests.adoption.owners import owner
from tests.injection.victims import Victim, differences
from tests.processes import Process, end, look_at

NOBODY: Final = 65534
AS_ANOTHER_USER: Final = """
import json, os, sys
from skeyd.errors import SkeydError
from skeyd.worker.vmm_search import find_candidates, only_one_named
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(*3 * [int(sys.argv[1])])
    os.setresuid(*3 * [int(sys.argv[1])])
try:
    print(json.dumps(only_one_named(sys.argv[2]) if sys.argv[2] else find_candidates().to_message()))
except SkeydError as error:
    print(json.dumps([error.reason.name, error.metadata]))
"""


def mine(found: Found, *owners: Victim) -> list[Candidate]:
    """Return what was found of these; a developer's machine has VMs of its own."""
    pids = [one.pid for one in owners]
    return [one for one in found.candidates if one.pid in pids]


def not_found(name: str) -> SkeydError:
    with pytest.raises(SkeydError) as caught:
        only_one_named(name)
    assert caught.value.reason is Reason.VMM_NOT_FOUND
    return caught.value


def as_another_user(name: str = "") -> Any:
    """Look as somebody who may not look at this user's processes, if that is root, or at root's."""
    done = subprocess.run(
        [sys.executable, "-c", AS_ANOTHER_USER, str(NOBODY), name], stdout=subprocess.PIPE, timeout=60, check=True
    )
    return json.loads(done.stdout)


def test_a_process_with_vms_is_found_and_told_of_and_not_touched() -> None:
    with owner(2, "-name", "guest=a b,,c,debug-threads=on", vcpus=3) as victim:
        before = victim.look()
        (found,) = mine(find_candidates(), victim)
        status = proc.status(victim.pid, victim.pid)
        assert found == Candidate(
            pid=victim.pid,
            start_time=proc.start_time(victim.pid),
            uid=os.geteuid(),
            executable=str(Path(f"/proc/{victim.pid}/exe").readlink()),
            name="a b,c",
            vm_fds=(4, 5),
            vcpus=3,
            mapped=int(status["VmSize"].split()[0]) * 1024,
            resident=int(status["VmRSS"].split()[0]) * 1024,
        )
        assert 1 << 20 < found.resident < found.mapped
        assert differences(before, victim.look()) == {}
        assert victim.ping() == 2


def test_who_has_no_vm_is_none() -> None:
    with owner(0, "-name", "web") as victim:
        assert not mine(find_candidates(), victim)


def test_of_very_many_vms_the_first_are_named() -> None:
    with owner(FDS_MAX + 6) as victim:
        (found,) = mine(find_candidates(), victim)
    assert found.vm_fds == tuple(range(4, 4 + FDS_MAX))


def test_who_is_traced_is_said_to_be_whichever_thread_it_is() -> None:
    with owner() as victim:
        for tid in proc.threads(victim.pid):
            tracee = Tracee.seize(victim.pid, tid)
            (found,) = mine(find_candidates(), victim)
            assert (found.refusal, found.refusal_detail) == (
                "VMM_TRACED",
                f"{tid} is traced by process {os.getpid()}",
            )
            tracee.interrupt()
            tracee.wait(float("inf"))
            tracee.detach()
        (found,) = mine(find_candidates(), victim)
        assert (found.refusal, found.refusal_detail) == ("", "")


def test_a_worker_of_skeyd_is_counted_and_no_candidate(tmp_path: Path) -> None:
    workers = find_candidates().workers
    with owner(lock=str(tmp_path / LOCK)) as worker, owner(lock=str(tmp_path / f"{LOCK}.txt")) as other:
        found = find_candidates()
        assert [one.pid for one in mine(found, worker, other)] == [other.pid]
        assert found.workers == workers + 1
        (tmp_path / LOCK).unlink()  # as somebody can who clears up
        assert not mine(find_candidates(), worker)
    with owner(0, lock=str(tmp_path / LOCK)):
        assert find_candidates().workers == workers


def test_who_may_not_be_looked_at_is_counted() -> None:
    with owner() as victim:
        found = Found.from_message(Fields(as_another_user(), "answer"))
        assert found.unreadable > 0
        assert bool(mine(found, victim)) == (os.geteuid() != 0)


def test_what_cannot_be_printed_is_not_shown() -> None:
    with owner(1, "-name", b"\xff\x1b[2J") as raw, owner(1, "-name", "a\nb") as lines:
        found = find_candidates()
        assert [one.name for one in mine(found, raw, lines)] == ["", ""]
    assert Found.from_message(Fields(found.to_message(), "answer")) == found


def test_a_program_whose_name_cannot_be_printed_is_shown_with_question_marks(tmp_path: Path) -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        owner()  # skips, or fails
    program = tmp_path / os.fsdecode(b"\xff\x1b\n")
    program.symlink_to(sys.executable)
    with owner() as victim:
        exe = str(Path(f"/proc/{victim.pid}/exe").readlink())
        real = os.readlink
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "readlink", lambda path: str(program) if str(path).endswith("/exe") else real(path))
            (found,) = mine(find_candidates(), victim)
        assert found.executable == f"{tmp_path}/???" != exe


@pytest.mark.parametrize("step", ["_links", "_refusal", "name_of"])
def test_a_process_that_ends_in_the_middle_is_none_and_counts_nowhere(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = find_candidates()
    with owner(1, "-name", "web") as victim:
        real: Callable[[int], Any] = getattr(vmm_search, step)
        ended: list[Process] = []

        def after(pid: int) -> Any:
            if pid == victim.pid and not ended:
                process = look_at(pid)
                assert process is not None
                ended.append(process)
                end(process)
            return real(pid)

        monkeypatch.setattr(vmm_search, step, after)
        found = find_candidates()
        assert ended
        assert not mine(found, victim)
        assert (found.unreadable, found.left_out, found.workers) == (before.unreadable, before.left_out, before.workers)


def test_what_was_read_of_another_with_its_pid_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    real = vmm_search._stat
    looks: list[int] = []

    def later(pid: int) -> list[str]:
        fields = real(pid)
        if pid == victim.pid:
            looks.append(pid)
            if len(looks) % 2 == 0:
                fields[19] = str(int(fields[19]) + 1)
        return fields

    with owner(1, "-name", "web-of-this-test") as victim:
        monkeypatch.setattr(vmm_search, "_stat", later)
        assert not mine(find_candidates(), victim)
        assert len(looks) == 2
        not_found("web-of-this-test")
        assert len(looks) == 4
        monkeypatch.undo()
        assert mine(find_candidates(), victim)


def test_beyond_each_bound_they_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with owner() as first, owner() as second:
        before = find_candidates()
        assert len(mine(before, first, second)) == 2
        for name, most in (
            ("CANDIDATES_MAX", 1),
            ("CANDIDATES_BYTES", vmm_search._MARGIN + 10),
            ("DESCRIPTORS_MAX", 4),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(vmm_search, name, most)
                found = find_candidates()
            assert len(found.candidates) == (1 if name == "CANDIDATES_MAX" else 0)
            assert found.left_out >= len(before.candidates) - len(found.candidates) > 0
        late = find_candidates(seconds=-1)
        assert not late.candidates
        assert late.left_out >= len(before.candidates)


def test_the_largest_answer_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    worst = Candidate(
        pid=1,
        start_time=(1 << 64) - 1,
        uid=(1 << 32) - 1,
        executable="\U0001f600" * TEXT_MAX,
        name="\U0001f600" * NAME_MAX,
        vm_fds=tuple(range((1 << 31) - FDS_MAX, 1 << 31)),
        vcpus=(1 << 32) - 1,
        mapped=(1 << 64) - 1,
        resident=(1 << 64) - 1,
        refusal="VMM_NOT_TRACEABLE",
        refusal_detail="\U0001f600" * TEXT_MAX,
    )
    monkeypatch.setattr(vmm_search, "_processes", lambda: ((pid, 1) for pid in range(1, 5000)))
    monkeypatch.setattr(vmm_search, "_is_still", lambda *_: True)
    monkeypatch.setattr(vmm_search, "_links", lambda _: {0: VM_LINK})
    for one, how_many in (
        (worst, range(30, 60)),
        (replace(worst, executable="", refusal_detail="", name=""), range(1024, 1025)),
    ):
        monkeypatch.setattr(vmm_search, "_candidate", lambda pid, *_, one=one: replace(one, pid=pid))
        found = find_candidates()
        assert len(found.candidates) in how_many
        assert len(found.candidates) + found.left_out == 4999
        assert len(found.candidates) <= CANDIDATES_MAX
        assert len(json.dumps({"ok": found.to_message()})) < CANDIDATES_BYTES
        assert Found.from_message(Fields(found.to_message(), "answer")) == found


def test_what_keeps_calls_from_being_made_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class ShadowStacks:
        def why_not(self, pid: int) -> str:
            return "it uses shadow stacks (CET)"

    with owner() as victim:
        for name, instead, refusal, word in (
            ("this_machine", lambda: None, "VMM_UNSUITABLE", os.uname().machine),
            ("this_machine", ShadowStacks, "VMM_UNSUITABLE", "(CET)"),
            ("_is_plain_vector", lambda _: False, "VMM_UNSUITABLE", "no 64-bit process"),
            ("_may_trace", lambda _: False, "VMM_NOT_TRACEABLE", "give the worker CAP_SYS_PTRACE"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(vmm_search, name, instead)
                (found,) = mine(find_candidates(), victim)
            assert found.refusal == refusal
            assert word in found.refusal_detail


def test_a_process_of_32_bits_is_known_by_its_auxiliary_vector() -> None:
    pairs = ((33, 0xF7FC0000), (16, 0), (6, 4096), (17, 100), (0, 0))
    assert vmm_search._is_plain_vector(struct.pack("=10Q", *(one for pair in pairs for one in pair)))
    assert not vmm_search._is_plain_vector(struct.pack("=10I", *(one for pair in pairs for one in pair)))
    assert not vmm_search._is_plain_vector(struct.pack("=4Q", 6, 65536, 0, 0))
    assert not vmm_search._is_plain_vector(b"")


# --- by name --------------------------------------------------------------------------------------------------------


def test_a_name_is_that_of_one_process_with_a_vm() -> None:
    with owner(1, "-name", "guest=of-one") as one, owner(1, "-name", "guest=of-one-more"), owner(0, "-name=of-one"):
        assert only_one_named("of-one") == (one.pid, proc.start_time(one.pid))
        error = not_found("of-non")
        assert "no process that has a VM is named 'of-non'" in error.message
        assert error.metadata == {"vmm_name": "of-non"}


def test_a_name_of_several_is_refused_with_their_pids() -> None:
    with owner(1, "-name", "of-two") as one, owner(3, "--name=of-two") as other:
        pids = ", ".join(map(str, sorted((one.pid, other.pid))))
        error = not_found("of-two")
        assert f"2 processes are named 'of-two', and it could be any: {pids}" in error.message
        assert error.metadata == {"vmm_name": "of-two", "vmm_pids": pids}


def test_of_very_many_the_first_pids_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmm_search, "_processes", lambda: ((pid, 1) for pid in range(100, 1100)))
    monkeypatch.setattr(vmm_search, "_is_still", lambda *_: True)
    monkeypatch.setattr(vmm_search, "_links", lambda _: {0: VM_LINK})
    monkeypatch.setattr(vmm_search, "name_of", lambda _: "web")
    error = not_found("web")
    assert error.message.startswith("1000 processes are named 'web'")
    assert error.metadata["vmm_pids"] == ", ".join(map(str, range(100, 116))) + ", …"


def test_who_has_the_name_and_may_not_be_looked_at_may_be_the_one(monkeypatch: pytest.MonkeyPatch) -> None:
    real = vmm_search._links
    with owner(1, "-name", "of-hidden") as hidden, owner(1, "-name", "of-hidden") as shown:

        def links(pid: int) -> dict[int, str]:
            if pid == hidden.pid:
                raise PermissionError
            return real(pid)

        monkeypatch.setattr(vmm_search, "_links", links)
        assert not_found("of-hidden").metadata["vmm_pids"] == ", ".join(map(str, sorted((hidden.pid, shown.pid))))
    with owner(1, "-name", "of-hidden") as hidden:
        # Alone it is the one, and who adopts it is told that it can't be done.
        assert only_one_named("of-hidden")[0] == hidden.pid
        assert as_another_user("of-hidden")[0] == hidden.pid


def test_a_name_is_looked_for_for_a_while_only() -> None:
    with pytest.raises(SkeydError) as caught:
        only_one_named("web", seconds=-1)
    assert caught.value.reason is Reason.VMM_NOT_FOUND
    assert "more processes than could be looked at" in caught.value.message


# --- and held --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "later", "said"), [("of-now", 0, "is named 'of-now' now"), ("of-then", 1, "was started at")]
)
def test_who_was_found_and_is_another_by_then_is_not_found(
    monkeypatch: pytest.MonkeyPatch, name: str, later: int, said: str
) -> None:
    with owner(1, "-name", name) as victim, ExitStack() as held:
        found = victim.pid, proc.start_time(victim.pid) + later
        monkeypatch.setattr(vmm_search, "only_one_named", lambda _: found)
        with pytest.raises(SkeydError) as caught:
            _found(Adoption(0, 0, -1, 1000, "of-then"), held)
        assert caught.value.reason is Reason.VMM_NOT_FOUND
        assert said in caught.value.message


def test_who_ends_while_its_name_is_read_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with owner(1, "-name", "of-then") as victim, ExitStack() as held:

        def ended(pid: int) -> str:
            victim.process.kill()
            victim.process.wait()
            return "of-then"

        monkeypatch.setattr(adopted, "name_of", ended)
        with pytest.raises(SkeydError) as caught:
            _found(Adoption(victim.pid, 0, -1, 1000), held)
        assert caught.value.reason is Reason.VMM_NOT_FOUND
        assert caught.value.metadata == {"vmm_pid": str(victim.pid)}
