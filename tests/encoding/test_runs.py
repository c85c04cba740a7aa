"""Keys as runs: the bytes of the documented format, back and forth, and every other bytes refused."""

from __future__ import annotations

import itertools
import tracemalloc
from array import array

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skeyd.encoding import runs
from skeyd.encoding.runs import RUN_MAX, RunsError, decode, encode, encode_one, guess
from tests.rpc.stubs import some_keys

VECTORS = {
    "one key": (b"\x10", "0000 10"),
    "two of one": (b"\x10\x10", "0100 10"),
    "two keys": (b"\x10\x06", "0000 0000 10 06"),
    "three runs": (b"\x00" * 3 + b"\xfe" + b"\x06" * 257, "0200 0000 0001 00 fe 06"),
    "the longest run": (b"\x38" * 65_536, "ffff 38"),
    "a longer run": (b"\x38" * 65_537, "ffff 0000 38 38"),
}
"""(keys, data in hex). docs/encodings.md shows them; none depends on the machine's byte order."""

_keys = st.one_of(
    st.binary(min_size=1, max_size=300),
    st.lists(st.tuples(st.integers(0, 255), st.integers(1, 700)), min_size=1, max_size=30).map(
        lambda pairs: b"".join(bytes([key]) * count for key, count in pairs)
    ),
)


@pytest.mark.parametrize(("keys", "data"), VECTORS.values(), ids=VECTORS)
def test_the_vectors_of_the_document_are_what_is_read(keys: bytes, data: str) -> None:
    assert decode(bytes.fromhex(data), len(keys)) == keys


@pytest.mark.parametrize(("keys", "data"), VECTORS.values(), ids=VECTORS)
def test_the_vectors_of_the_document_are_what_is_written(keys: bytes, data: str) -> None:
    if len(set(keys)) == 1:
        assert encode_one(keys[0], len(keys)) == bytes.fromhex(data)
    else:
        assert encode(keys, 1 << 20) == bytes.fromhex(data)


@settings(deadline=None)
@given(_keys)
@example(b"\x10" * RUN_MAX)
@example(b"\x10" * (2 * RUN_MAX) + b"\x20")
@example(bytes(range(256)) * 2)
@example(b"\x10\x20\x20" * 5000)
def test_what_is_written_is_read_again(keys: bytes) -> None:
    data = encode(keys, 1 << 20)
    assert data is not None
    assert decode(data, len(keys)) == keys
    assert decode(memoryview(data), len(keys)) == keys


@settings(deadline=None)
@given(st.integers(0, 255), st.integers(1, 4 * RUN_MAX))
@example(0x10, RUN_MAX)
@example(0x10, 2 * RUN_MAX + 1)
def test_one_key_is_written_as_few_runs_as_it_can_be(key: int, count: int) -> None:
    data = encode_one(key, count)
    assert decode(data, count) == bytes([key]) * count
    assert len(data) == 3 * -(-count // RUN_MAX)


@settings(deadline=None)
@given(_keys.filter(lambda keys: len(keys) <= 8_192))
def test_there_are_no_more_runs_than_there_must_be(keys: bytes) -> None:
    data = encode(keys, 1 << 20)
    assert data is not None
    assert len(data) == 3 * len(list(itertools.groupby(keys)))


def test_runs_that_are_cut_where_blocks_end_are_few() -> None:
    keys = (b"\x10" * 100_000 + b"\x20") * 10
    data = encode(keys, 1 << 20)
    assert data is not None
    assert decode(data, len(keys)) == keys
    assert len(data) <= 3 * (20 + len(keys) // 16_384 + 1)


def test_a_key_that_no_sample_meets_is_written_as_a_run_too() -> None:
    # One key only in a stretch of which the sample, of which an eighth of the keys is far apart, sees nothing.
    keys = bytearray(b"\x10" * 100_000)
    keys[200:5_000] = b"\x44" * 4_800
    data = encode(bytes(keys), 1 << 20)
    assert data is not None
    assert decode(data, len(keys)) == keys
    assert len(data) <= 3 * 10


@pytest.mark.parametrize("most", [0, 1, 3 * 999, 3 * 1000 - 1])
def test_what_would_take_more_than_it_may_is_given_up(most: int) -> None:
    keys = b"\x10\x20" * 500
    assert encode(keys, most) is None
    assert encode(keys, 3 * 1000) is not None


def test_random_keys_are_given_up_long_before_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    pattern = runs._pattern(b"\x10\x20")

    class Watched:
        def findall(self, keys: bytes, at: int, end: int) -> list[bytes]:
            looked.append(at)
            found: list[bytes] = pattern.findall(keys, at, end)
            return found

    monkeypatch.setattr(runs, "_pattern", lambda _: Watched())
    assert encode(b"\x10\x20" * (1 << 19), 1000) is None
    assert looked == [0]


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[str | int]:
    """Watch what is done at once, in runs or keys, and where others have their turn."""
    found: list[str | int] = []
    repeat, pattern = runs._repeat, runs._pattern

    class Watched:
        def __init__(self, keys: bytes) -> None:
            self._pattern = pattern(keys)

        def findall(self, keys: bytes, at: int, end: int) -> list[bytes]:
            found.append(end - at)
            return self._pattern.findall(keys, at, end)

    def watched_repeat(keys: bytes, lengths: array[int]) -> bytes:
        found.append(len(keys))
        return repeat(keys, lengths)

    monkeypatch.setattr(runs, "give_way", lambda: found.append("turn"))
    monkeypatch.setattr(runs, "_pattern", Watched)
    monkeypatch.setattr(runs, "_repeat", watched_repeat)
    return found


def test_others_have_their_turn_while_a_chunk_of_the_most_runs_is_decoded(happened: list[str | int]) -> None:
    # 59 ms in all; eight streams of such chunks kept a health check waiting for a tenth of a second.
    data = b"\x01\0" * 65_536 + b"\x10\x20" * 32_768
    assert decode(data, 131_072) == b"\x10\x10\x20\x20" * 32_768
    assert happened == ["turn"] * 64 + [1024, "turn"] * 64, "they are added up, and put together"


def test_others_have_their_turn_while_keys_are_encoded(happened: list[str | int]) -> None:
    keys = (b"\x10" * 8 + b"\x20" * 8) * 8192
    data = encode(keys, len(keys))
    assert data is not None
    assert happened == ["turn"] * 8 + [16_384, "turn"] * 8, "their kinds are found, and their runs"


@pytest.mark.parametrize(
    ("keys", "least", "most"),
    [
        (b"\x10", 0, 0),
        (b"\x10" * (1 << 20), 0, 0),
        (some_keys(1 << 20), 2.9, 3.0),
        ((b"\x10" * 64 + b"\x20" * 64) * 8192, 0.01, 0.1),
        (b"\x10\x20" * 1000, 2.9, 3.0),
    ],
    ids=["one", "one-key-throughout", "random", "runs-of-64", "alternating"],
)
def test_a_guess_is_near_the_truth(keys: bytes, least: float, most: float) -> None:
    assert least <= guess((keys,)) <= most


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "count"),
    [
        ("", 0),
        ("", 1),
        ("10", 1),
        ("0000", 1),
        ("0000 10 10", 1),
        ("0000 10", 0),
        ("0000 10", 2),
        ("0100 10", 1),
        ("0100 0100 10 20", 3),
        ("0100 0100 10 20", 5),
        ("ffff 10", 1 << 20),
    ],
)
def test_data_that_stands_for_other_keys_is_refused(data: str, count: int) -> None:
    with pytest.raises(RunsError) as refused:
        decode(bytes.fromhex(data), count)
    assert str(refused.value)


def test_a_bomb_is_refused_before_memory_is_spent() -> None:
    bomb = b"\xff\xff" * 10_000 + b"\x10" * 10_000  # 655 million keys in 30,000 bytes
    tracemalloc.start()
    try:
        with pytest.raises(RunsError):
            decode(bomb, 1 << 20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(bomb)


@pytest.mark.parametrize("most", [1, 3, 700, RUN_MAX])
def test_the_memory_that_is_taken_is_a_small_multiple_of_the_keys(most: int) -> None:
    # With 3, the most runs that a chunk of 1,048,576 keys can have: an object each would take some 40 MiB.
    count = 1 << 20 if most >= 3 else 1 << 18
    whole, rest = divmod(count, most)
    lengths = [most] * whole + [rest] * bool(rest)
    data = b"".join((length - 1).to_bytes(2, "little") for length in lengths) + b"\x10\x20" * (len(lengths) // 2)
    data += b"\x30" * (3 * len(lengths) - len(data))
    tracemalloc.start()
    try:
        keys = decode(data, count)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(keys) == count
    assert peak < 2.2 * count + 2 * len(data)


@settings(deadline=None)
@given(st.binary(max_size=60), st.integers(0, 1 << 20))
def test_any_bytes_are_so_many_keys_or_refused(data: bytes, count: int) -> None:
    lengths = [int.from_bytes(data[at : at + 2], "little") + 1 for at in range(0, len(data) // 3 * 2, 2)]
    try:
        keys = decode(data, count)
    except RunsError:
        assert len(data) % 3 or not data or sum(lengths) != count
    else:
        assert len(keys) == count == sum(lengths)
