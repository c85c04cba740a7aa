"""KeyWritings over a fake session, in few words."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from skeyd.errors import SkeydError
from skeyd.gfn import GfnRange, Ranges
from skeyd.vms.session import Session
from skeyd.vms.writing import KeyWriting, Progress, WriteOptions
from skeyd.worker.outcomes import LastWrite

MEMORY = (0x100, 0x100)


def new(session: Session, *ranges: tuple[int, int], allow_enable: bool = True, **options: Any) -> KeyWriting:
    """Make one, which has not begun."""
    return KeyWriting(
        session, Ranges(GfnRange(*one) for one in ranges), WriteOptions(allow_enable=allow_enable, **options)
    )


def begin(session: Session, *ranges: tuple[int, int], allow_enable: bool = True, **options: Any) -> KeyWriting:
    """Begin one."""
    begun = new(session, *ranges, allow_enable=allow_enable, **options)
    assert begun.begin()
    return begun


def write_chunk(writing_: KeyWriting, start: int, keys: bytes) -> Progress:
    """Set the keys of one chunk."""
    return writing_.chunk(GfnRange(start, len(keys)), keys, zlib.crc32(keys))


def refusal_of(writing_: KeyWriting, frames: GfnRange, keys: bytes, crc32: int | None = None) -> SkeydError:
    """Have a chunk refused, which must leave the progress as it was."""
    before = writing_.progress
    error = error_of(writing_, lambda: writing_.chunk(frames, keys, zlib.crc32(keys) if crc32 is None else crc32))
    assert writing_.progress == before
    return error


def error_of(writing_: KeyWriting, step: Callable[[], object]) -> SkeydError:
    """Do what fails, and return the error as the client is told it."""
    with pytest.raises(SkeydError) as refused, writing_.told():
        step()
    return refused.value


def kept_write(keys: bytes, **changes: Any) -> LastWrite:
    """Make what a worker says of a call that had set these keys."""
    return replace(LastWrite("kept", "", len(keys), zlib.crc32(keys), False, 0), **changes)
