"""DigestSkeys over the real daemon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skeyd.digest import Digester, Node, Tree, span
from skeyd.gfn import GfnRange
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2
from tests.examples import examples
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import GENERATIONS, MIB, SECONDS, Stubs, new_id, ranges, refused, some_keys

# Three slots: 1-3 MiB and 3-4 MiB touch, and one over the edge of a leaf at 256 MiB: 255-257 MiB.
SLOTS = ((1, 2), (3, 1), (255, 2))
FIRST, FIRST_COUNT = 0x100, 0x300
SECOND, SECOND_COUNT = 0xFF00, 0x200
LEAF = 1 << 16
KEYS = dict(enumerate(some_keys(FIRST_COUNT, 1), FIRST)) | dict(enumerate(some_keys(SECOND_COUNT, 2), SECOND))
LAST_MIB = (1 << 64) // MIB - 1


def digest(stubs: Stubs, vm: str, *wanted: tuple[int, int], **other: Any) -> pb.DigestSkeysResponse:
    """Ask for a digest."""
    return stubs.keys.DigestSkeys(pb.DigestSkeysRequest(vm=vm, ranges=ranges(*wanted), **other), timeout=SECONDS)


def tree_of(keys: dict[int, int], *, with_referenced_changed: bool = False) -> Tree:
    """Make the tree key by key."""
    digester = Digester(with_referenced_changed=with_referenced_changed)
    for gfn, key in sorted(keys.items()):
        digester.add(GfnRange(gfn, 1), bytes([key]))
    return digester.tree()


def expected(tree: Tree, level: int = 6, start: int = 0) -> pb.DigestSkeysResponse:
    """Write down what the tree says of a node."""
    node = tree.node(level, start)
    response = pb.DigestSkeysResponse(uses_storage_keys=True, consistency=pb.CONSISTENCY_LIVE)
    if node is not None:
        branch = tree.branch(node)
        response.node.CopyFrom(message(node))
        response.branch.CopyFrom(message(branch))
        response.children.extend(map(message, tree.children(branch)))
    return response


def message(node: Node) -> pb.DigestSkeysResponse.Node:
    return pb.DigestSkeysResponse.Node(level=node.level, start_gfn=node.start, keys=node.keys, sha256=node.sha256)


def without_incarnation(response: pb.DigestSkeysResponse) -> pb.DigestSkeysResponse:
    response.ClearField("incarnation")
    return response


@pytest.fixture(scope="module")
def vm(stubs: Stubs) -> Iterator[str]:
    """Make a VM whose keys are KEYS."""
    name = stubs.create(new_id(), *SLOTS).name
    stubs.set(name, [(FIRST, some_keys(FIRST_COUNT, 1)), (SECOND, some_keys(SECOND_COUNT, 2))])
    yield name
    stubs.delete(name)


@pytest.mark.parametrize("rc", [False, True])
def test_without_ranges_the_root_covers_all_keys(stubs: Stubs, vm: str, rc: bool) -> None:
    found = digest(stubs, vm, with_referenced_changed=rc)
    assert found.incarnation == stubs.look_at(vm).incarnation
    assert without_incarnation(found) == expected(tree_of(KEYS, with_referenced_changed=rc))
    assert (found.node.level, found.node.keys) == (6, len(KEYS))
    assert (found.branch.level, found.branch.start_gfn) == (1, 0)
    assert [(one.level, one.start_gfn, one.keys) for one in found.children] == [
        (0, 0, FIRST_COUNT + 0x100),
        (0, LEAF, 0x100),
    ]


@pytest.mark.parametrize("kernel", GENERATIONS, ids=vm_pb2.SimulatedKernel.Name)
def test_every_generation_has_the_same_digest_for_the_same_keys(
    stubs: Stubs, new_vm: NewVm, kernel: vm_pb2.SimulatedKernel.ValueType
) -> None:
    name, keys = new_vm((0, 2), kernel=kernel), some_keys(512, 7)
    stubs.set(name, [(0, keys)])
    found = digest(stubs, name, with_referenced_changed=True)
    read = dict(enumerate(stubs.get(name).keys))
    assert without_incarnation(found) == expected(tree_of(read, with_referenced_changed=True))
    assert digest(stubs, name).node == expected(tree_of(dict(enumerate(keys)))).node


def test_how_slots_and_ranges_are_cut_does_not_matter(stubs: Stubs, new_vm: NewVm) -> None:
    one, other = new_vm((0, 4)), new_vm((2, 2), (0, 1), (1, 1))
    keys = some_keys(1024, 3)
    stubs.set(one, [(0, keys)])
    stubs.set(other, [(0, keys[:100]), (100, keys[100:])])
    wanted = digest(stubs, one).node
    assert digest(stubs, other).node == wanted
    assert digest(stubs, other, (0, 1), (1, 500), (501, 523)).node == wanted
    assert digest(stubs, other, (0, 1023)).node != wanted


@settings(max_examples=examples(40), deadline=None)
@given(st.data())
def test_any_ranges_have_the_digest_of_the_keys_of_their_frames(stubs: Stubs, vm: str, data: st.DataObject) -> None:
    edges = data.draw(st.lists(st.sampled_from(sorted(KEYS)), min_size=1, max_size=12, unique=True).map(sorted))
    wanted = [(first, last + 1 - first) for first, last in zip(edges[::2], edges[1::2], strict=False)]
    wanted = wanted or [(edges[0], 1)]
    level, rc = data.draw(st.integers(0, 6)), data.draw(st.booleans())
    start = data.draw(st.sampled_from([0, LEAF, 5 * LEAF])) & -span(level)

    found = digest(
        stubs,
        vm,
        *wanted,
        with_referenced_changed=rc,
        node=pb.DigestSkeysRequest.NodeId(level=level, start_gfn=start),
    )

    keys = {gfn: KEYS[gfn] for first, count in wanted for gfn in range(first, first + count) if gfn in KEYS}
    assert without_incarnation(found) == expected(tree_of(keys, with_referenced_changed=rc), level, start)


def test_a_node_without_keys_is_not_set(stubs: Stubs, vm: str) -> None:
    found = digest(stubs, vm, node=pb.DigestSkeysRequest.NodeId(level=2, start_gfn=span(2)))
    assert found.uses_storage_keys
    assert not found.HasField("node")
    assert not found.HasField("branch")
    assert not found.children


def test_for_a_node_only_its_own_keys_are_read(stubs: Stubs, new_vm: NewVm, shared_daemon: Any) -> None:
    name = new_vm((0, 1024))
    stubs.set(name, [(0, b"\x10")])
    stubs.keys.DigestSkeys(
        pb.DigestSkeysRequest(vm=name, node=pb.DigestSkeysRequest.NodeId(level=0, start_gfn=LEAF)), timeout=SECONDS
    )
    line = shared_daemon.wait_for_line("rpc", method="/skeyd.v1.StorageKeyService/DigestSkeys", vm=name)
    assert line["keys"] == LEAF


def test_a_guest_without_storage_keys_has_no_digest(stubs: Stubs, new_vm: NewVm) -> None:
    name = new_vm((0, 4), (8, 1))
    found = digest(stubs, name)
    incarnation = stubs.look_at(name).incarnation
    assert found == pb.DigestSkeysResponse(incarnation=incarnation, consistency=pb.CONSISTENCY_LIVE)
    assert not found.uses_storage_keys


def test_frames_at_the_end_of_the_address_space_are_in_the_digest(stubs: Stubs, new_vm: NewVm) -> None:
    name = new_vm((0, 1), (LAST_MIB, 1))
    top = LAST_MIB * 256
    keys = some_keys(256, 9)
    stubs.set(name, [(0, keys), (top, keys)])
    every = dict(enumerate(keys)) | dict(enumerate(keys, top))
    assert without_incarnation(digest(stubs, name)) == expected(tree_of(every))
    start = top & -span(3)
    found = digest(stubs, name, node=pb.DigestSkeysRequest.NodeId(level=3, start_gfn=start))
    assert found.node.keys == 256
    assert without_incarnation(found) == expected(tree_of(every), 3, start)


@pytest.mark.parametrize(
    ("level", "start"), [(7, 0), (2**32 - 1, 0), (0, 1), (0, LEAF - 1), (1, LEAF), (6, 1 << 56), (6, 2**64 - 1)]
)
def test_a_node_that_there_can_not_be_is_refused_and_named(stubs: Stubs, vm: str, level: int, start: int) -> None:
    node = pb.DigestSkeysRequest.NodeId(level=level, start_gfn=start)
    found = refused(lambda: digest(stubs, vm, node=node))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
    assert f"level {level} at gfn {start:#x}" in found.message
    assert found.message.startswith("node: ")
