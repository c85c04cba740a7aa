"""A real kernel that no longer answers: told with what there is to see, and no test after it waits for it again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

import pytest

from skeyd.kvm import abi
from tests.contract import real
from tests.contract.operations import Answer, Capability, Get
from tests.contract.real import RealKernel
from tests.emulated.fixtures import host_suites, require_image
from tests.emulated.host import EmulatedHost, HostDied

pytestmark = [pytest.mark.emulated, pytest.mark.timeout(600)]

ASK: Final = Capability(abi.KVM_CAP_S390_SKEYS)
SHARED_VM: Final = -1
NO_VM: Final = 77
AT_ONCE: Final = 2.0
"""Seconds; whoever waits, waits for as long."""


@pytest.fixture(params=host_suites())
def host(request: pytest.FixtureRequest) -> Iterator[EmulatedHost]:
    # Nobody else may have one that is made to stand still.
    with EmulatedHost(require_image(request.param)) as host:
        yield host


def test_a_process_that_ended_takes_no_other_test_with_it(host: EmulatedHost) -> None:
    kernel = RealKernel(host)
    shared = kernel.shared
    # The server inside knows of no such VM, and the process ends with that.
    with pytest.raises(HostDied, match=r"(?s)has ended.*KeyError: 77.*Mem:"):
        shared.play(Get(0, 1, NO_VM))
    with pytest.raises(HostDied, match="as was told before"):
        shared.play(ASK)
    assert kernel.shared is not shared
    assert kernel.shared is kernel.shared
    assert kernel.shared.play(Get(0, 1, SHARED_VM)) == [Answer(keys=b"\0")]
    kernel.close()


def test_a_host_that_stands_still_is_waited_for_once(host: EmulatedHost, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = RealKernel(host)
    # From here on nobody waits for an answer that could come.
    monkeypatch.setattr(real, "SECONDS", 2.0)
    monkeypatch.setattr(real, "LOOK_SECONDS", 2.0)
    with kernel.process() as process:
        host.freeze()
        with pytest.raises(HostDied, match=r"(?s)is dead.*paused.*PSW="):
            process.play(ASK)
    begin = time.monotonic()
    with pytest.raises(HostDied, match="as a test before has found"):
        _ = kernel.shared
    with pytest.raises(HostDied, match="as a test before has found"), kernel.process():
        pass
    assert time.monotonic() - begin < AT_ONCE
    kernel.close()


def test_a_host_that_is_gone_is_said_to_be(host: EmulatedHost) -> None:
    kernel = RealKernel(host)
    host.__exit__()
    with pytest.raises(HostDied, match="is dead"):
        kernel.shared.play(Get(0, 1, SHARED_VM))
    with pytest.raises(HostDied, match="as a test before has found"):
        _ = kernel.shared
    kernel.close()
