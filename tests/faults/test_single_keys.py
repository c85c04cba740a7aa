"""Faults in SetSkey, ResetReferenced and GetSkey, over a connection that is kept and over a new one.

Linux 4.19 to 6.19 has the calls for ranges only, 7.2 has KEYOP. Whatever happens, the frame has its old key or the new
one, the new one where the client was told so, and no other frame has another key than before; the next call works.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from typing import Any, Final

import grpc
import pytest

from skeyd.rpc.status import DETAILS_KEY
from skeyd.storage_key import CHANGED, REFERENCED
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import storage_key_service_pb2_grpc, vm_pb2
from tests.faults.calls import DEADLINE
from tests.faults.oracle import WorkerGone
from tests.faults.subjects import FRAMES, OLD, Fault, Guest
from tests.faults.world import World
from tests.rpc.stubs import Refusal, refusal

GFN: Final = 300
"""Its key is 0, in a segment where nothing was set: Linux up to 6.19 loses the first one that is."""
KEY: Final = 0x36
KEYOP, BY_RANGE = "7.2", "4.19"
SET: Final = {
    KEYOP: ("keyop.sske", "keyop.iske"),
    BY_RANGE: ("other.get", "other.set", "other.read_back"),
}
"""The steps of a SetSkey."""
ERRORS: Final = ("EIO", "ENOMEM", "EFAULT")
MOMENTS: Final = ("before", "after")


def stub_of(world: World) -> Any:
    return storage_key_service_pb2_grpc.StorageKeyServiceStub(world.front.connection.channel)


def set_key(world: World, guest: Guest, key: int) -> Any:
    """Set the frame's key: what the client was told."""
    return told(lambda: stub_of(world).SetSkey(pb.SetSkeyRequest(vm=guest.name, gfn=GFN, key=key), timeout=DEADLINE))


def told(call: Callable[[], Any]) -> Any:
    """Make a call: its answer or refusal; None where the front is gone."""
    try:
        return call()
    except grpc.RpcError as error:
        trailers: Any = error.trailing_metadata()
        gone = error.code() is grpc.StatusCode.UNAVAILABLE and DETAILS_KEY not in dict(trailers or ())
        return None if gone else refusal(error)


def new_guest(world: World, kernel: str, kept: bool) -> Guest:
    """Make a VM with OLD keys; `kept`: there is a connection to its worker that a short call has left."""
    guest = world.new_guest(kernel)
    if kept:
        assert stub_of(world).GetSkey(pb.GetSkeyRequest(vm=guest.name, gfn=GFN), timeout=DEADLINE).key == 0
    return guest


def judge(world: World, guest: Guest, fault: Fault, answer: Any, *, was: int = 0, wanted: int = KEY) -> None:
    """Hold what is left against what was told."""
    assert world.fired(guest, fault), f"{fault} never happened; told {answer}"
    try:
        keys = world.read(guest)
    except WorkerGone:
        assert fault.action == "kill"
        assert answer is None or answer.reason in ("WORKER_LOST", "VM_DEAD"), answer
        world.kill_worker(guest)
        assert world.look(guest).state == vm_pb2.VM_STATE_DEAD
        assert (
            told(lambda: stub_of(world).GetSkey(pb.GetSkeyRequest(vm=guest.name), timeout=DEADLINE)).reason == "VM_DEAD"
        )
        world.delete(guest)
        return
    assert keys is not None
    assert keys[GFN] in (was, wanted)
    if isinstance(answer, (pb.SetSkeyResponse, pb.ResetReferencedResponse)):
        assert keys[GFN] == wanted
    world.require_equal(guest, keys[:GFN] + keys[GFN + 1 :], OLD[:GFN] + OLD[GFN + 1 :], "the other frames")
    # And it goes on.
    done = set_key(world, guest, 0x58)
    assert isinstance(done, pb.SetSkeyResponse), done
    assert done.old_key == keys[GFN]
    assert stub_of(world).GetSkey(pb.GetSkeyRequest(vm=guest.name, gfn=GFN), timeout=DEADLINE).key == 0x58
    world.delete(guest)


CASES: Final = [
    (kernel, f"{step}.{moment}") for kernel, steps in SET.items() for step, moment in itertools.product(steps, MOMENTS)
]
AND_ITS_ANSWER: Final = [*CASES, (KEYOP, "answer.keyop.before"), (BY_RANGE, "answer.set.before")]


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "new"])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(("kernel", "point"), CASES)
def test_an_ioctl_of_a_single_key_that_is_refused_is_told_and_the_frame_has_one_key_or_the_other(
    world: World, kernel: str, point: str, error: str, kept: bool
) -> None:
    guest, fault = new_guest(world, kernel, kept), Fault("worker", point, f"errno:{error}")
    world.arm(guest, fault)
    answer = set_key(world, guest, KEY)
    if point.startswith("other.get"):
        # Of a new connection the first GET is the look at the VM, which makes do without.
        assert not kept or isinstance(answer, Refusal), answer
    else:
        assert isinstance(answer, Refusal), answer
        # The kernel was asked to set it.
        assert answer.metadata["uncertain"] == f"{GFN:#x}-{GFN:#x}"
    judge(world, guest, fault, answer)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "new"])
@pytest.mark.parametrize(("kernel", "point"), AND_ITS_ANSWER)
def test_a_worker_that_is_killed_in_a_single_call_is_dead_and_told_so(
    world: World, kernel: str, point: str, kept: bool
) -> None:
    guest, fault = new_guest(world, kernel, kept), Fault("worker", point, "kill")
    world.arm(guest, fault)
    judge(world, guest, fault, set_key(world, guest, KEY))


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "new"])
@pytest.mark.parametrize(("kernel", "point"), AND_ITS_ANSWER)
def test_a_worker_that_stands_still_in_a_single_call_is_given_up_and_its_late_answer_is_nobodys(
    world: World, kernel: str, point: str, kept: bool
) -> None:
    guest, fault = new_guest(world, kernel, kept), Fault("worker", point, "stop")
    with world.patience(1.0):
        if kept:
            # The kept connection was made with more patience than this; one that is made now has less.
            world.kill_front()
            assert stub_of(world).GetSkey(pb.GetSkeyRequest(vm=guest.name, gfn=GFN), timeout=DEADLINE).key == 0
        world.arm(guest, fault)
        answer = set_key(world, guest, KEY)
    os.kill(guest.worker_pid, signal.SIGCONT)
    assert isinstance(answer, Refusal)
    assert answer.reason in ("WORKER_LOST", "VM_QUARANTINED"), answer
    judge(world, guest, fault, answer)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "new"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("kernel", "step"), [(KEYOP, "session.keyop"), (BY_RANGE, "session.write_slice")])
def test_a_front_that_is_killed_in_a_single_call_leaves_one_key_or_the_other(
    world: World, kernel: str, step: str, moment: str, kept: bool
) -> None:
    guest, fault = new_guest(world, kernel, kept), Fault("front", f"{step}.{moment}", "kill")
    world.arm(guest, fault)
    assert set_key(world, guest, KEY) is None
    world.kill_front()
    assert world.look(guest).worker_pid == guest.worker_pid
    judge(world, guest, fault, None)


def test_a_key_that_keyop_loses_is_set_again(world: World) -> None:
    guest, fault = new_guest(world, KEYOP, True), Fault("worker", "keyop.sske.before", "lose")
    world.arm(guest, fault)
    answer = set_key(world, guest, KEY)
    assert isinstance(answer, pb.SetSkeyResponse)
    assert answer.repaired
    judge(world, guest, fault, answer)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "new"])
@pytest.mark.parametrize("action", [*(f"errno:{error}" for error in ERRORS), "kill"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_reset_of_r_that_goes_wrong_changes_r_at_most(world: World, moment: str, action: str, kept: bool) -> None:
    guest, fault = new_guest(world, KEYOP, kept), Fault("worker", f"keyop.rrbe.{moment}", action)
    before = KEY | REFERENCED | CHANGED
    assert isinstance(set_key(world, guest, before), pb.SetSkeyResponse)
    world.arm(guest, fault)
    request = pb.ResetReferencedRequest(vm=guest.name, gfn=GFN)
    answer = told(lambda: stub_of(world).ResetReferenced(request, timeout=DEADLINE))
    assert isinstance(answer, Refusal)
    judge(world, guest, fault, answer, was=before, wanted=before & ~REFERENCED)


def test_frames_and_keys_here_are_what_they_are_meant_to_be() -> None:
    assert (FRAMES, OLD[GFN], any(OLD[256:512])) == (1024, 0, False)
