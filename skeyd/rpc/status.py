"""One table from reasons to gRPC statuses, and the one way in which a call ends with an error."""

from __future__ import annotations

from itertools import islice
from typing import Final, NoReturn

import grpc
from grpc import StatusCode

from skeyd import standard
from skeyd.errors import Reason, SkeydError

DOMAIN: Final = "skeyd"
"""ErrorInfo.domain of every error."""

DETAILS_KEY: Final = "grpc-status-details-bin"
"""Trailing metadata that carries google.rpc.Status."""

STATUS: Final = {
    Reason.REQUEST_INVALID: StatusCode.INVALID_ARGUMENT,
    Reason.VM_ID_INVALID: StatusCode.INVALID_ARGUMENT,
    Reason.RANGE_EMPTY: StatusCode.INVALID_ARGUMENT,
    Reason.RANGE_OVERFLOW: StatusCode.INVALID_ARGUMENT,
    Reason.RANGES_NOT_ASCENDING: StatusCode.INVALID_ARGUMENT,
    Reason.GFN_NOT_MAPPED: StatusCode.OUT_OF_RANGE,
    Reason.MEMORY_INVALID: StatusCode.INVALID_ARGUMENT,
    Reason.MEMORY_FILE_UNUSABLE: StatusCode.FAILED_PRECONDITION,
    Reason.CHUNK_OUT_OF_ORDER: StatusCode.INVALID_ARGUMENT,
    Reason.CHUNK_SIZE_MISMATCH: StatusCode.INVALID_ARGUMENT,
    Reason.CHUNK_CHECKSUM_MISMATCH: StatusCode.DATA_LOSS,
    Reason.ENCODING_UNSUPPORTED: StatusCode.INVALID_ARGUMENT,
    Reason.CHUNK_ENCODING_INVALID: StatusCode.INVALID_ARGUMENT,
    Reason.KEY_RESERVED_BIT: StatusCode.INVALID_ARGUMENT,
    Reason.STREAM_INCOMPLETE: StatusCode.ABORTED,
    Reason.REQUEST_ID_REUSED: StatusCode.INVALID_ARGUMENT,
    Reason.NOTHING_TO_RESUME: StatusCode.FAILED_PRECONDITION,
    Reason.EXPECTED_DIGEST_MISMATCH: StatusCode.FAILED_PRECONDITION,
    Reason.RESULT_DIGEST_MISMATCH: StatusCode.DATA_LOSS,
    Reason.SKEYS_NOT_ENABLED: StatusCode.FAILED_PRECONDITION,
    Reason.KEYS_NOT_STORED: StatusCode.DATA_LOSS,
    Reason.VM_NOT_FOUND: StatusCode.NOT_FOUND,
    Reason.VM_EXISTS: StatusCode.ALREADY_EXISTS,
    Reason.VM_BUSY: StatusCode.ABORTED,
    Reason.VM_REPLACED: StatusCode.ABORTED,
    Reason.VM_DEAD: StatusCode.FAILED_PRECONDITION,
    Reason.VM_QUARANTINED: StatusCode.FAILED_PRECONDITION,
    Reason.WORKER_LOST: StatusCode.UNAVAILABLE,
    Reason.WORKER_FAILED: StatusCode.INTERNAL,
    Reason.ADOPTION_FORBIDDEN: StatusCode.PERMISSION_DENIED,
    Reason.VMM_NOT_FOUND: StatusCode.NOT_FOUND,
    Reason.VMM_NOT_TRACEABLE: StatusCode.FAILED_PRECONDITION,
    Reason.VMM_TRACED: StatusCode.UNAVAILABLE,
    Reason.VMM_SANDBOXED: StatusCode.FAILED_PRECONDITION,
    Reason.VMM_MEMORY_UNKNOWN: StatusCode.FAILED_PRECONDITION,
    Reason.VMM_STUCK: StatusCode.UNAVAILABLE,
    Reason.VMM_UNSUITABLE: StatusCode.FAILED_PRECONDITION,
    Reason.FREEZE_EXPIRED: StatusCode.DEADLINE_EXCEEDED,
    Reason.FREEZE_UNSUPPORTED: StatusCode.UNIMPLEMENTED,
    Reason.QMP_UNREACHABLE: StatusCode.FAILED_PRECONDITION,
    Reason.QMP_BUSY: StatusCode.UNAVAILABLE,
    Reason.QMP_FAILED: StatusCode.FAILED_PRECONDITION,
    Reason.BACKEND_READ_ONLY: StatusCode.UNIMPLEMENTED,
    Reason.KVM_UNAVAILABLE: StatusCode.FAILED_PRECONDITION,
    Reason.CAP_S390_SKEYS_MISSING: StatusCode.UNIMPLEMENTED,
    Reason.CAP_S390_KEYOP_MISSING: StatusCode.UNIMPLEMENTED,
    Reason.PGSTE_UNAVAILABLE: StatusCode.FAILED_PRECONDITION,
    Reason.KERNEL_REFUSED: StatusCode.INTERNAL,
    Reason.OUT_OF_MEMORY: StatusCode.RESOURCE_EXHAUSTED,
    Reason.HOST_EXHAUSTED: StatusCode.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_VMS: StatusCode.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_STREAMS: StatusCode.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_CALLS: StatusCode.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_CALLS_ON_VM: StatusCode.RESOURCE_EXHAUSTED,
}

RETRY_SECONDS: Final = {
    Reason.VM_BUSY: 1,
    Reason.WORKER_LOST: 1,
    Reason.VMM_TRACED: 1,
    Reason.VMM_STUCK: 1,
    Reason.QMP_BUSY: 1,
    Reason.TOO_MANY_STREAMS: 1,
    Reason.TOO_MANY_CALLS: 1,
    Reason.TOO_MANY_CALLS_ON_VM: 1,
    Reason.HOST_EXHAUSTED: 5,
}
"""Reasons that pass by themselves: they carry RetryInfo."""

# Bytes. A peer refuses more than 8 KiB of trailers by default; the message is in them twice, once with each byte that
# isn't ASCII written as three, and a value of a path or a kernel can be long.
_MESSAGE_MAX: Final = 768
_METADATA_MAX: Final = 256
_METADATA_ENTRIES: Final = 10

# What documents promise, of what becomes of the keys and of a worker. It is added last, after whatever the worker
# itself had to tell, and is the last to be left out.
_PROMISED: Final = frozenset(
    {"outcome", "dirty", "next_gfn", "keys_set", "crc32", "uncertain", "enabled", "worker_log"}
)

_Status = standard.message("google.rpc.Status")
_ErrorInfo = standard.message("google.rpc.ErrorInfo")
_RetryInfo = standard.message("google.rpc.RetryInfo")


def abort(context: grpc.ServicerContext, error: SkeydError) -> NoReturn:
    """End a call with the error's status and details."""
    code = STATUS[error.reason]
    context.set_trailing_metadata(((DETAILS_KEY, details(error)),))
    context.abort(code, _cut(error.message, _MESSAGE_MAX))
    raise AssertionError("grpc's abort always raises")


def details(error: SkeydError) -> bytes:
    """Return the google.rpc.Status of an error, serialized."""
    status = _Status(code=STATUS[error.reason].value[0], message=_cut(error.message, _MESSAGE_MAX))
    entries = islice(sorted(error.metadata.items(), key=lambda one: one[0] not in _PROMISED), _METADATA_ENTRIES)
    metadata = {_cut(name, _METADATA_MAX // 4): _cut(value, _METADATA_MAX) for name, value in entries}
    status.details.add().Pack(_ErrorInfo(reason=error.reason.name, domain=DOMAIN, metadata=metadata))
    if error.reason in RETRY_SECONDS:
        retry = _RetryInfo()
        retry.retry_delay.seconds = RETRY_SECONDS[error.reason]
        status.details.add().Pack(retry)
    data: bytes = status.SerializeToString()
    return data


def _cut(text: str, most: int) -> str:
    # "replace": a file's name can have bytes that are no UTF-8, and protobuf raises on them.
    return text.encode("utf-8", "replace")[:most].decode("utf-8", "ignore")
