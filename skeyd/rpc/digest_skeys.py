"""DigestSkeys: keys compared without being moved."""

from __future__ import annotations

from skeyd.digest import ROOT_LEVEL, Digester, Node, frames_of, is_node
from skeyd.errors import Reason, SkeydError
from skeyd.gfn import Ranges
from skeyd.rpc import consistency, convert
from skeyd.rpc.bulk import parts_of, slice_seconds_of
from skeyd.rpc.calls import note
from skeyd.rpc.ending import Call, hanging_up
from skeyd.rpc.slots import CallSlots
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.vms.reading import check_ranges
from skeyd.vms.registry import Registry


def digest_skeys(
    registry: Registry, streams: CallSlots, request: pb.DigestSkeysRequest, call: Call
) -> pb.DigestSkeysResponse:
    """Answer a DigestSkeys call, as the contract says."""
    vm_id = convert.vm_id_of(request.vm)
    note(vm=request.vm)
    asked = convert.ranges_of(request.ranges)
    slice_seconds = slice_seconds_of(request)
    freeze_seconds = consistency.freeze_seconds_of(request)
    level, start = _node_of(request)
    with streams.taken(request.vm), hanging_up(call) as hang_up, registry.session(vm_id, hang_up) as session:
        ranges = check_ranges(session.memory_map, asked)
        # What is below the node and has keys, and nothing else, is read.
        wanted = Ranges(session.memory_map.mapped.shared(ranges.shared([frames_of(level, start)])))
        uses_keys, _ = consistency.begin(session, wanted, freeze_seconds, slice_seconds)
        answer = pb.DigestSkeysResponse(
            uses_storage_keys=uses_keys,
            incarnation=session.hello.incarnation,
            consistency=consistency.message(freeze_seconds),
        )
        if not uses_keys:
            return answer
        digester = Digester(with_referenced_changed=request.with_referenced_changed)
        for frames, keys in parts_of(session, wanted, slice_seconds, call):
            if keys is not None:
                digester.add(frames, keys)
    tree = digester.tree()
    node = tree.node(level, start)
    if node is not None:
        branch = tree.branch(node)
        answer.node.CopyFrom(_message(node))
        answer.branch.CopyFrom(_message(branch))
        answer.children.extend(_message(child) for child in tree.children(branch))
    return answer


def _node_of(request: pb.DigestSkeysRequest) -> tuple[int, int]:
    if not request.HasField("node"):
        return ROOT_LEVEL, 0
    level, start = request.node.level, request.node.start_gfn
    if not is_node(level, start):
        raise SkeydError(
            Reason.REQUEST_INVALID,
            f"node: the tree has no node of level {level} at gfn {start:#x}; levels are 0 to {ROOT_LEVEL}, and a node "
            "begins at a multiple of the frames that its level spans",
        )
    return level, start


def _message(node: Node) -> pb.DigestSkeysResponse.Node:
    return pb.DigestSkeysResponse.Node(level=node.level, start_gfn=node.start, keys=node.keys, sha256=node.sha256)
