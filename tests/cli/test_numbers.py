"""Ranges, sizes and keys as people write them, and all that they could write instead."""

from __future__ import annotations

import re
from collections.abc import Callable

import click
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from skeyd.cli.options import RANGE, number_of, size_of
from skeyd.gfn import GfnRange
from skeyd.storage_key import GFN_LIMIT
from tests.cli.running import NOBODY, skeyctl
from tests.examples import examples

WRITINGS: list[Callable[[int], str]] = [
    str,
    hex,
    lambda number: f"0x{number:X}",
    lambda number: f"0X{number:x}",
    lambda number: f"0x{number:020x}",
]
writings = st.sampled_from(WRITINGS)
gfns = st.one_of(st.integers(0, GFN_LIMIT - 1), st.integers(0, 300))

# What is near to a range and none: other bases, signs, digits of other scripts, what int() also takes.
PIECES = [*"0123456789abfxX-+ _.eobKl\n\t\0", "0x", "--", "٣", "१", "²", "\uff11", "K", "\ud800", "−"]  # noqa: RUF001
PIECES += [str(GFN_LIMIT - 1), str(GFN_LIMIT), "0x" + "f" * 5000, "9" * 5000, "1-", "5-3"]
absurd = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)

BAD_RANGES = [
    *("", " ", "-", "+", "--", "-1", "-1-5", "+5", "5+", "5-", "-5", "1--5", "1-+5", "1+-5", "1-2-3", "1+2+3", "1+2-3"),
    *("0x", "0x-0x", "0xg", "x10", "10x", "$10", "#10", "ten", "1.0", "1e3", "1,000", "1_000", "0b1", "0o17", "010"),
    *("0x1_0", " 5", "5 ", "5 - 6", "5\n", "٣", "१-२", "²", "\uff11\uff12", "5\u20136", "5-3", "0+0", "7+0"),
    *(f"{GFN_LIMIT}", f"0-{GFN_LIMIT}", f"0-{GFN_LIMIT - 1}", f"0+{GFN_LIMIT}", f"{GFN_LIMIT - 1}+2"),
    *("9" * 5000, "0x" + "f" * 5000, "0+" + "9" * 5000, "0+0x" + "f" * 5000, "0-0x" + "f" * 5000),
    *("5;6", "5:6", "5..6", "all", "vms/a", "0x10-0xf"),
]  # fmt: skip

BAD_SIZES = [
    *("", " ", "M", "0x", "0xM", "-1M", "+1M", "1.5G", "1e9", "1_000", "010M", " 1M", "1M ", "1 M", "1MB", "1MiB"),
    *("٣M", "²", "0b1", "256\u212a", "1K1", "M1", "1P", "9" * 5000, "1M\n"),
]  # fmt: skip


def convert(text: str) -> GfnRange:
    return RANGE.convert(text, None, None)


@settings(deadline=None)
@given(gfns, gfns, writings, writings)
def test_first_and_last_make_a_range_with_both_in_it(
    one: int, other: int, write_first: Callable[[int], str], write_last: Callable[[int], str]
) -> None:
    first, last = sorted((one, other))
    assume(last - first + 1 < GFN_LIMIT)  # all gfns at once are one more than can be asked for
    assert convert(f"{write_first(first)}-{write_last(last)}") == GfnRange(first, last - first + 1)


@settings(deadline=None)
@given(gfns, st.data(), writings, writings)
def test_first_and_count_make_a_range_of_so_many(
    first: int, data: st.DataObject, write_first: Callable[[int], str], write_count: Callable[[int], str]
) -> None:
    count = data.draw(st.integers(1, min(GFN_LIMIT - first, GFN_LIMIT - 1)))
    assert convert(f"{write_first(first)}+{write_count(count)}") == GfnRange(first, count)


@settings(deadline=None)
@given(gfns, writings)
def test_one_number_is_one_frame(gfn: int, write: Callable[[int], str]) -> None:
    assert convert(write(gfn)) == GfnRange(gfn, 1)


@settings(deadline=None)
@given(gfns, st.data())
def test_a_range_as_skeyctl_prints_it_can_be_given_back_to_it(first: int, data: st.DataObject) -> None:
    frames = GfnRange(first, data.draw(st.integers(1, min(GFN_LIMIT - first, GFN_LIMIT - 1))))
    assert convert(str(frames)) == frames


@settings(deadline=None, max_examples=examples(500))
@given(absurd)
def test_whatever_else_is_written_is_refused_as_a_bad_parameter(text: str) -> None:
    number = r"0[xX][0-9a-fA-F]+|0|[1-9][0-9]*"
    found = re.fullmatch(f"({number})(?:([-+])({number}))?", text)
    try:
        frames = convert(text)
    except click.BadParameter:
        frames = None
    expected = None
    if found and max(map(len, text.replace("+", "-").split("-"))) < 4000:
        first = int(found[1], 0)
        count = 1 if not found[2] else int(found[3], 0) - (first - 1 if found[2] == "-" else 0)
        if 0 < count < GFN_LIMIT and first + count <= GFN_LIMIT:
            expected = GfnRange(first, count)
    assert frames == expected


@pytest.mark.parametrize("text", BAD_RANGES, ids=lambda text: repr(text)[:20])
@pytest.mark.parametrize("verb", ["get", "set"])
def test_a_bad_range_is_refused_before_any_daemon_is_asked(verb: str, text: str) -> None:
    key = ["--acc", "1"] if verb == "set" else []
    done = skeyctl(NOBODY, "keys", verb, "a", *key, "--json", "--", text)
    assert done.status == 2
    assert done.error["reason"] == "USAGE"


def test_a_bad_range_is_named_with_the_ways_to_write_one() -> None:
    done = skeyctl(NOBODY, "keys", "get", "a", "0x10-0x1f", "ten")
    assert done.status == 2
    assert "'ten' is no range of frames; write 0x100-0x1ff, 0x100+256 or 0x100" in done.err


@settings(deadline=None)
@given(st.integers(0, 2**64), writings, st.sampled_from([*"kKmMgGtT", ""]))
def test_a_size_is_a_number_and_perhaps_a_unit(number: int, write: Callable[[int], str], unit: str) -> None:
    units = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
    assert size_of(write(number) + unit) == number * units[unit.lower()]


@settings(deadline=None, max_examples=examples(300))
@given(absurd)
def test_whatever_else_is_no_size(text: str) -> None:
    found = re.fullmatch(r"(?:0[xX][0-9a-fA-F]+|0|[1-9][0-9]*)[kmgtKMGT]?", text)
    if found and len(text) < 4000:
        size_of(text)
    elif not found:
        with pytest.raises(ValueError, match="size"):
            size_of(text)


@pytest.mark.parametrize("text", BAD_SIZES, ids=lambda text: repr(text)[:20])
@pytest.mark.parametrize("where", ["{}", "1M@{}"])
def test_a_bad_size_or_address_of_memory_is_refused_before_any_daemon_is_asked(where: str, text: str) -> None:
    arguments = ("vm", "create", "a", "--kind", "simulated", "--json", f"--memory={where.format(text)}")
    done = skeyctl(NOBODY, *arguments)
    assert done.status == 2
    error = done.error
    assert error["reason"] == "USAGE"
    assert "--memory" in error["message"]


@pytest.mark.parametrize("text", ["", "-1", "+1", "1_0", "٣", "0b1", "0o7", "010", " 2", "0x", "9" * 5000])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no number|Exceeds the limit"):
        number_of(text)
