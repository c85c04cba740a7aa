"""A key's bits, and the comparisons that a verified write rests on."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from skeyd import storage_key
from skeyd.storage_key import (
    StorageKey,
    differing_runs,
    first_reserved,
    look_through,
    lost_runs,
    only_key,
    runs_of_equal,
)
from tests.examples import examples

# Few values and long runs: neighbours that are equal are what the run functions are about.
_KEYS = st.lists(st.tuples(st.sampled_from([0x00, 0x02, 0x06, 0x08, 0x0A, 0xF0, 0xFE]), st.integers(1, 300))).map(
    lambda runs: b"".join(bytes([key]) * count for key, count in runs)
)


def test_every_byte_without_the_reserved_bit_comes_apart_and_together_again() -> None:
    for key in range(0, 256, 2):
        apart = StorageKey.from_byte(key)
        bits = f"{key:08b}"
        assert apart.access_control == int(bits[:4], 2)
        assert [apart.fetch_protection, apart.referenced, apart.changed] == [bit == "1" for bit in bits[4:7]]
        assert apart.to_byte() == key


def test_every_byte_with_the_reserved_bit_is_no_key() -> None:
    for key in range(1, 256, 2):
        with pytest.raises(ValueError, match=f"{key:#04x} has the reserved bit"):
            StorageKey.from_byte(key)


@pytest.mark.parametrize("key", [-1, -256, 256, 1 << 64])
def test_what_is_no_byte_is_no_key(key: int) -> None:
    with pytest.raises(ValueError, match="one byte"):
        StorageKey.from_byte(key)


@pytest.mark.parametrize("access_control", [-1, 16, 255])
def test_access_control_bits_beyond_four_are_refused(access_control: int) -> None:
    with pytest.raises(ValueError, match="0 to 15"):
        StorageKey(access_control, fetch_protection=False, referenced=False, changed=False)


def test_a_key_of_four_parts_is_the_byte_that_the_architecture_says() -> None:
    assert StorageKey(3, fetch_protection=True, referenced=False, changed=False).to_byte() == 0x38
    assert StorageKey(0, fetch_protection=False, referenced=True, changed=True).to_byte() == 0x06
    assert StorageKey(15, fetch_protection=True, referenced=True, changed=True).to_byte() == 0xFE


def test_the_masks_cover_the_byte_once() -> None:
    masks = [
        storage_key.ACC_MASK,
        storage_key.FETCH_PROTECTION,
        storage_key.REFERENCED,
        storage_key.CHANGED,
        storage_key.RESERVED,
    ]
    assert masks == [0xF0, 0x08, 0x04, 0x02, 0x01]
    assert storage_key.STABLE_MASK == 0xF8


@given(st.binary(max_size=600), st.booleans())
@settings(max_examples=examples(80), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_first_reserved_bit_is_found_wherever_it_is(keys: bytes, as_bytearray: bool) -> None:
    found = first_reserved(bytearray(keys) if as_bytearray else keys)

    assert found == next((index for index, key in enumerate(keys) if key % 2), None)


@given(_KEYS, st.integers(0, 2000), st.integers(0, 255).filter(lambda key: key % 2 == 1))
@settings(max_examples=examples(80), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_one_reserved_bit_among_many_good_keys_is_found(keys: bytes, at: int, bad: int) -> None:
    at = min(at, len(keys))
    assert first_reserved(keys) is None
    assert first_reserved(keys[:at] + bytes([bad]) + keys[at:]) == at


@pytest.mark.parametrize("as_view", [False, True])
@pytest.mark.parametrize("count", [0, 1, 65_535, 65_536, 65_537, 200_000])
def test_one_look_finds_the_first_reserved_bit_and_the_checksum(count: int, as_view: bool) -> None:
    before = zlib.crc32(b"before")
    good = bytes(range(0, 256, 2)) * (count // 128 + 1)
    for places in ((), (0,), (count - 1,), (65_535, 65_536), (65_536, 199_999)):
        keys = bytearray(good[:count])
        there = [at for at in places if 0 <= at < count]
        for at in there:
            keys[at] |= 1
        wanted = (there[0] if there else None, zlib.crc32(keys, before))
        assert look_through(memoryview(keys) if as_view else bytes(keys), before) == wanted


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    # (index, length) of each run of true.
    at = 0
    runs = []
    for flag, group in itertools.groupby(flags):
        length = len(list(group))
        if flag:
            runs.append((at, length))
        at += length
    return runs


Changes = list[tuple[int, int, int]]
"""(index, length, bits to flip), applied one after the other."""

_changes: st.SearchStrategy[Changes] = st.lists(
    st.tuples(st.integers(0, 1500), st.integers(0, 300), st.sampled_from([0x02, 0x04, 0x06, 0x08, 0x10, 0xF8, 0xFF]))
)


def _changed(keys: bytes, changes: Changes) -> bytes:
    found = bytearray(keys)
    for start, count, flipped in changes:
        for index in range(start, min(start + count, len(found))):
            found[index] ^= flipped
    return bytes(found)


def _compared(test: Callable[[bytes, Changes], None]) -> Callable[[], None]:
    # What both comparisons are given.
    for changes in (
        [(250, 12, 0x10)],
        [(0, 256, 0x10), (256, 256, 0x20)],  # runs that touch are one
        [(255, 1, 0x08), (257, 1, 0x08)],  # two runs with one equal key between them
        [(0, 1, 0x08), (599, 1, 0x08)],  # the first key and the last
        [(0, 600, 0xF8)],
    ):
        test = example(bytes(600), changes)(test)
    return settings(max_examples=examples(80), deadline=None, suppress_health_check=[HealthCheck.too_slow])(
        given(_KEYS, _changes)(test)
    )


@_compared
def test_differing_runs_are_what_a_comparison_key_by_key_finds(keys: bytes, changes: Changes) -> None:
    found = _changed(keys, changes)

    expected = _runs([one >> 3 != other >> 3 for one, other in zip(keys, found, strict=True)])
    assert differing_runs(keys, found) == expected
    assert differing_runs(bytearray(found), keys) == expected


@_compared
def test_lost_runs_are_what_a_comparison_key_by_key_finds(keys: bytes, changes: Changes) -> None:
    found = _changed(keys, changes)

    def is_lost(wanted: int, got: int) -> bool:
        acc_or_f_differs = wanted >> 3 != got >> 3
        lower_bit_is_missing = any(wanted & bit and not got & bit for bit in (0x04, 0x02, 0x01))
        return acc_or_f_differs or lower_bit_is_missing

    expected = _runs([is_lost(*pair) for pair in zip(keys, found, strict=True)])
    assert lost_runs(keys, bytearray(found)) == expected


@given(_KEYS)
@settings(max_examples=examples(50), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_keys_that_differ_in_referenced_and_changed_only_are_the_same(keys: bytes) -> None:
    other = bytes(key ^ 0x06 for key in keys)
    assert differing_runs(keys, other) == []
    assert differing_runs(keys, other, 0xFE) == ([(0, len(keys))] if keys else [])


def test_referenced_and_changed_that_came_along_are_no_loss_and_those_that_went_are() -> None:
    assert lost_runs(b"\x00\x30\x38", b"\x06\x34\x3a") == []
    assert lost_runs(b"\x06\x34\x3a", b"\x00\x30\x38") == [(0, 3)]
    assert lost_runs(b"\x04\x30", b"\x02\x30") == [(0, 1)]


@pytest.mark.parametrize("compare", [differing_runs, lost_runs])
@pytest.mark.parametrize(("wanted", "found"), [(b"", b"\0"), (b"\0\0", b"\0"), (b"\x10\0", b"\x10")])
def test_arrays_of_different_length_are_not_compared(
    compare: Callable[[bytes, bytes], object], wanted: bytes, found: bytes
) -> None:
    with pytest.raises(ValueError, match="can't be compared"):
        compare(wanted, found)


@given(_KEYS | st.binary(max_size=300))
@example(b"\n\n\n\0\n")  # a regular expression's dot stops at 0x0a unless told otherwise
@settings(max_examples=examples(80), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_runs_of_equal_keys_join_back_to_the_keys_and_are_as_long_as_can_be(keys: bytes) -> None:
    runs = runs_of_equal(keys)

    assert b"".join(bytes([key]) * count for _, count, key in runs) == keys
    assert [start for start, _, _ in runs] == [sum(count for _, count, _ in runs[:at]) for at in range(len(runs))]
    assert all(one[2] != other[2] for one, other in itertools.pairwise(runs))
    assert runs_of_equal(bytearray(keys)) == runs


@pytest.mark.parametrize(
    ("keys", "only"),
    [
        (b"\x10", 0x10),
        (bytes(1000), 0),
        (b"\xfe" * 1000, 0xFE),
        (b"\x10\x20", None),
        (b"\x10" * 999 + b"\x20", None),
        (b"\x20" + b"\x10" * 999, None),
        (b"\x10" * 300 + b"\x20" + b"\x10" * 699, None),
        (b"\x10" * 500 + b"\x20" + b"\x10" * 499, None),
        (b"\x10" * 200_000, 0x10),
        (b"\x10" * 131_072, 0x10),
        (b"\x10" * 65_530 + b"\x20" + b"\x10" * 134_469, None),
        (b"\x10" * 199_990 + b"\x20" + b"\x10" * 9, None),
    ],
)
def test_keys_that_are_all_one_are_told_from_others(keys: bytes, only: int | None) -> None:
    assert only_key(keys) == only
    assert only_key(memoryview(keys)) == only


@pytest.mark.parametrize("at", [1, 65_534, 65_535, 65_536, 65_537, 131_071, 131_072, 199_998])
def test_a_key_that_differs_is_seen_wherever_it_is_and_the_view_is_free_again(at: int) -> None:
    keys = bytearray(b"\x10" * 200_000)
    keys[at] = 0x20
    view = memoryview(keys)
    assert only_key(view) is None
    view.release()
    keys.append(0)  # BufferError where a view is left


def test_a_reserved_bit_is_found_in_a_view_too() -> None:
    assert first_reserved(memoryview(b"\x10\x11")) == 1
    assert first_reserved(memoryview(b"\x10\x10")) is None
    assert first_reserved(memoryview(b"\x10" * 200_000)) is None
    for at in (0, 65_535, 65_536, 199_999):
        keys = bytearray(b"\x10" * 200_000)
        keys[at] = 0xFF
        assert first_reserved(memoryview(keys)) == at
