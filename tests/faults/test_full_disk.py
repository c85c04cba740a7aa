"""A disk that is full, and a file that may not grow: the old keys of a call can't be kept."""

from __future__ import annotations

import errno
import itertools
import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

import grpc
import pytest

from tests.faults.calls import set_skeys
from tests.faults.processes import NoNamespace
from tests.faults.subjects import KERNELS, Guest
from tests.faults.world import World

DISK_BYTES: Final = 1 << 20
MODES: Final = (False, True)


@pytest.fixture(scope="module")
def small_disk() -> Iterator[World]:
    """Run a host whose runtime directory is on a small disk of its own.

    It takes a mount namespace: root has one, and others where the kernel lets users make namespaces.
    """
    try:
        made = World(disk_bytes=DISK_BYTES)
    except NoNamespace:
        reason = "no mount namespace for this user: run it as root, or set kernel.unprivileged_userns_clone=1"
        if os.environ.get("CI") == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(f"{reason} (CI=true makes this a failure)")
    try:
        yield made
    finally:
        made.close()


@contextmanager
def filled(world: World) -> Iterator[None]:
    """Leave no room on the disk meanwhile."""
    filler = world.directory / "filler"
    fd = os.open(filler, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with suppress(OSError):
            while True:
                os.write(fd, bytes(4096))
        assert not os.fstatvfs(fd).f_bavail
        yield
    finally:
        os.close(fd)
        filler.unlink()


@contextmanager
def file_bytes(guest: Guest, most: int) -> Iterator[None]:
    """Let no file of the guest's worker grow beyond so many bytes."""
    before = resource.prlimit(guest.worker_pid, resource.RLIMIT_FSIZE)
    resource.prlimit(guest.worker_pid, resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.prlimit(guest.worker_pid, resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kernel", [one for one in KERNELS if one != "owned"])
@pytest.mark.parametrize("keep", MODES)
def test_a_disk_that_is_full_refuses_the_call_that_needs_it(small_disk: World, kernel: str, keep: bool) -> None:
    guest = small_disk.guest(kernel)
    plan = small_disk.plan(guest, keep=keep)
    with small_disk.judged(guest, plan) as case, filled(small_disk):
        case.told = small_disk.set_skeys(plan)
    if keep:
        assert case.told.outcome == "APPLIED"  # it keeps no old keys
    else:
        assert (case.told.code, case.told.reason) == ("RESOURCE_EXHAUSTED", "HOST_EXHAUSTED")
        assert case.told.outcome == case.outcome == "ROLLED_BACK"


@pytest.mark.parametrize("chunks", [1, 4])
def test_a_disk_that_is_full_by_the_time_of_the_rollback_is_no_hindrance(small_disk: World, chunks: int) -> None:
    guest = small_disk.guest("4.19")
    plan = small_disk.plan(guest, end="close", chunks=chunks)
    with ExitStack() as disk, small_disk.judged(guest, plan) as case:
        answered = itertools.count(1)

        def fill(point: str) -> None:
            if point == "chunk.answered" and next(answered) == chunks:
                disk.enter_context(filled(small_disk))

        case.told = set_skeys(small_disk.front.connection, plan, fill)
        disk.close()
    assert case.told.outcome == case.outcome == "ROLLED_BACK"


def test_a_vm_that_there_is_no_room_for_is_not_made_and_leaves_nothing(small_disk: World) -> None:
    small_disk.require_keys(small_disk.bystander, small_disk.bystander.old)
    before = sorted(path.name for path in (small_disk.directory / "vms").iterdir())
    with filled(small_disk), pytest.raises(grpc.RpcError) as refused:
        small_disk.new_guest("7.2")
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert sorted(path.name for path in (small_disk.directory / "vms").iterdir()) == before
    small_disk.require_keys(small_disk.bystander, small_disk.bystander.old)


@pytest.mark.parametrize("most", [0, 100, 150])
def test_a_file_that_may_not_grow_refuses_the_slice(world: World, most: int) -> None:
    guest = world.guest("7.0")
    plan = world.plan(guest)
    with ExitStack() as limit, world.judged(guest, plan) as case:
        answered = itertools.count(1)

        def bound(point: str) -> None:
            # Not before the memory that keys are passed in has been made, which is a file too.
            if point == "chunk.answered" and next(answered) == 1:
                limit.enter_context(file_bytes(guest, most))

        case.told = set_skeys(world.front.connection, plan, bound)
        limit.close()
    assert os.strerror(errno.EFBIG) in case.told.message
    assert case.told.outcome == case.outcome == "ROLLED_BACK"


@pytest.mark.parametrize("keep", MODES)
def test_a_log_that_takes_nothing_ends_no_vm(world: World, keep: bool) -> None:
    """The memory that keys are passed in can't be made, which nobody foresaw, and the traceback can't be written."""
    guest = world.guest("7.2")
    plan = world.plan(guest, keep=keep)
    with world.judged(guest, plan) as case, file_bytes(guest, 0):
        case.told = world.set_skeys(plan)
    assert (case.told.reason, case.outcome) == ("WORKER_FAILED", "UNCHANGED")
