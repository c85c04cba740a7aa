"""The text of QEMU's dump-skeys: keys out of it, however it is cut, and nothing out of what QEMU doesn't write."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, MemoryMap, MemorySlot
from skeyd.worker.dump import BLOCK_KEYS, LINE_MAX, RUNS_MAX, DumpParser, Snapshot
from tests.examples import examples

GOOD: Final = b"page=f0d: key(56) => ACC=3, FP=8, REF=0, ch=0, reserved=0\n"
"""As QEMU wrote it."""


def line(page: int, key: int) -> bytes:
    """Write a line as write_keys of hw/s390x/s390-skeys.c does."""
    numbers = (page, key, key >> 4, key & 8, key & 4, key & 2, key & 1)
    return b"page=%03x: key(%d) => ACC=%X, FP=%d, REF=%d, ch=%d, reserved=%d\n" % numbers


def dump(start: int, keys: bytes) -> bytes:
    return b"".join(line(start + number, key) for number, key in enumerate(keys))


def memory(*slots: tuple[int, int]) -> MemoryMap:
    return MemoryMap(MemorySlot(number, GfnRange(*one), "vmm") for number, one in enumerate(slots))


def parsed(memory_map: MemoryMap, parts: Iterable[bytes]) -> Snapshot:
    parser = DumpParser(memory_map)
    for part in parts:
        parser.feed(part)
    parser.finish()
    return parser.snapshot


def read(snapshot: Snapshot, start: int, count: int) -> bytes:
    into = bytearray(count)
    snapshot.read(GfnRange(start, count), memoryview(into))
    return bytes(into)


def refused(memory_map: MemoryMap, *parts: bytes) -> str:
    with pytest.raises(SkeydError) as caught:
        parsed(memory_map, parts)
    assert caught.value.reason is Reason.QMP_FAILED
    return caught.value.message


def test_a_line_of_qemus_is_a_key() -> None:
    assert line(0xF0D, 56) == GOOD
    assert read(parsed(memory((0xF0D, 1)), [GOOD]), 0xF0D, 1) == b"\x38"


def test_all_keys_are_told_apart_and_the_reserved_bit_is_none() -> None:
    keys = bytes(range(256))
    found = read(parsed(memory((0, 256)), [dump(0, keys)]), 0, 256)
    assert found == bytes(key & 0xFE for key in keys)


@given(st.data())
@settings(max_examples=examples(60), deadline=None)
def test_it_may_be_cut_anywhere(data: st.DataObject) -> None:
    keys = data.draw(st.binary(min_size=1, max_size=300))
    text = dump(0xFF0, keys)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found = parsed(memory((0xFF0, len(keys))), parts)
    assert read(found, 0xFF0, len(keys)) == bytes(key & 0xFE for key in keys)


def test_more_keys_than_are_packed_together_are_read_in_any_pieces() -> None:
    count = 2 * BLOCK_KEYS + 4711
    keys = random.Random(1).randbytes(count).translate(bytes(key & 0xFE for key in range(256)))  # noqa: S311
    text = dump(7, keys)
    found = parsed(memory((7, count)), (text[at : at + 65_536] for at in range(0, len(text), 65_536)))
    assert read(found, 7, count) == keys
    assert read(found, 7 + BLOCK_KEYS - 1, 2) == keys[BLOCK_KEYS - 1 : BLOCK_KEYS + 1]
    assert read(found, 7 + count - 1, 1) == keys[-1:]
    assert read(found, 7, 1) == keys[:1]


def test_what_is_in_no_memory_slot_is_left_out() -> None:
    text = dump(0, bytes(range(0, 100, 2))) + dump(0x1000, b"\x10\x20\x30\x40")
    found = parsed(memory((10, 5), (0x1001, 2)), [text])
    assert read(found, 10, 5) == bytes(range(20, 30, 2))
    assert read(found, 0x1001, 2) == b"\x20\x30"


@pytest.mark.parametrize(("start", "count", "first"), [(4, 2, 5), (5, 1, 5), (0, 20, 5), (9, 1, 9), (8, 2, 9)])
def test_a_key_that_was_not_printed_is_not_made_up(start: int, count: int, first: int) -> None:
    found = parsed(memory((0, 20)), [dump(0, b"\x10" * 5), dump(6, b"\x20" * 3)])
    with pytest.raises(SkeydError) as caught:
        read(found, start, count)
    assert (caught.value.reason, caught.value.metadata["gfn"]) == (Reason.GFN_NOT_MAPPED, hex(first))
    assert read(found, 6, 3) == b"\x20" * 3


@pytest.mark.parametrize(
    "wrong",
    [
        b"\n",
        b": \n",
        b": : \n",
        b"This guest is not using storage keys\n",
        GOOD.replace(b"page", b"Page"),
        GOOD.replace(b"f0d", b"F0D"),
        GOOD.replace(b"f0d", b"0x1"),
        GOOD.replace(b"f0d", b"d"),
        GOOD.replace(b"f0d", b"f" * 14),
        GOOD.replace(b"f0d", b""),
        GOOD.replace(b"f0d", b"0f0d"),
        GOOD.replace(b"56", b"57"),
        GOOD.replace(b"56", b"056"),
        GOOD.replace(b"56", b"256"),
        GOOD.replace(b"56", b"-1"),
        GOOD.replace(b"ACC=3", b"ACC=2"),
        GOOD.replace(b"FP=8", b"FP=0"),
        GOOD.replace(b"REF=0", b"REF=4"),
        GOOD.replace(b"ch=0", b"ch=2"),
        GOOD.replace(b"reserved=0", b"reserved=1"),
        GOOD.replace(b"\n", b" \n"),
        GOOD.replace(b"\n", b"\r\n"),
        b" " + GOOD,
        b"\0" + GOOD,
        GOOD[:-1] + GOOD,
    ],
)
@pytest.mark.parametrize("before", [0, 3])
def test_what_qemu_doesnt_write_is_no_dump(wrong: bytes, before: int) -> None:
    text = dump(0xF0D - before, b"\x10" * before)
    assert "is no dump of keys" in refused(memory((0, 0x2000)), text + wrong + line(0xF0E, 8))


def test_a_dump_ends_with_a_whole_line_and_has_one() -> None:
    assert "in the middle of a line" in refused(memory((0, 1)), line(0, 0)[:-1])
    assert "in the middle of a line" in refused(memory((0, 2)), line(0, 0) + b"p")
    assert "it is empty" in refused(memory((0, 1)))
    assert "it is empty" in refused(memory((0, 1)), b"")


@pytest.mark.parametrize("second", [0, 4, 5])
def test_pages_ascend(second: int) -> None:
    assert "comes after" in refused(memory((0, 100)), dump(0, b"\0" * 6) + line(second, 0))
    assert "comes after" in refused(memory((0, 100)), dump(0, b"\0" * 6), line(second, 0))


def test_a_line_without_an_end_is_not_kept() -> None:
    parser = DumpParser(memory((0, 1)))
    parser.feed(b"x" * LINE_MAX)
    with pytest.raises(SkeydError, match="a line has more than"):
        parser.feed(b"x")


def test_a_dump_full_of_holes_is_not_kept() -> None:
    text = b"".join(line(2 * number, 8) for number in range(RUNS_MAX))
    slots = memory((0, 4 * RUNS_MAX))
    assert read(parsed(slots, [text]), 2 * RUNS_MAX - 2, 1) == b"\x08"
    assert "more than" in refused(slots, text, line(2 * RUNS_MAX, 8))


def test_keys_as_guests_have_them_take_little() -> None:
    snapshot = Snapshot()
    for start in range(0, 1 << 24, 1 << 20):
        snapshot.add(start, b"\x10" * (1 << 20))
    snapshot.finish()
    assert 0 < snapshot.room < (1 << 24) // 200
    snapshot.close()
    assert snapshot.room == 0
