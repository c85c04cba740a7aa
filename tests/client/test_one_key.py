"""What the client makes of GetSkey, SetSkey and ResetReferenced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from skeyd.client import Client, ClientError, OneKey, OneKeySet, StreamError, connect
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2
from tests.client.lying_daemon import LyingDaemon
from tests.daemon import DaemonProcess
from tests.rpc.fixtures import NewVm


@pytest.fixture
def client(shared_daemon: DaemonProcess) -> Iterator[Client]:
    """Connect to the shared daemon."""
    with connect(shared_daemon.target) as connected:
        yield connected


def test_a_key_is_set_read_and_its_r_reset(client: Client, new_vm: NewVm) -> None:
    name = new_vm((0, 1))
    assert client.get_skey(name, 3) == OneKey(None, "skeys")
    assert client.set_skey(name, 3, 0x36, allow_enable=True) == OneKeySet(None, False, True, "skeys")
    assert client.get_skey(name, 3) == OneKey(0x36, "keyop")
    assert client.reset_referenced(name, 3) == (True, True)
    assert client.reset_referenced(name, 3) == (False, True)
    assert client.set_skey(name, 3, 0x40) == OneKeySet(0x32, False, False, "keyop")


def test_on_older_kernels_the_calls_for_ranges_do_it(client: Client, new_vm: NewVm) -> None:
    name = new_vm((0, 1), kernel=vm_pb2.SIMULATED_KERNEL_LINUX_4_19)
    assert client.set_skey(name, 3, 0x36, allow_enable=True) == OneKeySet(None, True, True, "skeys")
    assert client.get_skey(name, 3) == OneKey(0x36, "skeys")
    with pytest.raises(ClientError) as refused:
        client.reset_referenced(name, 3)
    assert refused.value.reason == "CAP_S390_KEYOP_MISSING"


@pytest.mark.parametrize("key", [0x01, 0x100, 0xFFFFFFFF])
def test_a_key_that_is_none_is_an_error(tmp_path: Path, key: int) -> None:
    with LyingDaemon(tmp_path) as daemon, connect(daemon.target) as client:
        daemon.one_read, daemon.one_set = pb.GetSkeyResponse(key=key), pb.SetSkeyResponse(old_key=key)
        with pytest.raises(StreamError, match="impossible key"):
            client.get_skey("vms/a", 0)
        with pytest.raises(StreamError, match="impossible key"):
            client.set_skey("vms/a", 0, 0)
