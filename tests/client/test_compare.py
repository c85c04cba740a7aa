"""Two sides compared: every difference is found, and nothing is moved that doesn't differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skeyd.client import (
    Client,
    ClientError,
    Comparison,
    Difference,
    Digest,
    FileSide,
    KeyStream,
    Snapshot,
    StreamError,
    VmSide,
    connect,
    write_snapshot,
)
from skeyd.client.compare import _joined
from skeyd.gfn import GfnRange
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2
from tests.client.lying_daemon import LyingDaemon, header, trailer
from tests.client.test_snapshot import end_record, file_of, header_record, keys_record
from tests.daemon import DaemonProcess
from tests.examples import examples
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import GENERATIONS, MIB, Stubs, new_id, some_keys
from tests.rpc.test_digest_skeys import expected, tree_of

LEAF: Final = 1 << 16
LEAF_MIB: Final = 256
GIB: Final = 1024
LAST_MIB: Final = (1 << 64) // MIB - 1

Found = dict[int, tuple[int | None, int | None]]
"""By gfn: the key on the left, and the key on the right."""


@pytest.fixture(scope="session")
def client(shared_daemon: DaemonProcess) -> Iterator[Client]:
    """Connect to the shared daemon."""
    with connect(shared_daemon.target) as connected:
        yield connected


def frame_by_frame(differences: list[Difference]) -> Found:
    """Take differences apart; AssertionError where they do not ascend or have not the keys of their frames."""
    found: Found = {}
    end = 0
    for one in differences:
        assert one.frames.start >= end
        end = one.frames.end
        assert (one.left is None, one.right is None) != (True, True)
        for side in (one.left, one.right):
            assert side is None or len(side) == one.frames.count
        for index in range(one.frames.count):
            left, right = (None if side is None else side[index] for side in (one.left, one.right))
            found[one.frames.start + index] = left, right
    return found


def naive(left: dict[int, int], right: dict[int, int], mask: int = 0xF8) -> Found:
    """Compare frame by frame."""
    keys = {gfn: (left.get(gfn), right.get(gfn)) for gfn in sorted({*left, *right})}
    return {
        gfn: (one, other) for gfn, (one, other) in keys.items() if one is None or other is None or (one ^ other) & mask
    }


def with_keys(stubs: Stubs, new_vm: NewVm, *slots: tuple[int, int], **keys: bytes) -> str:
    """Make a VM that uses keys; g10=b"…" are keys of frames from 0x10 on."""
    name = new_vm(*slots)
    wanted = [(int(gfn[1:], 16), value) for gfn, value in keys.items()]
    stubs.set(name, wanted or [(slots[0][0] * 256, b"\0")])
    return name


def test_two_guests_of_16_gib_that_differ_in_one_key_move_one_leaf_a_side(
    client: Client, stubs: Stubs, new_vm: NewVm
) -> None:
    gfn = 37 * LEAF + 1234
    one = with_keys(stubs, new_vm, (0, 16 * GIB), g0=b"\x30" * 1000)
    other = with_keys(stubs, new_vm, (0, 16 * GIB), g0=b"\x30" * 1000)
    stubs.set(other, [(gfn, b"\x40")])
    left, right = VmSide(client, one), VmSide(client, other)
    comparison = Comparison(left, right)
    assert not comparison.same
    assert list(comparison) == [Difference(GfnRange(gfn, 1), b"\0", b"\x40")]
    assert (left.keys_moved, right.keys_moved) == (LEAF, LEAF)


def test_two_guests_that_are_the_same_move_nothing(client: Client, stubs: Stubs, new_vm: NewVm) -> None:
    keys = some_keys(300)
    one = with_keys(stubs, new_vm, (0, GIB), g5=keys)
    other = with_keys(stubs, new_vm, (0, 512), (512, 512), g5=bytes(key ^ 0x06 for key in keys))
    left, right = VmSide(client, one), VmSide(client, other)
    comparison = Comparison(left, right)
    assert comparison.same
    assert list(comparison) == []
    assert left.keys_moved == right.keys_moved == 0


def test_referenced_and_changed_differ_where_they_are_asked_for(client: Client, stubs: Stubs, new_vm: NewVm) -> None:
    one = with_keys(stubs, new_vm, (0, 1), g5=b"\x30\x36\x32")
    other = with_keys(stubs, new_vm, (0, 1), g5=b"\x30\x30\x32")
    assert Comparison(VmSide(client, one), VmSide(client, other)).same
    sides = [VmSide(client, name, with_referenced_changed=True) for name in (one, other)]
    assert list(Comparison(*sides)) == [Difference(GfnRange(6, 1), b"\x36", b"\x30")]


def test_sides_whose_digests_cover_different_bits_can_not_be_compared(
    client: Client, stubs: Stubs, new_vm: NewVm
) -> None:
    name = new_vm((0, 1))
    with pytest.raises(ValueError, match="referenced and changed"):
        Comparison(VmSide(client, name), VmSide(client, name, with_referenced_changed=True))


@pytest.mark.parametrize("kernel", GENERATIONS, ids=vm_pb2.SimulatedKernel.Name)
def test_a_guest_of_any_generation_is_compared(
    client: Client, stubs: Stubs, new_vm: NewVm, kernel: vm_pb2.SimulatedKernel.ValueType
) -> None:
    one, other = new_vm((0, 1), kernel=kernel), new_vm((0, 1))
    for name, key in ((one, 0x38), (other, 0x30)):
        stubs.set(name, [(0, bytes([key]) * 256)])
    (found,) = Comparison(VmSide(client, one), VmSide(client, other))
    assert found == Difference(GfnRange(0, 256), stubs.get(one).keys, b"\x30" * 256)


def test_frames_on_one_side_only_are_differences_of_their_own(client: Client, stubs: Stubs, new_vm: NewVm) -> None:
    one = with_keys(stubs, new_vm, (0, 2), (8, 1), g0=b"\x10" * 512)
    other = with_keys(stubs, new_vm, (1, 2), g100=b"\x10" * 512)
    found = list(Comparison(VmSide(client, one), VmSide(client, other)))
    assert found == [
        Difference(GfnRange(0, 256), b"\x10" * 256, None),
        Difference(GfnRange(512, 256), None, b"\x10" * 256),
        Difference(GfnRange(2048, 256), bytes(256), None),
    ]


def test_whole_leaves_on_one_side_only_are_moved_once_and_from_there(
    client: Client, stubs: Stubs, new_vm: NewVm
) -> None:
    # The left one's tree branches at level 2, the right one's at a leaf; what both have is the same.
    far = 64 * GIB
    one = with_keys(stubs, new_vm, (0, LEAF_MIB), (far, 3 * LEAF_MIB))
    other = with_keys(stubs, new_vm, (0, LEAF_MIB))
    left, right = VmSide(client, one), VmSide(client, other)
    found = frame_by_frame(list(Comparison(left, right)))
    assert found == dict.fromkeys(range(far * 256, far * 256 + 3 * LEAF), (0, None))
    assert (left.keys_moved, right.keys_moved) == (3 * LEAF, 0)
    back = frame_by_frame(list(Comparison(VmSide(client, other), VmSide(client, one))))
    assert back == dict.fromkeys(found, (None, 0))


@pytest.mark.parametrize("far", [256, 64 * GIB, 16 * 1024 * GIB, LAST_MIB - 255], ids="level-{}".format)
def test_trees_that_branch_at_different_levels_are_compared(
    client: Client, stubs: Stubs, new_vm: NewVm, far: int
) -> None:
    one = with_keys(stubs, new_vm, (0, 1), (far, 256), g5=b"\x10")
    other = with_keys(stubs, new_vm, (0, 1), g5=b"\x20")
    for first, second in ((one, other), (other, one)):
        left, right = VmSide(client, first), VmSide(client, second)
        found = frame_by_frame(list(Comparison(left, right)))
        assert found[5] == ((0x10, 0x20) if first == one else (0x20, 0x10))
        assert sorted(found) == [5, *range(far * 256, far * 256 + 256 * 256)]
        assert sorted((left.keys_moved, right.keys_moved)) == [256, 256 + LEAF]


def test_keyless_guests_are_the_same_and_a_keyless_guest_differs_from_others_without_a_frame_being_moved(
    client: Client, stubs: Stubs, new_vm: NewVm
) -> None:
    one, other = new_vm((0, 1)), new_vm((0, 2))
    keyed = with_keys(stubs, new_vm, (0, 1))
    assert Comparison(VmSide(client, one), VmSide(client, other)).same
    for first, second in ((one, keyed), (keyed, one)):
        left, right = VmSide(client, first), VmSide(client, second)
        comparison = Comparison(left, right)
        assert not comparison.same
        assert comparison.left.uses_storage_keys == (first == keyed)
        assert list(comparison) == []
        assert left.keys_moved == right.keys_moved == 0


def test_only_the_ranges_are_compared(client: Client, stubs: Stubs, new_vm: NewVm) -> None:
    one = with_keys(stubs, new_vm, (0, 1), (2, 1), g0=b"\x10" * 256, g200=b"\x10" * 256)
    other = with_keys(stubs, new_vm, (0, 3), g0=b"\x20" * 768)

    def found(*within: GfnRange) -> Found:
        left, right = VmSide(client, one, within), VmSide(client, other, within)
        made = frame_by_frame(list(Comparison(left, right)))
        assert left.keys_moved <= right.keys_moved <= sum(range_.count for range_ in within)
        return made

    assert found(GfnRange(3, 2), GfnRange(5, 1), GfnRange(20, 1)) == dict.fromkeys((3, 4, 5, 20), (16, 32))
    across = found(GfnRange(255, 258))
    assert across == {gfn: (0x10 if gfn in (255, 512) else None, 0x20) for gfn in range(255, 513)}
    with pytest.raises(ClientError) as refused:
        found(GfnRange(256, 1))
    assert refused.value.reason == "GFN_NOT_MAPPED"


def test_with_clip_ranges_may_lie_anywhere(client: Client, stubs: Stubs, new_vm: NewVm) -> None:
    name = with_keys(stubs, new_vm, (1, 1), (3, 1), g100=b"\x10" * 256)
    root = VmSide(client, name).digest().node
    assert VmSide(client, name, [GfnRange(0, 10_000)], clip=True).digest().node == root
    assert VmSide(client, name, [GfnRange(0, 300), GfnRange(400, 2**64 - 400)], clip=True).digest().node != root
    for within in ([], [GfnRange(0, 256), GfnRange(512, 256)], [GfnRange(2**64 - 1, 1)]):
        nowhere = VmSide(client, name, within, clip=True)
        found = nowhere.digest()
        assert (found.uses_storage_keys, found.node, found.children) == (True, None, ())
        assert list(nowhere.keys(GfnRange(0, 2**64))) == []
    assert not VmSide(client, new_vm((0, 1)), [GfnRange(9999, 1)], clip=True).digest().uses_storage_keys


def test_vms_of_two_daemons_are_compared(client: Client, stubs: Stubs, new_vm: NewVm, daemon: DaemonProcess) -> None:
    here = with_keys(stubs, new_vm, (0, 1), g7=b"\x30\x40")
    with Stubs(daemon.target) as elsewhere, connect(daemon.target) as other:
        there = elsewhere.create("there", (0, 1)).name
        elsewhere.set(there, [(8, b"\x48\x50")])
        found = frame_by_frame(list(Comparison(VmSide(client, here), VmSide(other, there))))
    assert found == {7: (0x30, 0), 8: (0x40, 0x48), 9: (0, 0x50)}


# A file


@contextmanager
def snapshot_of(client: Client, vm: str, path: Path, *within: GfnRange) -> Iterator[Snapshot]:
    with client.get_skeys(vm, within, max_chunk_keys=100) as stream:
        write_snapshot(path, stream)
    with Snapshot(path) as snapshot:
        yield snapshot


def test_a_guest_is_compared_with_a_file(client: Client, stubs: Stubs, new_vm: NewVm, tmp_path: Path) -> None:
    name = with_keys(stubs, new_vm, (0, 1), (2 * LEAF_MIB, 1), g5=some_keys(200))
    start = 2 * LEAF
    with snapshot_of(client, name, tmp_path / "a.skeys") as snapshot:
        before = dict(enumerate(stubs.get(name, (0, 256)).keys))
        assert Comparison(VmSide(client, name), FileSide(snapshot)).same
        stubs.set(name, [(100, bytes(key ^ 0xF8 for key in some_keys(50, 1))), (start + 9, b"\x18")])
        left, right = VmSide(client, name), FileSide(snapshot)
        found = frame_by_frame(list(Comparison(left, right)))
        after = dict(enumerate(stubs.get(name, (0, 256)).keys))
        assert found == naive(after, before) | {start + 9: (0x18, 0)}
        assert (left.keys_moved, right.keys_moved) == (512, 0)
        assert found == {
            gfn: (one, other)
            for gfn, (other, one) in frame_by_frame(list(Comparison(FileSide(snapshot), VmSide(client, name)))).items()
        }


def test_a_file_of_a_guest_without_keys_is_compared(
    client: Client, stubs: Stubs, new_vm: NewVm, tmp_path: Path
) -> None:
    name = new_vm((0, 1))
    with snapshot_of(client, name, tmp_path / "a.skeys") as snapshot:
        assert Comparison(VmSide(client, name), FileSide(snapshot)).same
        stubs.set(name, [(0, b"\x10")])
        comparison = Comparison(VmSide(client, name), FileSide(snapshot))
        assert not comparison.same
        assert list(comparison) == []


@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_two_files_differ_in_what_differs_frame_by_frame(tmp_path: Path, data: st.DataObject) -> None:
    edges = [0x40, LEAF, 2 * LEAF, 256 * LEAF, 256 * 256 * LEAF, 2**64 - 20]

    def some() -> dict[int, int]:
        keys: dict[int, int] = {}
        for edge in data.draw(st.lists(st.sampled_from(edges), min_size=1, max_size=4, unique=True)):
            start = edge + data.draw(st.integers(-20, 5))
            values = data.draw(st.lists(st.sampled_from([0, 0x10, 0x16, 0x38]), min_size=1, max_size=12))
            keys |= dict(enumerate(values, start))
        return keys

    def file(path: Path, keys: dict[int, int]) -> Path:
        records = [keys_record(gfn, bytes([key])) for gfn, key in sorted(keys.items())]
        path.write_bytes(file_of(header_record(), *records, end_record(bytes(key for _, key in sorted(keys.items())))))
        return path

    one = some()
    other = some() if data.draw(st.booleans()) else one | some()
    rc = data.draw(st.booleans())
    within: list[GfnRange] = []
    if data.draw(st.booleans()):
        cut = data.draw(st.sampled_from(edges))
        within = [GfnRange(0, cut), GfnRange(cut + 3, 2**64 - cut - 3)]
    with Snapshot(file(tmp_path / "a", one)) as first, Snapshot(file(tmp_path / "b", other)) as second:
        sides = [FileSide(snapshot, within, with_referenced_changed=rc) for snapshot in (first, second)]
        comparison = Comparison(*sides)
        found = frame_by_frame(list(comparison))

    def inside(keys: dict[int, int]) -> dict[int, int]:
        return {g: key for g, key in keys.items() if not within or any(w.start <= g < w.end for w in within)}

    wanted = naive(inside(one), inside(other), 0xFE if rc else 0xF8)
    assert found == wanted
    assert comparison.same == (not wanted)


def test_runs_of_differences_are_as_long_as_they_can_be_within_a_leaf(
    client: Client, stubs: Stubs, new_vm: NewVm
) -> None:
    one = with_keys(stubs, new_vm, (0, 4), g5=some_keys(900, 1))
    other = with_keys(stubs, new_vm, (0, 4), g5=some_keys(900, 2))
    found = list(Comparison(VmSide(client, one), VmSide(client, other)))
    wanted = naive(dict(enumerate(stubs.get(one).keys)), dict(enumerate(stubs.get(other).keys)))
    assert frame_by_frame(found) == wanted
    runs = [list(group) for _, group in groupby(enumerate(wanted), lambda item: item[1] - item[0])]
    assert [difference.frames.count for difference in found] == [len(run) for run in runs]


def test_leaves_that_differ_side_by_side_are_read_in_one_stream(
    client: Client, stubs: Stubs, new_vm: NewVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (with_keys(stubs, new_vm, (0, 4 * LEAF_MIB)) for _ in range(2))
    for leaf in (0, 1, 3):
        stubs.set(other, [(leaf * LEAF + 7, b"\x40")])
    asked: list[list[GfnRange]] = []
    read = client.get_skeys

    def counted(vm: str, ranges: list[GfnRange]) -> AbstractContextManager[KeyStream]:
        asked.append(ranges)
        return read(vm, ranges)

    monkeypatch.setattr(client, "get_skeys", counted)
    found = list(Comparison(VmSide(client, one), VmSide(client, other)))
    assert [difference.frames.start for difference in found] == [7, LEAF + 7, 3 * LEAF + 7]
    assert asked == [[GfnRange(0, 2 * LEAF)]] * 2 + [[GfnRange(3 * LEAF, LEAF)]] * 2


def test_nobody_is_asked_again_for_what_it_has_told(
    client: Client, stubs: Stubs, new_vm: NewVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = with_keys(stubs, new_vm, (0, 1), (256, 1), (64 * GIB, 1), g5=b"\x10")
    small = with_keys(stubs, new_vm, (0, 1), g5=b"\x20")
    asked: list[tuple[str, tuple[int, int] | None]] = []
    digest = client.digest_skeys

    def noted(vm: str, within: Sequence[GfnRange], **other: Any) -> Digest:
        asked.append((vm, other["node"]))
        return digest(vm, within, **other)

    monkeypatch.setattr(client, "digest_skeys", noted)
    for first, second in ((large, small), (small, large)):
        asked.clear()
        list(Comparison(VmSide(client, first), VmSide(client, second)))
        assert sorted(asked, key=str) == sorted([(large, None), (large, (1, 0)), (small, None)], key=str)


def test_no_more_leaves_are_read_in_one_stream_than_a_node_of_level_1_has() -> None:
    leaves = [GfnRange(leaf * LEAF, LEAF) for leaf in range(600) if leaf != 300]
    counts = [(frames.start // LEAF, frames.count // LEAF) for frames in _joined(leaves)]
    assert counts == [(0, 256), (256, 44), (301, 256), (557, 43)]


# What is not as it should be


def test_a_guest_that_is_replaced_in_the_middle_is_an_error(client: Client, stubs: Stubs) -> None:
    vm_id = new_id()
    names = [stubs.create(vm_id, (0, 1)).name, stubs.create(new_id(), (0, 1)).name]
    try:
        for name, key in zip(names, (b"\x10", b"\x20"), strict=True):
            stubs.set(name, [(0, key)])
        left, right = (VmSide(client, name) for name in names)
        comparison = Comparison(left, right)
        stubs.delete(names[0])
        stubs.create(vm_id, (0, 1))
        stubs.set(names[0], [(0, b"\x10")])
        with pytest.raises(ClientError, match="another VM than a moment ago") as replaced:
            list(comparison)
        assert (replaced.value.code, replaced.value.reason) == (grpc.StatusCode.ABORTED, "VM_REPLACED")
        assert replaced.value.metadata == {"vm": names[0]}
        with pytest.raises(ClientError) as replaced:
            left.digest()
        assert replaced.value.reason == "VM_REPLACED"
    finally:
        for name in names:
            stubs.delete(name)


def test_a_guest_that_is_gone_is_an_error(client: Client, stubs: Stubs) -> None:
    with pytest.raises(ClientError) as refused:
        VmSide(client, "vms/nobody")
    assert refused.value.reason == "VM_NOT_FOUND"


@pytest.fixture
def lying(tmp_path: Path) -> Iterator[LyingDaemon]:
    """Serve lies about a VM of one leaf."""
    with LyingDaemon(tmp_path) as daemon:
        daemon.looking = lambda _: vm_pb2.Vm(incarnation="1", memory_slots=[vm_pb2.MemorySlot(count=4)])
        yield daemon


def test_impossible_memory_slots_are_an_error(lying: LyingDaemon) -> None:
    for slots in ([(0, 0)], [(2**64 - 1, 2)], [(0, 4), (2, 4)]):
        messages = [vm_pb2.MemorySlot(start_gfn=start, count=count) for start, count in slots]
        lying.looking = lambda _, messages=messages: vm_pb2.Vm(memory_slots=messages)  # type: ignore[misc]
        with connect(lying.target) as client, pytest.raises(StreamError, match="impossible memory slots"):
            VmSide(client, "vms/a")


def test_a_vm_that_is_said_to_have_no_memory_at_all_is_survived(lying: LyingDaemon) -> None:
    lying.looking = lambda _: vm_pb2.Vm(incarnation="1")
    lying.digesting = lambda _: pb.DigestSkeysResponse(incarnation="1")
    with connect(lying.target) as client:
        nowhere = VmSide(client, "vms/a", [GfnRange(0, 1)], clip=True)
        assert not nowhere.digest().uses_storage_keys
        assert list(nowhere.keys(GfnRange(0, 2**64))) == []


def test_keys_that_are_gone_when_they_are_to_be_read_are_an_error(lying: LyingDaemon) -> None:
    def digest(request: pb.DigestSkeysRequest) -> pb.DigestSkeysResponse:
        answer = expected(tree_of({0: 0x10 if request.vm == "vms/a" else 0x20}))
        answer.incarnation = "1"
        return answer

    lying.digesting = digest
    with connect(lying.target) as client:
        comparison = Comparison(VmSide(client, "vms/a"), VmSide(client, "vms/b"))
        first = header((0, 4), uses_keys=False)
        first.header.incarnation = "1"
        lying.says(first, trailer(b""))
        with pytest.raises(StreamError, match="is said to use none"):
            list(comparison)


def test_nodes_that_are_gone_when_they_are_asked_for_again_are_survived(lying: LyingDaemon) -> None:
    """A walk ends whatever a daemon says."""

    def digest(request: pb.DigestSkeysRequest) -> pb.DigestSkeysResponse:
        answer = pb.DigestSkeysResponse(uses_storage_keys=True)
        if not request.HasField("node"):
            seed = 0x10 if request.vm == "vms/a" else 0x20
            answer = expected(tree_of({gfn << 32: seed for gfn in range(3)}))
        answer.incarnation = "1"
        return answer

    lying.digesting = digest
    with connect(lying.target) as client:
        comparison = Comparison(VmSide(client, "vms/a"), VmSide(client, "vms/b"))
        assert not comparison.same
        assert list(comparison) == []
