"""CONSISTENCY_FROZEN over the real daemon, on VMs that nobody runs: what is asked for, answered, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from skeyd import limits
from skeyd.errors import Reason, SkeydError
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.worker.protocol import FREEZE_MAX_NS, FROZEN_KEYS
from tests.rpc.fixtures import NewVm
from tests.rpc.one_vm import GetCall
from tests.rpc.stubs import SECONDS, SetStream, Stubs, ranges, refused, some_keys, whole
from tests.vms.fake_worker import Caller, FakeWorker, hello

FROZEN = pb.CONSISTENCY_FROZEN
KEYS = some_keys(512, 5)


@pytest.fixture
def name(new_vm: NewVm, stubs: Stubs) -> str:
    name = new_vm((0, 1), (2, 1))
    stubs.set(name, [(0, KEYS[:256]), (512, KEYS[256:])])
    return name


def test_all_keys_come_as_ever_and_header_and_trailer_say_of_which_moment(stubs: Stubs, name: str) -> None:
    request = pb.GetSkeysRequest(vm=name, max_chunk_keys=100, consistency=FROZEN)
    frozen, live = whole(stubs.keys.GetSkeys(request, timeout=SECONDS)), stubs.get(name, chunk_keys=100)
    assert (frozen.keys, frozen.layout) == (live.keys, live.layout)
    assert frozen.header.consistency == FROZEN
    assert frozen.trailer.HasField("frozen_time")
    # Nothing had to be held: nobody runs it.
    assert frozen.trailer.frozen_time == Duration()
    assert live.header.consistency == pb.CONSISTENCY_LIVE
    assert not live.trailer.HasField("frozen_time")


def test_a_part_of_it_too(stubs: Stubs, name: str) -> None:
    request = pb.GetSkeysRequest(
        vm=name, ranges=ranges((1, 2), (4, 1), (250, 266)), consistency=FROZEN, freeze_budget=Duration(seconds=10)
    )
    found = whole(stubs.keys.GetSkeys(request, timeout=SECONDS))
    assert found.keys == stubs.get(name, (1, 2), (4, 1), (250, 266)).keys


def test_keys_that_are_set_while_it_is_being_sent_are_not_in_it(stubs: Stubs, new_vm: NewVm) -> None:
    name = new_vm((0, 8192))
    keys = some_keys(1 << 20, 6)
    stubs.set(name, [(0, keys), (1 << 20, keys)])
    # More than a stream reads ahead, and more than gRPC sends ahead.
    stream = stubs.keys.GetSkeys(pb.GetSkeysRequest(vm=name, max_chunk_keys=4096, consistency=FROZEN), timeout=SECONDS)
    first = next(stream)
    assert first.header.consistency == FROZEN
    stubs.set(name, [(0, bytes(1 << 20)), (1 << 20, bytes(1 << 20))])
    assert whole([first, *stream]).keys == keys + keys
    assert not any(stubs.get(name).keys)


def test_digests_and_summaries_are_of_a_moment_too(stubs: Stubs, name: str) -> None:
    def digest(**other: Any) -> pb.DigestSkeysResponse:
        return stubs.keys.DigestSkeys(pb.DigestSkeysRequest(vm=name, **other), timeout=SECONDS)

    def summary(**other: Any) -> pb.SummarizeSkeysResponse:
        return stubs.keys.SummarizeSkeys(pb.SummarizeSkeysRequest(vm=name, **other), timeout=SECONDS)

    for ask in (digest, summary):
        call: Callable[..., Any] = ask
        live, frozen = call(), call(consistency=FROZEN, freeze_budget=Duration(nanos=900_000_000))
        assert (live.consistency, frozen.consistency) == (pb.CONSISTENCY_LIVE, FROZEN)
        frozen.consistency = pb.CONSISTENCY_LIVE
        assert frozen == live
    nowhere = pb.DigestSkeysRequest.NodeId(level=0, start_gfn=1 << 20)
    assert digest(consistency=FROZEN, node=nowhere).consistency == FROZEN


def test_a_guest_without_keys_is_an_answer(stubs: Stubs, new_vm: NewVm) -> None:
    request = pb.GetSkeysRequest(vm=new_vm((0, 1)), consistency=FROZEN)
    found = whole(stubs.keys.GetSkeys(request, timeout=SECONDS))
    assert (found.header.uses_storage_keys, found.header.consistency, found.parts) == (False, FROZEN, [])


LEAST = Duration(nanos=round(limits.MIN_FREEZE_SECONDS * 1e9))
MOST = Duration(seconds=round(limits.MAX_FREEZE_SECONDS))


@pytest.mark.parametrize("budget", [LEAST, MOST])
def test_the_bounds_of_a_budget_are_budgets(stubs: Stubs, new_vm: NewVm, budget: Duration) -> None:
    # Of a guest without keys, which needs no time.
    request = pb.GetSkeysRequest(vm=new_vm((0, 1)), consistency=FROZEN, freeze_budget=budget)
    assert whole(stubs.keys.GetSkeys(request, timeout=SECONDS)).header.consistency == FROZEN


@pytest.mark.parametrize(
    "wrong",
    [
        {"consistency": 3},
        {"consistency": -1},
        {"freeze_budget": MOST},
        {"consistency": pb.CONSISTENCY_LIVE, "freeze_budget": MOST},
        {"consistency": FROZEN, "freeze_budget": Duration()},
        {"consistency": FROZEN, "freeze_budget": Duration(nanos=LEAST.nanos - 1)},
        {"consistency": FROZEN, "freeze_budget": Duration(seconds=MOST.seconds, nanos=1)},
        {"consistency": FROZEN, "freeze_budget": Duration(seconds=-1)},
        {"consistency": FROZEN, "freeze_budget": Duration(seconds=1, nanos=-1)},
        {"consistency": FROZEN, "freeze_budget": Duration(seconds=1, nanos=1_000_000_000)},
    ],
)
def test_what_makes_no_sense_is_refused_by_every_call(stubs: Stubs, name: str, wrong: dict[str, Any]) -> None:
    for call in (
        lambda: list(stubs.keys.GetSkeys(pb.GetSkeysRequest(vm=name, **wrong), timeout=SECONDS)),
        lambda: stubs.keys.DigestSkeys(pb.DigestSkeysRequest(vm=name, **wrong), timeout=SECONDS),
        lambda: stubs.keys.SummarizeSkeys(pb.SummarizeSkeysRequest(vm=name, **wrong), timeout=SECONDS),
    ):
        found = refused(call)
        assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")


def test_a_moment_that_is_over_is_not_gone_on_with(stubs: Stubs, name: str) -> None:
    resume = pb.GetSkeysRequest.Resume(gfn=4, incarnation=stubs.look_at(name).incarnation, crc32=1)
    request = pb.GetSkeysRequest(vm=name, resume=resume, consistency=FROZEN)
    found = refused(lambda: list(stubs.keys.GetSkeys(request, timeout=SECONDS)))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
    assert "resume" in found.message


def test_more_than_a_worker_keeps_is_refused(stubs: Stubs, new_vm: NewVm) -> None:
    name = new_vm((0, (FROZEN_KEYS >> 8) + 1))
    stubs.set(name, [(0, b"\x10")])
    found = refused(lambda: list(stubs.keys.GetSkeys(pb.GetSkeysRequest(vm=name, consistency=FROZEN), timeout=SECONDS)))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
    assert f"{FROZEN_KEYS + 256} keys" in found.message


def test_a_setskeys_that_runs_keeps_it_from_beginning(stubs: Stubs, name: str) -> None:
    with SetStream(stubs) as going:
        going.begin(name, (0, 4))
        request = pb.GetSkeysRequest(vm=name, consistency=FROZEN)
        found = refused(lambda: list(stubs.keys.GetSkeys(request, timeout=SECONDS)))
        assert (found.code, found.reason, found.metadata["vm"]) == (grpc.StatusCode.ABORTED, "VM_BUSY", name)
        assert found.retry_seconds == 1


def test_the_longest_budget_is_one_that_workers_know() -> None:
    assert limits.MAX_FREEZE_SECONDS == FREEZE_MAX_NS / 1e9


def test_a_worker_of_an_earlier_build_is_told_of_and_not_asked(runtime_dir: Path) -> None:
    def script(caller: Caller) -> None:
        old = hello()
        del old["freezes"]
        caller.say(old)
        caller.wait_for_end()

    with FakeWorker(runtime_dir, script):
        call = GetCall(runtime_dir, pb.GetSkeysRequest(vm="vms/web", consistency=FROZEN))
        with pytest.raises(SkeydError, match="reads no keys of one moment") as refusal:
            list(call.parts)
        assert refusal.value.reason is Reason.FREEZE_UNSUPPORTED
