"""A SetSkeys whose client says nothing more: it is cut, what it set is rolled back, and others may set keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import grpc
import pytest

from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2
from tests.daemon import DaemonProcess
from tests.rpc import impatient
from tests.rpc.stubs import KEEP, SetStream, Stubs, chunk, commit, header, new_id, some_keys

OLD: Final = some_keys(512)
NEW: Final = bytes(key ^ 0x40 for key in OLD)


@pytest.fixture
def waiting(runtime_dir: Path) -> Iterator[DaemonProcess]:
    """Run a daemon that waits for a second."""
    daemon = DaemonProcess(runtime_dir, impatient.through(1.0, 30.0))
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.end_everything()


@pytest.mark.parametrize("after", ["header", "chunk"])
@pytest.mark.parametrize("keep", [False, True], ids=["roll-back", "keep"])
def test_a_writer_that_says_nothing_more_is_cut_and_what_it_set_is_as_it_asked(
    waiting: DaemonProcess, after: str, keep: bool
) -> None:
    with Stubs(waiting.target) as stubs:
        vm = stubs.create("web", (0, 4)).name
        stubs.set(vm, [(0, OLD)])
        with SetStream(stubs) as stream:
            asked = {"on_interrupt": KEEP, "request_id": new_id()} if keep else {}
            stream.begin(vm, (0, 512), **asked)
            if after == "chunk":
                assert stream.ask(chunk(0, NEW[:256])).progress.keys_set == 256
            with pytest.raises(grpc.RpcError) as caught:
                next(stream.call)
            assert caught.value.code() == grpc.StatusCode.CANCELLED
        line = waiting.wait_for_line("rpc", method="/skeyd.v1.StorageKeyService/SetSkeys", code="CANCELLED")
        assert line["stalled"] is True
        stays = after == "chunk" and keep
        # Nobody is kept from setting keys, for no longer than it takes to roll back.
        while True:
            answers, error = stubs.send(header(vm, (1000, 1)), chunk(1000, b"\x30"), commit())
            if error is None:
                break
            assert error.reason == "VM_BUSY"
        assert answers[-1].WhichOneof("part") == "result"
        assert stubs.get(vm, (0, 512)).keys == (NEW[:256] + OLD[256:] if stays else OLD)


def test_a_writer_that_says_something_in_time_is_not_cut(waiting: DaemonProcess) -> None:
    with Stubs(waiting.target) as stubs:
        vm = stubs.create("web", (0, 4)).name
        stubs.set(vm, [(0, OLD)])
        with SetStream(stubs) as stream:
            stream.begin(vm, (0, 512))
            for gfn in range(512):
                assert stream.ask(chunk(gfn, NEW[gfn : gfn + 1])).progress.keys_set == gfn + 1
            assert stream.ask(commit()).result.outcome == pb.SetSkeysResponse.OUTCOME_APPLIED
        assert stubs.look_at(vm).last_write.outcome == vm_pb2.WRITE_OUTCOME_APPLIED
