"""One call that something was done to, and the oracle's judgement of what is left."""

from __future__ import annotations

import time
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from skeyd.v1 import vm_pb2
from tests.faults.calls import DEADLINE, Plan, Told
from tests.faults.front_points import SLICE_KEYS
from tests.faults.oracle import WorkerGone
from tests.faults.processes import SETTLED_SECONDS, Held, zombies_of
from tests.faults.subjects import FRAMES, Fault, Guest, acc_f
from tests.processes import look_at

if TYPE_CHECKING:  # which makes cases
    from tests.faults.world import World

_REFERENCED_CHANGED: Final = 0x06


class Case:
    """One call that something was done to."""

    def __init__(
        self, world: World, guest: Guest, plan: Plan, held: Held, front_pid: int, faults: tuple[Fault, ...]
    ) -> None:
        self.world = world
        self.guest = guest
        self.plan = plan
        self.told = Told("")
        """What the client was told, to be set."""
        self.outcome = ""
        """What came of it, as the judgement found."""
        self._held = held
        self._front_pid = front_pid
        self._faults = faults

    def judge(self) -> None:
        """Hold everything against the invariants of docs/design.md."""
        world, guest = self.world, self.guest
        self._settle()
        for fault in self._faults:
            # A fault that never happened shows nothing.
            assert world.fired(guest, fault), f"{fault} never happened; told {self.told}"
        vm = world.look(guest)
        try:
            now = world.read(guest)
        except WorkerGone:
            # A process that was killed hangs up before it lets go of its lock: it is dead once it has.
            until = time.monotonic() + SETTLED_SECONDS
            while (vm.state != vm_pb2.VM_STATE_DEAD or look_at(guest.worker_pid)) and time.monotonic() < until:
                vm = world.look(guest)
            self._judge_dead(vm)
            self._judge_others()
            return
        assert vm.state == vm_pb2.VM_STATE_READY, vm
        assert vm.incarnation == guest.incarnation
        assert vm.uses_storage_keys == (now is not None)
        self._judge_enabled(now)
        mine = vm.last_write.request_id == self.plan.request_id and vm.HasField("last_write")
        found = vm_pb2.WriteOutcome.Name(vm.last_write.outcome).removeprefix("WRITE_OUTCOME_") if mine else "UNCHANGED"
        if self.plan.validate_only:
            assert found == "UNCHANGED"
        elif self._is_known:
            assert self.told.outcome == found, f"told {self.told}, and GetVm says {vm.last_write}"
        self.outcome = found
        self._judge_keys(now, vm.last_write if mine else vm_pb2.LastWrite())
        self._judge_held()
        self._judge_others()
        self._judge_next(vm)

    @property
    def _is_known(self) -> bool:
        return self.told.outcome not in ("", "UNKNOWN")

    def _settle(self) -> None:
        # Until nobody writes and nothing is being rolled back: a header alone says so, and changes nothing.
        probe = Plan(self.guest.name, ((0, 1),), b"\0", allow_enable=True, end="close", chunks=0)
        until = time.monotonic() + SETTLED_SECONDS
        # A front that was killed may not have ended yet.
        while (told := self.world.set_skeys(probe)).reason == "VM_BUSY" or told.is_of_nobody:
            assert time.monotonic() < until, f"it never settles: {told}"
        assert told.reason in ("STREAM_INCOMPLETE", "VM_DEAD"), told

    def _judge_dead(self, vm: vm_pb2.Vm) -> None:
        assert vm.state == vm_pb2.VM_STATE_DEAD, vm
        assert look_at(self.guest.worker_pid) is None
        self.outcome = "DEAD"
        told = self.world.set_skeys(self.world.plan(self.guest, allow_enable=True))
        assert told.reason == "VM_DEAD", told
        assert told.metadata.get("outcome", "UNCHANGED") == "UNCHANGED"
        self.world.delete(self.guest)
        self._judge_front()

    def _judge_enabled(self, now: bytes | None) -> None:
        # 4: nothing is enabled that nobody allowed, and who can be told is told.
        if now is None or self.guest.old is not None:
            assert not self.told.enabled
            return
        assert self.plan.allow_enable
        assert self.told.enabled or not self._is_known, self.told

    def _judge_keys(self, now: bytes | None, last: vm_pb2.LastWrite) -> None:
        # 1 and 2.
        world, guest, plan = self.world, self.guest, self.plan
        frames = plan.frames()
        if now is None:
            assert guest.old is None
            assert self.outcome in ("UNCHANGED", "ROLLED_BACK") or (self.outcome == "KEPT" and not last.keys_set)
            return
        old = bytes(FRAMES) if guest.old is None else guest.old
        new = bytearray(old)
        for gfn, key in zip(frames, plan.keys, strict=True):
            new[gfn] = key
        told = self.told
        match self.outcome:  # which is what was told, if anything was
            case "APPLIED":
                world.require_equal(guest, acc_f(now), acc_f(bytes(new)), "ACC and F of an applied call")
                beside = [gfn for gfn in range(FRAMES) if gfn not in set(frames)]
                world.require_equal(guest, _at(now, beside), _at(old, beside), "keys beside an applied call")
                lost = [gfn for gfn in frames if new[gfn] & ~now[gfn] & _REFERENCED_CHANGED]
                assert not lost or guest.kernel == "owned"
                assert last.keys_set == len(plan.keys)
                if self._is_known:
                    assert (told.keys_set, told.crc32) == (len(plan.keys), zlib.crc32(plan.keys))
            case "UNCHANGED" | "ROLLED_BACK":
                world.require_equal(guest, now, old, f"the keys of a call that is {self.outcome}")
                assert self.outcome == "UNCHANGED" or not plan.keep, "what was to be kept is rolled back"
            case "DIRTY":
                dirty = {gfn for one in last.dirty for gfn in range(one.start_gfn, one.start_gfn + one.count)}
                assert dirty
                assert dirty <= set(frames) or len(last.dirty) == 256
                beside = [gfn for gfn in range(FRAMES) if gfn not in dirty]
                world.require_equal(guest, _at(now, beside), _at(old, beside), "keys beside dirty frames")
                assert _at(now, sorted(dirty)) != _at(old, sorted(dirty)), "no frame is dirty"
                if self._is_known:
                    assert told.metadata["dirty"].split(",")[0] == _first(last)
            case "KEPT":
                self._judge_kept(now, old, last)
            case other:
                raise AssertionError(f"no end of a call: {other}")

    def _judge_kept(self, now: bytes, old: bytes, last: vm_pb2.LastWrite) -> None:
        plan, told, frames = self.plan, self.told, self.plan.frames()
        assert plan.keep
        done = last.keys_set
        # Where the kernel stopped in the middle of a slice, all who ask are told of it.
        unsure = [gfn for one in last.dirty for gfn in range(one.start_gfn, one.start_gfn + one.count)]
        assert not unsure or unsure == list(range(unsure[0], unsure[0] + len(unsure)))
        assert len(unsure) <= SLICE_KEYS
        assert set(unsure) <= set(frames[done:])
        assert acc_f(_at(now, frames[:done])) == acc_f(plan.keys[:done])
        if done:
            assert last.next_gfn == frames[done - 1] + 1
        if self._is_known:
            assert (told.keys_set, told.crc32) == (done, zlib.crc32(plan.keys[:done])), told
            assert int(told.metadata["next_gfn"], 16) == [*frames, frames[-1] + 1][done]
            assert _frames_of(told.metadata.get("uncertain", "")) == unsure
        rest = [gfn for gfn in range(FRAMES) if gfn not in {*frames[:done], *unsure}]
        self.world.require_equal(self.guest, _at(now, rest), _at(old, rest), "keys after those that were kept")

    def _judge_held(self) -> None:
        # 5: what they hold open is what they held.
        held = self.world.held_at_rest(self.guest)
        assert held.worker == self._held.worker, f"it held {self._held.worker}, and now {held.worker}"
        assert held.front == self._held.front or self.world.front.pid != self._front_pid

    def _judge_front(self) -> None:
        if self.world.front.pid != self._front_pid:
            return
        self.world.look(self.world.bystander)  # which reaps
        assert not zombies_of(self.world.front.pid)

    def _judge_others(self) -> None:
        # 3: a VM beside it is as it was.
        bystander = self.world.bystander
        if bystander is self.guest:
            return
        assert look_at(bystander.worker_pid) is not None
        self.world.require_keys(bystander, bystander.old)
        vm = self.world.look(bystander)
        assert (vm.state, vm.incarnation) == (vm_pb2.VM_STATE_READY, bystander.incarnation)

    def _judge_next(self, vm: vm_pb2.Vm) -> None:
        world, guest, plan = self.world, self.guest, self.plan
        whole = replace(plan, end="commit", chunks=1 << 30, spoil="", seconds=DEADLINE)
        if self.outcome == "APPLIED" and not self._is_known:
            # Who was not told sends it again, and it is not applied twice.
            with world.trace() as ioctls:
                again = world.set_skeys(whole)
                assert (again.outcome, again.answers) == ("APPLIED", ("result",)), again
                assert not [kind for kind, _, _ in ioctls() if kind == "set"]
        if self.outcome == "KEPT" and not plan.digest:
            again = world.set_skeys(whole, resume=True)
            assert again.outcome == "APPLIED", again
            assert again.begun["keys_set"] == vm.last_write.keys_set
            assert again.begun["crc32"] == zlib.crc32(plan.keys[: vm.last_write.keys_set])
            now = world.read(guest)
            assert now is not None
            assert acc_f(_at(now, plan.frames())) == acc_f(plan.keys)
        if guest.old is not None or plan.allow_enable:
            world.restore(guest)


def _at(keys: bytes | bytearray, frames: list[int]) -> bytes:
    return bytes(keys[gfn] for gfn in frames)


def _frames_of(text: str) -> list[int]:
    if not text:
        return []
    first, _, last = text.partition("-")
    return list(range(int(first, 16), int(last or first, 16) + 1))


def _first(last: vm_pb2.LastWrite) -> str:
    one = last.dirty[0]
    return hex(one.start_gfn) if one.count == 1 else f"{one.start_gfn:#x}-{one.start_gfn + one.count - 1:#x}"
