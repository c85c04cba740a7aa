"""A guest in this process, whose SetSkeys calls are made one step at a time."""

from __future__ import annotations

import errno
import random

from skeyd.gfn import GfnRange
from skeyd.kvm.errors import KvmError
from skeyd.worker.backend import Backend
from skeyd.worker.keys import Keys
from skeyd.worker.outcomes import Begun, LastWrite
from skeyd.worker.transactions import Call, Done, Transactions
from tests.worker.backends import Recording

FRAMES = 1024
"""Of the VM that most tests have: one slot of 4 MiB."""
WHOLE = GfnRange(0, FRAMES)
OLD = bytes(random.Random(1).choices(b"\x00\x16\x38\x52\xf4", k=FRAMES))  # noqa: S311  no secret
GENERATIONS = ("4.19", "7.0", "7.2")
ROLL_BACK = Call("", "0" * 64, keep=False)
KEEP = Call("job-1", "1" * 64, keep=True)


def no_file() -> int:
    raise AssertionError("a file was asked for")


class Guest:
    """A VM, its keys, and the calls on it."""

    def __init__(self, backend: Backend | None = None, *, kernel: str = "7.2", keyless: bool = False) -> None:
        self.backend = backend or Recording((0, 4), kernel=kernel)
        self.keys = Keys(self.backend)
        self.calls = Transactions(self.keys, no_file)
        if not keyless:
            self.keys.write(WHOLE, OLD, allow_enable=True)

    def read(self, frames: GfnRange = WHOLE) -> bytes:
        """Read keys, past everything that is tested."""
        found = bytearray(frames.count)
        assert self.backend.get_skeys(frames.start, memoryview(found))
        return bytes(found)

    def set_old(self, keys: bytes) -> None:
        """Set keys from frame 0 on, by nobody's call."""
        self.keys.write(GfnRange(0, len(keys)), keys, allow_enable=True)

    def begin(self, call: Call = ROLL_BACK, owner: object = "a", *, resume: bool = False) -> Begun:
        """Begin a call."""
        return self.calls.begin(owner, call, resume)

    def set(self, start: int, keys: bytes, owner: object = "a", *, allow_enable: bool = False) -> None:
        """Set a slice."""
        self.calls.set(owner, GfnRange(start, len(keys)), keys, allow_enable)

    def commit(self, owner: object = "a") -> Done:
        """Commit what was set, whatever it was."""
        current = self.calls._open
        done = current.done if current is not None else Done()
        return self.calls.commit(owner, done.keys_set, done.crc32)

    def settle(self, owner: object = "a") -> LastWrite | None:
        """End the call without a commit, and do all that is then to be done."""
        self.calls.abandon(owner)
        steps = 0
        while self.calls.rolling_back:
            self.calls.step()
            steps += 1
            assert steps < 10_000
        return self.calls.outcome()


class Stubborn(Recording):
    """Refuses SETs of chosen frames, as an old kernel does: those before the bad one are set."""

    def __init__(self, kernel: str = "4.19") -> None:
        super().__init__((0, 4), kernel=kernel)
        self.bad: set[int] = set()
        self.errno = errno.EFAULT
        self.blind: set[int] = set()
        """Frames that can't be read either."""
        self.tried: list[GfnRange] = []
        """What it was asked to set."""

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
        """Set the keys up to the first bad frame."""
        self.tried.append(GfnRange(start_gfn, buffer.nbytes))
        for index in range(buffer.nbytes):
            if start_gfn + index in self.bad:
                if index:
                    super().set_skeys(start_gfn, buffer[:index])
                raise KvmError("KVM_S390_SET_SKEYS", self.errno)
        super().set_skeys(start_gfn, buffer)

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """Read the keys, or none."""
        if self.blind & set(range(start_gfn, start_gfn + buffer.nbytes)):
            raise KvmError("KVM_S390_GET_SKEYS", errno.EFAULT)
        return super().get_skeys(start_gfn, buffer)
