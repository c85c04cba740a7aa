"""Lines to a descriptor that may take none: a bounded queue, and a thread that nobody waits for.

The standard library's QueueListener can't be it: its end waits for the reader, and a full queue has it raise.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

_RETRY_SECONDS: Final = 0.25
"""Between two tries where writing fails: nothing tells of room on a disk."""


class LineWriter:
    """Writes lines in their order. What is beyond `most` bytes is lost and counted.

    From the first line that is lost all are, until those before it are written; then comes one line with their number,
    which `loss` makes. So it stands where they are missing, and there is one for each gap. A write that fails (a full
    disk, a reader that is gone) is tried again, and is as one that waits.

    Synchronization: any thread.
    """

    def __init__(self, fd: int, most: int, loss: Callable[[int], bytes]) -> None:
        self._fd = fd
        self._most = most
        self._loss = loss
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._lost = 0
        self._writing = False
        self._closed = False
        # A daemon: one that hangs in a write must not hold the end up.
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        """Hand a line over, with its end. Never waits for the reader."""
        with self._changed:
            if self._lost or self._bytes + len(line) > self._most:
                self._lost += 1
                return
            self._lines.append(line)
            self._bytes += len(line)
            self._changed.notify_all()

    def lose(self) -> None:
        """Count a line that there is no way to make."""
        with self._changed:
            self._lost += 1
            self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait until all is written, but not for longer. Whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._lines or self._lost or self._writing), seconds)

    def close(self, seconds: float) -> bool:
        """Have the thread end when all is written or a write fails, and wait for that. Whether it has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (line := self._next()) is not None:
            self._write(line)

    def _next(self) -> bytes | None:
        with self._changed:
            if self._writing:
                self._writing = False
                self._changed.notify_all()
            while not (self._lines or self._lost or self._closed):
                self._changed.wait()
            if self._lines:
                line = self._lines.popleft()
                self._bytes -= len(line)
                self._writing = True
                return line
            lost, self._lost = self._lost, 0
            self._writing = lost > 0
        return self._loss(lost) if lost else None

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                room = select.poll()
                room.register(self._fd, select.POLLOUT)
                room.poll(_RETRY_SECONDS * 1000)
            except OSError:
                if self._closed:
                    return
                time.sleep(_RETRY_SECONDS)
