"""Whose VM a call adopts, changes or lets go, in the call's line of the log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from skeyd.errors import SkeydError
from skeyd.rpc.calls import note
from skeyd.worker.adoption import Vmm

FIELDS: Final = ("vmm_pid", "vmm_start_time", "vmm_uid", "vmm_executable", "vmm_name")


def note_vmm(vmm: Vmm | None) -> None:
    """Note whose VM it is; nothing for one that was not adopted."""
    if vmm is not None:
        values = (vmm.pid, vmm.start_time, vmm.uid, vmm.executable, vmm.name)
        note(**dict(zip(FIELDS, values, strict=True)))


@contextmanager
def noting_refused_vmm() -> Iterator[None]:
    """Note what a refusal has to say of the process that was to be adopted."""
    try:
        yield
    except SkeydError as error:
        told = {name: error.metadata[name] for name in FIELDS if name in error.metadata}
        note(
            **{name: int(value) if value.isdecimal() and name != FIELDS[-1] else value for name, value in told.items()}
        )
        raise
