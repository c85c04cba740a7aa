"""Whether a VM is the one that a client means, or another that has got its name since."""

from __future__ import annotations

from skeyd.errors import Reason, SkeydError
from skeyd.worker.protocol import Hello


def require_incarnation(hello: Hello, vm: str, meant: str) -> None:
    """VM_REPLACED where the VM of a session has another incarnation than the one that is meant."""
    if meant != hello.incarnation:
        raise SkeydError(
            Reason.VM_REPLACED,
            f"the {vm} that is meant has the incarnation {meant[:64]!r}; the one that is here has {hello.incarnation}",
            {"vm": vm, "incarnation": hello.incarnation},
        )
