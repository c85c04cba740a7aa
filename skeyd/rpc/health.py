"""grpc.health.v1.Health: whether the daemon serves."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any, Final

import grpc

from skeyd import standard
from skeyd.rpc.slots import CallSlots

SERVICE: Final = "grpc.health.v1.Health"

_Request = standard.message("grpc.health.v1.HealthCheckRequest")
_Response = standard.message("grpc.health.v1.HealthCheckResponse")


class Health:
    """Serving from `serve` to `drain`, for the daemon ("") and each of its services alike.

    Synchronization: any thread.
    """

    def __init__(self, services: Iterable[str], watches: CallSlots) -> None:
        self._services = frozenset(("", *services))
        self._watches = watches
        self._changed = threading.Condition()
        self._serving = False
        self._ended = False

    def serve(self) -> None:
        """Say SERVING from now on."""
        self._set(True)

    def drain(self) -> None:
        """Say NOT_SERVING from now on, to watchers at once and as the last they hear."""
        with self._changed:
            self._ended = True
        self._set(False)

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what a server needs to serve it."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Check": grpc.unary_unary_rpc_method_handler(
                    self._check, _Request.FromString, _Response.SerializeToString
                ),
                "Watch": grpc.unary_stream_rpc_method_handler(
                    self._watch, _Request.FromString, _Response.SerializeToString
                ),
            },
        )

    def _set(self, serving: bool) -> None:
        with self._changed:
            self._serving = serving
            self._changed.notify_all()

    def _status(self, service: str) -> int:
        if service not in self._services:
            return int(_Response.SERVICE_UNKNOWN)
        return int(_Response.SERVING if self._serving else _Response.NOT_SERVING)

    def _check(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._changed:
            found = self._status(request.service)
        if found == _Response.SERVICE_UNKNOWN:
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:80]!r}")
        return _Response(status=found)

    def _watch(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with self._watches.taken():
            gone = False

            def wake() -> None:
                nonlocal gone
                with self._changed:
                    gone = True
                    self._changed.notify_all()

            if not context.add_callback(wake):
                return
            last: int | None = None
            while True:
                with self._changed:
                    while not gone and not self._ended and self._status(request.service) == last:
                        self._changed.wait()
                    before, last = last, self._status(request.service)
                    if gone or (self._ended and last == before):
                        return  # nothing more comes, and an open watch would hold up the daemon's end
                yield _Response(status=last)
