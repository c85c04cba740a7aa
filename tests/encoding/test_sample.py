"""A sample is of the keys, and not of the pieces that they lie in."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from skeyd.encoding.sample import sample


@settings(deadline=None)
@given(st.lists(st.binary(max_size=400), min_size=1, max_size=4).filter(any), st.integers(1, 20), st.integers(1, 40))
@example([b"", b"\x10"], 8, 128)
def test_a_sample_is_the_same_however_the_keys_are_cut(pieces: list[bytes], times: int, keys: int) -> None:
    whole = b"".join(pieces)
    found = [bytes(part) for part in sample([memoryview(one) for one in pieces], times, keys)]
    step = max(keys, len(whole) // times)
    assert found == [whole[at : at + keys] for at in range(0, len(whole), step)]
    assert found == list(sample([whole], times, keys))
