"""The table from reasons to statuses, and what a status carries."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skeyd import standard
from skeyd.errors import Reason, SkeydError
from skeyd.rpc import status
from tests.rpc.stubs import SECONDS, Refusal, refused


def parsed(error: SkeydError) -> tuple[Any, Any, list[Any]]:
    """Take details apart: the Status, its ErrorInfo, and what follows."""
    message = standard.message("google.rpc.Status").FromString(status.details(error))
    info = standard.message("google.rpc.ErrorInfo")()
    assert message.details[0].Unpack(info)
    return message, info, list(message.details[1:])


def test_every_reason_has_a_status_and_every_status_a_reason() -> None:
    assert set(status.STATUS) == set(Reason)


def test_no_reason_is_a_success_or_unknown() -> None:
    assert not {grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN} & set(status.STATUS.values())


def test_every_reason_says_what_it_means() -> None:
    for reason in Reason:
        assert reason.value.endswith(".")
        assert len(reason.value) > 15
    assert len({reason.value for reason in Reason}) == len(Reason), "two reasons of one meaning would be one"


def test_what_a_client_may_try_again_as_it_is_says_so_by_its_status() -> None:
    # gRPC's own retry policies go by the status: UNAVAILABLE, ABORTED and RESOURCE_EXHAUSTED are what they name.
    codes = {status.STATUS[reason] for reason in status.RETRY_SECONDS}
    assert codes <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.RESOURCE_EXHAUSTED}


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_details_parse_back(reason: Reason) -> None:
    message, info, rest = parsed(SkeydError(reason, "what was wrong", {"gfn": "0x10", "vm": "vms/a"}))
    assert (message.code, message.message) == (status.STATUS[reason].value[0], "what was wrong")
    assert (info.reason, info.domain) == (reason.name, "skeyd")
    assert dict(info.metadata) == {"gfn": "0x10", "vm": "vms/a"}
    assert len(rest) == (reason in status.RETRY_SECONDS)
    for one in rest:
        retry = standard.message("google.rpc.RetryInfo")()
        assert one.Unpack(retry)
        assert retry.retry_delay.seconds == status.RETRY_SECONDS[reason]


@settings(deadline=None)
@given(
    st.text(max_size=2000),
    st.dictionaries(st.text(max_size=100), st.text(max_size=400), max_size=20),
)
def test_details_are_bounded_and_readable_whatever_an_error_says(message: str, metadata: dict[str, str]) -> None:
    error = SkeydError(Reason.VM_BUSY, message * 3, metadata)
    found, info, _ = parsed(error)
    assert len(status.details(error)) < 4096
    assert len(found.message.encode()) <= 768
    assert all(len(value.encode()) <= 256 for value in info.metadata.values())
    assert info.reason == "VM_BUSY"


@pytest.mark.parametrize("foreign", [9, 10, 100])
@pytest.mark.parametrize(
    "promised",
    [
        {"outcome": "UNCHANGED"},
        {"outcome": "DIRTY", "dirty": "0x10-0x1f", "enabled": "true"},
        {
            "outcome": "KEPT",
            "enabled": "true",
            "next_gfn": "0x10",
            "keys_set": "16",
            "crc32": "0x12345678",
            "uncertain": "0x10-0x1f",
        },
    ],
    ids=lambda promised: promised["outcome"],
)
def test_no_entries_of_a_workers_leave_out_what_became_of_the_keys(promised: dict[str, str], foreign: int) -> None:
    theirs = {f"theirs_{number}": "x" for number in range(foreign)}
    error = SkeydError(Reason.KEYS_NOT_STORED, "lost", {"gfn": "0x10", **theirs})
    error.metadata.update(promised)  # as KeyWriting does, when all else is known
    found = dict(parsed(error)[1].metadata)
    assert found.items() >= promised.items()
    assert found["gfn"] == "0x10", "of the rest the first are kept"
    assert len(found) == 10


class Service:
    """A method that fails as it is told, on a server with nothing else: what the client gets of an error."""

    def __init__(self, socket: Path) -> None:
        self.error = SkeydError(Reason.VM_BUSY, "")
        self._server = grpc.server(ThreadPoolExecutor(1))
        method: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(self._fail)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Fail": method}),))
        self._server.add_insecure_port(f"unix:{socket}")
        self._server.start()
        self._channel = grpc.insecure_channel(f"unix:{socket}")

    def refusal(self, error: SkeydError) -> Refusal:
        """Fail with an error and take what arrives."""
        self.error = error
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary("/test/Fail")
        return refused(lambda: call(b"", timeout=SECONDS))

    def close(self) -> None:
        """End it."""
        self._channel.close()
        self._server.stop(None).wait()

    def _fail(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        status.abort(context, self.error)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Serve."""
    made = Service(tmp_path_factory.mktemp("s") / "s")
    yield made
    made.close()


@pytest.mark.parametrize("character", ["x", "é", "…", "\U0001f511", "\0", "%", "\udcff", "\n"], ids=ascii)
def test_the_longest_error_there_can_be_arrives_with_its_reason(service: Service, character: str) -> None:
    # More than 8 KiB of trailers and gRPC replaces the error by one of its own.
    long = character * 100_000
    found = service.refusal(SkeydError(Reason.WORKER_LOST, long, {f"{n:02}{long}": long for n in range(100)}))
    assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
    assert found.retry_seconds == 1
    assert found.message
    assert set(found.message) <= {character, "?"}


def test_what_is_short_enough_arrives_as_it_was(service: Service) -> None:
    found = service.refusal(SkeydError(Reason.GFN_NOT_MAPPED, "gfn 0x10 … ☃", {"gfn": "0x10", "next_gfn": "0x8"}))
    assert (found.code, found.reason) == (grpc.StatusCode.OUT_OF_RANGE, "GFN_NOT_MAPPED")
    assert found.message == "gfn 0x10 … ☃"
    assert found.metadata == {"gfn": "0x10", "next_gfn": "0x8"}
    assert found.retry_seconds is None
