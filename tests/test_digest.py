"""The digest against the page that describes it, and against the plain implementation on that page."""

from __future__ import annotations

import hashlib
import re
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skeyd.digest import LEAF_FRAMES, ROOT_LEVEL, Digester, Node, Tree, frames_of, is_node, parent_of, span
from skeyd.gfn import GfnRange
from tests.examples import examples

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "digest.md").read_text()
LIMIT = 1 << 64

Keys = dict[int, int]


def _plain() -> Callable[..., bytes]:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    page: dict[str, Any] = {}
    exec(code, page)  # noqa: S102  it is ours
    made: Callable[..., bytes] = page["digest"]
    return made


plain = _plain()
VECTORS = re.findall(r"^\| `([^`]*)` \| (yes|no) \| `([0-9a-f]{64})` \|$", PAGE, re.MULTILINE)


def _keys_of(text: str) -> Keys:
    keys: Keys = {}
    for start, count, key in re.findall(r"(0x[0-9a-f]+)\+(\d+) (0x[0-9a-f]{2})", text):
        keys |= dict.fromkeys(range(int(start, 16), int(start, 16) + int(count)), int(key, 16))
    return keys


def _runs(keys: Keys) -> Iterator[tuple[int, bytes]]:
    gfns = sorted(keys)
    while gfns:
        count = next((index for index, gfn in enumerate(gfns) if gfn != gfns[0] + index), len(gfns))
        yield gfns[0], bytes(keys[gfn] for gfn in gfns[:count])
        gfns = gfns[count:]


def tree_of(keys: Keys, *, with_referenced_changed: bool = False, cut: Iterator[int] | None = None) -> Tree:
    """Make the tree of keys, in pieces of the sizes that `cut` gives."""
    digester = Digester(with_referenced_changed=with_referenced_changed)
    for start, run in _runs(keys):
        at = 0
        while at < len(run):
            size = next(cut) if cut else len(run)
            piece = run[at : at + size]
            digester.add(GfnRange(start + at, len(piece)), piece)
            at += len(piece)
    return digester.tree()


def _sampled(draw: st.DrawFn) -> Keys:
    # Where things change: around the edges of nodes of all levels, and at both ends of the address space.
    edges = [0, *(span(level) for level in range(ROOT_LEVEL)), 3 * span(1), LIMIT]
    keys: Keys = {}
    for _ in range(draw(st.integers(1, 4))):
        edge = draw(st.sampled_from(edges))
        start = min(max(0, edge + draw(st.integers(-20, 10))), LIMIT - 1)
        values = draw(st.lists(st.integers(0, 127), min_size=1, max_size=24))
        keys |= {start + index: 2 * key for index, key in enumerate(values) if start + index < LIMIT}
    return keys


sampled_keys = st.composite(_sampled)()


def test_there_are_vectors() -> None:
    assert len(VECTORS) >= 10
    assert {rc for _, rc, _ in VECTORS} == {"yes", "no"}
    assert len(PAGE.split("## Test vectors")[1].split("## ")[0].splitlines()) >= len(VECTORS) + 4


@pytest.mark.parametrize(("keys", "rc", "digest"), VECTORS, ids=range(len(VECTORS)))
def test_both_implementations_give_the_digests_of_the_page(keys: str, rc: str, digest: str) -> None:
    found = _keys_of(keys)
    assert ", ".join(f"{start:#x}+{len(run)}" for start, run in _runs(found))  # the row could be read
    assert plain(found, rc == "yes").hex() == digest
    root = tree_of(found, with_referenced_changed=rc == "yes").root
    assert root == Node(ROOT_LEVEL, 0, len(found), bytes.fromhex(digest))


def test_the_bytes_of_the_leaf_that_the_page_spells_out_are_those_of_the_first_vector() -> None:
    (spelled,) = re.findall(r"is the SHA-256 of `([0-9a-f ]+)`", PAGE)
    leaf = tree_of(_keys_of(VECTORS[0][0])).node(0, 0)
    assert leaf == Node(0, 0, 1, hashlib.sha256(bytes.fromhex(spelled)).digest())


@settings(max_examples=examples(150), deadline=None)
@given(sampled_keys, st.booleans(), st.data())
def test_any_keys_cut_in_any_way_have_the_digest_of_the_plain_implementation(
    keys: Keys, rc: bool, data: st.DataObject
) -> None:
    def cut() -> Iterator[int]:
        while True:
            yield data.draw(st.integers(1, 9))

    tree = tree_of(keys, with_referenced_changed=rc, cut=cut())
    assert tree.root is not None
    assert tree.root.sha256 == plain(keys, rc)
    assert tree.with_referenced_changed == rc


@settings(max_examples=examples(100), deadline=None)
@given(sampled_keys, st.integers(0, ROOT_LEVEL), st.data())
def test_every_node_is_the_digest_of_the_keys_that_it_spans(keys: Keys, level: int, data: st.DataObject) -> None:
    tree = tree_of(keys)
    starts = {gfn & -span(level) for gfn in keys}
    for start in {*starts, data.draw(st.integers(0, (LIMIT - 1) // span(level))) * span(level)}:
        below = {gfn: key for gfn, key in keys.items() if start <= gfn < start + span(level)}
        node = tree.node(level, start)
        if start not in starts:
            assert node is None
            continue
        assert node == Node(level, start, len(below), plain(below, False, level, start))
        children = tree.children(node)
        if level:
            assert parent_of(children, with_referenced_changed=False) == node
            assert [child.start for child in children] == sorted({gfn & -span(level - 1) for gfn in below})
        else:
            assert children == []
        branch = tree.branch(node)
        assert branch.keys == node.keys
        assert branch.level == 0 or len(tree.children(branch)) > 1
        assert tree.node(branch.level, branch.start) == branch


@pytest.mark.parametrize("level", range(1, ROOT_LEVEL + 1))
def test_the_tree_branches_where_keys_first_lie_apart(level: int) -> None:
    tree = tree_of({0: 0x10, span(level - 1): 0x10})
    assert tree.root is not None
    branch = tree.branch(tree.root)
    assert (branch.level, branch.start) == (level, 0)
    assert [child.start for child in tree.children(branch)] == [0, span(level - 1)]


@pytest.mark.parametrize(("rc", "covered"), [(False, 0xF8), (True, 0xFE)])
@pytest.mark.parametrize("bit", [1 << bit for bit in range(1, 8)])
def test_exactly_the_covered_bits_change_the_digest(rc: bool, covered: int, bit: int) -> None:
    one, other = (tree_of({5: key, 6: 0}, with_referenced_changed=rc).root for key in (0, bit))
    assert (one != other) == bool(bit & covered)


def test_the_flag_is_in_the_digest_even_where_no_key_tells() -> None:
    assert tree_of({0: 0x10}).root != tree_of({0: 0x10}, with_referenced_changed=True).root


def test_frames_that_have_the_key_0_are_not_frames_without_a_key() -> None:
    assert tree_of({0: 0x10, 1: 0, 2: 0x10}).root != tree_of({0: 0x10, 2: 0x10}).root


def test_without_keys_there_is_no_node() -> None:
    tree = Digester().tree()
    assert tree.root is None
    assert tree.node(0, 0) is None


def test_keys_are_not_kept_so_that_their_memory_can_be_used_again() -> None:
    buffer = bytearray(b"\x10" * 8)
    digester = Digester()
    with memoryview(buffer) as view:
        digester.add(GfnRange(0, 8), view)
    buffer[:] = b"\x70" * 8
    assert digester.tree().root == tree_of(dict.fromkeys(range(8), 0x10)).root
    buffer += b"more"  # nobody holds on to it


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_keys_may_be_any_bytes(kind: Callable[[bytes], Any]) -> None:
    digester = Digester()
    digester.add(GfnRange(3, 2), kind(b"\x10\x20"))
    assert digester.tree().root == tree_of({3: 0x10, 4: 0x20}).root


@pytest.mark.parametrize("start", [0, 3, 4])
def test_frames_that_do_not_ascend_are_refused(start: int) -> None:
    digester = Digester()
    digester.add(GfnRange(3, 2), bytes(2))
    with pytest.raises(ValueError, match=f"{start:#x}.* do not lie after"):
        digester.add(GfnRange(start, 1), bytes(1))


@pytest.mark.parametrize("count", [1, 3])
def test_keys_that_are_not_as_many_as_their_frames_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"2 keys are not those of {count} frames"):
        Digester().add(GfnRange(0, count), bytes(2))


def test_nothing_can_be_added_once_the_tree_is_made() -> None:
    digester = Digester()
    digester.add(GfnRange(0, 1), b"\x10")
    digester.tree()
    with pytest.raises(ValueError, match="do not lie after"):
        digester.add(GfnRange(LIMIT - 1, 1), b"\x10")


@pytest.mark.parametrize(
    ("level", "start"), [(-1, 0), (ROOT_LEVEL + 1, 0), (0, 1), (1, LEAF_FRAMES), (6, 1 << 56), (0, LIMIT), (0, -65536)]
)
def test_there_is_no_node_off_the_grid(level: int, start: int) -> None:
    assert not is_node(level, start)
    with pytest.raises(ValueError, match=f"no node of level {level}"):
        tree_of({0: 0x10}).node(level, start)


def test_nodes_span_what_the_page_says() -> None:
    assert [span(level) for level in range(ROOT_LEVEL + 1)] == [65536 * 256**level for level in range(7)]
    assert frames_of(ROOT_LEVEL, 0) == GfnRange(0, LIMIT)
    assert frames_of(0, LIMIT - LEAF_FRAMES).end == LIMIT
    assert is_node(0, LIMIT - LEAF_FRAMES)


def test_no_more_than_a_leaf_is_held_back() -> None:
    # A leaf is hashed when the next begins: it doesn't wait for the tree.
    digester = Digester()
    digester.add(GfnRange(0, LEAF_FRAMES + 1), bytes(LEAF_FRAMES + 1))
    assert digester._keys == bytes(1)
    assert len(digester._leaves) == 1


@pytest.mark.parametrize("apart", [1, 2])
def test_what_is_held_back_depends_little_on_how_it_was_cut(apart: int) -> None:
    tracemalloc.start()
    try:
        digester = Digester()
        for gfn in range(0, LEAF_FRAMES, apart):
            digester.add(GfnRange(gfn, 1), b"\x10")
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A byte a key and 16 a run, and what arrays keep in reserve.
    assert held < (1.5 * LEAF_FRAMES if apart == 1 else 1.5 * (1 + 16) * LEAF_FRAMES / 2)


def test_a_leaf_is_the_hash_of_its_level_flag_and_first_gfn_and_of_its_runs() -> None:
    content = struct.pack(">BBQ", 0, 0, 0) + struct.pack(">QQ", 7, 1) + b"\x50"
    leaf = tree_of({7: 0x50}).node(0, 0)
    assert leaf is not None
    assert leaf.sha256 == hashlib.sha256(content).digest()
