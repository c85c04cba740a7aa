"""docs/encodings.md shows what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from skeyd.encoding import runs
from skeyd.v1 import storage_key_service_pb2 as pb
from tests.encoding.test_runs import VECTORS

PAGE = (Path(__file__).parents[2] / "docs" / "encodings.md").read_text()
ROWS = re.findall(r"^\| (`[^|]*`[^|]*) \| `([0-9a-f ]+)` \|$", PAGE, re.MULTILINE)


def keys_of(words: str) -> bytes:
    """Read how the page writes keys down."""
    keys = b""
    for one in words.split(", "):
        key, times = re.fullmatch(r"`([0-9a-f]{2})`(?: (twice|\d+ times))?", one).groups()  # type: ignore[union-attr]
        count = {None: 1, "twice": 2}.get(times) or int(times.split()[0])
        keys += bytes.fromhex(key) * count
    return keys


@pytest.mark.parametrize(("keys", "data"), ROWS)
def test_every_vector_of_the_page_is_right(keys: str, data: str) -> None:
    assert runs.decode(bytes.fromhex(data), len(keys_of(keys))) == keys_of(keys)


def test_the_page_has_the_vectors_of_the_tests() -> None:
    assert [(keys_of(keys), data) for keys, data in ROWS] == list(VECTORS.values())


def test_the_page_has_the_encodings_of_the_contract() -> None:
    told = re.findall(r"^\| (\d) \| (ENCODING_\w+) \|", PAGE, re.MULTILINE)
    assert {name: int(number) for number, name in told} == {
        name: number for name, number in pb.Encoding.items() if number
    }
