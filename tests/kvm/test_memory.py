"""Guest memory: where it lies, what is behind it, and that nothing of it stays."""

from __future__ import annotations

import mmap
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from skeyd.kvm.errors import ClosedError
from skeyd.kvm.memory import GuestMemory
from tests.kvm.maps import mapped_bytes, mappings, pages_present

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "guest.mem"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
    return path


@pytest.fixture(params=["anonymous", "memfd", "file"])
def make(request: pytest.FixtureRequest, path: Path) -> Callable[[int], GuestMemory]:
    return {
        "anonymous": GuestMemory.anonymous,
        "memfd": GuestMemory.memfd,
        "file": lambda size: GuestMemory.file(str(path), size),
    }[request.param]


def behind(memory: GuestMemory) -> str:
    """Return the path of the file that is mapped."""
    return next(one.path for one in mappings() if one.start <= memory.address < one.end)


def _guarded() -> set[tuple[int, int]]:
    # Mappings without any access, as a reservation is.
    return {(one.start, one.end) for one in mappings() if one.access == "---p"}


@pytest.mark.parametrize("size", [MIB, 3 * MIB])
def test_memory_is_aligned_to_a_segment_and_zero_and_writable_to_its_last_byte(
    make: Callable[[int], GuestMemory], size: int
) -> None:
    # Several at once: a single one could be aligned by luck.
    memories = [make(size) for _ in range(4)]
    try:
        for memory in memories:
            assert memory.address % MIB == 0
            assert memory.size == size
        view = memories[0].view()
        assert len(view) == size
        assert (view[0], view[-1]) == (0, 0)
        view[0], view[size - 1] = 0x12, 0x34
        assert bytes(view[:2]) == b"\x12\0"
        assert bytes(view[-2:]) == b"\0\x34"
    finally:
        for memory in memories:
            memory.close()


def test_what_is_mapped_is_the_memory_and_no_rest_of_its_reservation(make: Callable[[int], GuestMemory]) -> None:
    before = _guarded()
    with make(2 * MIB) as memory:
        assert _guarded() == before
        assert mapped_bytes(memory.address, memory.address + 2 * MIB) == 2 * MIB


def test_closing_unmaps_all_of_it(make: Callable[[int], GuestMemory]) -> None:
    with make(2 * MIB) as memory:
        start = memory.address
    assert mapped_bytes(start, start + 2 * MIB) == 0


def test_closing_twice_is_fine_and_unmaps_nothing_that_came_after(make: Callable[[int], GuestMemory]) -> None:
    memory = make(2 * MIB)
    memory.close()
    with make(2 * MIB) as other:
        memory.close()
        assert mapped_bytes(other.address, other.address + 2 * MIB) == 2 * MIB


def test_memory_that_is_closed_has_no_address_and_no_view(make: Callable[[int], GuestMemory]) -> None:
    memory = make(MIB)
    memory.close()
    with pytest.raises(ClosedError):
        memory.address  # noqa: B018  a property that raises
    with pytest.raises(ClosedError):
        memory.view()


@pytest.mark.parametrize("size", [0, -MIB, 1, MIB - 1, MIB + 4096, 2 * MIB + 1])
def test_a_size_that_is_no_multiple_of_a_segment_is_refused(make: Callable[[int], GuestMemory], size: int) -> None:
    before = _guarded()
    # A memfd can't even be made of a negative size; then it is the kernel that says so.
    with pytest.raises((ValueError, OSError), match=r"multiple of 1048576 bytes|Invalid argument"):
        make(size)
    assert _guarded() == before


@pytest.mark.parametrize("count", [1, 1024, 1025])
def test_touching_brings_in_the_pages_that_were_named(
    make: Callable[[int], GuestMemory], path: Path, count: int
) -> None:
    os.truncate(path, 16 * MIB)
    with make(16 * MIB) as memory:
        assert memory.touch([]) == 0
        named = [2 * number + 1 for number in range(count)]
        assert memory.touch([page * mmap.PAGESIZE + page % mmap.PAGESIZE for page in named]) == count
        present = [page for page, there in enumerate(pages_present(memory.address, memory.size)) if there]
        # Of a file the kernel reads more than it is asked for, and maps what it has.
        assert set(named) <= set(present)
        assert present == named or behind(memory) == str(path)
        assert not any(memory.view())


@pytest.mark.parametrize("offset", [-1, MIB])
def test_what_is_not_in_the_memory_is_not_touched(make: Callable[[int], GuestMemory], offset: int) -> None:
    with make(MIB) as memory:
        with pytest.raises(ValueError, match="not within 1048576 bytes"):
            memory.touch([0, offset])
        assert not any(pages_present(memory.address, memory.size))


def test_touching_stops_where_a_file_was_cut_and_kills_nobody(path: Path) -> None:
    with GuestMemory.file(str(path), 4 * MIB) as memory:
        os.truncate(path, 2 * MIB)
        assert memory.touch(range(0, 4 * MIB, MIB)) == 2
        assert memory.touch([3 * MIB]) == 0


def test_touching_closed_memory_is_refused(make: Callable[[int], GuestMemory]) -> None:
    memory = make(MIB)
    memory.close()
    with pytest.raises(ClosedError):
        memory.touch([0])


def test_anonymous_memory_is_private_and_untouched_memory_costs_nothing() -> None:
    # A TiB, far more than any machine that runs this has.
    with GuestMemory.anonymous(1 << 40) as memory:
        view = memory.view()
        view[-1] = 1
        (own,) = (one for one in mappings() if one.start <= memory.address < one.end)
        assert own.access == "rw-p"


def test_a_memfd_is_mapped_shared_and_only_the_mapping_keeps_it() -> None:
    # That no descriptor stays is what this folder's fixture sees to.
    with GuestMemory.memfd(MIB, "some-guest") as memory:
        (own,) = (one for one in mappings() if one.start == memory.address)
        assert own.access == "rw-s"
        assert own.path == "/memfd:some-guest (deleted)"


def test_memory_too_large_for_the_address_space_is_enomem_and_leaves_nothing() -> None:
    before = _guarded()
    # By its limit: an s390x process has all 64 bits of it, and page tables that grow a level for each use of them.
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, hard))
    try:
        with pytest.raises(OSError, match="Cannot allocate memory"):
            GuestMemory.anonymous(2 << 40)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert _guarded() == before


def test_a_mapping_that_fails_gives_back_its_reservation() -> None:
    before = _guarded()
    # A shared mapping of no file: the reservation is made, and laying over it is EBADF.
    with pytest.raises(OSError, match="Bad file descriptor"):
        GuestMemory._map(MIB, -1, mmap.MAP_SHARED)
    assert _guarded() == before


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_file_is_shared_with_whoever_else_has_it(path: Path) -> None:
    with GuestMemory.file(str(path), 2 * MIB) as memory:
        view = memory.view()
        view[2 * MIB - 1] = 0xAB
        with path.open("r+b") as file:
            file.seek(2 * MIB - 1)
            assert file.read(1) == b"\xab"
            file.seek(5)
            file.write(b"\xcd")
            file.flush()
        assert view[5] == 0xCD


def test_a_file_keeps_its_size_and_what_lies_beyond_the_slot(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(b"beyond")
    with GuestMemory.file(str(path), 2 * MIB) as memory:
        memory.view()[: 2 * MIB] = b"\xff" * (2 * MIB)
    assert path.stat().st_size == 4 * MIB
    assert path.read_bytes()[2 * MIB : 2 * MIB + 6] == b"beyond"


def test_a_file_of_exactly_the_slots_size_will_do(path: Path) -> None:
    with GuestMemory.file(str(path), 4 * MIB) as memory:
        memory.view()[-1] = 1


@pytest.mark.parametrize("missing", [1, MIB, 4 * MIB])
def test_a_file_that_is_too_short_is_refused_and_not_grown(path: Path, missing: int) -> None:
    os.truncate(path, 4 * MIB - missing)
    with pytest.raises(ValueError, match=f"has {4 * MIB - missing} bytes, fewer than the slot's {4 * MIB}"):
        GuestMemory.file(str(path), 4 * MIB)
    assert path.stat().st_size == 4 * MIB - missing


def test_a_missing_file_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        GuestMemory.file(str(tmp_path / "missing"), MIB)
    assert list(tmp_path.iterdir()) == []


def test_a_symbolic_link_is_not_followed(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        GuestMemory.file(str(link), MIB)


def test_a_fifo_is_refused_and_does_not_hold_the_process_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="is no regular file"):
        GuestMemory.file(str(tmp_path / "fifo"), MIB)


def test_a_device_is_refused() -> None:
    with pytest.raises(ValueError, match="is no regular file"):
        GuestMemory.file("/dev/zero", MIB)


def test_a_directory_and_a_socket_are_refused(runtime_dir: Path) -> None:
    with pytest.raises(IsADirectoryError):
        GuestMemory.file(str(runtime_dir), MIB)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(runtime_dir / "socket"))
        with pytest.raises(OSError, match="No such device or address"):
            GuestMemory.file(str(runtime_dir / "socket"), MIB)
