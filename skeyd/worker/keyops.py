"""One frame's key by KVM_S390_KEYOP, where the kernel has it: read, set and verified, R reset."""

from __future__ import annotations

from skeyd.errors import Reason, SkeydError, no_keyop, reserved_bit
from skeyd.gfn import GfnRange
from skeyd.kvm import abi
from skeyd.kvm.errors import KvmError
from skeyd.storage_key import RESERVED, differing_runs, lost_runs
from skeyd.worker import refusals
from skeyd.worker.backend import Backend
from skeyd.worker.keys import REPAIRS, Keys


class KeyOps:
    """KEYOP on the frames of one VM that uses storage keys.

    KEYOP itself doesn't care whether the guest uses keys. But a key that it sets for one that doesn't is wiped when
    keys are enabled, and one that it reads there is a key that GET would not tell of: so None is the answer then,
    and nothing is done. SkeydError CAP_S390_KEYOP_MISSING where the kernel has no KEYOP; GFN_NOT_MAPPED before it is
    asked.

    Synchronization: none; one thread owns it, and the Keys of the same VM.
    """

    def __init__(self, backend: Backend, keys: Keys) -> None:
        self._backend = backend
        self._keys = keys
        self._uses_keys = False
        """Once true for good."""

    def read(self, gfn: int) -> int | None:
        """Return the frame's key (ISKE)."""
        return self._call(abi.KVM_S390_KEYOP_ISKE, gfn) if self._may(gfn) else None

    def reset_referenced(self, gfn: int) -> int | None:
        """Reset the frame's R (RRBE) and return R and C as they were."""
        return self._call(abi.KVM_S390_KEYOP_RRBE, gfn) if self._may(gfn) else None

    def write(self, gfn: int, key: int) -> tuple[int, bool] | None:
        """Set the frame's key (SSKE), prove it, and return the old one and whether it had to be set again.

        SkeydError KEYS_NOT_STORED; it has the metadata "uncertain" wherever the kernel was asked to set.
        """
        frame = GfnRange(gfn, 1)
        if key & RESERVED:
            # SSKE would drop the bit, and the key set would not be the one that was asked for.
            raise reserved_bit(key, gfn)
        if not self._may(gfn):
            return None
        try:
            old = self._call(abi.KVM_S390_KEYOP_SSKE, gfn, key)
            for repairs in range(REPAIRS + 1):
                found = self._call(abi.KVM_S390_KEYOP_ISKE, gfn)
                if not lost_runs(bytes([key]), bytes([found])):
                    return old, repairs > 0
                if repairs < REPAIRS:
                    self._call(abi.KVM_S390_KEYOP_SSKE, gfn, key)
            if not differing_runs(bytes([key]), bytes([found])):
                return old, True
            raise SkeydError(
                Reason.KEYS_NOT_STORED,
                f"the kernel did not keep key {key:#04x} of gfn {gfn:#x} in {REPAIRS} repairs; it has {found:#04x}",
                {"gfn": hex(gfn), "count": "1"},
            )
        except SkeydError as error:
            error.metadata["uncertain"] = str(frame)
            raise

    def _may(self, gfn: int) -> bool:
        if not self._backend.has_keyop:
            raise no_keyop()
        self._backend.memory_map.require_mapped(GfnRange(gfn, 1))
        self._uses_keys = self._uses_keys or self._keys.uses_keys()
        return self._uses_keys

    def _call(self, operation: int, gfn: int, key: int = 0) -> int:
        try:
            return self._backend.keyop(operation, gfn, key)
        except KvmError as error:
            raise refusals.of_key_call(error, GfnRange(gfn, 1)) from error
