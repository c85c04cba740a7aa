"""Where the keys of two guests differ, or of a guest and a file: found by digests, so that no other keys are moved.

The walk begins at the roots of both hash trees (skeyd.digest) and goes down where they differ. Guests may run
meanwhile: each digest and each key is as it was when it was read.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import grpc

from skeyd.client.connection import Client
from skeyd.client.digesting import Digest
from skeyd.client.errors import ClientError, StreamError
from skeyd.client.reading import Keys
from skeyd.client.snapshot import Snapshot
from skeyd.digest import ROOT_LEVEL, Digester, Node, frames_of, parent_of, span
from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, MemoryMap, MemorySlot, Ranges
from skeyd.limits import MAX_RANGES
from skeyd.storage_key import RESERVED, STABLE_MASK, differing_runs


class Side(Protocol):
    """What can be compared."""

    with_referenced_changed: bool
    """Its digests cover R and C too."""
    keys_moved: int
    """Keys that a daemon has sent for `keys` so far."""

    def digest(self, node: tuple[int, int] | None = None) -> Digest:
        """Return a node of its tree, by (level, first gfn), and what is below it; None: the root."""
        ...

    def keys(self, frames: GfnRange) -> Generator[Keys, None, None]:
        """Give the keys of those of the frames that have one. Each call's frames lie after those of the last."""
        ...


@dataclass(frozen=True, slots=True)
class Difference:
    """Frames that follow one another and differ: each in its keys, or all by being on one side only."""

    frames: GfnRange
    left: bytes | None
    """Their keys on the left side, one byte a frame; None: they are on the right side only."""
    right: bytes | None
    """Likewise."""


class Comparison:
    """Compares two sides: their roots at once, then by iterating, once, all that differs, ascending.

    ClientError, StreamError and SnapshotError where a side can't be read; ClientError VM_REPLACED where a VM is another
    one in the middle of it. ValueError where one side's digests cover R and C and the other's don't.
    """

    def __init__(self, left: Side, right: Side) -> None:
        if left.with_referenced_changed != right.with_referenced_changed:
            raise ValueError("the digests of one side cover the referenced and changed bits, those of the other don't")
        self._left, self._right = left, right
        self.left, self.right = left.digest(), right.digest()
        """The roots."""
        self.same = (self.left.uses_storage_keys, self.left.node) == (self.right.uses_storage_keys, self.right.node)
        """Whether they are the same, frames without keys included. Two guests that use no keys are."""

    def __iter__(self) -> Iterator[Difference]:
        """Walk. Nothing comes where only one side uses storage keys: then no frame differs more than another."""
        if self.left.uses_storage_keys != self.right.uses_storage_keys:
            return
        mask = 0xFF & ~RESERVED if self._left.with_referenced_changed else STABLE_MASK
        for frames in _joined(self._walk(self.left, self.right)):
            with closing(self._left.keys(frames)) as left, closing(self._right.keys(frames)) as right:
                for part in _side_by_side(left, right):
                    one, other = part.left, part.right
                    if one is None or other is None:
                        yield part
                        continue
                    for index, count in differing_runs(one, other, mask):
                        where = GfnRange(part.frames.start + index, count)
                        yield Difference(where, one[index : index + count], other[index : index + count])

    def _walk(self, left: Digest, right: Digest) -> Iterator[GfnRange]:
        # What to look at key by key: leaves that differ, and larger nodes that one side has no key of.
        if left.node == right.node:
            return
        levels = [_lowest(left), _lowest(right)]
        level = max(levels)
        lefts, rights = self._nodes(left, level), self._nodes(right, level)
        for start in sorted({*lefts, *rights}):
            one, other = lefts.get(start), rights.get(start)
            if one == other:
                continue
            if not level or one is None or other is None:
                yield frames_of(level, start)
                continue
            # Who has told of lower nodes than these already has none beside them, and need not be asked again.
            yield from self._walk(
                left if levels[0] < level else self._left.digest((level, start)),
                right if levels[1] < level else self._right.digest((level, start)),
            )

    def _nodes(self, digest: Digest, level: int) -> dict[int, Node]:
        # The nodes of a level that a digest tells of, by first gfn.
        if digest.branch is None:
            return {}
        if digest.children and digest.branch.level == level + 1:
            return {child.start: child for child in digest.children}
        made = digest.branch
        while made.level < level:
            made = parent_of([made], with_referenced_changed=self._left.with_referenced_changed)
        return {made.start: made}


class VmSide:
    """The keys of a VM, where they are.

    `within`: the frames to look at, the first and the last of each range in a memory slot; none: all. With `clip` they
    may be anywhere: frames in no slot are frames without keys, and no ranges are no frames.
    """

    def __init__(
        self,
        client: Client,
        vm: str,
        within: Sequence[GfnRange] = (),
        *,
        clip: bool = False,
        with_referenced_changed: bool = False,
    ) -> None:
        self.with_referenced_changed = with_referenced_changed
        self.keys_moved = 0
        self._client = client
        self._vm = vm
        about = client.get_vm(vm)
        self._incarnation = about.incarnation
        try:
            slots = [MemorySlot(one.slot, GfnRange(one.start_gfn, one.count), "") for one in about.memory_slots]
            self._mapped = MemoryMap(slots).mapped
        except SkeydError as error:
            raise StreamError(f"the daemon tells of impossible memory slots: {error.message}") from error
        self._within = Ranges(self._clipped(within) if clip else within)
        self._nowhere = clip and not self._within

    def digest(self, node: tuple[int, int] | None = None) -> Digest:
        """Ask the daemon."""
        # Without a range to ask for, any frame tells whether the guest uses keys at all.
        within = [GfnRange(one.start, 1) for one in self._mapped[:1]] if self._nowhere else self._within
        found = self._client.digest_skeys(
            self._vm, within, with_referenced_changed=self.with_referenced_changed, node=node
        )
        self._require_same_vm(found.incarnation)
        return Digest(found.uses_storage_keys, None, None, (), found.incarnation) if self._nowhere else found

    def keys(self, frames: GfnRange) -> Generator[Keys, None, None]:
        """Read them."""
        wanted: Iterable[GfnRange] = [frames]
        if self._nowhere:
            wanted = ()
        elif self._within:
            wanted = self._within.shared(wanted)
        pieces = list(self._mapped.shared(wanted))
        for index in range(0, len(pieces), MAX_RANGES):
            with self._client.get_skeys(self._vm, pieces[index : index + MAX_RANGES]) as stream:
                self._require_same_vm(stream.header.incarnation)
                if not stream.uses_storage_keys:
                    raise StreamError(f"{self._vm} used storage keys, and is said to use none")
                for part in stream:
                    if isinstance(part, Keys):
                        self.keys_moved += part.frames.count
                        yield part

    def _clipped(self, within: Iterable[GfnRange]) -> Iterator[GfnRange]:
        for one in within:
            parts = list(self._mapped.shared([one]))
            if parts:
                yield GfnRange(parts[0].start, parts[-1].end - parts[0].start)

    def _require_same_vm(self, incarnation: str) -> None:
        if incarnation != self._incarnation:
            raise ClientError(
                grpc.StatusCode.ABORTED,
                f"{self._vm} is another VM than a moment ago: "
                f"its worker's incarnation was {self._incarnation!r}, and is {incarnation!r}",
                Reason.VM_REPLACED.name,
                {"vm": self._vm},
            )


class FileSide:
    """The keys of a snapshot, `within` some frames or all of them. It is read once for the digests, and once again."""

    def __init__(
        self, snapshot: Snapshot, within: Sequence[GfnRange] = (), *, with_referenced_changed: bool = False
    ) -> None:
        self.with_referenced_changed = with_referenced_changed
        self.keys_moved = 0
        self._snapshot = snapshot
        self._within = Ranges(within)
        digester = Digester(with_referenced_changed=with_referenced_changed)
        for part in self._parts():
            digester.add(part.frames, part.keys)
        self._tree = digester.tree()
        self._rest = self._parts()
        self._next = next(self._rest, None)

    def digest(self, node: tuple[int, int] | None = None) -> Digest:
        """Take it from the tree that was made of the file."""
        found = self._tree.node(*node or (ROOT_LEVEL, 0))
        uses_keys = self._snapshot.uses_storage_keys
        if found is None:
            return Digest(uses_keys, None, None, (), "")
        branch = self._tree.branch(found)
        return Digest(uses_keys, found, branch, tuple(self._tree.children(branch)), "")

    def keys(self, frames: GfnRange) -> Generator[Keys, None, None]:
        """Go on in the file to where they are."""
        while (part := self._next) is not None and part.frames.start < frames.end:
            inside = Ranges([part.frames]).shared([frames])
            if part.frames.end > frames.end:
                self._next = _from(part, frames.end)
            else:
                self._next = next(self._rest, None)
            for one in inside:
                yield _cut(part, one)

    def _parts(self) -> Iterator[Keys]:
        for part in self._snapshot.keys() if self._snapshot.uses_storage_keys else ():
            if not self._within:
                yield part
                continue
            for frames in self._within.shared([part.frames]):
                yield _cut(part, frames)


def _lowest(digest: Digest) -> int:
    # The lowest level that a digest tells of.
    return max(0, digest.branch.level - 1) if digest.branch else 0


def _joined(several: Iterable[GfnRange]) -> Iterator[GfnRange]:
    # Neighbours are read in one stream; only so many, so that what is found first is told early.
    last: GfnRange | None = None
    for one in several:
        if last is not None and last.end == one.start and last.count + one.count <= span(1):
            last = GfnRange(last.start, last.count + one.count)
            continue
        if last is not None:
            yield last
        last = one
    if last is not None:
        yield last


def _side_by_side(left: Iterator[Keys], right: Iterator[Keys]) -> Iterator[Difference]:
    # Everything that comes, ascending, whether or not it differs: frames with their keys on the sides that have them.
    rest = (left, right)
    parts = [next(left, None), next(right, None)]
    while any(parts):
        start = min(part.frames.start for part in parts if part)
        edges = (edge for part in parts if part for edge in (part.frames.start, part.frames.end))
        frames = GfnRange(start, min(edge for edge in edges if edge > start) - start)
        keys: list[bytes | None] = [None, None]
        for side, part in enumerate(parts):
            if part and part.frames.start == start:
                keys[side] = _cut(part, frames).keys
                parts[side] = _from(part, frames.end) or next(rest[side], None)
        yield Difference(frames, keys[0], keys[1])


def _cut(part: Keys, frames: GfnRange) -> Keys:
    start = frames.start - part.frames.start
    return Keys(frames, part.keys[start : start + frames.count])


def _from(part: Keys, gfn: int) -> Keys | None:
    return _cut(part, GfnRange(gfn, part.frames.end - gfn)) if gfn < part.frames.end else None
