"""DigestSkeys: what the daemon's answer comes to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from skeyd.client.errors import StreamError
from skeyd.digest import ROOT_LEVEL, Node, is_node, parent_of, span
from skeyd.gfn import GfnRange
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2


@dataclass(frozen=True, slots=True)
class Digest:
    """A node of a VM's hash tree (skeyd.digest), and what is below it."""

    uses_storage_keys: bool
    """False: there are no keys, and so no digest."""
    node: Node | None
    """The node that was asked for, the root by default; None where it covers no keys."""
    branch: Node | None
    """The lowest node, that one or below it, that covers the same keys."""
    children: tuple[Node, ...]
    """The nodes right below `branch`, ascending."""
    incarnation: str
    """Of the VM's worker."""


def digest_request(
    vm: str, ranges: Iterable[GfnRange], with_referenced_changed: bool, node: tuple[int, int] | None
) -> pb.DigestSkeysRequest:
    """Write a DigestSkeys request down."""
    request = pb.DigestSkeysRequest(
        vm=vm,
        ranges=[vm_pb2.GfnRange(start_gfn=one.start, count=one.count) for one in ranges],
        with_referenced_changed=with_referenced_changed,
    )
    if node is not None:
        request.node.level, request.node.start_gfn = node
    return request


def digest_of(
    response: pb.DigestSkeysResponse, wanted: tuple[int, int] | None, *, with_referenced_changed: bool
) -> Digest:
    """Take the answer of DigestSkeys. StreamError where a digest is not that of what is below it, or not the wanted."""
    node = _node(response.node) if response.HasField("node") else None
    branch = _node(response.branch) if response.HasField("branch") else None
    children = tuple(map(_node, response.children))
    if node is None or branch is None:
        # A guest that uses keys has one at the first frame of each range, so there is always a root.
        rootless = wanted is None and response.uses_storage_keys
        good = node is None and branch is None and not children and not rootless
    else:
        good = response.uses_storage_keys and (node.level, node.start) == (wanted or (ROOT_LEVEL, 0))
        good = good and _fits(node, branch, children, with_referenced_changed)
    if not good:
        raise StreamError("the daemon tells of digests that do not fit together")
    return Digest(response.uses_storage_keys, node, branch, children, response.incarnation)


def _fits(node: Node, branch: Node, children: Sequence[Node], with_referenced_changed: bool) -> bool:
    made = branch
    if branch.level:
        starts = [child.start for child in children]
        if (
            len(children) < 2
            or sorted(set(starts)) != starts
            or any(child.level != branch.level - 1 for child in children)
            or any(child.start & -span(branch.level) != branch.start for child in children)
        ):
            return False
        made = parent_of(children, with_referenced_changed=with_referenced_changed)
    elif children:
        return False
    if made != branch:
        return False
    while made.level < node.level:
        made = parent_of([made], with_referenced_changed=with_referenced_changed)
    return made == node


def _node(message: pb.DigestSkeysResponse.Node) -> Node:
    if (
        not is_node(message.level, message.start_gfn)
        or not 1 <= message.keys <= span(message.level)
        or len(message.sha256) != 32
    ):
        raise StreamError(f"the daemon tells of an impossible digest of level {message.level}")
    return Node(message.level, message.start_gfn, message.keys, message.sha256)
