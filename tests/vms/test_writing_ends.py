"""What a SetSkeys comes to, whoever ends it: errors say what became of the keys; calls that were made before."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange, Ranges
from skeyd.limits import ROLL_BACK_STALL_SECONDS
from skeyd.vms.pacing import FIRST_KEYS
from skeyd.vms.writing import KeysDigest, KeyWriting, Progress, WriteOptions
from skeyd.worker.outcomes import Begun, LastWrite
from skeyd.worker.protocol import SLICE_KEYS
from tests.vms.fake_session import FakeSession
from tests.vms.writings import MEMORY, begin, error_of, kept_write, new, refusal_of, write_chunk

# --- the worker's refusals -----------------------------------------------------------------------------------------


UNCERTAIN = {"gfn": "0x1", "uncertain": "0x4000-0x13fff"}
SLICE = bytes(FIRST_KEYS)


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (kept_write(SLICE, outcome="rolled_back"), {"gfn": "0x1", "outcome": "ROLLED_BACK"}),
        (
            kept_write(SLICE, outcome="dirty", dirty=(GfnRange(0x40001, 2), GfnRange(0x40010, 1))),
            {"gfn": "0x1", "outcome": "DIRTY", "dirty": "0x40001-0x40002,0x40010-0x40010"},
        ),
        (
            kept_write(SLICE, dirty=(GfnRange(0x4001, 2), GfnRange(0x4010, 1))),
            {
                "gfn": "0x1",
                "uncertain": "0x4001-0x4002,0x4010-0x4010",
                "outcome": "KEPT",
                "next_gfn": hex(FIRST_KEYS),
                "keys_set": str(FIRST_KEYS),
                "crc32": f"{zlib.crc32(SLICE):#010x}",
            },
        ),
    ],
    ids=["rolled back", "dirty", "kept"],
)
def test_a_slice_that_the_worker_refused_ends_the_call_and_says_what_became_of_it(
    outcome: LastWrite, told: dict[str, str]
) -> None:
    session = FakeSession((0, 4 * SLICE_KEYS))
    session.refusals = {1: SkeydError(Reason.KEYS_NOT_STORED, "lost", dict(UNCERTAIN))}
    session.outcomes = [outcome]
    ours = begin(session, (0, 3 * SLICE_KEYS), keep=outcome.outcome == "kept")
    keys = bytes(3 * SLICE_KEYS)
    refused = error_of(ours, lambda: write_chunk(ours, 0, keys))
    assert refused.reason is Reason.KEYS_NOT_STORED
    # What is uncertain is so no more where the old keys are back; what isn't back is said.
    assert refused.metadata == told
    assert ours.progress == Progress(FIRST_KEYS, FIRST_KEYS, 0, enabled=False, crc32=zlib.crc32(SLICE))
    assert len(session.written) == 2
    assert session.calls == ["begin", "abandon"]


class Clock:
    """Moves while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def test_the_old_keys_are_waited_for_until_the_last_of_them_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("skeyd.vms.writing.time", clock)
    session = FakeSession(MEMORY)
    rolling = kept_write(b"\x20" * 4, outcome="rolling_back")
    # More answers than there were slices: the kernel may refuse some frames, and others have to be tried one by one.
    session.outcomes = [*(replace(rolling, left=left) for left in range(50, 0, -1)), replace(rolling, outcome="dirty")]
    ours = begin(session, (0x100, 8))
    write_chunk(ours, 0x100, b"\x20" * 4)
    assert error_of(ours, ours.cut).metadata["outcome"] == "DIRTY"
    assert session.calls == ["begin", *["abandon"] * 51]
    assert clock.pauses == [], "it went on"


@pytest.mark.parametrize("left", [0, 4])
def test_a_worker_with_which_nothing_comes_back_is_asked_now_and_then_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """A debugger may have the VM's process; a worker of an earlier build doesn't say what is left."""
    clock = Clock()
    monkeypatch.setattr("skeyd.vms.writing.time", clock)
    session = FakeSession(MEMORY)
    rolling = kept_write(b"\x20" * 4, outcome="rolling_back", left=left)
    session.outcomes = [rolling] * 10_000
    ours = begin(session, (0x100, 8))
    write_chunk(ours, 0x100, b"\x20" * 4)
    assert error_of(ours, ours.cut).metadata == {"outcome": "UNKNOWN"}
    assert ROLL_BACK_STALL_SECONDS <= clock.now < ROLL_BACK_STALL_SECONDS + 1
    assert len(session.calls) < 200
    assert clock.pauses[0] == 0, "the first answer may have come right before something was done"


def test_of_a_worker_that_goes_on_after_a_while_it_is_known() -> None:
    session = FakeSession(MEMORY)
    rolling = kept_write(b"\x20" * 4, outcome="rolling_back", left=4)
    session.outcomes = [*[rolling] * 8, replace(rolling, outcome="rolled_back")]
    ours = begin(session, (0x100, 8))
    write_chunk(ours, 0x100, b"\x20" * 4)
    assert error_of(ours, ours.cut).metadata == {"outcome": "ROLLED_BACK"}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "lie",
    [
        None,
        kept_write(b"\x20" * 4, outcome="applied"),
        kept_write(b"\x20" * 3),
        kept_write(b"\x20" * 4, crc32=1),
        kept_write(b"\x20" * 5, outcome="rolled_back"),
    ],
    ids=["nothing", "applied", "fewer", "others", "more"],
)
def test_a_worker_that_says_what_cant_be_is_not_believed(lie: LastWrite | None, keep: bool) -> None:
    session = FakeSession(MEMORY)
    session.outcomes = [lie]
    ours = begin(session, (0x100, 8), keep=keep)
    write_chunk(ours, 0x100, b"\x20" * 4)
    assert error_of(ours, ours.cut).metadata == {"outcome": "UNKNOWN"}


@pytest.mark.parametrize(("keep", "other"), [(False, "kept"), (True, "rolled_back"), (True, "dirty")])
def test_what_is_kept_is_what_was_to_be_kept(keep: bool, other: str) -> None:
    session = FakeSession(MEMORY)
    session.outcomes = [kept_write(b"\x20" * 4, outcome=other, dirty=(GfnRange(0x100, 1),) if other == "dirty" else ())]
    ours = begin(session, (0x100, 8), keep=keep)
    write_chunk(ours, 0x100, b"\x20" * 4)
    assert error_of(ours, ours.cut).metadata == {"outcome": "UNKNOWN"}


@pytest.mark.parametrize("after", [0, 2])
def test_of_a_worker_that_is_lost_nobody_knows_what_it_does(after: int) -> None:
    session = FakeSession(MEMORY, uses_keys=False)
    rolling = kept_write(b"\x20" * 4, outcome="rolling_back")
    session.outcomes = [*[rolling] * after, SkeydError(Reason.WORKER_LOST, "gone")]
    session.refusals = {1: SkeydError(Reason.WORKER_LOST, "first", {"uncertain": "0x104-0x107"})}
    ours = begin(session, (0x100, 8))
    write_chunk(ours, 0x100, b"\x20" * 4)
    told = error_of(ours, lambda: write_chunk(ours, 0x104, b"\x20" * 4))
    assert told.message == "first"
    assert told.metadata == {"outcome": "UNKNOWN", "uncertain": "0x104-0x107", "enabled": "true"}


def test_a_worker_that_is_lost_before_it_was_asked_to_set_anything_has_changed_nothing() -> None:
    class Lost(FakeSession):
        def begin(self, request_id: str, fingerprint: str, *, keep: bool, resume: bool) -> Begun:
            raise SkeydError(Reason.WORKER_LOST, "gone")

    ours = new(Lost(MEMORY), (0x100, 8))
    assert error_of(ours, ours.begin).metadata == {"outcome": "UNCHANGED"}


@pytest.mark.parametrize(
    ("outcomes", "told"),
    [
        ([None], {"outcome": "UNCHANGED"}),
        ([kept_write(b"", outcome="rolled_back")], {"outcome": "ROLLED_BACK"}),
        ([SkeydError(Reason.WORKER_LOST, "gone")], {"outcome": "UNKNOWN", "enabled": "true", "uncertain": "0x0-0x1"}),
    ],
)
def test_what_a_workers_error_says_of_the_keys_by_itself_is_not_passed_on(
    outcomes: list[LastWrite | SkeydError | None], told: dict[str, str]
) -> None:
    said = {"outcome": "KEPT", "dirty": "0x0-0x1", "next_gfn": "0x104", "keys_set": "4", "crc32": "0x00000000"}
    said |= {"enabled": "true", "uncertain": "0x0-0x1"}
    session = FakeSession(MEMORY)
    session.outcomes = outcomes
    ours = begin(session, (0x100, 8))

    def fail() -> None:
        raise SkeydError(Reason.GFN_NOT_MAPPED, "said by a worker", {"gfn": "0x104", **said})

    assert error_of(ours, fail).metadata == {"gfn": "0x104", **told}


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("outcome", ["rolled_back", "kept"])
def test_the_error_says_whether_the_guest_uses_keys_since(enabled: bool, outcome: str) -> None:
    # By the worker's word: a write that failed may have enabled them too.
    session = FakeSession(MEMORY)
    session.outcomes = [kept_write(b"\x20" * 4, outcome=outcome, enabled=enabled)]
    ours = begin(session, (0x100, 8), keep=outcome == "kept")
    write_chunk(ours, 0x100, b"\x20" * 4)
    assert error_of(ours, ours.cut).metadata.get("enabled") == ("true" if enabled else None)


def test_more_dirty_ranges_than_a_status_has_room_for_are_cut_with_a_mark() -> None:
    session = FakeSession(MEMORY)
    dirty = tuple(GfnRange(gfn, 1) for gfn in range(0x100, 0x200, 2))
    session.outcomes = [kept_write(b"\x20" * 4, outcome="dirty", dirty=dirty)]
    ours = begin(session, (0x100, 8))
    write_chunk(ours, 0x100, b"\x20" * 4)
    listed = error_of(ours, ours.cut).metadata["dirty"]
    *whole, mark = listed.split(",")
    assert mark == "…"
    assert whole == [str(one) for one in dirty[: len(whole)]]
    # status.py cuts at 256 bytes, in the middle of a range if it has to.
    assert 200 < len(listed.encode()) <= 256


# --- the end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunks", "next_gfn", "keys_set"),
    [([], "0x100", 0), ([(0x100, 2)], "0x102", 2), ([(0x100, 4)], "0x110", 4), ([(0x100, 4), (0x110, 1)], "0x111", 5)],
)
@pytest.mark.parametrize("how", [KeyWriting.commit, KeyWriting.cut])
@pytest.mark.parametrize("keep", [False, True])
def test_a_stream_that_ends_before_its_ranges_are_covered_is_incomplete_and_says_what_is_missing(
    chunks: list[tuple[int, int]], next_gfn: str, keys_set: int, how: Callable[[KeyWriting], object], keep: bool
) -> None:
    session = FakeSession(MEMORY)
    ours = begin(session, (0x100, 4), (0x110, 2), keep=keep)
    for start, count in chunks:
        write_chunk(ours, start, bytes(count))
    if keep and chunks:
        session.outcomes = [kept_write(bytes(keys_set))]
    refused = error_of(ours, lambda: how(ours))
    assert refused.reason is Reason.STREAM_INCOMPLETE
    assert f"{6 - keys_set} are missing from gfn {next_gfn} on" in refused.message
    if not chunks:
        assert refused.metadata == {"outcome": "UNCHANGED"}
    elif keep:
        crc32 = f"{zlib.crc32(bytes(keys_set)):#010x}"
        assert refused.metadata == {
            "outcome": "KEPT",
            "next_gfn": next_gfn,
            "keys_set": str(keys_set),
            "crc32": crc32,
        }
    else:
        assert refused.metadata == {"outcome": "ROLLED_BACK"}
    assert session.calls == ["begin", "abandon"]


def test_a_stream_that_was_covered_and_ends_without_commit_is_incomplete_all_the_same() -> None:
    ours = begin(FakeSession(MEMORY), (0x100, 4))
    write_chunk(ours, 0x100, bytes(4))
    refused = error_of(ours, ours.cut)
    assert refused.reason is Reason.STREAM_INCOMPLETE
    assert refused.metadata == {"outcome": "ROLLED_BACK"}


def test_an_error_of_another_kind_ends_the_call_too() -> None:
    session = FakeSession(MEMORY)
    ours = begin(session, (0x100, 4))
    write_chunk(ours, 0x100, bytes(2))
    with pytest.raises(SkeydError) as refused, ours.told():
        raise SkeydError(Reason.REQUEST_INVALID, "no")
    assert refused.value.metadata == {"outcome": "ROLLED_BACK"}
    assert session.calls == ["begin", "abandon"]


def test_what_is_no_refusal_is_left_to_the_end_of_the_session() -> None:
    session = FakeSession(MEMORY)
    ours = begin(session, (0x100, 4))
    with pytest.raises(ZeroDivisionError), ours.told():
        raise ZeroDivisionError
    assert session.calls == ["begin"]


@pytest.mark.parametrize("lie", [{"keys_set": 3}, {"keys_set": 5}, {"crc32": 1}])
def test_a_worker_that_has_applied_something_else_is_not_believed(lie: dict[str, int]) -> None:
    class Lying(FakeSession):
        def commit(self, keys_set: int, crc32: int) -> Begun:
            return replace(super().commit(keys_set, crc32), **lie)  # type: ignore[arg-type]

    session = Lying(MEMORY)
    ours = begin(session, (0x100, 4))
    write_chunk(ours, 0x100, b"\x10" * 4)
    refused = error_of(ours, ours.commit)
    assert refused.reason is Reason.WORKER_FAILED
    assert f"it applied {lie.get('keys_set', 4)} keys" in refused.message
    # Not UNCHANGED: something was set and committed, and nobody knows what.
    assert refused.metadata == {"outcome": "UNKNOWN"}
    assert session.calls == ["begin", "commit"]


# --- validate_only -------------------------------------------------------------------------------------------------


def test_what_is_only_validated_is_checked_as_ever_and_the_worker_is_told_nothing() -> None:
    session = FakeSession(MEMORY)
    ours = begin(session, (0x100, 4), (0x110, 2), validate_only=True)
    assert write_chunk(ours, 0x100, bytes(4)) == Progress(0x110, 4, 0, enabled=False, crc32=zlib.crc32(bytes(4)))
    assert write_chunk(ours, 0x110, bytes(2)).keys_set == 6
    assert ours.commit() == Progress(0x112, 6, 0, enabled=False, crc32=zlib.crc32(bytes(6)))
    assert (session.written, session.calls) == ([], [])


def test_what_is_only_validated_is_refused_as_ever() -> None:
    session = FakeSession(MEMORY, uses_keys=False)
    ours = new(session, (0x100, 4), allow_enable=False, validate_only=True)
    assert error_of(ours, ours.begin).reason is Reason.SKEYS_NOT_ENABLED
    ours = new(session, (0x100, 0x101), validate_only=True)
    assert error_of(ours, ours.begin).reason is Reason.GFN_NOT_MAPPED
    ours = begin(session, (0x100, 4), validate_only=True)
    write_chunk(ours, 0x100, bytes(2))
    refused = refusal_of(ours, GfnRange(0x102, 2), b"\x10\x01")
    assert refused.reason is Reason.KEY_RESERVED_BIT
    assert refused.metadata == {"gfn": "0x103", "outcome": "UNCHANGED"}
    refused = error_of(ours, ours.commit)
    assert refused.reason is Reason.STREAM_INCOMPLETE
    assert refused.metadata == {"outcome": "UNCHANGED"}
    assert (session.written, session.calls) == ([], [])


def test_the_request_id_of_another_request_is_refused_where_it_is_only_validated_too() -> None:
    session = FakeSession(MEMORY)
    options: dict[str, Any] = {"validate_only": True, "request_id": "mine", "fingerprint": "7" * 64}
    ours = begin(session, (0x100, 4), **options)
    assert session.calls == ["require_unused mine " + "7" * 64]
    write_chunk(ours, 0x100, bytes(4))
    assert ours.commit().keys_set == 4
    session.reused = SkeydError(Reason.REQUEST_ID_REUSED, "no")
    ours = new(session, (0x100, 4), **options)
    refused = error_of(ours, ours.begin)
    assert (refused.reason, refused.metadata) == (Reason.REQUEST_ID_REUSED, {"outcome": "UNCHANGED"})


# --- who waits no more ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["expected", "resulting"])
@pytest.mark.parametrize("after", [0, 1])
def test_keys_that_nobody_waits_for_any_more_are_not_digested_to_the_end(which: str, after: int) -> None:
    class Gone(Exception):  # noqa: N818  (says what happened)
        pass

    session = FakeSession((0, 4 * SLICE_KEYS))
    ranges = Ranges(GfnRange(start, 16) for start in range(0, 512, 128))
    looks: list[int] = []

    def still_wanted() -> None:
        looks.append(len(session.read))
        if len(looks) > after:
            raise Gone

    options = {which: KeysDigest(bytes(32), False)}
    ours = KeyWriting(session, ranges, WriteOptions(**options), still_wanted)  # type: ignore[arg-type]

    def use() -> None:
        ours.begin()
        for one in ranges:
            write_chunk(ours, one.start, bytes(one.count))
        ours.commit()

    with pytest.raises(Gone):
        use()
    assert len(looks) == after + 1
    assert len(session.read) <= after + 1, "nothing more is read"
    assert "commit" not in session.calls


# --- requests that were sent before --------------------------------------------------------------------------------


def test_what_was_applied_before_is_not_set_again() -> None:
    session = FakeSession(MEMORY)
    session.begun = Begun("applied", 6, 2, 0x1234, True)
    ours = new(session, (0x100, 4), (0x110, 2), request_id="mine")
    assert not ours.begin()
    assert ours.progress == Progress(0x112, 6, 2, enabled=True, crc32=0x1234)
    assert session.written == []


def test_what_was_applied_before_must_have_been_whole() -> None:
    session = FakeSession(MEMORY)
    session.begun = Begun("applied", 5, 2, 0x1234, True)
    ours = new(session, (0x100, 4), (0x110, 2), request_id="mine")
    assert error_of(ours, ours.begin).reason is Reason.WORKER_FAILED


@pytest.mark.parametrize(("before", "next_gfn"), [(0, 0x100), (3, 0x103), (4, 0x110), (5, 0x111), (6, 0x112)])
def test_a_call_that_was_cut_goes_on_behind_what_it_has_set(before: int, next_gfn: int) -> None:
    session = FakeSession(MEMORY)
    keys = b"\x10\x20\x30\x40\x50\x60"
    session.begun = Begun("resumed", before, 1, zlib.crc32(keys[:before]), False)
    ours = begin(session, (0x100, 4), (0x110, 2), keep=True, request_id="mine", resume=True)
    assert ours.progress == Progress(next_gfn, before, 1, enabled=False, crc32=zlib.crc32(keys[:before]))
    if before < 4:
        write_chunk(ours, next_gfn, keys[before:4])
    if before < 6:
        write_chunk(ours, ours.progress.next_gfn, keys[max(before, 4) :])
    assert ours.commit() == Progress(0x112, 6, 1, enabled=False, crc32=zlib.crc32(keys))


def test_a_worker_that_has_set_more_than_there_is_to_set_is_not_believed() -> None:
    session = FakeSession(MEMORY)
    session.begun = Begun("resumed", 7, 0, 0, False)
    ours = new(session, (0x100, 4), (0x110, 2), keep=True, request_id="mine", resume=True)
    assert error_of(ours, ours.begin).reason is Reason.WORKER_FAILED
