"""A session without a worker: a guest's keys in a dictionary, and a record of what was asked of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from skeyd.errors import SkeydError
from skeyd.gfn import GfnRange, MemoryMap, MemorySlot
from skeyd.vms.session import Session
from skeyd.worker.protocol import Hello
from tests.worker.specs import UID


def key_of(gfn: int) -> int:
    """Return the key that a frame has before anything is set; neighbours differ."""
    return gfn * 6 % 256 & 0xFE


class FakeSession(Session):
    """A session with a guest whose slots are given in frames."""

    def __init__(self, *slots: tuple[int, int], uses_keys: bool = True, keyop: bool | None = False) -> None:
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
        self.refusals: dict[int, SkeydError] = {}
        """By number of the write, counted from 0: what it raises."""

    def uses_keys(self) -> bool:
        """Whether the guest uses storage keys."""
        return self.enabled

    def read_slices(self, frames: Iterable[GfnRange]) -> Iterator[tuple[GfnRange, bytes | None]]:
        """As a session does, without reading ahead."""
        for one in frames:
            self.read.append(one)
            if self.keyless_from is not None and one.end > self.keyless_from:
                yield one, None
            else:
                yield one, bytes(self.impossible.get(gfn, key_of(gfn)) for gfn in range(one.start, one.end))

    def write_slice(self, frames: GfnRange, keys: bytes | memoryview, allow_enable: bool) -> tuple[int, bool]:
        """As a session does."""
        number = len(self.written)
        self.written.append((frames, bytes(keys), allow_enable))
        if number in self.refusals:
            raise self.refusals[number]
        enabled, self.enabled = not self.enabled, True
        return self.repaired, enabled

    def keyop(self, operation: str, gfn: int, key: int = 0) -> tuple[int | None, bool]:
        """As a session does."""
        self.keyops.append((operation, gfn, key))
        if not self.enabled:
            return None, False
        found = self.impossible.get(gfn, key_of(gfn))
        return found if operation != "rrbe" or gfn in self.impossible else found & 0x06, self.repaired > 0
