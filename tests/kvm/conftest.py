"""What the tests of the kernel's side are held to: no descriptor stays open."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import NoReturn

import pytest

from skeyd.kvm.errors import KvmError
from skeyd.kvm.probe import PGSTE_REMEDY
from skeyd.kvm.system import Kvm
from skeyd.kvm.vm import Vm


@pytest.fixture(autouse=True)
def no_fd_left(open_fds: None) -> None:
    """Hold every test of this folder to it."""


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    """Open the real /dev/kvm. Where that can't be, the test is skipped; SKEYD_REQUIRE_KVM=1 makes that a failure."""
    try:
        device = Kvm()
    except OSError as error:
        _cannot(f"/dev/kvm can't be opened: {error.strerror}")
    with device:
        yield device


@pytest.fixture
def real_vm(kvm: Kvm) -> Iterator[Vm]:
    """Make a VM of the real kernel. Likewise where an s390x process lacks PGSTE page tables."""
    try:
        vm = kvm.create_vm()
    except KvmError as error:
        if error.errno != errno.EINVAL or os.uname().machine != "s390x":
            raise
        _cannot(f"{error}; {PGSTE_REMEDY}")
    with vm:
        yield vm


def _cannot(why: str) -> NoReturn:
    if os.environ.get("SKEYD_REQUIRE_KVM") == "1":
        pytest.fail(why)
    pytest.skip(f"{why}; SKEYD_REQUIRE_KVM=1 makes this a failure")
