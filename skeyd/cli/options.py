"""What several commands take and how they show it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from skeyd.client import KeysDigest, SetOptions
from skeyd.errors import SkeydError
from skeyd.gfn import GfnRange
from skeyd.storage_key import GFN_LIMIT, StorageKey

_F = TypeVar("_F", bound=Callable[..., Any])

# No leading zeros: 010 is ten to some and eight to others.
_DIGITS: Final = r"0x[0-9a-f]+|0|[1-9][0-9]*"
_NUMBER: Final = re.compile(_DIGITS, re.IGNORECASE | re.ASCII)
_SIZE: Final = re.compile(rf"({_DIGITS})([kmgt]?)", re.IGNORECASE | re.ASCII)
_UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class _Sha256(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since click 8.2
    name = "sha256"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """Read 64 hexadecimal digits."""
        if isinstance(value, bytes):
            return value
        if not re.fullmatch(r"[0-9a-f]{64}", value, re.IGNORECASE | re.ASCII):
            self.fail(f"{value!r} is no SHA-256 in 64 hexadecimal digits", param, ctx)
        return bytes.fromhex(value)


def json_option(function: _F) -> _F:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON value.")(function)


def allow_enable_option(function: _F) -> _F:
    """Add --allow-enable."""
    return click.option(
        "--allow-enable", is_flag=True, help="Make a guest use storage keys that doesn't. It can't be undone."
    )(function)


def set_options(function: _F) -> _F:
    """Add the options that say how keys are set; the function gets them as one SetOptions, `how`."""

    @functools.wraps(function)
    def with_how(
        *arguments: Any,
        allow_enable: bool,
        keep: bool,
        validate_only: bool,
        request_id: str,
        resume: bool,
        incarnation: str,
        expected_digest: bytes | None,
        resulting_digest: bytes | None,
        digests_with_referenced_changed: bool,
        **others: Any,
    ) -> Any:
        if resume and not request_id:
            raise click.UsageError("--resume goes on with a --request-id")
        how = SetOptions(
            allow_enable=allow_enable,
            keep=keep or resume,
            validate_only=validate_only,
            request_id=request_id,
            resume=resume,
            incarnation=incarnation,
            expected=_digest(expected_digest, digests_with_referenced_changed),
            resulting=_digest(resulting_digest, digests_with_referenced_changed),
        )
        return function(*arguments, how=how, **others)

    wrapped: Any = with_how
    for option in reversed(
        (
            click.option("--keep", is_flag=True, help="What was set stays when it is cut; else it is rolled back."),
            click.option("--validate-only", is_flag=True, help="Check everything and change nothing."),
            click.option(
                "--request-id",
                default="",
                metavar="ID",
                help="A name for this request, as a UUID: sent again it is not applied again.",
            ),
            click.option(
                "--resume",
                is_flag=True,
                help="Go on with the request of this ID that was cut and kept. Implies --keep.",
            ),
            click.option(
                "--incarnation",
                default="",
                metavar="HEX",
                help="The VM that is meant, as `vm show` has it: no other that has its name by now.",
            ),
            click.option(
                "--expected-digest",
                type=_Sha256(),
                help="What `keys digest` must say of these ranges before anything is set.",
            ),
            click.option(
                "--resulting-digest",
                type=_Sha256(),
                help="What it must say afterwards, or all is rolled back. Not with --keep.",
            ),
            click.option("--digests-with-referenced-changed", is_flag=True, help="These digests cover both bits, too."),
        )
    ):
        wrapped = option(wrapped)
    done: _F = allow_enable_option(wrapped)
    return done


def _digest(sha256: bytes | None, with_referenced_changed: bool) -> KeysDigest | None:
    return None if sha256 is None else KeysDigest(sha256, with_referenced_changed)


def with_referenced_changed_option(function: _F) -> _F:
    """Add --with-referenced-changed."""
    return click.option(
        "--with-referenced-changed",
        is_flag=True,
        help="Cover the referenced and changed bits too, which change as a guest runs.",
    )(function)


def key_options(function: _F) -> _F:
    """Add the options that say which key to set; `key_of` takes them."""
    for option in reversed(
        (
            click.option("--key", metavar="BYTE", help="The whole key, as 0x38; instead of the four options below."),
            click.option("--acc", type=click.IntRange(0, 15), help="Access-control bits, 0 to 15."),
            click.option("--fetch", is_flag=True, help="Fetch protection."),
            click.option("--referenced", is_flag=True, help="Referenced."),
            click.option("--changed", is_flag=True, help="Changed."),
        )
    ):
        function = option(function)
    return function


def key_of(key: str | None, acc: int | None, fetch: bool, referenced: bool, changed: bool) -> int:
    """Return the key that `key_options` say. click's UsageError."""
    if (key is None) == (acc is None) or (key is not None and (fetch or referenced or changed)):
        raise click.UsageError("say either --key, or --acc with --fetch, --referenced and --changed as needed")
    if key is None:
        return StorageKey(acc or 0, fetch, referenced, changed).to_byte()
    try:
        return StorageKey.from_byte(number_of(key)).to_byte()
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--key") from error


KEY_HEADS: Final = f"{'KEY':<5} {'ACC':>3}  F  R  C"
"""Above `key_columns`."""


def key_columns(key: int) -> str:
    """Show a key as a byte and taken apart."""
    parts = StorageKey.from_byte(key)
    bits = "  ".join(str(int(bit)) for bit in (parts.fetch_protection, parts.referenced, parts.changed))
    return f"{key:#04x}  {parts.access_control:>3}  {bits}"


def show_json(value: object) -> None:
    """Print a value for programs."""
    click.echo(json.dumps(value, indent=2))


def show_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows for people: left-justified columns, as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def vm_name(vm: str) -> str:
    """Take a VM as people write it: its id, or its whole name. UnicodeEncodeError."""
    return require_utf8(vm if "/" in vm else f"vms/{vm}")


def require_utf8(text: str) -> str:
    """Return the text. UnicodeEncodeError where it is none; protobuf's implementations raise different things."""
    text.encode()
    return text


def number_of(text: str) -> int:
    """Read a number as it is written everywhere here: decimal or 0x…, and nothing else that int() takes. ValueError."""
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text!r} is no number; write 256 or 0x100")
    return int(text, 0)


def size_of(text: str) -> int:
    """Read a number of bytes: 4096, 0x1000, 256M, 1G. ValueError."""
    found = _SIZE.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is no size; write 4096, 0x1000, 256M or 1G")
    return int(found[1], 0) * _UNITS[found[2].lower()]


if TYPE_CHECKING:
    _GfnRangeParam = click.ParamType[GfnRange]
else:
    _GfnRangeParam = click.ParamType  # generic since click 8.2 only


class RangeType(_GfnRangeParam):
    """Guest frames as people write them: FIRST-LAST or FIRST+COUNT or one gfn; decimal or 0x…."""

    name = "range"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> GfnRange:
        """Read one. The last frame of FIRST-LAST is part of the range."""
        if isinstance(value, GfnRange):
            return value
        try:
            if "+" in value:
                first, _, count = value.partition("+")
                frames = GfnRange(number_of(first), number_of(count))
            else:
                first, dash, last = value.partition("-")
                start = number_of(first)
                end = number_of(last) if dash else start
                if end < start:
                    self.fail(f"{value!r} ends before it begins", param, ctx)
                frames = GfnRange(start, end - start + 1)
        except ValueError:
            self.fail(f"{value!r} is no range of frames; write 0x100-0x1ff, 0x100+256 or 0x100", param, ctx)
        except SkeydError as error:
            self.fail(error.message, param, ctx)
        if frames.count == GFN_LIMIT:
            # All gfns that there are: the request's field is a u64.
            self.fail(f"{value!r} is one frame more than can be asked for", param, ctx)
        return frames


RANGE: Final = RangeType()


if TYPE_CHECKING:
    _GfnParam = click.ParamType[int]
else:
    _GfnParam = click.ParamType


class GfnType(_GfnParam):
    """One guest frame: decimal or 0x…."""

    name = "gfn"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it."""
        if isinstance(value, int):
            return value
        try:
            gfn = number_of(value)
        except ValueError:
            self.fail(f"{value!r} is no frame; write 256 or 0x100", param, ctx)
        if gfn >= GFN_LIMIT:
            self.fail(f"{value!r} is beyond 2^64", param, ctx)
        return gfn


GFN: Final = GfnType()
