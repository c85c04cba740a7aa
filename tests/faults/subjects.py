"""What is hurt, and how: guests, their keys, what a call sets, faults."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from skeyd.v1 import vm_pb2

FRAMES: Final = 1024
RANGES: Final = ((100, 412), (700, 100), (820, 100))
"""What a call sets, of a guest of four segments: chunks of 200, 200, 12, 100 and 100 frames, which are 13 slices."""
KEYS: Final = sum(count for _, count in RANGES)
KERNELS: Final = {
    "4.19": vm_pb2.SIMULATED_KERNEL_LINUX_4_19,
    "7.0": vm_pb2.SIMULATED_KERNEL_LINUX_7_0,
    "7.2": vm_pb2.SIMULATED_KERNEL_LINUX_7_2,
    "owned": vm_pb2.SIMULATED_KERNEL_UNSPECIFIED,
}
"""Kernels below a VM; "owned" is this machine's own."""

_EVEN: Final = bytes(byte & 0xFE for byte in range(256))
_ACC_F: Final = bytes(byte & 0xF8 for byte in range(256))


def some_keys(count: int, seed: int) -> bytes:
    """Return keys that look like nothing in particular; the same ones for the same seed."""
    return random.Random(seed).randbytes(count).translate(_EVEN)  # noqa: S311  no secret


def acc_f(keys: bytes) -> bytes:
    """Return what nobody but a SET changes."""
    return keys.translate(_ACC_F)


OLD: Final = some_keys(256, 1) + bytes(256) + some_keys(256, 2) + bytes(256)
"""Keys of a guest before a call. The second and the fourth MiB have none yet: there Linux up to 6.19 loses one."""


@dataclass(frozen=True)
class Fault:
    """Something to happen once, or, with an action that "always:" begins, from then on."""

    who: str
    """ "front", "client" or "worker"; the last is the worker of the VM that is written to."""
    point: str
    action: str
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.who}-{self.point}-{self.action}-{self.nth}"


@dataclass
class Guest:
    """A VM to be written to."""

    name: str
    kernel: str
    old: bytes | None
    """All its keys; None: it uses none."""
    incarnation: str
    worker_pid: int

    @property
    def vm_id(self) -> str:
        """The name without its "vms/"."""
        return self.name.removeprefix("vms/")
