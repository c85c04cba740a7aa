"""The counts and runs of keys against the simplest count there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skeyd import summary
from skeyd.gfn import GfnRange
from skeyd.summary import _PIECE, Run, Summarizer, Summary
from tests.examples import examples
from tests.rpc.stubs import some_keys

Part = tuple[int, bytes, bool]
"""Frames skipped before it, keys, and whether a range begins with it."""


def naive(parts: list[Part]) -> Summary:
    """Count key by key."""
    frames: list[tuple[int, int, int]] = []  # gfn, key, and a number that differs where a run must end
    gfn = stretch = 0
    for skipped, keys, new_range in parts:
        gfn += skipped
        stretch += bool(skipped) or new_range
        for key in keys:
            frames.append((gfn, key, stretch))
            gfn += 1
    runs = [list(run) for _, run in groupby(frames, lambda frame: frame[1:])]
    longest = max(runs, key=len, default=[])  # the first of several
    return Summary(
        dict(sorted(Counter(key for _, key, _ in frames).items())),
        len(runs),
        Run(GfnRange(longest[0][0], len(longest)), longest[0][1]) if longest else None,
    )


def counted(parts: list[Part], cut: Callable[[], int] | None = None) -> Summary:
    """Count as the module does, in pieces of the sizes that `cut` gives."""
    summarizer, gfn = Summarizer(), 0
    for skipped, keys, new_range in parts:
        gfn += skipped
        if new_range:
            summarizer.end_run()
        at = 0
        while at < len(keys):
            piece = keys[at : at + (cut() if cut else len(keys))]
            summarizer.add(GfnRange(gfn, len(piece)), piece)
            at += len(piece)
            gfn += len(piece)
    return summarizer.summary()


# Runs, so that there are long ones; few different keys, so that neighbours meet their like; any keys at times.
_run = st.builds(lambda key, count: bytes([2 * key]) * count, st.sampled_from([0, 1, 24, 127]), st.integers(1, 30))
_any = st.lists(st.integers(0, 127), min_size=1, max_size=30).map(lambda keys: bytes(2 * key for key in keys))
_keys = st.lists(st.one_of(_run, _run, _any), min_size=1, max_size=8).map(b"".join)
_parts = st.lists(st.tuples(st.sampled_from([0, 0, 1, 5]), _keys, st.booleans()), max_size=6)


@settings(max_examples=examples(300), deadline=None)
@given(_parts, st.data())
@example([], None)
def test_any_keys_cut_in_any_way_are_counted_as_one_by_one(parts: list[Part], data: st.DataObject | None) -> None:
    assert counted(parts, (lambda: data.draw(st.integers(1, 40))) if data else None) == naive(parts)


@pytest.mark.parametrize(
    "keys",
    [
        some_keys(3 * _PIECE + 17, 5),
        bytes(_PIECE) + b"\x10" + bytes(2 * _PIECE),
        b"\x10" * (_PIECE - 1) + b"\x20" * (_PIECE + 2) + b"\x10",
        bytes([0x30] * 7 + [0x36]) * (_PIECE // 4),
        b"".join(bytes([2 * (length % 128)]) * length for length in range(1, 400)),
        b"".join(bytes([2 * (length % 128)]) * length for length in range(400, 0, -1)),
        b"\xfe" * (2 * _PIECE),
    ],
    ids=["any", "one-in-the-middle", "over-the-edge", "period-of-8", "ever-longer", "ever-shorter", "one"],
)
def test_keys_of_several_pieces_are_counted_as_one_by_one(keys: bytes) -> None:
    assert counted([(0, keys, False)]) == naive([(0, keys, False)])
    assert counted([(0, keys[:1000], False), (0, keys[1000:], False)]) == naive([(0, keys, False)])


def test_others_have_their_turn_after_each_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    # A piece of 32,768 random keys takes some 0.6 ms; a thread that counts a slice of them kept health checks waiting.
    happened: list[str | int] = []

    class Watched(Summarizer):
        def _add(self, gfn: int, keys: bytes) -> None:
            happened.append(len(keys))
            super()._add(gfn, keys)

    monkeypatch.setattr(summary, "give_way", lambda: happened.append("turn"))
    Watched().add(GfnRange(5, 262_144), some_keys(262_144))
    assert happened == [32_768, "turn"] * 8


def test_every_key_has_a_count_of_its_own() -> None:
    found = counted([(0, bytes(key for key in range(0, 256, 2) for _ in range(key // 2 + 1)), False)])
    assert found.counts == {key: key // 2 + 1 for key in range(0, 256, 2)}
    assert found.keys == sum(range(1, 129))
    assert found.longest_run == Run(GfnRange(sum(range(1, 128)), 128), 254)


def test_a_run_goes_on_over_all_cuts() -> None:
    found = counted([(7, b"\x30" * 5000, False)], lambda: 1)
    assert found == Summary({0x30: 5000}, 1, Run(GfnRange(7, 5000), 0x30))


def test_a_gap_ends_a_run() -> None:
    assert counted([(0, b"\x30" * 4, False), (1, b"\x30" * 3, False)]).runs == 2


def test_the_edge_of_a_range_ends_a_run_and_ends_it_once() -> None:
    summarizer = Summarizer()
    summarizer.end_run()
    summarizer.add(GfnRange(0, 4), b"\x30" * 4)
    summarizer.end_run()
    summarizer.end_run()
    summarizer.add(GfnRange(4, 3), b"\x30" * 3)
    assert summarizer.summary() == Summary({0x30: 7}, 2, Run(GfnRange(0, 4), 0x30))


def test_of_several_longest_runs_the_first_counts() -> None:
    found = counted([(0, b"\x10" * 3 + b"\x20" * 4 + b"\x30" * 4 + b"\x40" * 4, False)])
    assert found.longest_run == Run(GfnRange(3, 4), 0x20)


def test_frames_at_the_end_of_all_are_counted() -> None:
    summarizer = Summarizer()
    summarizer.add(GfnRange((1 << 64) - 4, 4), b"\x10\x10\x20\x20")
    assert summarizer.summary().longest_run == Run(GfnRange((1 << 64) - 4, 2), 0x10)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_keys_may_be_any_bytes_and_are_not_kept(kind: Callable[[bytearray], Any]) -> None:
    keys = bytearray(b"\x10\x20")
    summarizer = Summarizer()
    summarizer.add(GfnRange(3, 2), kind(keys))
    keys[:] = b"\x30\x30"
    assert summarizer.summary().counts == {0x10: 1, 0x20: 1}


@pytest.mark.parametrize("start", [0, 3, 4])
def test_frames_that_do_not_ascend_are_refused(start: int) -> None:
    summarizer = Summarizer()
    summarizer.add(GfnRange(3, 2), bytes(2))
    with pytest.raises(ValueError, match="do not lie after"):
        summarizer.add(GfnRange(start, 1), bytes(1))
    summarizer.end_run()
    with pytest.raises(ValueError, match="do not lie after"):
        summarizer.add(GfnRange(start, 1), bytes(1))


@pytest.mark.parametrize("count", [1, 3])
def test_keys_that_are_not_as_many_as_their_frames_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"2 keys are not those of {count} frames"):
        Summarizer().add(GfnRange(0, count), bytes(2))
