"""Around every call: its messages are parsed, its errors become statuses, and it leaves one line in the log.

Each method is served to grpcio as one that takes a stream of bytes, whatever it is: the same on the wire, and so this
module and not grpcio's pool waits for the request (with a limit) and parses it (with an error that names it).
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Final

import grpc
import structlog

from skeyd import limits
from skeyd.errors import Reason, SkeydError, exhausted
from skeyd.rpc import status
from skeyd.rpc.lanes import crowding, require_admitted
from skeyd.rpc.messages import bounded
from skeyd.rpc.patience import Patience

_END: Final = object()
_METHOD_MAX: Final = 200
"""Characters of a method's name in the log: an unknown one is the client's choice."""
_END_SECONDS: Final = 1.0
"""For grpc to tell of a call's end after it told of the messages' end, which it was the cause of."""

_notes: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("skeyd_call_notes")


def note(**what: Any) -> None:
    """Add to the running call's line in the log: which VM, how many keys."""
    _notes.get({}).update(what)


class CallInterceptor(grpc.ServerInterceptor):
    """Parses, logs and ends every call. `pool_of` says in which threads a method runs; None: the server's own.

    `parsers` has by method what takes the place of the generated class's parser, which is `bounded`. A handler may give
    ready bytes for a response.

    Synchronization: any thread.
    """

    def __init__(
        self,
        log: structlog.typing.FilteringBoundLogger,
        pool_of: Callable[[str], ThreadPoolExecutor | None] = lambda _: None,
        parsers: Mapping[str, Callable[[bytes], Any]] | None = None,
    ) -> None:
        self._log = log
        self._parsers = parsers or {}
        self._pool_of = pool_of
        self._patience = Patience()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the method's handler, whichever of the four kinds it is, or the lack of one."""
        method = handler_call_details.method
        handler = continuation(handler_call_details)
        # grpcio's types know no handler whose messages are plain bytes.
        make: Any
        if handler is None:
            make, behaviour = grpc.stream_unary_rpc_method_handler, self._unknown(method)
        elif handler.response_streaming:
            make, behaviour = grpc.stream_stream_rpc_method_handler, self._stream(method, handler)
        else:
            make, behaviour = grpc.stream_unary_rpc_method_handler, self._unary(method, handler)
        pool = self._pool_of(method)
        if pool is not None:
            # grpcio has had this attribute since 1.14 and calls it experimental; without it one pool serves all.
            behaviour.experimental_thread_pool = pool
        wrapped: grpc.RpcMethodHandler[Any, Any] = make(behaviour)
        return wrapped

    def _unknown(self, method: str) -> Any:
        def behaviour(_: Iterator[bytes], context: grpc.ServicerContext) -> None:
            code = grpc.StatusCode.UNIMPLEMENTED
            _Call(self._log, method, context, self._patience).end(code.name, "warning")
            context.abort(code, "there is no such method")

        return behaviour

    def _unary(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> Any:
        inner: Any = handler.stream_unary if handler.request_streaming else handler.unary_unary

        def behaviour(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            call = _Call(self._log, method, context, self._patience)
            try:
                require_admitted()
                request = call.request(messages, handler, self._parsers.get(method))
                response: bytes = call.written(call.run(inner, request, context), handler)
            except BaseException as error:
                call.fail(error)
                return b""  # to nobody: the client is gone
            call.end("OK")
            return response

        return behaviour

    def _stream(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> Any:
        inner: Any = handler.stream_stream if handler.request_streaming else handler.unary_stream

        def behaviour(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            call = _Call(self._log, method, context, self._patience)
            try:
                require_admitted()
                request = call.request(messages, handler, self._parsers.get(method))
                responses = call.run(inner, request, context)
                try:
                    while (response := call.run(next, responses, _END)) is not _END:
                        written = call.written(response, handler)
                        with call.patient(limits.IDLE_SECONDS):
                            yield written
                finally:
                    # Here and not when the collector comes by: a stream that is cut lets go of its VM at once.
                    call.run(responses.close)
            except GeneratorExit:
                call.end("CANCELLED")
                raise
            except BaseException as error:
                call.fail(error)
                return  # the client is gone
            call.end("OK")

        return behaviour


class Cancelled(Exception):  # noqa: N818 (says what happened)
    """The client is gone, and with it the reason to go on. For handlers to raise; there is nobody to tell."""


class _GivenUp(Exception):  # noqa: N818 (says what happened)
    pass


class _Call:
    def __init__(
        self,
        log: structlog.typing.FilteringBoundLogger,
        method: str,
        context: grpc.ServicerContext,
        patience: Patience,
    ) -> None:
        self._log = log
        self._method = method[:_METHOD_MAX]
        self._context = context
        self._patience = patience
        self._started = time.monotonic()
        self._notes: dict[str, Any] = {}
        # A context of its own, entered for each step: grpc promises no thread to a stream.
        self._variables = contextvars.copy_context()
        self._variables.run(_notes.set, self._notes)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._variables.run(function, *arguments)

    def patient(self, seconds: float) -> AbstractContextManager[None]:
        """Wait for the client in the body, but not for longer."""
        return self._patience.limit(seconds, self._give_up)

    def _patient_of_request(self) -> AbstractContextManager[None]:
        wait, sooner = limits.REQUEST_SECONDS, limits.CROWDED_REQUEST_SECONDS
        return self._patience.limit(wait, self._give_up, sooner, crowding())

    def request(
        self, messages: Iterator[bytes], handler: grpc.RpcMethodHandler[Any, Any], parser: Callable[[bytes], Any] | None
    ) -> Any:
        """Return the one request, or the stream of them."""
        requests = self._parsed(messages, parser or bounded(handler.request_deserializer or bytes))
        if handler.request_streaming:
            return requests
        request = next(requests, None)
        if request is None:
            raise SkeydError(Reason.REQUEST_INVALID, "the call ended without its request")
        return request

    def written(self, response: Any, handler: grpc.RpcMethodHandler[Any, Any]) -> Any:
        if isinstance(response, bytes) or handler.response_serializer is None:
            return response
        return handler.response_serializer(response)

    def end(self, code: str, level: str = "info", **more: Any) -> None:
        took = round((time.monotonic() - self._started) * 1000, 3)
        line = {"code": code, "peer": self._context.peer(), "ms": took, **self._notes, **more}
        getattr(self._log, level)("rpc", method=self._method, **line)

    def fail(self, error: BaseException) -> None:
        """Log the error and, if there is still somebody to tell, end the call with its status. Returns if not."""
        if isinstance(error, OSError):
            error = exhausted(error) or error
        if isinstance(error, SkeydError):
            code = status.STATUS[error.reason].name
            level = "error" if code in ("INTERNAL", "DATA_LOSS") else "warning"
            more = {"metadata": error.metadata} if error.metadata else {}
            self.end(code, level, reason=error.reason.name, error=error.message, **more)
            if self._context.is_active():
                status.abort(self._context, error)
        elif isinstance(error, (_GivenUp, Cancelled)) or not self._context.is_active():
            self.end("CANCELLED")
        elif type(error) is Exception and not error.args and (own := _aborted_with(self._context)):
            # What context.abort raises: a status that one of gRPC's own services prescribes.
            self.end(own.name, "warning")
            raise error
        else:
            self.end("INTERNAL", "error", exc_info=error)
            self._context.abort(grpc.StatusCode.INTERNAL, "skeyd failed; its log says how")

    def _parsed(self, messages: Iterator[bytes], parser: Callable[[bytes], Any]) -> Iterator[Any]:
        # The first message comes with the call itself, or its sender is up to something.
        came = False
        while True:
            with self.patient(limits.IDLE_SECONDS) if came else self._patient_of_request():
                message = next(messages, None)
            if message is None:
                if "stalled" in self._notes:
                    # grpc may tell of the messages' end before it tells of the cancellation that was its cause.
                    raise _GivenUp
                if not came:
                    self._require_client()
                return
            came = True
            try:
                request = parser(message)
            except SkeydError:
                raise
            except Exception:  # DecodeError differs between protobuf's implementations
                what = f"a message of {len(message)} bytes is none that {self._method} takes"
                raise SkeydError(Reason.REQUEST_INVALID, what) from None
            yield request

    def _require_client(self) -> None:
        # Nothing came at all. Is that what a faulty client sent, or has the call ended, of which grpc tells afterwards?
        ended = threading.Event()
        if not self._context.add_callback(ended.set) or ended.wait(_END_SECONDS):
            raise Cancelled

    def _give_up(self) -> None:
        self._notes["stalled"] = True
        self._context.cancel()


def _aborted_with(context: grpc.ServicerContext) -> grpc.StatusCode | None:
    code: grpc.StatusCode | None = context.code()  # type: ignore[attr-defined]  # grpcio has it since 1.40
    return code
