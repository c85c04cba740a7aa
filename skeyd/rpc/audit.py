"""Whose VM a call adopts, changes or lets go, in the call's line of the log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from skeyd.errors import SkeydError
from skeyd.rpc.calls import note
from skeyd.worker.adoption import VMM_METADATA, Vmm

_TEXTS: Final = ("vmm_executable", "vmm_name")


def note_vmm(vmm: Vmm | None) -> None:
    """Note whose VM it is; nothing for one that was not adopted."""
    if vmm is not None:
        values = (vmm.pid, vmm.start_time, vmm.uid, vmm.executable, vmm.name)
        note(**dict(zip(VMM_METADATA, values, strict=True)))


@contextmanager
def noting_refused_vmm() -> Iterator[None]:
    """Note what a refusal has to say of the process that was to be adopted."""
    try:
        yield
    except SkeydError as error:
        for name in VMM_METADATA:
            if name in error.metadata:
                value = error.metadata[name]
                note(**{name: int(value) if value.isdecimal() and name not in _TEXTS else value})
        raise
