"""The key of one frame: which of the kernel's calls it takes, and what a worker may say of it."""

from __future__ import annotations

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.vms.single import OneRead, OneWritten, read_one, reset_referenced, write_one
from tests.vms.fake_session import FakeSession, key_of

HOLE = 100


def session(*, keyop: bool, uses_keys: bool = True) -> FakeSession:
    """Frames 0 to 99 and 200 to 299."""
    return FakeSession((0, 100), (200, 100), uses_keys=uses_keys, keyop=keyop)


def reason(error: pytest.ExceptionInfo[SkeydError]) -> Reason:
    return error.value.reason


def test_with_keyop_a_key_is_read_by_it_and_by_nothing_else() -> None:
    talk = session(keyop=True)
    assert read_one(talk, 7) == OneRead(key_of(7), by_keyop=True)
    assert (talk.keyops, talk.read) == ([("iske", 7, 0)], [])


def test_without_keyop_a_key_is_read_as_a_range_of_one() -> None:
    talk = session(keyop=False)
    assert read_one(talk, 7) == OneRead(key_of(7), by_keyop=False)
    assert (talk.keyops, talk.read) == ([], [GfnRange(7, 1)])


@pytest.mark.parametrize("keyop", [True, False])
def test_a_guest_that_uses_no_keys_has_none(keyop: bool) -> None:
    talk = session(keyop=keyop, uses_keys=False)
    talk.keyless_from = 0
    # KEYOP isn't asked there, or it would tell of a key: the worker's GET said that there are none.
    assert read_one(talk, 7) == OneRead(None, by_keyop=False)


@pytest.mark.parametrize("keyop", [True, False])
@pytest.mark.parametrize("gfn", [HOLE, 300, 1 << 52, (1 << 64) - 1])
def test_a_frame_in_no_slot_is_refused_before_the_worker_is_asked(keyop: bool, gfn: int) -> None:
    talk = session(keyop=keyop)
    for use in (
        lambda: read_one(talk, gfn),
        lambda: write_one(talk, gfn, 0x10, True),
        lambda: reset_referenced(talk, gfn),
    ):
        with pytest.raises(SkeydError) as refused:
            use()
        assert reason(refused) is Reason.GFN_NOT_MAPPED
    assert (talk.keyops, talk.read, talk.written) == ([], [], [])


def test_an_impossible_key_is_the_workers_fault() -> None:
    talk = session(keyop=False)
    talk.impossible[7] = 0x37
    for use in (lambda: read_one(talk, 7), lambda: write_one(talk, 7, 0x10, False)):
        with pytest.raises(SkeydError) as refused:
            use()
        assert reason(refused) is Reason.WORKER_FAILED
    assert talk.written == []


def test_with_keyop_a_key_is_set_by_it_and_by_nothing_else() -> None:
    talk = session(keyop=True)
    assert write_one(talk, 7, 0x10, False) == OneWritten(key_of(7), repaired=False, enabled=False, by_keyop=True)
    assert (talk.keyops, talk.read, talk.written) == ([("sske", 7, 0x10)], [], [])


def test_a_key_that_was_set_again_is_told_of() -> None:
    for keyop in (True, False):
        talk = session(keyop=keyop)
        talk.repaired = 1
        assert write_one(talk, 7, 0x10, False).repaired


@pytest.mark.parametrize("allow", [True, False])
def test_without_keyop_a_key_is_set_as_a_range_of_one(allow: bool) -> None:
    talk = session(keyop=False)
    assert write_one(talk, 7, 0x10, allow) == OneWritten(key_of(7), repaired=False, enabled=False, by_keyop=False)
    assert (talk.keyops, talk.read, talk.written) == ([], [GfnRange(7, 1)], [(GfnRange(7, 1), b"\x10", allow)])


@pytest.mark.parametrize("keyop", [True, False])
def test_the_first_key_of_a_guest_is_set_by_the_call_that_enables_keys(keyop: bool) -> None:
    talk = session(keyop=keyop, uses_keys=False)
    talk.keyless_from = 0
    assert write_one(talk, 7, 0x10, True) == OneWritten(None, repaired=False, enabled=True, by_keyop=False)
    assert talk.written == [(GfnRange(7, 1), b"\x10", True)]


@pytest.mark.parametrize("keyop", [True, False])
def test_a_key_with_the_reserved_bit_is_refused_before_the_worker_is_asked(keyop: bool) -> None:
    talk = session(keyop=keyop)
    with pytest.raises(SkeydError) as refused:
        write_one(talk, 7, 0x11, True)
    assert reason(refused) is Reason.KEY_RESERVED_BIT
    assert (talk.keyops, talk.written) == ([], [])


def test_r_and_c_are_returned_as_they_were() -> None:
    talk = session(keyop=True)
    assert reset_referenced(talk, 1) == key_of(1) & 0x06
    assert talk.keyops == [("rrbe", 1, 0)]


def test_without_keyop_r_is_not_reset_by_anything_that_could_lose_c() -> None:
    talk = session(keyop=False)
    with pytest.raises(SkeydError) as refused:
        reset_referenced(talk, 1)
    assert reason(refused) is Reason.CAP_S390_KEYOP_MISSING
    assert (talk.read, talk.written) == ([], [])


def test_a_guest_that_uses_no_keys_has_no_r() -> None:
    with pytest.raises(SkeydError) as refused:
        reset_referenced(session(keyop=True, uses_keys=False), 1)
    assert reason(refused) is Reason.SKEYS_NOT_ENABLED
