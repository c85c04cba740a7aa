"""The text that QEMU's dump-skeys writes, taken apart as it comes, and the keys that were in it.

A line a page (hw/s390x/s390-skeys.c, write_keys, the same from QEMU 2.5 to 10.0):
    page=f0d: key(56) => ACC=3, FP=8, REF=0, ch=0, reserved=0
"""

from __future__ import annotations

import re
import zlib
from bisect import bisect_right
from typing import Final

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, MemoryMap
from skeyd.storage_key import RESERVED

LINE_MAX: Final = 96
"""Bytes; the longest that can be has 75."""

BLOCK_KEYS: Final = 65_536
"""Keys that are packed together."""

RUNS_MAX: Final = 4096
"""Runs of pages that a dump may have: one a memory slot, and fewer than this where memory devices come and go."""

_PAGE: Final = re.compile(rb"page=([0-9a-f]{3,13})")


def _line_of(key: int) -> bytes:
    parts = (key, key >> 4, key & 8, key & 4, key & 2, key & RESERVED)
    return b"key(%d) => ACC=%X, FP=%d, REF=%d, ch=%d, reserved=%d" % parts


# Whatever follows the page, and the key that it is. SSKE ignores the reserved bit, and so does this.
_KEYS: Final = {_line_of(key): key & ~RESERVED for key in range(256)}


class Snapshot:
    """Keys of one moment, packed: what a guest has for most frames takes next to nothing."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._counts: list[int] = []
        self._blocks: list[list[bytes]] = []
        self._rest = bytearray()
        """Of the last run: what is no whole block yet."""
        self._unpacked: tuple[int, int, bytes] = (-1, -1, b"")

    def add(self, start: int, keys: bytes) -> None:
        """Take the keys of frames that come after all that were taken. QMP_FAILED where there are too many runs."""
        if not self._starts or start != self._starts[-1] + self._counts[-1]:
            self.finish()
            if len(self._starts) == RUNS_MAX:
                raise _strange(f"its pages are in more than {RUNS_MAX} runs")
            self._starts.append(start)
            self._counts.append(0)
            self._blocks.append([])
        self._counts[-1] += len(keys)
        self._rest += keys
        while len(self._rest) >= BLOCK_KEYS:
            self._pack(BLOCK_KEYS)

    def finish(self) -> None:
        """Pack what is left."""
        if self._rest:
            self._pack(len(self._rest))

    @property
    def room(self) -> int:
        """Bytes of memory that they take."""
        return len(self._rest) + sum(len(block) for blocks in self._blocks for block in blocks)

    def close(self) -> None:
        """Give the memory back."""
        for kept in (self._starts, self._counts, self._blocks, self._rest):
            kept.clear()
        self._unpacked = (-1, -1, b"")

    def read(self, frames: GfnRange, into: memoryview) -> None:
        """Fill `into` with the keys of frames. GFN_NOT_MAPPED where the dump has one of them not."""
        at = 0
        while at < frames.count:
            gfn = frames.start + at
            run = bisect_right(self._starts, gfn) - 1
            if run < 0 or gfn >= self._starts[run] + self._counts[run]:
                where = {"gfn": hex(gfn), "count": str(frames.count)}
                raise SkeydError(
                    Reason.GFN_NOT_MAPPED, f"the VMM has printed no key for gfn {gfn:#x} of {frames}", where
                )
            block, offset = divmod(gfn - self._starts[run], BLOCK_KEYS)
            keys = self._block(run, block)[offset : offset + frames.count - at]
            into[at : at + len(keys)] = keys
            at += len(keys)

    def _pack(self, count: int) -> None:
        self._blocks[-1].append(zlib.compress(self._rest[:count], 1))
        del self._rest[:count]

    def _block(self, run: int, block: int) -> bytes:
        # Slices come in order, several a block.
        if self._unpacked[:2] != (run, block):
            self._unpacked = (run, block, zlib.decompress(self._blocks[run][block]))
        return self._unpacked[2]


class DumpParser:
    """Takes a dump in parts, cut anywhere, and keeps the keys of frames that are in memory slots.

    QMP_FAILED for whatever QEMU doesn't write; memory is bounded by the slots and RUNS_MAX, however much comes.
    """

    def __init__(self, memory_map: MemoryMap) -> None:
        self._mapped = memory_map.mapped
        self.snapshot = Snapshot()
        """The keys; whole after `finish`."""
        self._tail = b""
        self._next = 0
        """The least page that may come."""

    def feed(self, data: bytes) -> None:
        """Take what comes next."""
        end = data.rfind(b"\n") + 1
        if end:
            self._lines(self._tail + data[:end])
            self._tail = data[end:]
        else:
            self._tail += data
        if len(self._tail) > LINE_MAX:
            raise _strange(f"a line has more than {LINE_MAX} bytes")

    def finish(self) -> None:
        """Say that the dump is whole."""
        if self._tail:
            raise _strange("it ends in the middle of a line")
        if not self._next:
            raise _strange("it is empty")
        self.snapshot.finish()

    def _lines(self, text: bytes) -> None:
        # All of it in a few calls that are made in C: QEMU waits while nobody reads.
        parts = text.replace(b"\n", b": ").split(b": ")
        pages, keys = parts[:-1:2], self._keys(parts[1::2])
        start = _page_of(pages[0])
        following = ("page=%03x " * len(pages)) % tuple(range(start, start + len(pages)))
        if b" ".join(pages) == following[:-1].encode():
            self._add(start, keys)
            return
        for page, key in zip(pages, keys, strict=True):
            self._add(_page_of(page), bytes([key]))

    def _keys(self, lines: list[bytes]) -> bytes:
        try:
            return bytes(map(_KEYS.__getitem__, lines))
        except KeyError as error:
            raise _strange(f"a line has {bytes(error.args[0])[:LINE_MAX]!r}") from None

    def _add(self, start: int, keys: bytes) -> None:
        if start < self._next:
            raise _strange(f"page {start:#x} comes after page {self._next - 1:#x}")
        self._next = start + len(keys)
        for part, inside in self._mapped.split(GfnRange(start, len(keys))):
            if inside:
                self.snapshot.add(part.start, keys[part.start - start : part.end - start])


def _page_of(text: bytes) -> int:
    found = _PAGE.fullmatch(text)
    page = -1 if found is None else int(found[1], 16)
    if b"page=%03x" % max(page, 0) != text:
        raise _strange(f"a line begins with {text[:LINE_MAX]!r}")
    return page


def _strange(what: str) -> SkeydError:
    return SkeydError(Reason.QMP_FAILED, f"what the VMM prints as its keys is no dump of keys: {what}")
