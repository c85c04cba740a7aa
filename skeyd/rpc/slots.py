"""A bound on how many calls of a kind run at once, and that no VM has them all."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from skeyd.errors import Reason, SkeydError


class CallSlots:
    """So many calls and no more: one more is refused at once, it doesn't wait. `reason` says that none is free.

    A sharer, as a VM, gets another only while it has fewer than are free (Choudhury and Hahne's dynamic threshold, at
    1): alone at most half of all, and each that comes then half of what is free. Something is left for whoever has none
    yet, until the last: of 48 slots six that want all leave nothing.

    Synchronization: any thread.
    """

    def __init__(self, most: int, what: str, reason: Reason) -> None:
        self._lock = threading.Lock()
        self._free = most
        self._held: Counter[str] = Counter()
        self._most = most
        self._what = what
        self._reason = reason

    @contextmanager
    def taken(self, sharer: str = "", refusal: Reason = Reason.TOO_MANY_CALLS_ON_VM) -> Iterator[None]:
        """Hold a slot. SkeydError: the reason given above, or `refusal` where the sharer has its share.

        `sharer`: a VM's name, or what else may not have all; empty: there is no share.
        """
        with self._lock:
            if not self._free:
                raise SkeydError(
                    self._reason, f"{self._most} {self._what} run, as many as are allowed; try again later"
                )
            held = self._held[sharer]
            if sharer and held >= self._free:
                raise self._over_share(sharer, held, refusal)
            self._free -= 1
            self._held[sharer] += 1
        try:
            yield
        finally:
            with self._lock:
                self._free += 1
                self._held[sharer] -= 1
                if not self._held[sharer]:
                    del self._held[sharer]

    def _over_share(self, sharer: str, held: int, reason: Reason) -> SkeydError:
        metadata = {"vm": sharer} if reason is Reason.TOO_MANY_CALLS_ON_VM else {}
        return SkeydError(
            reason,
            f"{held} of at most {self._most} {self._what} are of {sharer}, and the {self._free} that are free are kept "
            "for others; try again later",
            metadata,
        )
