"""Backends that watch, and backends that lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from skeyd.gfn import GfnRange
from skeyd.kvm.errors import KvmError
from skeyd.worker.backend import Backend
from skeyd.worker.own_capture import OwnCapture
from skeyd.worker.protocol import KEYOPS
from skeyd.worker.simulated import SimulatedVm
from tests.worker.specs import simulated


class Recording:
    """A simulated VM that writes down what it is asked: ("set", frames) and so on."""

    def __init__(self, *slots: tuple[int, int], kernel: str = "7.2") -> None:
        self.vm = SimulatedVm(simulated(*(slots or [(0, 4)]), kernel=kernel))
        self.kernel = self.vm.kernel
        self.memory_map = self.vm.memory_map
        self.has_keyop = self.vm.has_keyop
        self.calls: list[tuple[str, GfnRange]] = []

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """As the ioctl."""
        self.calls.append(("get", GfnRange(start_gfn, buffer.nbytes)))
        return self.vm.get_skeys(start_gfn, buffer)

    def prepare_set(self, start_gfn: int, keys: bytes | bytearray) -> None:
        """Write it down only."""
        self.calls.append(("prepare", GfnRange(start_gfn, len(keys))))

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
        """As the ioctl."""
        self.calls.append(("set", GfnRange(start_gfn, buffer.nbytes)))
        self.vm.set_skeys(start_gfn, buffer)

    def keyop(self, operation: int, gfn: int, key: int = 0) -> int:
        """As the ioctl."""
        self.calls.append((KEYOPS[operation - 1], GfnRange(gfn, 1)))
        return self.vm.keyop(operation, gfn, key)

    def capture(self, frames: Sequence[GfnRange], into: memoryview, seconds: float, slice_seconds: float) -> OwnCapture:
        """Read slice by slice."""
        return OwnCapture(self, frames, into, seconds, slice_seconds)

    def close(self) -> None:
        """Forget the keys."""
        self.vm.close()

    def sets(self) -> list[GfnRange]:
        """Return what was set so far."""
        return [frames for call, frames in self.calls if call == "set"]


class Forgetful(Recording):
    """Keeps some frames' keys only after so many SETs of them: {gfn: how many are lost first}."""

    def __init__(self, forgets: dict[int, int]) -> None:
        super().__init__()
        self.vm.set_skeys(0, memoryview(bytearray(1)))
        self.forgets = dict(forgets)

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
        """Set the keys, but for those that are to be lost this time."""
        kept = bytearray(buffer)
        old = bytearray(len(kept))
        self.vm.get_skeys(start_gfn, memoryview(old))
        for index in range(len(kept)):
            if self.forgets.get(start_gfn + index, 0) > 0:
                self.forgets[start_gfn + index] -= 1
                kept[index] = old[index]
        super().set_skeys(start_gfn, memoryview(kept))


class Changing(Recording):
    """Changes each key on its way out of GET."""

    def __init__(self, change: Callable[[int], int]) -> None:
        super().__init__()
        self.change = change

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """As the ioctl, then change what it found."""
        answer = super().get_skeys(start_gfn, buffer)
        buffer[:] = bytes(map(self.change, buffer))
        return answer


class Refusing(Recording):
    """Refuses the calls whose numbers, counted from 0 and by kind, are given."""

    def __init__(self, errors: dict[tuple[str, int], KvmError | Exception]) -> None:
        super().__init__()
        self.errors = errors

    def _ask(self, kind: str) -> None:
        error = self.errors.get((kind, sum(call == kind for call, _ in self.calls)))
        if error is not None:
            self.calls.append((kind, GfnRange(0, 1)))
            raise error

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """As the ioctl, or the refusal."""
        self._ask("get")
        return super().get_skeys(start_gfn, buffer)

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
        """As the ioctl, or the refusal."""
        self._ask("set")
        super().set_skeys(start_gfn, buffer)

    def keyop(self, operation: int, gfn: int, key: int = 0) -> int:
        """As the ioctl, or the refusal."""
        self._ask(KEYOPS[operation - 1])
        return super().keyop(operation, gfn, key)


_: type[Backend] = Recording
