"""A worker whose simulated VMs take their time: each key that is read costs NANOSECONDS_A_KEY, as a real walk does.

benchmarks.daemon has it started in place of skeyd/worker/__main__.py, in the same way (`python -I -S`). It is CPU time
and spent without Python's lock, as an ioctl's is (benchmarks/peer/source.c).
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

_HERE: Final = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100,PTH120  pathlib is slow to load
if os.path.dirname(_HERE) not in sys.path:  # noqa: PTH120
    sys.path.append(os.path.dirname(_HERE))  # noqa: PTH120

from skeyd.worker import process  # noqa: E402
from skeyd.worker.simulated import SimulatedVm  # noqa: E402

NANOSECONDS_A_KEY: Final = 50

_source: Final = ctypes.CDLL(os.path.join(_HERE, "peer", "build", "libsource.so"))  # noqa: PTH118
_source.source_used.restype = ctypes.c_uint64
_source.source_work_until.argtypes = (ctypes.c_uint64,)


class SlowVm(SimulatedVm):
    """A simulated VM that takes NANOSECONDS_A_KEY for each key that is read, the reading itself included."""

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """As the ioctl, and as slow."""
        begun = _source.source_used()
        uses_keys = super().get_skeys(start_gfn, buffer)
        if uses_keys:
            _source.source_work_until(begun + buffer.nbytes * NANOSECONDS_A_KEY)
        return uses_keys


if __name__ == "__main__":
    setattr(process, "SimulatedVm", SlowVm)  # noqa: B010
    sys.exit(process.serve_vm(int(sys.argv[2])) if sys.argv[1] == "vm" else process.report_host())
