"""Errors of the daemon as exceptions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import grpc

from skeyd import standard
from skeyd.limits import IDLE_SECONDS

_DETAILS_KEY: Final = "grpc-status-details-bin"
_Status = standard.message("google.rpc.Status")
_ErrorInfo = standard.message("google.rpc.ErrorInfo")


class ClientError(Exception):
    """A call failed. `reason` is one of skeyd.errors.Reason by name, or empty where the error is not skeyd's own."""

    def __init__(self, code: grpc.StatusCode, message: str, reason: str, metadata: dict[str, str]) -> None:
        self.code = code
        self.message = message
        self.reason = reason
        self.metadata = metadata
        super().__init__(f"{reason or code.name}: {message}")


class StreamError(Exception):
    """What a stream carried does not fit together: keys are not those that the daemon sent, or some are missing."""


class OtherKeysError(StreamError):
    """A request_id was applied before with other keys. Those are what the guest has; of this call's none was set."""


@contextmanager
def translated() -> Iterator[None]:
    """Turn gRPC's errors into ClientErrors."""
    try:
        yield
    except grpc.RpcError as error:
        raise client_error(error) from error


def client_error(error: grpc.RpcError) -> ClientError:
    """Take an error apart: status, and ErrorInfo where the daemon sent one."""
    # Every RpcError that a call raises is the call itself.
    call: grpc.Call = error  # type: ignore[assignment]
    code, message = call.code(), call.details() or ""
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            try:
                for detail in _Status.FromString(value).details:
                    info = _ErrorInfo()
                    if detail.Unpack(info):
                        return ClientError(code, message, info.reason, dict(info.metadata))
            except Exception:  # noqa: S112  DecodeError differs between protobuf's implementations
                continue
    if code is grpc.StatusCode.CANCELLED:
        # Not by this client, which doesn't look at calls that it cancelled itself.
        message = f"the daemon cut the call; it waits for its client for {IDLE_SECONDS:g} s at most ({message})"
    return ClientError(code, message, "", {})
