"""SetSkeys calls as the worker knows them, over every simulated generation and kernels that refuse half-way."""

from __future__ import annotations

import errno
import os
import random
import tempfile
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skeyd.errors import SkeydError
from skeyd.gfn import GfnRange
from skeyd.kvm.errors import KvmError
from skeyd.linux import open_unnamed
from skeyd.worker import journal
from skeyd.worker.keys import Keys
from skeyd.worker.outcomes import LastWrite
from skeyd.worker.protocol import SIMULATED_KERNELS
from skeyd.worker.transactions import Call, Transactions
from tests.examples import examples
from tests.worker.backends import Recording, Refusing

CALL = Call("", "0" * 64, keep=False)
REFUSED = KvmError("KVM_S390_SET_SKEYS", errno.EFAULT)
SLOTS = (GfnRange(0, 256), GfnRange(1024, 256))


class HalfRefusing(Recording):
    """Sets only a part of some SETs, and refuses them then: as often as `refuses` says."""

    def __init__(self, kernel: str, chance: random.Random) -> None:
        super().__init__((0, 1), (4, 1), kernel=kernel)
        self.chance = chance
        self.refuses = 0.0

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
        """As the ioctl, or half of it."""
        if self.chance.random() < self.refuses:
            done = self.chance.randrange(len(buffer) + 1)
            if done:
                super().set_skeys(start_gfn, buffer[:done])
            raise REFUSED
        super().set_skeys(start_gfn, buffer)


def _all_keys(backend: Recording) -> dict[int, int]:
    found: dict[int, int] = {}
    for frames in SLOTS:
        keys = bytearray(frames.count)
        backend.vm.get_skeys(frames.start, memoryview(keys))
        found.update(zip(range(frames.start, frames.end), keys, strict=True))
    return found


def _ended(transactions: Transactions, owner: object) -> LastWrite | None:
    transactions.abandon(owner)
    while transactions.rolling_back:
        transactions.step()
    return transactions.outcome_for(owner)


def _file() -> int:
    directory = os.open(tempfile.gettempdir(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return open_unnamed(directory)
    finally:
        os.close(directory)


def _no_file() -> int:
    raise AssertionError("memory is enough")


_slices = st.lists(
    st.tuples(st.sampled_from(SLOTS), st.integers(0, 255), st.integers(1, 256), st.integers(0, 127), st.booleans()),
    max_size=7,
)


@given(
    kernel=st.sampled_from(SIMULATED_KERNELS),
    slices=_slices,
    keyless=st.booleans(),
    memory=st.sampled_from([50, 400, journal.MEMORY_BYTES]),
    refuses=st.sampled_from([(0, 0), (0, 0.3), (0.3, 0), (0.3, 0.3)]),
    seed=st.integers(0, 1 << 32),
)
@settings(max_examples=examples(200), deadline=None)
def test_every_frame_has_every_bit_of_its_old_key_or_is_said_to_be_dirty(
    kernel: str,
    slices: list[tuple[GfnRange, int, int, int, bool]],
    keyless: bool,
    memory: int,
    refuses: tuple[float, float],
    seed: int,
) -> None:
    chance = random.Random(seed)  # noqa: S311  no secret

    def some(count: int) -> bytes:
        return bytes(chance.randrange(0, 256, 2) for _ in range(count))

    backend = HalfRefusing(kernel, chance)
    keys = Keys(backend)
    if not keyless:
        for frames in SLOTS:
            keys.write(frames, some(frames.count), allow_enable=True)
    old = _all_keys(backend)
    transactions, owner = Transactions(keys, _file), object()
    with mock.patch.object(journal, "MEMORY_BYTES", memory):
        transactions.begin(owner, CALL, resume=False)
        backend.refuses = refuses[0]
        asked = False
        left = keys.frames()  # more keys than that are no call
        for slot, at, count, key, plain in slices:
            frames = GfnRange(slot.start + at, min(count, slot.count - at))
            left -= frames.count
            if left < 0:
                break
            asked = True
            try:
                transactions.set(owner, frames, bytes([2 * key]) * frames.count if plain else some(frames.count), True)
            except SkeydError as error:
                assert error.metadata["uncertain"] == str(frames)  # noqa: PT017  it may be refused or not
        backend.refuses = refuses[1]
        last = _ended(transactions, owner)
    new = _all_keys(backend)
    if last is None:
        assert not asked
    else:
        assert last.outcome == ("dirty" if last.dirty else "rolled_back")
        assert not last.dirty or refuses[1] > 0
    dirty = {gfn for frames in (last.dirty if last else ()) for gfn in range(frames.start, frames.end)}
    assert {gfn for gfn in old if old[gfn] != new[gfn]} <= dirty


@pytest.mark.parametrize("bit", [0x02, 0x04, 0x08, 0x10])
@pytest.mark.parametrize("old_has_it", [False, True])
def test_a_frame_that_the_kernel_refuses_is_dirty_whichever_bit_is_the_new_keys(bit: int, old_has_it: bool) -> None:
    # R or C too many is no loss of a SET that was taken; of one that was refused it may be the new key's.
    old, new = (0x80 | bit, 0x80) if old_has_it else (0x80, 0x80 | bit)
    # The slice as a whole, and each of its frames.
    backend = Refusing({("set", number): REFUSED for number in (2, 3, 4)})
    transactions, owner = Transactions(Keys(backend), _no_file), object()
    Keys(backend).write(GfnRange(0, 4), bytes([old]) * 4, allow_enable=True)
    transactions.begin(owner, CALL, resume=False)
    transactions.set(owner, GfnRange(1, 2), bytes([new]) * 2, False)
    last = _ended(transactions, owner)
    assert last is not None
    assert (last.outcome, last.dirty) == ("dirty", (GfnRange(1, 2),))
