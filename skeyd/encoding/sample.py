"""A sample of keys that depends on nothing but the keys: not on the pieces that they lie in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Pieces = Sequence[bytes | memoryview]
"""Keys, at least one, end to end."""


def sample(pieces: Pieces, times: int, keys: int) -> Iterator[bytes | memoryview]:
    """Take `keys` keys each at about so many places, as far from one another as that makes them; fewer at the end."""
    count = sum(map(len, pieces))
    for at in range(0, count, max(keys, count // times)):
        yield pieces[0][at : at + keys] if len(pieces) == 1 else _cut(pieces, at, keys)


def _cut(pieces: Pieces, at: int, keys: int) -> bytes:
    found: list[bytes | memoryview] = []
    for piece in pieces:
        if at < len(piece):
            found.append(piece[at : at + keys])
            keys -= len(found[-1])
            if not keys:
                break
        at = max(0, at - len(piece))
    return b"".join(found)
