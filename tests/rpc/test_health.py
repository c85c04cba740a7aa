"""grpc.health.v1.Health over the real daemon."""

from __future__ import annotations

import grpc
import pytest

from skeyd.limits import MAX_WATCHES
from tests.daemon import DaemonProcess
from tests.rpc.standard_services import (
    NOT_SERVING,
    SERVICE_UNKNOWN,
    SERVING,
    Reflection,
    check,
    watch,
)
from tests.rpc.stubs import Stubs, refusal

SERVICES = ["", "skeyd.v1.HostService", "skeyd.v1.StorageKeyService", "skeyd.v1.VmService"]


@pytest.mark.parametrize("service", SERVICES)
def test_the_daemon_and_each_of_its_services_serve(stubs: Stubs, service: str) -> None:
    assert check(stubs.channel, service) == SERVING


@pytest.mark.parametrize("service", ["skeyd.v1.Nothing", "skeyd", " ", "x" * 4000])
def test_a_service_that_is_not_there_is_not_found(stubs: Stubs, service: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        check(stubs.channel, service)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert repr(service[:80]) in (caught.value.details() or "")


def test_a_watch_of_a_service_that_is_not_there_says_so_and_goes_on(stubs: Stubs) -> None:
    watching = watch(stubs.channel, "skeyd.v1.Nothing")
    assert next(watching).status == SERVICE_UNKNOWN
    assert watching.is_active()
    watching.cancel()


def test_health_is_served_on_every_listener(shared_daemon: DaemonProcess) -> None:
    with Stubs(shared_daemon.tcp) as over_tcp:
        assert check(over_tcp.channel) == SERVING


def test_watchers_are_told_at_once_that_the_daemon_ends(daemon: DaemonProcess) -> None:
    with Stubs(daemon.target) as stubs:
        watching = [watch(stubs.channel, service) for service in SERVICES]
        assert [next(one).status for one in watching] == [SERVING] * 4
        daemon.terminate()
        assert [next(one).status for one in watching] == [NOT_SERVING] * 4
        for one in watching:
            one.cancel()
    assert daemon.wait() == 0


def test_watches_and_reflection_are_bounded_together_and_a_free_place_can_be_taken(daemon: DaemonProcess) -> None:
    with Stubs(daemon.target) as stubs:
        watching = [watch(stubs.channel) for _ in range(MAX_WATCHES)]
        assert [next(one).status for one in watching] == [SERVING] * MAX_WATCHES

        with pytest.raises(grpc.RpcError) as caught:
            next(watch(stubs.channel))
        found = refusal(caught.value)
        assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
        assert str(MAX_WATCHES) in found.message
        assert found.retry_seconds == 1
        asking = Reflection(stubs.channel, "v1")
        with pytest.raises(grpc.RpcError) as caught:
            asking.ask(list_services="")
        assert refusal(caught.value).reason == "TOO_MANY_STREAMS"
        asking.cancel()

        watching.pop().cancel()
        while daemon.wait_for_line("rpc", method="/grpc.health.v1.Health/Watch")["code"] == "RESOURCE_EXHAUSTED":
            pass
        watching.append(watch(stubs.channel))
        assert next(watching[-1]).status == SERVING
        for one in watching:
            one.cancel()
