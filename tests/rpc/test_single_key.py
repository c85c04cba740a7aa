"""GetSkey, SetSkey and ResetReferenced on the daemon: one frame, whatever the kernel below can do."""

from __future__ import annotations

import grpc
import pytest

from skeyd.v1 import host_service_pb2, vm_pb2
from skeyd.v1 import storage_key_service_pb2 as pb
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import SECONDS, Refusal, SetStream, Stubs, chunk, commit, refused

KERNELS = {
    "4.19": (vm_pb2.SIMULATED_KERNEL_LINUX_4_19, pb.KEY_CALL_SKEYS),
    "7.0": (vm_pb2.SIMULATED_KERNEL_LINUX_7_0, pb.KEY_CALL_KEYOP),
    "7.2": (vm_pb2.SIMULATED_KERNEL_LINUX_7_2, pb.KEY_CALL_KEYOP),
}
"""By release: the simulated kernel, and how one key is read there."""

every_kernel = pytest.mark.parametrize("kernel", KERNELS)


class One:
    """One VM of two MiB with a hole of one between them, and the three calls on it."""

    def __init__(self, stubs: Stubs, name: str, call: pb.KeyCall.ValueType) -> None:
        self.stubs = stubs
        self.name = name
        self.call = call

    def get(self, gfn: int) -> pb.GetSkeyResponse:
        return self.stubs.keys.GetSkey(pb.GetSkeyRequest(vm=self.name, gfn=gfn), timeout=SECONDS)

    def set(self, gfn: int, key: int, *, allow_enable: bool = False) -> pb.SetSkeyResponse:
        request = pb.SetSkeyRequest(vm=self.name, gfn=gfn, key=key, allow_enable=allow_enable)
        return self.stubs.keys.SetSkey(request, timeout=SECONDS)

    def reset(self, gfn: int) -> pb.ResetReferencedResponse:
        request = pb.ResetReferencedRequest(vm=self.name, gfn=gfn)
        return self.stubs.keys.ResetReferenced(request, timeout=SECONDS)


@pytest.fixture
def one(stubs: Stubs, new_vm: NewVm, kernel: str) -> One:
    """Make a VM on the kernel that the test names."""
    simulated, call = KERNELS[kernel]
    return One(stubs, new_vm((0, 1), (2, 1), kernel=simulated), call)


def assert_refused(found: Refusal, code: grpc.StatusCode, reason: str, **metadata: str) -> None:
    assert (found.code, found.reason) == (code, reason)
    assert metadata.items() <= found.metadata.items()


@every_kernel
def test_a_key_that_is_set_is_the_one_that_is_read_and_no_other_frame_has_it(one: One) -> None:
    assert one.set(5, 0x38, allow_enable=True) == pb.SetSkeyResponse(
        # On 4.19 to 6.19 the first key of a segment is lost at first.
        enabled=True,
        repaired=one.call == pb.KEY_CALL_SKEYS,
        call=pb.KEY_CALL_SKEYS,
    )
    assert one.set(0x200, 0xF6) == pb.SetSkeyResponse(old_key=0, repaired=one.call == pb.KEY_CALL_SKEYS, call=one.call)
    assert one.set(5, 0x40) == pb.SetSkeyResponse(old_key=0x38, call=one.call)
    assert one.get(5) == pb.GetSkeyResponse(key=0x40, call=one.call)
    assert one.get(4) == pb.GetSkeyResponse(key=0, call=one.call)
    expected = bytearray(512)
    expected[5], expected[256] = 0x40, 0xF6
    assert one.stubs.get(one.name).keys == expected


@every_kernel
def test_a_guest_that_uses_no_keys_has_none_and_gets_none_unasked(one: One) -> None:
    assert one.get(5) == pb.GetSkeyResponse(call=pb.KEY_CALL_SKEYS)
    assert not one.get(5).HasField("key")
    assert_refused(refused(lambda: one.set(5, 0x38)), grpc.StatusCode.FAILED_PRECONDITION, "SKEYS_NOT_ENABLED")
    assert not one.stubs.look_at(one.name).uses_storage_keys


@pytest.mark.parametrize("kernel", ["7.0", "7.2"])
def test_r_is_reset_and_r_and_c_are_told_as_they_were(one: One) -> None:
    one.stubs.set(one.name, [(0, b"\xf8\xfa\xfc\xfe")])
    was = [one.reset(gfn) for gfn in range(4)]
    assert [(it.was_referenced, it.was_changed) for it in was] == [
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    ]
    assert one.stubs.get(one.name, (0, 4)).keys == b"\xf8\xfa\xf8\xfa"


@pytest.mark.parametrize("kernel", ["4.19"])
def test_where_there_is_no_keyop_r_is_not_reset_and_the_error_says_why(one: One) -> None:
    one.stubs.set(one.name, [(0, b"\xfe")])
    found = refused(lambda: one.reset(0))
    assert_refused(found, grpc.StatusCode.UNIMPLEMENTED, "CAP_S390_KEYOP_MISSING")
    assert "7.0" in found.message
    assert one.get(0).key == 0xFE


@pytest.mark.parametrize("kernel", ["7.0", "7.2"])
def test_a_guest_that_uses_no_keys_has_no_r_to_reset(one: One) -> None:
    assert_refused(refused(lambda: one.reset(0)), grpc.StatusCode.FAILED_PRECONDITION, "SKEYS_NOT_ENABLED")
    assert not one.stubs.look_at(one.name).uses_storage_keys


@every_kernel
@pytest.mark.parametrize("gfn", [0x100, 0x300, 1 << 52, (1 << 64) - 1])
def test_a_frame_in_no_slot_has_no_key(one: One, gfn: int) -> None:
    one.stubs.set(one.name, [(0, b"\x30")])
    for call in (lambda: one.get(gfn), lambda: one.set(gfn, 0x30), lambda: one.reset(gfn)):
        assert_refused(refused(call), grpc.StatusCode.OUT_OF_RANGE, "GFN_NOT_MAPPED", gfn=hex(gfn))


@every_kernel
@pytest.mark.parametrize(
    ("key", "reason"), [(0x01, "KEY_RESERVED_BIT"), (0xFF, "KEY_RESERVED_BIT"), (0x100, "REQUEST_INVALID")]
)
def test_what_is_no_key_is_refused_and_changes_nothing(one: One, key: int, reason: str) -> None:
    found = refused(lambda: one.set(0, key, allow_enable=True))
    assert_refused(found, grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert not one.stubs.look_at(one.name).uses_storage_keys


@pytest.mark.parametrize("kernel", ["7.2"])
@pytest.mark.parametrize("name", ["vms/", "web", "vms/Web", "vms/../web"])
def test_what_is_no_name_is_refused(one: One, name: str) -> None:
    one.name = name
    for call in (lambda: one.get(0), lambda: one.set(0, 0), lambda: one.reset(0)):
        assert_refused(refused(call), grpc.StatusCode.INVALID_ARGUMENT, "VM_ID_INVALID")


@pytest.mark.parametrize("kernel", ["7.2"])
def test_a_vm_that_is_not_there_is_not_found(one: One) -> None:
    one.name = "vms/nobody"
    for call in (lambda: one.get(0), lambda: one.set(0, 0), lambda: one.reset(0)):
        assert_refused(refused(call), grpc.StatusCode.NOT_FOUND, "VM_NOT_FOUND")


@pytest.mark.parametrize("kernel", ["7.2"])
def test_while_a_stream_sets_keys_one_key_can_be_read_and_none_be_set(one: One) -> None:
    one.stubs.set(one.name, [(0, b"\x30" * 16)])
    with SetStream(one.stubs) as stream:
        stream.begin(one.name, (0, 16))
        stream.ask(chunk(0, b"\xf8" * 8))
        assert one.get(0).key == 0xF8
        for call in (lambda: one.set(0, 0x40), lambda: one.reset(0)):
            assert_refused(refused(call), grpc.StatusCode.ABORTED, "VM_BUSY")
        stream.ask(chunk(8, b"\xf8" * 8))
        stream.ask(commit())
        stream.finish()
        assert list(stream.call) == []  # the daemon has let go of the VM before it ends the call
    assert one.set(0, 0x40).old_key == 0xF8


@pytest.mark.parametrize("kernel", ["7.2"])
def test_one_key_is_read_while_as_many_streams_run_as_the_vm_may_have(one: One) -> None:
    """A debug client waits behind nobody."""
    limits = one.stubs.hosts.GetHost(host_service_pb2.GetHostRequest(), timeout=SECONDS).host.limits
    one.stubs.set(one.name, [(0, b"\x30" * 256)])
    request = pb.GetSkeysRequest(vm=one.name, max_chunk_keys=1)
    streams = [one.stubs.keys.GetSkeys(request, timeout=SECONDS) for _ in range(limits.max_key_streams // 2)]
    try:
        for stream in streams:
            next(stream)
        assert one.get(0).key == 0x30
    finally:
        for stream in streams:
            stream.cancel()
