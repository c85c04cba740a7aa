"""CallInterceptor: statuses and log lines of calls of all four kinds, on a server of the test's own."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog

from skeyd import limits
from skeyd.errors import Reason, SkeydError
from skeyd.rpc.calls import CallInterceptor, Cancelled, note
from tests.rpc.stubs import SECONDS, refusal, refused

PRIVATE = "a-path-that-is-nobodys-business"
KINDS = ["unary_unary", "unary_stream", "stream_unary", "stream_stream"]


class Log:
    """Keeps the lines that a structlog logger would write."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self._more = threading.Condition()
        self.logger: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
            None,
            wrapper_class=structlog.make_filtering_bound_logger(0),
            processors=[self._keep],
            cache_logger_on_first_use=False,
        )

    def one(self) -> dict[str, Any]:
        """Wait for the one line of a call."""
        with self._more:
            assert self._more.wait_for(lambda: self.lines, SECONDS)
            (line,) = self.lines
            return line

    def of(self, kind: str) -> dict[str, Any]:
        """Wait for the line of a call of that kind, whatever others there are."""
        with self._more:

            def found() -> list[dict[str, Any]]:
                return [line for line in self.lines if line["method"] == f"/test/{kind}"]

            assert self._more.wait_for(found, SECONDS)
            return found()[0]

    def _keep(self, _: Any, level: str, event: Any) -> Any:
        with self._more:
            self.lines.append({"level": level, **event})
            self._more.notify_all()
        raise structlog.DropEvent


class Server:
    """Serves /test/<kind> for each of the four kinds, all with one behaviour."""

    def __init__(self, socket: Path) -> None:
        self.log = Log()
        self.behaviour: Callable[[Any, grpc.ServicerContext], Any] = lambda request, _: request
        self.responses: Iterator[Any] = iter(())
        """Those of the last stream, held so that no collector can close them."""
        self._server = grpc.server(ThreadPoolExecutor(4), interceptors=[CallInterceptor(self.log.logger)])
        handlers = {}
        for kind in KINDS:
            make = getattr(grpc, f"{kind}_rpc_method_handler")
            handlers[kind] = make(self._stream if kind.endswith("_stream") else self._unary)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
        self._server.add_insecure_port(f"unix:{socket}")
        self._server.start()
        self.channel = grpc.insecure_channel(f"unix:{socket}")

    def call(self, kind: str, message: bytes = b"asked") -> Any:
        """Begin a call of a kind; the result or the iterator of results."""
        request = iter([message]) if kind.startswith("stream_") else message
        return getattr(self.channel, kind)(f"/test/{kind}")(request, timeout=SECONDS)

    def finish(self, kind: str, message: bytes = b"asked") -> list[bytes]:
        """Make a call of a kind to its end."""
        result = self.call(kind, message)
        return list(result) if kind.endswith("_stream") else [result]

    def close(self) -> None:
        """End it."""
        self.channel.close()
        self._server.stop(None).wait()

    def _unary(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self.behaviour(request if isinstance(request, bytes) else next(request), context)

    def _stream(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        self.responses = self._responses(request, context)
        return self.responses

    def _responses(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield b"first"
        yield self.behaviour(request if isinstance(request, bytes) else next(request), context)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Serve."""
    made = Server(tmp_path / "s")
    yield made
    made.close()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each of the four kinds of method."""
    assert isinstance(request.param, str)
    return request.param


def test_a_call_that_goes_well_leaves_one_line_with_all_that_it_noted(server: Server, kind: str) -> None:
    def behaviour(request: bytes, _: grpc.ServicerContext) -> bytes:
        note(vm="vms/a", keys=1)
        note(keys=2)
        return request + b" and answered"

    server.behaviour = behaviour
    assert server.finish(kind)[-1] == b"asked and answered"
    line = server.log.one()
    assert line.pop("ms") >= 0
    assert line.pop("peer").startswith("unix:")
    assert line == {
        "level": "info",
        "event": "rpc",
        "method": f"/test/{kind}",
        "code": "OK",
        "vm": "vms/a",
        "keys": 2,
    }


def test_notes_of_one_call_never_get_into_another_ones_line(server: Server) -> None:
    # All at once, on as many threads: each waits in its middle for the others.
    together = threading.Barrier(4)
    numbers = iter(range(4))

    def behaviour(request: bytes, _: grpc.ServicerContext) -> bytes:
        number = next(numbers)
        note(first=number)
        together.wait(SECONDS)
        note(second=number)
        return request

    server.behaviour = behaviour
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(server.finish, ["unary_unary", "unary_stream"] * 2))
    assert sorted(line["first"] for line in server.log.lines) == [0, 1, 2, 3]
    assert all(line["first"] == line["second"] for line in server.log.lines)


@pytest.mark.parametrize(
    ("reason", "code", "level"),
    [
        (Reason.VM_NOT_FOUND, grpc.StatusCode.NOT_FOUND, "warning"),
        (Reason.KEYS_NOT_STORED, grpc.StatusCode.DATA_LOSS, "error"),
        (Reason.WORKER_FAILED, grpc.StatusCode.INTERNAL, "error"),
    ],
)
def test_an_error_with_a_reason_becomes_its_status_and_a_line(
    server: Server, kind: str, reason: Reason, code: grpc.StatusCode, level: str
) -> None:
    def behaviour(request: bytes, _: grpc.ServicerContext) -> bytes:
        note(vm="vms/a")
        raise SkeydError(reason, "what was wrong", {"gfn": "0x10"})

    server.behaviour = behaviour
    with pytest.raises(grpc.RpcError) as caught:
        server.finish(kind)
    found = refusal(caught.value)
    assert (found.code, found.message, found.reason) == (code, "what was wrong", reason.name)
    assert found.metadata == {"gfn": "0x10"}
    line = server.log.one()
    assert (line["level"], line["code"], line["reason"]) == (level, code.name, reason.name)
    assert (line["error"], line["vm"], line["metadata"]) == ("what was wrong", "vms/a", {"gfn": "0x10"})
    assert "exc_info" not in line


@pytest.mark.parametrize("error", [RuntimeError(PRIVATE), KeyError(PRIVATE), OSError(5, PRIVATE), Exception(PRIVATE)])
def test_an_unknown_error_is_internal_and_only_the_log_knows_it(
    server: Server, kind: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def behaviour(request: bytes, _: grpc.ServicerContext) -> bytes:
        raise error

    server.behaviour = behaviour
    with pytest.raises(grpc.RpcError) as caught:
        server.finish(kind)
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert PRIVATE not in str(caught.value)
    assert not [item for item in caught.value.trailing_metadata() if PRIVATE in str(item)]
    line = server.log.one()
    assert (line["level"], line["code"]) == ("error", "INTERNAL")
    assert line["exc_info"] is error
    assert not caplog.records, "grpc has nothing to add"


def test_a_bare_exception_of_nobodys_is_internal_too(server: Server) -> None:
    # grpc's abort raises a bare Exception; one that comes from elsewhere must not pass for it.
    def behaviour(request: bytes, _: grpc.ServicerContext) -> bytes:
        raise Exception

    server.behaviour = behaviour
    with pytest.raises(grpc.RpcError) as caught:
        server.finish("unary_unary")
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert server.log.one()["level"] == "error"


def test_a_status_that_a_handler_ends_its_call_with_stays(server: Server, kind: str) -> None:
    def behaviour(request: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")

    server.behaviour = behaviour
    with pytest.raises(grpc.RpcError) as caught:
        server.finish(kind)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAUTHENTICATED, "who are you?")
    line = server.log.one()
    assert (line["level"], line["code"]) == ("warning", "UNAUTHENTICATED")


class Patient:
    """A behaviour that waits until its client has gone."""

    def __init__(self, then: Exception | None = None) -> None:
        self.begun = threading.Event()
        self._then = then

    def __call__(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """Wait, then fail as told or answer."""
        gone = threading.Event()
        if not context.add_callback(gone.set):
            gone.set()
        self.begun.set()
        assert gone.wait(SECONDS)
        if self._then is not None:
            raise self._then
        return request


def test_a_stream_that_its_client_cancels_is_logged_as_cancelled(server: Server) -> None:
    server.behaviour = behaviour = Patient()
    responses = server.call("unary_stream")
    assert next(responses) == b"first"
    assert behaviour.begun.wait(SECONDS)
    responses.cancel()
    line = server.log.one()
    assert (line["level"], line["code"]) == ("info", "CANCELLED")
    assert inspect.isgenerator(server.responses)
    assert inspect.getgeneratorstate(server.responses) == inspect.GEN_CLOSED


@pytest.mark.parametrize(
    ("error", "code", "level"),
    [
        (SkeydError(Reason.WORKER_LOST, "too late"), "UNAVAILABLE", "warning"),
        (RuntimeError("what grpc's iterators raise when they are cut"), "CANCELLED", "info"),
    ],
    ids=["with-a-reason", "unknown"],
)
def test_an_error_after_the_client_has_gone_is_told_to_nobody(
    server: Server, error: Exception, code: str, level: str
) -> None:
    server.behaviour = behaviour = Patient(error)
    responses = server.call("unary_stream")
    assert next(responses) == b"first"
    assert behaviour.begun.wait(SECONDS)
    responses.cancel()
    line = server.log.one()
    assert (line["level"], line["code"]) == (level, code)


def test_a_method_that_there_is_not_is_unimplemented_and_leaves_a_line(server: Server) -> None:
    nothing: grpc.UnaryUnaryMultiCallable[bytes, bytes] = server.channel.unary_unary("/test/Nothing")
    with pytest.raises(grpc.RpcError) as caught:
        nothing(b"", timeout=SECONDS)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    line = server.log.one()
    assert (line["method"], line["code"]) == ("/test/Nothing", "UNIMPLEMENTED")


def test_a_note_outside_of_any_call_is_for_nobody() -> None:
    note(vm="vms/a")


class Serializing(Server):
    """Its methods have a parser and a writer, as those of generated services do."""

    def __init__(self, socket: Path) -> None:
        super().__init__(socket)
        self.channel.close()
        self._server.stop(None).wait()
        parsers = {"/test/stream_stream": lambda message: message + b" and parsed by another"}
        self._server = grpc.server(
            ThreadPoolExecutor(4), interceptors=[CallInterceptor(self.log.logger, parsers=parsers)]
        )
        handlers = {}
        for kind in KINDS:
            make = getattr(grpc, f"{kind}_rpc_method_handler")
            handlers[kind] = make(
                self._stream if kind.endswith("_stream") else self._unary,
                request_deserializer=lambda message: message + b" and parsed",
                response_serializer=lambda response: b"written: " + response.encode(),
            )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
        self._server.add_insecure_port(f"unix:{socket}2")
        self._server.start()
        self.channel = grpc.insecure_channel(f"unix:{socket}2")


@pytest.fixture
def serializing(tmp_path: Path) -> Iterator[Serializing]:
    """Serve."""
    made = Serializing(tmp_path / "s")
    yield made
    made.close()


def test_bytes_that_a_handler_gives_are_on_the_wire_as_they_are(serializing: Serializing, kind: str) -> None:
    serializing.behaviour = lambda _request, _context: b"ready bytes"
    assert serializing.finish(kind)[-1] == b"ready bytes"


def test_what_a_handler_gives_is_written_and_what_comes_is_parsed_by_whoever_is_to(
    serializing: Serializing, kind: str
) -> None:
    serializing.behaviour = lambda request, _context: request.decode()
    parser = b" by another" if kind == "stream_stream" else b""
    assert serializing.finish(kind)[-1] == b"written: asked and parsed" + parser


def test_a_request_that_is_far_too_large_is_never_parsed(serializing: Serializing, kind: str) -> None:
    most = b"a" * limits.MAX_REQUEST_BYTES
    assert serializing.finish(kind, most)
    if kind == "stream_stream":
        assert serializing.finish(kind, most + b"a"), "it has a parser of its own"
        return
    found = refused(lambda: serializing.finish(kind, most + b"a"))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
    assert str(limits.MAX_REQUEST_BYTES) in found.message


def test_a_handler_that_says_that_its_client_is_gone_is_believed(server: Server, kind: str) -> None:
    def behaviour(_: bytes, context: grpc.ServicerContext) -> bytes:
        context.cancel()
        raise Cancelled

    server.behaviour = behaviour
    with pytest.raises(grpc.RpcError):
        server.finish(kind)
    line = server.log.one()
    assert (line["level"], line["code"]) == ("info", "CANCELLED")


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream"])
def test_a_call_without_a_request_is_an_error_that_says_so(server: Server, kind: str) -> None:
    call: Any = getattr(server.channel, kind.replace("unary_", "stream_", 1))(f"/test/{kind}")
    found = refused(lambda: list(call(iter(()), timeout=SECONDS)) if kind.endswith("_stream") else call(iter(())))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
    assert "without its request" in found.message


class Ending:
    """A call whose messages have ended because it has, of which grpc tells a moment later, or has told."""

    def __init__(self, *, told: bool) -> None:
        self._told = told

    def is_active(self) -> bool:
        return not self._told

    def peer(self) -> str:
        return "unix:"

    def add_callback(self, callback: Callable[[], None]) -> bool:
        if not self._told:
            self._told = True
            threading.Thread(target=callback).start()
            return True
        return False


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("make", [grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler])
def test_a_call_that_ended_before_its_request_came_is_no_clients_fault(make: Any, told: bool) -> None:
    log = Log()
    wrapped: Any = CallInterceptor(log.logger).intercept_service(lambda _: make(_never), _Details())
    behaviour = wrapped.stream_unary or wrapped.stream_stream
    response = behaviour(iter(()), Ending(told=told))
    assert not list(response)
    assert log.one()["code"] == "CANCELLED"


def _never(*_: Any) -> Any:
    raise AssertionError("nothing came that could be handled")


class _Details:
    method = "/test/ended"
    invocation_metadata: Any = ()


class Endless(Server):
    """Its streams never end."""

    def _responses(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        while True:
            yield bytes(1 << 20)


def test_a_reader_that_takes_nothing_is_cut_off_and_keeps_nobody_waiting_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "IDLE_SECONDS", 0.5)
    server = Endless(tmp_path / "s")
    try:
        stalled = server.call("unary_stream")
        assert len(next(stalled)) == 1 << 20
        assert server.finish("unary_unary") == [b"asked"]
        line = server.log.of("unary_stream")
        assert (line["code"], line["stalled"]) == ("CANCELLED", True)
        assert line["ms"] >= 500
        with pytest.raises(grpc.RpcError) as caught:
            list(stalled)
        assert caught.value.code() == grpc.StatusCode.CANCELLED
    finally:
        server.close()


def test_a_reader_that_is_slow_but_takes_what_comes_is_not_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "IDLE_SECONDS", 0.5)
    server = Endless(tmp_path / "s")
    try:
        taken = server.call("unary_stream")
        ends = time.monotonic() + 1.0
        while time.monotonic() < ends:
            assert len(next(taken)) == 1 << 20
        taken.cancel()
        assert "stalled" not in server.log.one()
    finally:
        server.close()
