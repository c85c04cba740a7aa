"""The key of one frame: what the daemon's answers come to."""

from __future__ import annotations

from dataclasses import dataclass

from skeyd.client.errors import StreamError
from skeyd.storage_key import StorageKey
from skeyd.v1 import storage_key_service_pb2 as pb


@dataclass(frozen=True, slots=True)
class OneKey:
    """The key of one frame."""

    key: int | None
    """None: the guest uses no storage keys."""
    call: str
    """The kernel's call that read it, or found that there is none: "keyop" or "skeys", the latter for all None."""


@dataclass(frozen=True, slots=True)
class OneKeySet:
    """What setting the key of one frame came to."""

    old_key: int | None
    """None: the guest used no storage keys."""
    repaired: bool
    """The kernel had lost it at first."""
    enabled: bool
    """The guest uses storage keys since this call."""
    call: str
    """As in OneKey. Only with "keyop" were the old key read and the new one set in one step."""


def one_key(response: pb.GetSkeyResponse) -> OneKey:
    """Take the answer of GetSkey. StreamError for a key that is none."""
    key = response.key if response.HasField("key") else None
    return OneKey(_checked(key), _call_name(response.call))


def one_key_set(response: pb.SetSkeyResponse) -> OneKeySet:
    """Take the answer of SetSkey. StreamError for a key that is none."""
    old = response.old_key if response.HasField("old_key") else None
    return OneKeySet(_checked(old), response.repaired, response.enabled, _call_name(response.call))


def _checked(key: int | None) -> int | None:
    if key is not None:
        try:
            StorageKey.from_byte(key)
        except ValueError as error:
            raise StreamError(f"the daemon tells of an impossible key: {error}") from None
    return key


def _call_name(call: pb.KeyCall.ValueType) -> str:
    return {pb.KEY_CALL_KEYOP: "keyop", pb.KEY_CALL_SKEYS: "skeys"}.get(call, "")
