"""A session without a worker: a guest's keys in a dictionary, and a record of what was asked of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from skeyd.errors import SkeydError
from skeyd.gfn import GfnRange, MemoryMap, MemorySlot
from skeyd.vms.pacing import Pace
from skeyd.vms.read_ahead import ChunkRead
from skeyd.vms.session import Session
from skeyd.worker.outcomes import Begun, LastWrite
from skeyd.worker.protocol import Hello
from tests.worker.specs import UID


def key_of(gfn: int) -> int:
    """Return the key that a frame has before anything is set; neighbours differ."""
    return gfn * 6 % 256 & 0xFE


class FakeSession(Session):
    """A session with a guest whose slots are given in frames."""

    def __init__(self, *slots: tuple[int, int], uses_keys: bool = True, keyop: bool = False) -> None:
        memory = tuple(MemorySlot(number, GfnRange(*one), "none") for number, one in enumerate(slots))
        self.hello = Hello("web", UID, "0" * 32, "simulated", "simulated", "0", 1, 0, memory, keyop)
        self.memory_map = MemoryMap(memory)
        self.enabled = uses_keys
        self.keyless_from: int | None = None
        """The gfn from which on reads say that the guest uses no keys."""
        self.impossible: dict[int, int] = {}
        """By gfn: a key in the place of the one that a frame has."""
        self.read: list[GfnRange] = []
        self.keyops: list[tuple[str, int, int]] = []
        self.written: list[tuple[GfnRange, bytes, bool]] = []
        self.repaired = 0
        """Keys that each write says it repaired."""
        self.nanoseconds: Callable[[int], int] = lambda count: count
        """How long the kernel had so many keys."""
        self.refusals: dict[int, SkeydError] = {}
        """By number of the write, counted from 0: what it raises."""
        self.calls: list[str] = []
        """What was said of the call as a whole: begin, commit, abandon."""
        self.committed: tuple[int, int] | None = None
        """What the commit said was set: keys, and their CRC-32."""
        self.reused: SkeydError | None = None
        """What is said of a request_id that is to be unused."""
        self.begun = Begun("begun", 0, 0, 0, False)
        """What the next begin answers."""
        self.outcomes: list[LastWrite | SkeydError | None] = []
        """What each abandon answers; at the end of it that all is rolled back, or that nothing was set."""
        self._applied = Begun("applied", 0, 0, 0, False)

    def take_snapshot(self) -> None:
        """As a session does with a VM whose keys are read slice by slice."""

    def uses_keys(self) -> bool:
        """Whether the guest uses storage keys."""
        return self.enabled

    def read_chunks(self, chunks: Iterable[GfnRange], chunk_keys: int, pace: Pace) -> Iterator[ChunkRead]:
        """As a session does, without reading ahead, and in pieces of odd sizes."""
        for one in chunks:
            assert one.count <= chunk_keys
            self.read.append(one)
            if self.keyless_from is not None and one.end > self.keyless_from:
                yield ChunkRead(one, None)
            else:
                keys = memoryview(bytes(self.impossible.get(gfn, key_of(gfn)) for gfn in range(one.start, one.end)))
                yield ChunkRead(one, (keys[: one.count // 3], keys[one.count // 3 :]))

    def write_slice(self, frames: GfnRange, keys: bytes | memoryview, allow_enable: bool) -> tuple[int, bool, int]:
        """As a session does."""
        number = len(self.written)
        self.written.append((frames, bytes(keys), allow_enable))
        if number in self.refusals:
            raise self.refusals[number]
        enabled, self.enabled = not self.enabled, True
        before = self._applied
        self._applied = Begun(
            "applied",
            before.keys_set + frames.count,
            before.repaired + self.repaired,
            zlib.crc32(keys, before.crc32),
            before.enabled or enabled,
        )
        return self.repaired, enabled, self.nanoseconds(frames.count)

    def begin(self, request_id: str, fingerprint: str, *, keep: bool, resume: bool) -> Begun:
        """As a session does."""
        self.calls.append("begin")
        self._applied = replace(self.begun, state="applied")
        return self.begun

    def require_unused(self, request_id: str, fingerprint: str) -> None:
        """As a session does."""
        self.calls.append(f"require_unused {request_id} {fingerprint}")
        if self.reused is not None:
            raise self.reused

    def commit(self, keys_set: int, crc32: int) -> Begun:
        """As a session does."""
        self.calls.append("commit")
        self.committed = (keys_set, crc32)
        return self._applied

    def abandon(self) -> LastWrite | None:
        """As a session does."""
        self.calls.append("abandon")
        if self.outcomes:
            outcome = self.outcomes.pop(0)
            if isinstance(outcome, SkeydError):
                raise outcome
            return outcome
        if not self.written:
            return None
        done = self._applied
        return LastWrite("rolled_back", "", done.keys_set, done.crc32, done.enabled, 0)

    def keyop(self, operation: str, gfn: int, key: int = 0) -> tuple[int | None, bool]:
        """As a session does."""
        self.keyops.append((operation, gfn, key))
        if not self.enabled:
            return None, False
        found = self.impossible.get(gfn, key_of(gfn))
        return found if operation != "rrbe" or gfn in self.impossible else found & 0x06, self.repaired > 0
