"""A daemon whose workers may trace nobody that has more rights."""

from __future__ import annotations

import os
import shutil
from typing import Final

from tests.injection.victims import cannot

WITHOUT_RIGHT: Final = ("setpriv", "--bounding-set=-sys_ptrace")
"""What a daemon is started through."""


def require_rights() -> None:
    """Only root has rights that can be taken from one process and left to another."""
    if os.geteuid() != 0:
        cannot("not root")
    if shutil.which(WITHOUT_RIGHT[0]) is None:
        cannot("there is no setpriv")
