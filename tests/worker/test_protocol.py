"""Every message of front and worker: as it was written, or refused by the field that is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skeyd import limits
from skeyd.gfn import GfnRange, MemorySlot
from skeyd.kvm import abi
from skeyd.worker import adoption, protocol
from skeyd.worker.adoption import Adoption, Vmm
from skeyd.worker.candidates import CANDIDATES_MAX, FDS_MAX, Candidate, Found
from skeyd.worker.outcomes import DIRTY_RANGES, OUTCOMES, REQUEST_ID, STATES, Begun, LastWrite
from skeyd.worker.packets import Fields, ProtocolError, decode, encode, take_answer
from skeyd.worker.protocol import MAX_MEMORY, MAX_MEMORY_SLOTS, Hello, SlotSpec, Spec
from tests.examples import examples
from tests.worker.specs import UID
from tests.worker.wire import LONG, NO_FLAG, NO_INTEGER, NO_LIST, NO_OBJECT, NO_TEXT, over_the_wire

VMM = Vmm(4712, 123_456, 64055, "/usr/bin/qemu-system-s390x", "web", 13, "probed")
SPEC = Spec(
    "web-1",
    UID,
    "adopted",
    (SlotSpec(0, 1 << 20, "memfd"), SlotSpec(1 << 30, 1 << 20, "file", "/g/m")),
    1_700_000_000,
    adoption=Adoption(4711, 123_456, 9, 1000),
    vmm=VMM,
)
HELLO = Hello(
    "web-1",
    UID,
    "0123456789abcdef0123456789abcdef",
    "adopted",
    "7.2.12",
    "0.1.0",
    4711,
    1_700_000_000,
    (MemorySlot(0, GfnRange(0, 256), "vmm"), MemorySlot(1, GfnRange(512, 256), "vmm")),
    vmm=VMM,
)

FOUND = Found(
    (
        Candidate(1, 2, 3, "/usr/bin/qemu-system-s390x", "web", (13, 14), 2, 1 << 30, 1 << 20),
        Candidate(4, 5, 0, "", "", (), 0, 0, 0, "VMM_TRACED", "by whom"),
    ),
    6,
    7,
    8,
)
BEGUN = Begun("resumed", 512, 3, 0x89ABCDEF, True)
LAST_WRITE = LastWrite("dirty", "mine", 512, 0x89ABCDEF, True, 600, (GfnRange(0, 1), GfnRange(8, 4)))

READERS: dict[str, tuple[dict[str, Any], Callable[[Fields], object]]] = {
    "spec": (SPEC.to_message(), Spec.from_message),
    "hello": (HELLO.to_message(), Hello.from_message),
    "found": (FOUND.to_message(), Found.from_message),
    "begun": (BEGUN.to_message(), Begun.from_message),
    "last_write": (LAST_WRITE.to_message(), LastWrite.from_message),
}
OF_A_VM = ("spec", "hello")
LISTS = {"spec": "slots", "hello": "slots", "found": "candidates", "last_write": "dirty"}

BAD_ID = ["", "A", "1a", "-a", "a-", "a_b", "a b", "a.b", "a/b", "..", "ä", "a" * 64, "a\n", "\na", "a\0"]
BAD_UID = ["", UID[:-1], UID + "0", UID.upper(), UID.replace("-", ""), UID + "\n", "{" + UID + "}"]
BAD_KIND = ["", "Owned", "adopt", "owned ", "none"]
BAD_BACKING = ["", "ANONYMOUS", "hugetlb", "anonymous\n"]

BAD_NAME = [*NO_TEXT[1:], "a" * 256, "a\n", "\u202e", "\ud800"]
BAD_VMM: dict[tuple[str | int, ...], list[Any]] = {
    ("vmm", "pid"): [*NO_INTEGER, -1, 0, (1 << 31) + 1],
    ("vmm", "start_time"): [*NO_INTEGER, -1, 1 << 64],
    ("vmm", "uid"): [*NO_INTEGER, -1, 1 << 32],
    ("vmm", "executable"): [*NO_TEXT, LONG],
    ("vmm", "fd"): [*NO_INTEGER, -1, 1 << 31],
    ("vmm", "memory_source"): [*NO_TEXT, "", "qmp ", "Probed", "probed\n"],
    ("vmm", "access"): [*NO_TEXT[1:], "", "QMP", "injection\n"],
    ("vmm", "name"): BAD_NAME,
}

BAD: dict[str, dict[tuple[str | int, ...], list[Any]]] = {
    "spec": {
        ("protocol",): [*NO_INTEGER, 0, 1, 2, 4, -1],
        ("id",): [*NO_TEXT, *BAD_ID],
        ("uid",): [*NO_TEXT, *BAD_UID],
        ("kind",): [*NO_TEXT, *BAD_KIND],
        ("created",): [*NO_INTEGER, -1, protocol.CREATED_MAX + 1],
        ("simulated_kernel",): [*NO_TEXT, "", "6.1", "7.2 ", "latest"],
        ("adoption",): NO_OBJECT,
        ("adoption", "pid"): [*NO_INTEGER, -1, 0, (1 << 31) + 1],
        ("adoption", "start_time"): [*NO_INTEGER, -1, 1 << 64],
        ("adoption", "fd"): [*NO_INTEGER, -2, 1 << 31],
        ("adoption", "hold_ms"): [*NO_INTEGER, -1, 0, 10_001],
        ("adoption", "name"): BAD_NAME,
        ("adoption", "qmp_socket"): [*NO_TEXT[1:], LONG],
        ("adoption", "access"): [*NO_TEXT[1:], "QMP", "ptrace", "qmp\n"],
        ("vmm",): NO_OBJECT[1:],
        **BAD_VMM,
        ("slots",): [*NO_LIST, *([one] for one in NO_OBJECT)],
        ("slots", 1, "guest_phys_addr"): [*NO_INTEGER, -1, 1 << 64],
        ("slots", 1, "size"): [*NO_INTEGER, -1, 0, MAX_MEMORY + 1, 1 << 64],
        ("slots", 1, "backing"): [*NO_TEXT, *BAD_BACKING],
        ("slots", 1, "path"): [*NO_TEXT, LONG],
    },
    "hello": {
        ("protocol",): [*NO_INTEGER, 0, 1, 2, 4, -1],
        ("id",): [*NO_TEXT, *BAD_ID],
        ("uid",): [*NO_TEXT, *BAD_UID],
        ("incarnation",): [*NO_TEXT, "", "0" * 31, "0" * 33, "G" * 32, "A" * 32, "0" * 32 + "\n"],
        ("keyop",): [None, 0, 1, 1.5, "true", [], {}],
        ("freezes",): [0, 1, 1.5, "true", [], {}],
        ("kind",): [*NO_TEXT, *BAD_KIND],
        ("kernel",): [*NO_TEXT, LONG],
        ("version",): [*NO_TEXT, LONG],
        ("pid",): [*NO_INTEGER, -1, 0, (1 << 31) + 1],
        ("created",): [*NO_INTEGER, -1, protocol.CREATED_MAX + 1],
        ("vmm",): NO_OBJECT,
        **BAD_VMM,
        ("slots",): [*NO_LIST, *([one] for one in NO_OBJECT)],
        ("slots", 1, "slot"): [*NO_INTEGER, -1, MAX_MEMORY_SLOTS],
        ("slots", 1, "start"): [*NO_INTEGER, -1, 1 << 64],
        ("slots", 1, "count"): [*NO_INTEGER, -1, 0, (1 << 64) + 1],
        ("slots", 1, "backing"): [*NO_TEXT, *BAD_BACKING],
    },
    "found": {
        ("candidates",): [
            *NO_LIST,
            *([one] for one in NO_OBJECT),
            [FOUND.candidates[0].to_message()] * 2,
            [one.to_message() for one in reversed(FOUND.candidates)],
            [{}] * (CANDIDATES_MAX + 1),
        ],
        ("candidates", 1, "pid"): [*NO_INTEGER, -1, 0, (1 << 31) + 1],
        ("candidates", 1, "start_time"): [*NO_INTEGER, -1, 1 << 64],
        ("candidates", 1, "uid"): [*NO_INTEGER, -1, 1 << 32],
        ("candidates", 1, "executable"): [*NO_TEXT, LONG, "a\n"],
        ("candidates", 1, "name"): BAD_NAME,
        ("candidates", 1, "vm_fds"): [*NO_LIST, *([one] for one in NO_INTEGER), [-1], [1 << 31], [4] * (FDS_MAX + 1)],
        ("candidates", 1, "vcpus"): [*NO_INTEGER, -1, 1 << 32],
        ("candidates", 1, "mapped"): [*NO_INTEGER, -1, 1 << 64],
        ("candidates", 1, "resident"): [*NO_INTEGER, -1, 1 << 64],
        ("candidates", 1, "refusal"): [*NO_TEXT, "VM_DEAD", "vmm_traced", "VMM_TRACED\n"],
        ("candidates", 1, "refusal_detail"): [*NO_TEXT, LONG, "a\n"],
        ("unreadable",): [*NO_INTEGER, -1, 1 << 32],
        ("left_out",): [*NO_INTEGER, -1, 1 << 32],
        ("workers",): [*NO_INTEGER, -1, 1 << 32],
    },
    "begun": {
        ("state",): [*NO_TEXT, "", "Begun", "kept", "applied\n"],
        ("keys_set",): [*NO_INTEGER, -1, (1 << 64) + 1],
        ("repaired",): [*NO_INTEGER, -1, (1 << 64) + 1],
        ("crc32",): [*NO_INTEGER, -1, 1 << 32],
        ("enabled",): NO_FLAG,
    },
    "last_write": {
        ("outcome",): [*NO_TEXT, "", "DIRTY", "unchanged", "dirty\n"],
        ("request_id",): [*NO_TEXT, "a b", "ä", "a" * 129, "a\n"],
        ("keys_set",): [*NO_INTEGER, -1, (1 << 64) + 1],
        ("crc32",): [*NO_INTEGER, -1, 1 << 32],
        ("enabled",): NO_FLAG,
        ("end",): [*NO_INTEGER, -1, (1 << 64) + 1],
        ("left",): [*(one for one in NO_INTEGER if one is not None), -1, (1 << 64) + 1],
        ("dirty",): [*NO_LIST, *([one] for one in NO_OBJECT), [{"start": 0, "count": 1}] * (DIRTY_RANGES + 1), []],
        ("dirty", 1, "start"): [*NO_INTEGER, -1, 1 << 64],
        ("dirty", 1, "count"): [*NO_INTEGER, -1, 0, (1 << 64) + 1],
    },
}


def _places(kind: str) -> list[Any]:
    return [pytest.param(kind, place, id=f"{kind}-{'.'.join(map(str, place))}") for place in BAD[kind]]


def _holder(message: dict[str, Any], place: tuple[str | int, ...]) -> Any:
    holder: Any = message
    for step in place[:-1]:
        holder = holder[step]
    return holder


MAY_BE_MISSING: dict[str, tuple[tuple[str | int, ...], ...]] = {
    "spec": (
        ("adoption", "name"),
        ("adoption", "qmp_socket"),
        ("adoption", "access"),
        ("vmm", "name"),
        ("vmm", "access"),
        ("vmm",),
    ),
    "hello": (("vmm", "name"), ("vmm", "access"), ("freezes",)),
    "found": (("candidates", 1, "name"),),
    "last_write": (("left",),),
}
"""Who wrote it can be older than these."""
every_field = pytest.mark.parametrize(("kind", "place"), [one for kind in READERS for one in _places(kind)])


# --- whole messages ------------------------------------------------------------------------------------------------


def test_the_messages_that_the_tests_break_are_good_before() -> None:
    assert Spec.from_message(over_the_wire(SPEC.to_message())) == SPEC
    assert Hello.from_message(over_the_wire(HELLO.to_message())) == HELLO
    assert Found.from_message(over_the_wire(FOUND.to_message())) == FOUND
    assert Begun.from_message(over_the_wire(BEGUN.to_message())) == BEGUN
    assert LastWrite.from_message(over_the_wire(LAST_WRITE.to_message())) == LAST_WRITE


def test_every_field_of_every_message_is_broken_by_some_test() -> None:
    for kind, (message, _) in READERS.items():
        fields: set[tuple[str | int, ...]] = {(name,) for name in message}
        if kind in LISTS:
            fields |= {(LISTS[kind], 1, name) for name in message[LISTS[kind]][1]}
        for whole in message.keys() & {"adoption", "vmm"}:
            fields |= {(whole, name) for name in message[whole]}
        assert fields == set(BAD[kind])


_texts = st.text(st.characters().filter(str.isprintable), max_size=40)
_vmms = st.builds(
    Vmm,
    st.integers(1, adoption.PID_MAX),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, adoption.UID_MAX),
    _texts,
    _texts,
    st.integers(0, adoption.FD_MAX),
    st.sampled_from(adoption.MEMORY_SOURCES),
    st.sampled_from(adoption.ACCESSES),
)
_frames = st.integers(0, (1 << 64) - 1).flatmap(
    lambda start: st.builds(GfnRange, st.just(start), st.integers(1, min(1 << 52, (1 << 64) - start)))
)


@given(
    st.builds(
        Spec,
        vm_id=st.from_regex(protocol.VM_ID, fullmatch=True),
        uid=st.uuids().map(str),
        kind=st.sampled_from(protocol.KINDS),
        slots=st.lists(
            st.builds(
                SlotSpec,
                st.integers(0, (1 << 64) - 1),
                st.integers(1, MAX_MEMORY),
                st.sampled_from(protocol.BACKINGS),
                _texts,
            ),
            max_size=MAX_MEMORY_SLOTS,
        ).map(tuple),
        created=st.integers(0, protocol.CREATED_MAX),
        simulated_kernel=st.sampled_from(protocol.SIMULATED_KERNELS),
        adoption=st.builds(
            Adoption,
            st.integers(1, adoption.PID_MAX),
            st.integers(0, (1 << 64) - 1),
            st.integers(-1, adoption.FD_MAX),
            st.integers(1, adoption.HOLD_MAX_MS),
            access=st.sampled_from(("", *adoption.ACCESSES)),
        ).flatmap(
            lambda one: st.sampled_from(
                (
                    one,
                    replace(one, pid=0, name="web"),
                    replace(one, pid=0, qmp_socket="/q"),
                    replace(one, qmp_socket="/q"),
                )
            )
        ),
        vmm=st.none() | _vmms,
    ).map(lambda spec: spec if spec.kind == "adopted" else replace(spec, adoption=None, vmm=None))
)
@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_spec_arrives_as_it_was_written(spec: Spec) -> None:
    assert Spec.from_message(decode(encode(spec.to_message()), "it")) == spec


@pytest.mark.parametrize("kind", ["owned", "simulated"])
def test_only_an_adopted_vm_is_another_processs(kind: str) -> None:
    with pytest.raises(ProtocolError, match=f"the adoption of a VM of kind {kind}"):
        Spec.from_message(over_the_wire(replace(SPEC, kind=kind, vmm=None).to_message()))
    with pytest.raises(ProtocolError, match=f"the adoption of a VM of kind {kind}"):
        Spec.from_message(over_the_wire(replace(SPEC, kind=kind, adoption=None).to_message()))
    with pytest.raises(ProtocolError, match=f"the vmm of a VM of kind {kind}"):
        Hello.from_message(over_the_wire(replace(HELLO, kind=kind).to_message()))


def test_a_process_without_a_number_is_one_that_listens() -> None:
    assert SPEC.adoption is not None
    spec = replace(SPEC, adoption=replace(SPEC.adoption, pid=0, qmp_socket="/run/vm/qmp", access="qmp"))
    assert Spec.from_message(over_the_wire(spec.to_message())) == spec


def test_only_a_vmm_that_prints_its_keys_has_no_descriptor() -> None:
    assert HELLO.vmm is not None
    hello = replace(HELLO, vmm=replace(HELLO.vmm, fd=-1, access="qmp"))
    assert Hello.from_message(over_the_wire(hello.to_message())) == hello


@given(
    st.builds(
        Hello,
        vm_id=st.from_regex(protocol.VM_ID, fullmatch=True),
        uid=st.uuids().map(str),
        incarnation=st.from_regex(protocol.INCARNATION, fullmatch=True),
        kind=st.sampled_from(protocol.KINDS),
        kernel=_texts,
        version=_texts,
        pid=st.integers(1, (1 << 31) - 1),
        created=st.integers(0, protocol.CREATED_MAX),
        slots=st.builds(
            MemorySlot,
            st.integers(0, MAX_MEMORY_SLOTS - 1),
            _frames,
            st.sampled_from(protocol.BACKINGS),
        ).map(lambda one: (one,)),
        keyop=st.booleans(),
        vmm=_vmms,
    ).map(lambda hello: hello if hello.kind == "adopted" else replace(hello, vmm=None))
)
@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_hello_arrives_as_it_was_written(hello: Hello) -> None:
    assert Hello.from_message(decode(encode(hello.to_message()), "it")) == hello


def test_a_vmm_is_known_by_its_pid_or_its_name() -> None:
    assert SPEC.adoption is not None
    for wrong in (replace(SPEC.adoption, name="web"), replace(SPEC.adoption, pid=0)):
        with pytest.raises(ProtocolError, match="pid"):
            Spec.from_message(over_the_wire(replace(SPEC, adoption=wrong).to_message()))


def test_who_is_older_than_names_has_none() -> None:
    spec, hello = SPEC.to_message(), HELLO.to_message()
    del spec["adoption"]["name"], spec["vmm"], hello["vmm"]["name"]
    assert Spec.from_message(over_the_wire(spec)) == replace(SPEC, vmm=None)
    assert Hello.from_message(over_the_wire(hello)) == replace(HELLO, vmm=replace(VMM, name=""))


_counts = st.integers(0, 1 << 64)
WITHOUT_DIRTY = ["applied", "rolled_back"]
_crcs = st.integers(0, (1 << 32) - 1)


@given(st.builds(Begun, st.sampled_from(STATES), _counts, _counts, _crcs, st.booleans()))
@settings(max_examples=examples(60), deadline=None)
def test_how_far_a_call_has_come_arrives_as_it_was_written(begun: Begun) -> None:
    assert Begun.from_message(decode(encode(begun.to_message()), "it")) == begun


@given(
    st.sampled_from(OUTCOMES).flatmap(
        lambda outcome: st.builds(
            LastWrite,
            st.just(outcome),
            st.from_regex(REQUEST_ID, fullmatch=True),
            _counts,
            _crcs,
            st.booleans(),
            _counts,
            st.lists(
                _frames, min_size=outcome == "dirty", max_size=5 if outcome in ("dirty", "rolling_back", "kept") else 0
            ).map(tuple),
        )
    )
)
@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_became_of_a_call_arrives_as_it_was_written(last: LastWrite) -> None:
    assert LastWrite.from_message(decode(encode(last.to_message()), "it")) == last


def test_as_many_dirty_ranges_as_there_may_be_fit_a_packet() -> None:
    dirty = tuple(GfnRange((1 << 64) - 1 - 2 * number, 1) for number in range(DIRTY_RANGES))
    last = LastWrite("dirty", "~" * 128, 1 << 64, (1 << 32) - 1, True, 1 << 64, dirty)
    answer = {"ok": {"uses_keys": True, "last_write": last.to_message()}}
    assert LastWrite.from_message(take_answer(decode(encode(answer), "it")).object("last_write")) == last


@pytest.mark.parametrize("outcome", WITHOUT_DIRTY)
def test_only_what_is_dirty_or_kept_has_dirty_frames(outcome: str) -> None:
    with pytest.raises(ProtocolError, match=f"outcome {outcome} with 2 dirty ranges"):
        LastWrite.from_message(over_the_wire({**LAST_WRITE.to_message(), "outcome": outcome}))


def test_dirty_frames_beyond_two_to_the_64_are_none() -> None:
    wrong = {**LAST_WRITE.to_message(), "dirty": [{"start": (1 << 64) - 1, "count": 2}]}
    with pytest.raises(ProtocolError):
        LastWrite.from_message(over_the_wire(wrong))


@every_field
def test_a_field_that_is_wrong_in_any_way_is_refused_by_name(kind: str, place: tuple[str | int, ...]) -> None:
    good, read = READERS[kind]
    for value in BAD[kind][place]:
        message = copy.deepcopy(good)
        _holder(message, place)[place[-1]] = value
        refusal = _refusal(read, message)
        assert refusal is not None, f"{value!r} was taken"
        assert str(place[-1]) in refusal


def _refusal(read: Callable[[Fields], object], message: dict[str, Any]) -> str | None:
    try:
        read(over_the_wire(message))
    except ProtocolError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("kind", "place"),
    [one for kind in READERS for one in _places(kind)],
)
def test_a_field_that_is_missing_is_refused_by_name(kind: str, place: tuple[str | int, ...]) -> None:
    good, read = READERS[kind]
    message = copy.deepcopy(good)
    del _holder(message, place)[place[-1]]
    if place in MAY_BE_MISSING.get(kind, ()):
        read(over_the_wire(message))
        return
    with pytest.raises(ProtocolError, match=str(place[-1])):
        read(over_the_wire(message))


@pytest.mark.parametrize("kind", READERS)
def test_a_field_that_this_version_does_not_know_changes_nothing(kind: str) -> None:
    good, read = READERS[kind]
    assert read(over_the_wire({**good, "new": [1, {"a": None}]})) == read(over_the_wire(good))


@pytest.mark.parametrize("kind", OF_A_VM)
def test_a_vm_has_at_most_so_many_slots(kind: str) -> None:
    good, read = READERS[kind]
    message = {**good, "slots": [good["slots"][0]] * (MAX_MEMORY_SLOTS + 1)}
    with pytest.raises(ProtocolError, match=f"slots is no list of at most {MAX_MEMORY_SLOTS}"):
        read(over_the_wire(message))


def test_a_worker_without_memory_is_none() -> None:
    with pytest.raises(ProtocolError, match="without memory slots"):
        Hello.from_message(over_the_wire({**HELLO.to_message(), "slots": []}))


@pytest.mark.parametrize(("start", "count"), [((1 << 64) - 1, 2), ((1 << 64) - 256, 512)])
def test_a_worker_with_memory_beyond_two_to_the_64_is_none(start: int, count: int) -> None:
    slots = [{"slot": 0, "start": start, "count": count, "backing": "none"}]
    with pytest.raises(ProtocolError, match=r"beyond 2\^64"):
        Hello.from_message(over_the_wire({**HELLO.to_message(), "slots": slots}))


@pytest.mark.parametrize("second", [(0, 256), (255, 1), (0, 1), (100, 1000)])
def test_a_worker_whose_memory_overlaps_is_none(second: tuple[int, int]) -> None:
    slots = [
        {"slot": number, "start": start, "count": count, "backing": "none"}
        for number, (start, count) in enumerate([(0, 256), second])
    ]
    with pytest.raises(ProtocolError, match="memory slots that overlap"):
        Hello.from_message(over_the_wire({**HELLO.to_message(), "slots": slots}))


@pytest.mark.parametrize("text", ["a\nb", "\x1b[2J", "\ud800", "\0"])
def test_a_worker_whose_words_are_not_printable_is_none(text: str) -> None:
    with pytest.raises(ProtocolError, match="kernel"):
        Hello.from_message(over_the_wire({**HELLO.to_message(), "kernel": text}))


# --- numbers -------------------------------------------------------------------------------------------------------


def test_the_largest_slot_is_the_kernels_number_of_frames_in_whole_mebibytes() -> None:
    frames = (1 << 31) - 1
    assert MAX_MEMORY <= frames * 4096 < MAX_MEMORY + (1 << 20)
    assert MAX_MEMORY % (1 << 20) == 0


def test_a_thread_is_held_for_as_long_as_the_limit_says() -> None:
    assert limits.MAX_HOLD_SECONDS * 1000 == adoption.HOLD_MAX_MS
    assert 1 <= limits.DEFAULT_HOLD_SECONDS * 1000 <= adoption.HOLD_MAX_MS


def test_the_buffers_lie_side_by_side_and_hold_whole_slices_and_the_largest_chunk() -> None:
    assert protocol.BUFFER_BYTES == protocol.BUFFERS * protocol.BUFFER_KEYS
    assert protocol.BUFFER_KEYS == limits.MAX_CHUNK_KEYS
    assert protocol.BUFFER_KEYS % protocol.SLICE_KEYS == 0
    assert protocol.SLICE_KEYS <= abi.KVM_S390_SKEYS_MAX
