"""What the client makes of DigestSkeys: digests that fit together, or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skeyd.client import Client, ClientError, Digest, StreamError, connect
from skeyd.digest import Digester, Tree
from skeyd.gfn import GfnRange
from skeyd.v1 import storage_key_service_pb2 as pb
from tests.client.lying_daemon import LyingDaemon
from tests.daemon import DaemonProcess
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import Stubs, ranges, some_keys
from tests.rpc.test_digest_skeys import expected

LEAF = 1 << 16


def tree(*, rc: bool = False) -> Tree:
    """Make a tree over frames of three leaves."""
    digester = Digester(with_referenced_changed=rc)
    for start in (0x10, LEAF, 9 * LEAF + 5):
        digester.add(GfnRange(start, 8), some_keys(8, start))
    return digester.tree()


def good() -> pb.DigestSkeysResponse:
    """Say what an honest daemon says of it."""
    response = expected(tree())
    response.incarnation = "1"
    return response


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LyingDaemon]:
    """Serve lies."""
    with LyingDaemon(tmp_path) as lying:
        yield lying


@pytest.fixture
def client(daemon: LyingDaemon) -> Iterator[Client]:
    """Connect to it."""
    with connect(daemon.target) as connected:
        yield connected


def test_a_good_answer_is_taken_and_the_question_is_what_was_meant(daemon: LyingDaemon, client: Client) -> None:
    """The fake above all: the lies below differ from this by one thing each."""
    asked: list[pb.DigestSkeysRequest] = []

    def answer(request: pb.DigestSkeysRequest) -> pb.DigestSkeysResponse:
        asked.append(request)
        return good()

    daemon.digesting = answer
    found = client.digest_skeys("vms/a", [GfnRange(0, 9), GfnRange(10, 2)])
    made = tree()
    assert made.root is not None
    branch = made.branch(made.root)
    assert found == Digest(True, made.root, branch, tuple(made.children(branch)), "1")
    assert asked == [pb.DigestSkeysRequest(vm="vms/a", ranges=ranges((0, 9), (10, 2)))]


def test_a_node_and_the_bits_can_be_asked_for(daemon: LyingDaemon, client: Client) -> None:
    asked: list[pb.DigestSkeysRequest] = []

    def answer(request: pb.DigestSkeysRequest) -> pb.DigestSkeysResponse:
        asked.append(request)
        return expected(tree(rc=True), 0, 9 * LEAF)

    daemon.digesting = answer
    found = client.digest_skeys("vms/a", with_referenced_changed=True, node=(0, 9 * LEAF), slice_seconds=1.5)
    assert found.node == found.branch == tree(rc=True).node(0, 9 * LEAF)
    (request,) = asked
    assert request.with_referenced_changed
    assert (request.max_slice_time.seconds, request.max_slice_time.nanos) == (1, 500_000_000)
    assert request.node == pb.DigestSkeysRequest.NodeId(level=0, start_gfn=9 * LEAF)


def test_a_guest_without_keys_and_a_node_without_keys_are_answers(daemon: LyingDaemon, client: Client) -> None:
    daemon.digesting = lambda _: pb.DigestSkeysResponse(incarnation="1")
    assert client.digest_skeys("vms/a") == Digest(False, None, None, (), "1")
    daemon.digesting = lambda _: pb.DigestSkeysResponse(uses_storage_keys=True)
    assert client.digest_skeys("vms/a", node=(0, 0)) == Digest(True, None, None, (), "")


def _without_nodes(response: pb.DigestSkeysResponse) -> None:
    response.ClearField("node")
    response.ClearField("branch")


def _all_of_one_leaf(response: pb.DigestSkeysResponse) -> None:
    response.node.CopyFrom(response.children[1])
    response.branch.CopyFrom(response.children[1])


def _changed(change: Callable[[pb.DigestSkeysResponse], object]) -> pb.DigestSkeysResponse:
    response = good()
    change(response)
    return response


LIES: dict[str, pb.DigestSkeysResponse] = {
    "uses keys and has no root": pb.DigestSkeysResponse(uses_storage_keys=True),
    "uses no keys and has a root": _changed(lambda one: one.ClearField("uses_storage_keys")),
    "a root without a branch": _changed(lambda one: one.ClearField("branch")),
    "a branch without a root": _changed(lambda one: one.ClearField("node")),
    "children of nothing": _changed(_without_nodes),
    "a branch without children": _changed(lambda one: one.ClearField("children")),
    "a child too few": _changed(lambda one: one.children.pop()),
    "a child twice": _changed(lambda one: one.children.append(one.children[-1])),
    "children in disorder": _changed(lambda one: one.children.reverse()),
    "another child": _changed(lambda one: setattr(one.children[0], "sha256", bytes(32))),
    "a child elsewhere": _changed(lambda one: setattr(one.children[-1], "start_gfn", 300 * LEAF)),
    "a child of another level": _changed(lambda one: setattr(one.children[0], "level", 1)),
    "more keys than below": _changed(lambda one: setattr(one.branch, "keys", 25)),
    "another branch": _changed(lambda one: setattr(one.branch, "sha256", bytes(32))),
    "another root": _changed(lambda one: setattr(one.node, "sha256", bytes(32))),
    "a root with other keys": _changed(lambda one: setattr(one.node, "keys", 23)),
    "not the root": _changed(lambda one: one.node.CopyFrom(one.branch)),
    "the bits that were not asked for": expected(tree(rc=True)),
    "a short digest": _changed(lambda one: setattr(one.node, "sha256", bytes(31))),
    "a level that there is not": _changed(lambda one: setattr(one.node, "level", 7)),
    "off the grid": _changed(lambda one: setattr(one.children[0], "start_gfn", 1)),
    "no keys": _changed(lambda one: setattr(one.children[0], "keys", 0)),
    "more keys than frames": _changed(lambda one: setattr(one.children[0], "keys", LEAF + 1)),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_does_not_fit_together_is_an_error(daemon: LyingDaemon, client: Client, lie: str) -> None:
    daemon.digesting = lambda _: LIES[lie]
    with pytest.raises(StreamError, match=r"do not fit together|impossible digest"):
        client.digest_skeys("vms/a")


@pytest.mark.parametrize(
    "lie",
    [
        expected(tree(), 0, 0),
        good(),
        _changed(_all_of_one_leaf),
        pb.DigestSkeysResponse(node=pb.DigestSkeysResponse.Node(level=0, start_gfn=LEAF, keys=1, sha256=bytes(32))),
    ],
    ids=["another-node", "the-root", "a-leaf-with-children", "half-an-answer"],
)
def test_another_node_than_that_asked_for_is_an_error(
    daemon: LyingDaemon, client: Client, lie: pb.DigestSkeysResponse
) -> None:
    daemon.digesting = lambda _: lie
    with pytest.raises(StreamError, match="do not fit together"):
        client.digest_skeys("vms/a", node=(0, LEAF))


def test_the_daemons_own_digest_is_taken_and_its_refusal_is_an_error(
    shared_daemon: DaemonProcess, new_vm: NewVm, stubs: Stubs
) -> None:
    name, keys = new_vm((0, 1)), some_keys(256)
    stubs.set(name, [(0, keys)])
    digester = Digester()
    digester.add(GfnRange(0, 256), keys)
    with connect(shared_daemon.target) as client:
        found = client.digest_skeys(name)
        assert found.node == digester.tree().root
        assert found.incarnation == stubs.look_at(name).incarnation
        with pytest.raises(ClientError) as refused:
            client.digest_skeys("vms/nobody")
        assert refused.value.reason == "VM_NOT_FOUND"
        with pytest.raises(ClientError) as refused:
            client.digest_skeys(name, node=(0, 1))
        assert refused.value.reason == "REQUEST_INVALID"
