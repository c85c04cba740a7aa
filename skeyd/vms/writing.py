"""From chunks to a guest's keys: what SetSkeys takes, checked whole before the kernel sees any of it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from skeyd.errors import Reason, SkeydError, reserved_bit
from skeyd.gfn import GfnRange, Ranges
from skeyd.storage_key import first_reserved
from skeyd.vms.reading import pieces
from skeyd.vms.session import Session
from skeyd.worker.protocol import SLICE_KEYS


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it has come."""

    next_gfn: int
    """The frame that the next chunk must begin with; after the last one the end of the last range."""
    keys_set: int
    keys_repaired: int
    enabled: bool
    """This call made the guest use storage keys."""


class KeyWriting:
    """One SetSkeys: ranges known beforehand, filled by chunks in order.

    Every SkeydError from here carries in its metadata how far it had come: "next_gfn" and "keys_set"; what lies before
    next_gfn is set and verified. "uncertain" is the slice that the kernel stopped in the middle of, if it did.
    """

    def __init__(self, session: Session, ranges: Ranges, allow_enable: bool) -> None:
        for wanted in ranges:
            session.memory_map.require_mapped(wanted)
        if not allow_enable and not session.uses_keys():
            raise SkeydError(
                Reason.SKEYS_NOT_ENABLED,
                f"the guest of vms/{session.hello.vm_id} uses no storage keys; setting one enables them for good, "
                "which the request must allow",
            )
        self._session = session
        self._ranges = ranges
        self._allow_enable = allow_enable
        self._range = 0
        self.progress = Progress(ranges[0].start, 0, 0, False)

    def chunk(self, frames: GfnRange, keys: bytes, crc32: int) -> Progress:
        """Set the keys of one chunk and verify them."""
        with self.telling():
            self._check(frames, keys, crc32)
            at = 0
            for piece in pieces(frames, SLICE_KEYS):
                with memoryview(keys) as view:
                    part = view[at : at + piece.count]
                    repaired, enabled = self._session.write_slice(piece, part, self._allow_enable)
                at += piece.count
                self._advance(piece, repaired, enabled)
            return self.progress

    def commit(self) -> Progress:
        """Take note that nothing more comes. STREAM_INCOMPLETE where something is missing."""
        with self.telling():
            if self._range < len(self._ranges):
                self._incomplete("Commit came before the keys of all ranges")
            return self.progress

    def cut(self) -> None:
        """Take note that the stream ended without Commit: STREAM_INCOMPLETE."""
        with self.telling():
            self._incomplete("the stream ended without Commit")

    def _check(self, frames: GfnRange, keys: bytes, crc32: int) -> None:
        if len(keys) != frames.count:
            raise SkeydError(
                Reason.CHUNK_SIZE_MISMATCH,
                f"the chunk at gfn {frames.start:#x} has {len(keys)} keys and a count of {frames.count}",
                {"gfn": hex(frames.start)},
            )
        if zlib.crc32(keys) != crc32:
            raise SkeydError(
                Reason.CHUNK_CHECKSUM_MISMATCH,
                f"the keys of the chunk at gfn {frames.start:#x} have CRC-32 {zlib.crc32(keys):#010x}, "
                f"not {crc32:#010x}",
                {"gfn": hex(frames.start)},
            )
        if self._range == len(self._ranges):
            raise SkeydError(
                Reason.CHUNK_OUT_OF_ORDER,
                f"a chunk at gfn {frames.start:#x} after all ranges were covered",
                {"gfn": hex(frames.start)},
            )
        if frames.start != self.progress.next_gfn:
            raise SkeydError(
                Reason.CHUNK_OUT_OF_ORDER,
                f"the next chunk begins at gfn {self.progress.next_gfn:#x}, not {frames.start:#x}",
                {"gfn": hex(frames.start)},
            )
        if frames.end > self._ranges[self._range].end:
            raise SkeydError(
                Reason.CHUNK_OUT_OF_ORDER,
                f"the chunk {frames} reaches beyond its range {self._ranges[self._range]}",
                {"gfn": hex(self._ranges[self._range].end)},
            )
        bad = first_reserved(keys)
        if bad is not None:
            raise reserved_bit(keys[bad], frames.start + bad)

    def _advance(self, piece: GfnRange, repaired: int, enabled: bool) -> None:
        next_gfn = piece.end
        if next_gfn == self._ranges[self._range].end:
            self._range += 1
            if self._range < len(self._ranges):
                next_gfn = self._ranges[self._range].start
        before = self.progress
        self.progress = Progress(
            next_gfn,
            before.keys_set + piece.count,
            before.keys_repaired + repaired,
            before.enabled or enabled,
        )

    def _incomplete(self, what: str) -> None:
        missing = self._ranges.frames() - self.progress.keys_set
        raise SkeydError(
            Reason.STREAM_INCOMPLETE,
            f"{what}: {self.progress.keys_set} keys are set, {missing} are missing from "
            f"gfn {self.progress.next_gfn:#x} on",
        )

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Have every SkeydError from within say how far it had come."""
        try:
            yield
        except SkeydError as error:
            error.metadata["next_gfn"] = hex(self.progress.next_gfn)
            error.metadata["keys_set"] = str(self.progress.keys_set)
            if self.progress.enabled:
                error.metadata["enabled"] = "true"
            raise
