"""The digest of a guest's storage keys: a hash tree over its frames. Everybody may import this.

docs/digest.md describes it for those who implement it elsewhere. Leaves lie on a grid of absolute frame numbers, so
the tree depends on which frames have which keys and on nothing else: not on memory slots, ranges or chunks.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from skeyd.gfn import GfnRange
from skeyd.storage_key import RESERVED, STABLE_MASK

LEAF_FRAMES: Final = 1 << 16
"""Frames of a leaf: 256 MiB of a guest. A node of each level above has up to 256 nodes below it."""

ROOT_LEVEL: Final = 6
"""The level of the root, which spans all frames that there can be; leaves are level 0."""

DIGEST_BYTES: Final = 32
"""Bytes of a node's digest: SHA-256."""

_HEAD: Final = struct.Struct(">BBQ")
_RUN: Final = struct.Struct(">QQ")
_LEAF_MASK: Final = ~(LEAF_FRAMES - 1)
_STABLE: Final = bytes(key & STABLE_MASK for key in range(256))
_WHOLE: Final = bytes(key & ~RESERVED for key in range(256))


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the tree. It covers at least one key."""

    level: int
    start: int
    """First gfn of its span, whether or not that frame has a key."""
    keys: int
    """Keys that it covers."""
    sha256: bytes
    """32 bytes."""


def span(level: int) -> int:
    """Frames that a node of a level spans."""
    return LEAF_FRAMES << 8 * level


def is_node(level: int, start: int) -> bool:
    """Whether the tree has a place for such a node."""
    return 0 <= level <= ROOT_LEVEL and 0 <= start < span(ROOT_LEVEL) and not start % span(level)


def frames_of(level: int, start: int) -> GfnRange:
    """Return the frames that a node spans."""
    return GfnRange(start, span(level))


def parent_of(children: Sequence[Node], *, with_referenced_changed: bool) -> Node:
    """Return the node over all nodes that one has right below it; at least one, ascending."""
    level = children[0].level + 1
    start = children[0].start & -span(level)
    hashed = hashlib.sha256(_head(level, with_referenced_changed, start))
    for child in children:
        hashed.update(bytes([(child.start - start) // span(child.level)]))
        hashed.update(child.sha256)
    return Node(level, start, sum(child.keys for child in children), hashed.digest())


class Digester:
    """Takes keys in ascending order of frames, cut in any way, and makes the tree. Synchronization: one thread.

    It keeps 48 bytes for each leaf of 65,536 frames; of the leaf that it is in, a byte a key and 16 a run of frames.
    """

    def __init__(self, *, with_referenced_changed: bool = False) -> None:
        """`with_referenced_changed`: cover R and C too, and not only ACC and F."""
        self._with_referenced_changed = with_referenced_changed
        self._table = _WHOLE if with_referenced_changed else _STABLE
        self._leaves = _Level()
        self._leaf = 0
        # Of the leaf that isn't whole yet: its canonical keys, and its runs, each a first gfn and a number of frames.
        self._keys = bytearray()
        self._runs = array("Q")
        self._end = 0

    def add(self, frames: GfnRange, keys: bytes | bytearray | memoryview) -> None:
        """Add the keys of frames, one byte a frame; they are not kept. ValueError where they don't ascend or fit."""
        if len(keys) != frames.count:
            raise ValueError(f"{len(keys)} keys are not those of {frames.count} frames")
        if frames.start < self._end:
            raise ValueError(f"frames {frames} do not lie after those before them")
        canonical = memoryview((keys if isinstance(keys, bytes) else bytes(keys)).translate(self._table))
        gfn = frames.start
        while gfn < frames.end:
            leaf = gfn & _LEAF_MASK
            if leaf != self._leaf:
                self._finish_leaf()
                self._leaf = leaf
            end = min(leaf + LEAF_FRAMES, frames.end)
            self._keys += canonical[gfn - frames.start : end - frames.start]
            if self._runs and gfn == self._end:
                self._runs[-1] += end - gfn
            else:
                self._runs.extend((gfn, end - gfn))
            gfn = self._end = end

    def tree(self) -> Tree:
        """Return the tree over all that was added. Nothing can be added any more."""
        self._finish_leaf()
        self._end = span(ROOT_LEVEL)
        return Tree(self._leaves, with_referenced_changed=self._with_referenced_changed)

    def _finish_leaf(self) -> None:
        if not self._runs:
            return
        hashed = hashlib.sha256(_head(0, self._with_referenced_changed, self._leaf))
        at = 0
        with memoryview(self._keys) as keys:
            for first, count in zip(self._runs[::2], self._runs[1::2], strict=True):
                hashed.update(_RUN.pack(first, count))
                hashed.update(keys[at : at + count])
                at += count
        self._leaves.append(Node(0, self._leaf, at, hashed.digest()))
        self._keys, self._runs = bytearray(), array("Q")


class Tree:
    """The nodes over keys. Whatever covers no key is no node. Synchronization: any thread, once made."""

    def __init__(self, leaves: _Level, *, with_referenced_changed: bool) -> None:
        """For Digester.tree."""
        self.with_referenced_changed = with_referenced_changed
        self._levels = [leaves]
        for level in range(1, ROOT_LEVEL + 1):
            self._levels.append(self._above(level, self._levels[-1]))

    @property
    def root(self) -> Node | None:
        """The root; None where there are no keys."""
        return self.node(ROOT_LEVEL, 0)

    def node(self, level: int, start: int) -> Node | None:
        """Return a node; None where it covers no keys. ValueError where there can't be one."""
        if not is_node(level, start):
            raise ValueError(f"there is no node of level {level} at gfn {start:#x}")
        return self._levels[level].at(level, start)

    def children(self, node: Node) -> list[Node]:
        """Return the nodes right below a node, ascending; none below a leaf."""
        if not node.level:
            return []
        below = self._levels[node.level - 1]
        return list(below.within(node.level - 1, node.start, node.start + span(node.level)))

    def branch(self, node: Node) -> Node:
        """Return the lowest node, itself or below, that covers the same keys: where the tree branches, or a leaf."""
        while len(below := self.children(node)) == 1:
            node = below[0]
        return node

    def _above(self, level: int, below: _Level) -> _Level:
        made = _Level()
        first = 0
        while first < len(below):
            start = below.starts[first] & -span(level)
            children = list(below.within(level - 1, start, start + span(level)))
            made.append(parent_of(children, with_referenced_changed=self.with_referenced_changed))
            first += len(children)
        return made


class _Level:
    # The nodes of a level, ascending, without an object for each.
    def __init__(self) -> None:
        self.starts = array("Q")
        self._keys = array("Q")
        self._digests = bytearray()

    def __len__(self) -> int:
        return len(self.starts)

    def append(self, node: Node) -> None:
        self.starts.append(node.start)
        self._keys.append(node.keys)
        self._digests += node.sha256

    def at(self, level: int, start: int) -> Node | None:
        return next(self.within(level, start, start + 1), None)

    def within(self, level: int, start: int, end: int) -> Iterator[Node]:
        for index in range(bisect_left(self.starts, start), bisect_left(self.starts, end)):
            digest = bytes(self._digests[32 * index : 32 * index + 32])
            yield Node(level, self.starts[index], self._keys[index], digest)


def _head(level: int, with_referenced_changed: bool, start: int) -> bytes:
    # The level keeps the hashes of leaves and of all levels apart. All that follows has a fixed length or follows its
    # own, so no two contents are hashed as one.
    return _HEAD.pack(level, with_referenced_changed, start)
