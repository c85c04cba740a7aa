"""Clients of gRPC's standard services, health and reflection, made from skeyd.standard's descriptors alone."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import grpc

from skeyd import standard
from tests.rpc.stubs import SECONDS

_HEALTH = "grpc.health.v1"
_Request = standard.message(f"{_HEALTH}.HealthCheckRequest")
_Response = standard.message(f"{_HEALTH}.HealthCheckResponse")

NOT_SERVING = _Response.NOT_SERVING
SERVING = _Response.SERVING
SERVICE_UNKNOWN = _Response.SERVICE_UNKNOWN


def check(channel: grpc.Channel, service: str = "", seconds: float = SECONDS) -> int:
    """Ask once."""
    call: grpc.UnaryUnaryMultiCallable[Any, Any] = channel.unary_unary(
        f"/{_HEALTH}.Health/Check", _Request.SerializeToString, _Response.FromString
    )
    return int(call(_Request(service=service), timeout=seconds).status)


def watch(channel: grpc.Channel, service: str = "") -> Any:
    """Begin to watch; iterating gives responses."""
    call: grpc.UnaryStreamMultiCallable[Any, Any] = channel.unary_stream(
        f"/{_HEALTH}.Health/Watch", _Request.SerializeToString, _Response.FromString
    )
    return call(_Request(service=service), timeout=SECONDS)


class Reflection:
    """A stream to one version of the reflection service, question by question."""

    def __init__(self, channel: grpc.Channel, version: str) -> None:
        package = f"grpc.reflection.{version}"
        self.request = standard.message(f"{package}.ServerReflectionRequest")
        """The class of its requests."""
        call: grpc.StreamStreamMultiCallable[Any, Any] = channel.stream_stream(
            f"/{package}.ServerReflection/ServerReflectionInfo",
            self.request.SerializeToString,
            standard.message(f"{package}.ServerReflectionResponse").FromString,
        )
        self._questions: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.answers: Any = call(self._asked(), timeout=SECONDS)

    def ask(self, **question: Any) -> Any:
        """Ask and take the answer."""
        self._questions.put(self.request(**question))
        return next(self.answers)

    def close(self) -> None:
        """Close the asking half and wait for the end of the answers."""
        self._questions.put(None)
        assert list(self.answers) == []

    def cancel(self) -> None:
        """Hang up."""
        self.answers.cancel()
        self._questions.put(None)

    def _asked(self) -> Iterator[Any]:
        while (question := self._questions.get()) is not None:
            yield question
