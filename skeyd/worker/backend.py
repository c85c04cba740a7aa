"""What every kind of VM offers: the storage-key ioctls, with the kernel's answers and the kernel's errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from skeyd.gfn import GfnRange, MemoryMap


class Capture(Protocol):
    """Keys that belong together, while they are being read. It ends with what `step` returns or raises."""

    def fileno(self) -> int | None:
        """Return what is readable once `step` has something to do, while another process reads; None: it always has.

        While there is one nobody else may ask the VM for anything.
        """

    def seconds_left(self) -> float | None:
        """After how long `step` is to be called though nothing is readable; None: never."""

    def step(self) -> int | None:
        """Go on a little. None: there is more; else for how long the VM's owner stood still, in nanoseconds.

        SkeydError FREEZE_EXPIRED where it took longer than it may; else as the Backend's own calls.
        """

    def cancel(self) -> None:
        """Let it end: nobody wants the keys. Where there is a descriptor `step` tells of the end; else it has ended."""

    def close(self) -> None:
        """End it now, and return when nothing is held or read any more. It may have ended."""


class KeptKeys(Protocol):
    """Keys of one time, of which slices are read."""

    @property
    def room(self) -> int:
        """Bytes of memory that they take."""

    def read(self, wanted: GfnRange, into: memoryview) -> None:
        """Fill `into` with the keys of frames in memory slots that were asked for."""

    def close(self) -> None:
        """Give the memory back."""


class Printing(Capture, Protocol):
    """A Capture of all keys there are."""

    @property
    def keys(self) -> KeptKeys:
        """They are there once it has ended well."""


class Backend(Protocol):
    """A VM at the level of KVM_S390_GET_SKEYS, KVM_S390_SET_SKEYS and KVM_S390_KEYOP.

    Refusals are KvmErrors, as from a kernel.
    """

    kernel: str
    """uname -r, or the generation that is simulated."""
    memory_map: MemoryMap
    has_keyop: bool
    """Whether there is KVM_S390_KEYOP."""

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """As skeyd.kvm.vm.Vm.get_skeys: False where the guest uses no storage keys."""

    def prepare_set(self, start_gfn: int, keys: bytes | bytearray) -> None:
        """Do what can be done for a SET of these keys to lose none. It may be nothing: no proof rests on it.

        All frames are in memory slots. Nothing is changed but R and C of frames whose keys are set next.
        """

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
        """As skeyd.kvm.vm.Vm.set_skeys."""

    def keyop(self, operation: int, gfn: int, key: int = 0) -> int:
        """As skeyd.kvm.vm.Vm.keyop."""

    def capture(self, frames: Sequence[GfnRange], into: memoryview, seconds: float, slice_seconds: float) -> Capture:
        """Begin to fill `into` with the keys of these frames as they are at one moment, end to end.

        All frames are in memory slots and the guest uses keys. It takes `seconds` at most, and an ioctl about
        `slice_seconds`. Nobody sets a key meanwhile. `into` is memory that forked processes share.
        """

    def close(self) -> None:
        """End the VM. Closing twice is fine."""
