"""A front's connection, as its worker has it: the socket, and the memory that both write keys and ranges into."""

from __future__ import annotations

import mmap
import os
import socket

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, Ranges
from skeyd.linux import sealed_memfd
from skeyd.storage_key import GFN_LIMIT
from skeyd.worker.channel import Channel
from skeyd.worker.packets import Fields, ProtocolError
from skeyd.worker.protocol import BUFFER_BYTES, BUFFER_KEYS, BUFFERS, RANGE, SLICE_KEYS


class FrontConnection:
    """One of a worker's connections. Synchronization: none; one thread owns it."""

    def __init__(self, connection: socket.socket) -> None:
        self.channel = Channel(connection)
        self._buffers: mmap.mmap | None = None

    def attach(self) -> int:
        """Make the memory that is shared, BUFFER_BYTES; return its descriptor, which is the caller's. OSError.

        ProtocolError the second time.
        """
        if self._buffers is not None:
            raise ProtocolError("attached twice")
        fd = sealed_memfd("skeyd-keys", BUFFER_BYTES)
        try:
            self._buffers = mmap.mmap(fd, BUFFER_BYTES)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def slice(self, request: Fields) -> tuple[GfnRange, memoryview]:
        """Return the frames that a request names, and where in the memory their keys belong, a byte each.

        The view is the caller's to release. The front can write there at any time. ProtocolError.
        """
        buffers = self._require_attached()
        at = request.integer("buffer", 0, BUFFERS - 1) * BUFFER_KEYS
        offset = request.integer("offset", 0, BUFFER_KEYS - 1)
        start = request.integer("start", 0, GFN_LIMIT - 1)
        frames = GfnRange(start, request.integer("count", 1, min(SLICE_KEYS, BUFFER_KEYS - offset)))
        at += offset
        with memoryview(buffers) as whole:
            return frames, whole[at : at + frames.count]

    def ranges(self, request: Fields) -> Ranges:
        """Return the ranges that a request says are in the memory, each a RANGE. ProtocolError."""
        buffers = self._require_attached()
        size = request.integer("ranges", 1, BUFFER_BYTES // RANGE.size) * RANGE.size
        with memoryview(buffers) as whole:
            # A copy: the front can still write there.
            pairs = bytes(whole[:size])
        try:
            return Ranges(GfnRange(start, count) for start, count in RANGE.iter_unpack(pairs))
        except SkeydError as error:
            raise ProtocolError(error.message) from None

    def require_heard(self) -> None:
        """Raise a SkeydError, which nobody will hear, where the front has hung up: nobody wants what it asked for."""
        if self.channel.is_ended():
            raise SkeydError(Reason.WORKER_FAILED, "the front has hung up")

    def close(self) -> None:
        """Hang up, and give the memory back."""
        self.channel.close()
        if self._buffers is not None:
            self._buffers.close()

    def _require_attached(self) -> mmap.mmap:
        if self._buffers is None:
            raise ProtocolError("not attached")
        return self._buffers
