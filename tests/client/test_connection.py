"""Client and ClientError: one daemon's calls, and its refusals as exceptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from skeyd import paths
from skeyd.client import Client, ClientError, connect
from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.rpc import status
from skeyd.v1 import vm_pb2, vm_service_pb2
from tests.client.lying_daemon import LyingDaemon
from tests.daemon import DaemonProcess
from tests.rpc.stubs import MIB, new_id


@pytest.fixture
def client(shared_daemon: DaemonProcess) -> Iterator[Client]:
    """Connect to the real daemon."""
    with shared_daemon.connect() as connected:
        yield connected


def test_a_vm_lives_from_create_to_delete(client: Client) -> None:
    vm_id = new_id()
    made = client.create_vm(
        vm_service_pb2.CreateVmRequest(
            vm_id=vm_id,
            kind=vm_pb2.VM_KIND_SIMULATED,
            memory_slots=[vm_service_pb2.MemorySlotSpec(memory_size=MIB)],
        )
    )
    assert made.name == f"vms/{vm_id}"
    assert client.get_vm(made.name) == made
    assert made in client.list_vms()
    client.delete_vm(made.name)
    assert made not in client.list_vms()


def test_the_host_is_described(client: Client) -> None:
    assert client.host().limits.max_chunk_keys == 1 << 20


CALLS: dict[str, Callable[[Client, str], object]] = {
    "get_vm": lambda client, name: client.get_vm(name),
    "delete_vm": lambda client, name: client.delete_vm(name),
    "get_skeys": lambda client, name: client.get_skeys(name).__enter__(),
    "set_skeys": lambda client, name: client.set_skeys(name, [GfnRange(0, 1)], []),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_raises_a_client_error_with_the_reason(client: Client, call: str) -> None:
    with pytest.raises(ClientError) as caught:
        CALLS[call](client, "vms/nobody")
    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "VM_NOT_FOUND")
    assert error.metadata == {"vm": "vms/nobody", **({"outcome": "UNCHANGED"} if call == "set_skeys" else {})}
    assert error.message == "there is no vms/nobody"
    assert str(error) == "VM_NOT_FOUND: there is no vms/nobody"


def test_create_raises_it_too(client: Client) -> None:
    with pytest.raises(ClientError) as caught:
        client.create_vm(vm_service_pb2.CreateVmRequest(vm_id="A"))
    assert caught.value.reason == "VM_ID_INVALID"


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_where_nobody_listens_the_error_is_grpcs_own(tmp_path: Path, call: Callable[[Client, str], object]) -> None:
    with connect(f"unix:{tmp_path}/nothing") as nobody, pytest.raises(ClientError) as caught:
        call(nobody, "vms/a")
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "")
    assert str(caught.value).startswith("UNAVAILABLE: ")
    assert "nothing" in caught.value.message


GOOD_DETAILS = status.details(SkeydError(Reason.VM_BUSY, "busy", {"vm": "vms/a"}))


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        (GOOD_DETAILS, "VM_BUSY"),
        (b"", ""),
        (b"\xff\xff\xff", ""),
        (GOOD_DETAILS[:-1], ""),
        (GOOD_DETAILS.replace(b"google.rpc.ErrorInfo", b"google.rpc.ErrorNone"), ""),
    ],
    ids=["good", "empty", "garbage", "cut-off", "of-another-type"],
)
def test_details_that_cannot_be_read_leave_the_status_as_it_is(tmp_path: Path, details: bytes, reason: str) -> None:
    def looking(context: grpc.ServicerContext) -> vm_pb2.Vm:
        context.set_trailing_metadata((("grpc-status-details-bin", details),))
        context.abort(grpc.StatusCode.ABORTED, "busy")

    with LyingDaemon(tmp_path) as daemon:
        daemon.looking = looking
        with connect(daemon.target) as client, pytest.raises(ClientError) as caught:
            client.get_vm("vms/a")
    assert (caught.value.code, caught.value.message) == (grpc.StatusCode.ABORTED, "busy")
    assert caught.value.reason == reason


def test_a_closed_client_is_of_no_more_use(shared_daemon: DaemonProcess) -> None:
    client = shared_daemon.connect()
    client.close()
    client.close()
    with pytest.raises(ValueError, match="closed"):
        client.list_vms()


def test_a_proxy_of_the_environment_is_not_used(shared_daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    # Port 1 answers nobody: a client that went through this proxy would not arrive.
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    with connect(shared_daemon.tcp) as client:
        client.list_vms()


@pytest.mark.parametrize(
    ("uid", "environment", "expected"),
    [
        (0, {"XDG_RUNTIME_DIR": "/run/user/0"}, "/run/skeyd"),
        (1000, {"XDG_RUNTIME_DIR": "/run/user/1000"}, "/run/user/1000/skeyd"),
        (1000, {}, "/tmp/skeyd-1000"),  # noqa: S108  nothing is made there
        (1000, {"XDG_RUNTIME_DIR": ""}, "/tmp/skeyd-1000"),  # noqa: S108  likewise
    ],
)
def test_client_and_daemon_meet_in_the_same_place_by_default(
    monkeypatch: pytest.MonkeyPatch, uid: int, environment: dict[str, str], expected: str
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: uid)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(paths.default_runtime_dir()) == expected
    assert paths.default_target() == f"unix:{expected}/skeyd.sock"
