"""Keys on their way from a worker: what it is asked for ahead of who reads, in how much memory."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from skeyd.gfn import GfnRange
from skeyd.vms.pacing import Pace
from skeyd.worker.packets import Fields
from skeyd.worker.protocol import BUFFER_KEYS, NANOSECONDS_MAX, SLICE_KEYS

SLICES_AHEAD: Final = 16
"""Most slices that a worker is asked for before it has answered: the socket must hold its answers."""


class ChunkRead:
    """Keys of frames that follow one another, where the worker has put them."""

    def __init__(
        self, frames: GfnRange, views: tuple[memoryview, ...] | None, done: Callable[[], None] = lambda: None
    ) -> None:
        self.frames = frames
        self.views = views
        """Their keys, end to end; None: the guest uses none. The worker can still change them, if it is no honest one.
        """
        self._done = done

    def release(self) -> None:
        """Give the memory back, for the worker to go on in; before that which takes long. WORKER_LOST."""
        self.drop()
        self._done()

    def copy(self) -> bytes | None:
        """Return the keys, and release them."""
        keys = None if self.views is None else b"".join(self.views)
        self.release()
        return keys

    def drop(self) -> None:
        """Let go of the memory, and ask for nothing."""
        for view in self.views or ():
            view.release()
        self.views = ()


@dataclass(slots=True, eq=False)
class _Filling:
    frames: GfnRange
    begins: int
    """Where in the ring, counted from the beginning of all."""
    asked: int = 0
    answered: int = 0
    uses_keys: bool = True


class ReadAhead:
    """Chunks of at most `chunk_keys` frames, filled one after the other by as many ioctls as a Pace wants.

    The memory is a ring that holds a chunk, and a slice for the worker to be busy with while that is written down: two
    slices where a chunk is one, as it is unless a client asks for others. What of it nobody holds is being filled: the
    worker goes on while a caller is busy with what it has released. Synchronization: one thread.
    """

    def __init__(
        self,
        memory: mmap.mmap,
        send: Callable[[dict[str, Any]], None],
        take: Callable[[], Fields],
        chunks: Iterable[GfnRange],
        chunk_keys: int,
        pace: Pace,
    ) -> None:
        self._memory = memory
        self._send = send
        self._take = take
        self._todo = iter(chunks)
        # The rest of the worker's memory isn't touched, and so costs none.
        self._ring_keys = min(chunk_keys, BUFFER_KEYS) + SLICE_KEYS
        self._pace = pace
        self._chosen: deque[_Filling] = deque()
        self._asked: deque[tuple[_Filling, int]] = deque()
        self._given, self._back = 0, 0
        """Keys' room that was ever given to slices, and that came back."""

    def __iter__(self) -> Iterator[ChunkRead]:
        self._ask()
        while self._chosen:
            first = self._chosen[0]
            while first.answered < first.frames.count:
                self._answer()
                self._ask()
            chunk = ChunkRead(first.frames, self._views(first) if first.uses_keys else None, self._came_back)
            try:
                yield chunk
            finally:
                chunk.drop()
            if self._chosen and self._chosen[0] is first:
                self._came_back()

    def _came_back(self) -> None:
        self._back += self._chosen.popleft().frames.count
        self._ask()

    def _ask(self) -> None:
        # Of the first slice nobody knows how long it takes; those after it are measured by it.
        while len(self._asked) < (SLICES_AHEAD if self._pace.measured else 1) and (filling := self._next()):
            at = self._given % self._ring_keys
            buffer, offset = divmod(at, BUFFER_KEYS)
            count = min(
                self._pace.keys,
                filling.frames.count - filling.asked,
                self._back + self._ring_keys - self._given,
                self._ring_keys - at,
                BUFFER_KEYS - offset,
            )
            if not count:
                return
            start = filling.frames.start + filling.asked
            self._send({"op": "get", "buffer": buffer, "offset": offset, "start": start, "count": count})
            self._given += count
            filling.asked += count
            self._asked.append((filling, count))

    def _next(self) -> _Filling | None:
        if not self._chosen or self._chosen[-1].asked == self._chosen[-1].frames.count:
            # As far ahead as chunks have room, and not farther than slices are asked for.
            if self._given == self._back + self._ring_keys or (frames := next(self._todo, None)) is None:
                return None
            self._chosen.append(_Filling(frames, self._given))
        return self._chosen[-1]

    def _answer(self) -> None:
        filling, count = self._asked.popleft()
        answer = self._take()
        filling.uses_keys = answer.boolean("uses_keys") and filling.uses_keys
        self._pace.took(count, answer.integer("ns", 0, NANOSECONDS_MAX))
        filling.answered += count

    def _views(self, filling: _Filling) -> tuple[memoryview, ...]:
        at = filling.begins % self._ring_keys
        count = filling.frames.count
        with memoryview(self._memory) as whole:
            if at + count <= self._ring_keys:
                return (whole[at : at + count],)
            return whole[at : self._ring_keys], whole[: at + count - self._ring_keys]
