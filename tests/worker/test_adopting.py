"""Which way to the keys is taken, by what a VMM's monitor says and what becomes of an injection."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.worker import adopting, dumped
from skeyd.worker.adopting import adopt
from skeyd.worker.adoption import Adoption, Vmm
from skeyd.worker.dumped import DumpedVm
from skeyd.worker.protocol import SlotSpec, Spec
from tests.qmp.monitors import FakeMonitor
from tests.qmp.printer import Printer
from tests.worker.specs import UID

MIB: Final = 1 << 20


@dataclass
class Injected:
    """What an injection gives."""

    spec: Spec
    vmm: Vmm


@pytest.fixture
def printer() -> Printer:
    """Be a VMM's monitor, of this process."""
    printer = Printer(b"\x10" * 256)
    printer.answers |= {
        "query-cpus-fast": [{"thread-id": threading.get_native_id()}],
        "query-kvm": {"enabled": True, "present": True},
        "qom-get": "s390-ccw-virtio-7.2-machine",
        "query-memory-size-summary": {"base-memory": MIB},
        "query-memory-devices": [],
    }
    return printer


@pytest.fixture
def monitor(printer: Printer, runtime_dir: Path) -> Iterator[FakeMonitor]:
    with FakeMonitor(runtime_dir / "qmp", printer.converse) as fake:
        yield fake
    printer.let_go()


def spec(monitor: FakeMonitor, *slots: SlotSpec, access: str = "") -> Spec:
    adoption = Adoption(0, 0, -1, 1000, qmp_socket=monitor.path, access=access)
    return Spec("guest", UID, "adopted", slots, 0, adoption=adoption)


def injecting(monkeypatch: pytest.MonkeyPatch, error: SkeydError | None = None) -> list[Spec]:
    """Have injections end so, and return what each is made of."""
    tried: list[Spec] = []

    def inject(spec: Spec) -> Any:
        tried.append(spec)
        if error is not None:
            raise error
        return Injected(spec, Vmm(os.getpid(), 1, 0, "", "", 7, "named"))

    monkeypatch.setattr(adopting, "_injecting", inject)
    return tried


def test_what_the_monitor_says_is_what_an_injection_begins_with(
    monitor: FakeMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = injecting(monkeypatch)
    vm = adopt(spec(monitor))
    assert (vm.vmm.memory_source, vm.vmm.access) == ("qmp", "injection")
    assert tried[0].slots == (SlotSpec(0, MIB, "vmm"),)
    assert tried[0].adoption is not None
    assert tried[0].adoption.pid == os.getpid()
    assert tried[0].adoption.start_time > 0
    named = (SlotSpec(MIB, MIB, "vmm"),)
    assert adopt(spec(monitor, *named)).vmm.memory_source == "named"
    assert tried[1].slots == named


@pytest.mark.parametrize("access", ["", "injection"])
@pytest.mark.parametrize(
    "reason", [reason for reason in Reason if reason.name.startswith("VMM_") or reason is Reason.KVM_UNAVAILABLE]
)
def test_keys_are_read_over_qmp_only_where_the_kernel_allows_no_tracing(
    monitor: FakeMonitor, monkeypatch: pytest.MonkeyPatch, reason: Reason, access: str
) -> None:
    injecting(monkeypatch, SkeydError(reason, "no"))
    if reason is Reason.VMM_NOT_TRACEABLE and not access:
        vm = adopt(spec(monitor))
        try:
            assert (vm.vmm.access, vm.vmm.fd, vm.vmm.memory_source) == ("qmp", -1, "qmp")
            assert vm.kernel == os.uname().release
        finally:
            vm.close()
        return
    with pytest.raises(SkeydError) as caught:
        adopt(spec(monitor, access=access))
    assert caught.value.reason is reason
    # Who it was is written down, whatever came of it.
    assert caught.value.metadata["vmm_pid"] == str(os.getpid())
    assert caught.value.metadata["vmm_uid"] == str(os.getuid())


def test_who_asks_for_qmp_has_nothing_injected(monitor: FakeMonitor, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = injecting(monkeypatch)
    vm = adopt(spec(monitor, access="qmp"))
    vm.close()
    assert vm.vmm.access == "qmp"
    assert tried == []


def test_a_guest_without_kvm_is_not_injected(
    printer: Printer, monitor: FakeMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = injecting(monkeypatch)
    printer.answers["query-kvm"] = {"enabled": False, "present": True}
    for access in ("", "injection"):
        with pytest.raises(SkeydError, match="access qmp") as caught:
            adopt(spec(monitor, access=access))
        assert caught.value.reason is Reason.VMM_NOT_FOUND
    assert tried == []
    vm = adopt(spec(monitor, access="qmp"))
    vm.close()
    assert vm.kernel == "QEMU 9.2.1, without KVM"


def test_a_monitor_that_another_has_is_not_waited_for_again_and_again(
    monitor: FakeMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = adopt(spec(monitor, access="qmp"))
    assert isinstance(vm, DumpedVm)
    monkeypatch.setattr(dumped, "ONE_KEY_SECONDS", 0.2)
    one = memoryview(bytearray(1))
    try:
        with socket.socket(socket.AF_UNIX) as another:
            another.connect(monitor.path)
            assert another.recv(10).startswith(b'{"QMP"')
            with pytest.raises(SkeydError, match="no greeting"):
                vm.get_skeys(0, one)
            clients = monitor.clients
            for _ in range(3):
                with pytest.raises(SkeydError, match="no greeting") as caught:
                    vm.get_skeys(0, one)
                assert caught.value.reason is Reason.QMP_BUSY
            monkeypatch.setattr(dumped, "Monitor", None)  # nobody connects
            with pytest.raises(SkeydError, match="no greeting"):
                vm.get_skeys(0, one)
            assert monitor.clients == clients
    finally:
        vm.close()


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"qom-get": "pc-q35-7.2-machine"}, "only machines s390-ccw-virtio"),
        ({"query-memory-size-summary": {"base-memory": MIB, "plugged-memory": 4096}}, "memory devices"),
        ({"query-memory-devices": [{"type": "virtio-mem", "data": {}}]}, "memory devices"),
        ({"query-memory-size-summary": {"base-memory": MIB + 1}}, "can't be"),
    ],
)
def test_memory_that_can_not_be_told_exactly_is_to_be_named(
    printer: Printer, monitor: FakeMonitor, monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], said: str
) -> None:
    injecting(monkeypatch)
    printer.answers |= answers
    with pytest.raises(SkeydError, match=said) as caught:
        adopt(spec(monitor))
    assert caught.value.reason is Reason.VMM_UNSUITABLE
    assert adopt(spec(monitor, SlotSpec(0, MIB, "vmm"))).vmm.memory_source == "named"


@pytest.mark.parametrize("pid", [0, os.getpid()], ids=["of whoever listens", "named"])
def test_a_monitor_that_tells_of_another_processs_cpus_is_not_taken(
    printer: Printer, monitor: FakeMonitor, monkeypatch: pytest.MonkeyPatch, pid: int
) -> None:
    tried = injecting(monkeypatch)
    printer.answers["query-cpus-fast"] = [{"thread-id": threading.get_native_id()}, {"thread-id": 1}]
    asked = spec(monitor)
    assert asked.adoption is not None
    with pytest.raises(SkeydError, match=f"are not of process {os.getpid()}") as caught:
        adopt(replace(asked, adoption=replace(asked.adoption, pid=pid)))
    assert caught.value.reason is Reason.VMM_NOT_FOUND
    assert tried == []
