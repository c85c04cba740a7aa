"""Packets between front and worker: what is one, what its fields may be, and errors in answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skeyd.errors import Reason, SkeydError
from skeyd.worker.packets import MESSAGE_MAX, Fields, ProtocolError, decode, encode, error_message, take_answer
from tests.examples import examples
from tests.worker.wire import LONG, NO_OBJECT, NO_TEXT, over_the_wire

# --- packets -------------------------------------------------------------------------------------------------------


def _packets() -> Iterator[tuple[str, bytes]]:
    yield "nothing", b""
    yield "a word", b"hello"
    yield "half an object", b'{"a":'
    yield "two objects", b"{}{}"
    yield "something after", b"{}\0"
    yield "no text", b"\xff\xff\xff"
    yield "broken UTF-8", b'{"a":"\xc3"}'
    yield "an array", b"[{}]"
    yield "a string", b'"{}"'
    yield "a number", b"1"
    yield "null", b"null"
    yield "NaN", b"NaN"
    yield "deep arrays", b"[" * 50_000
    yield "deep objects", b'{"a":' * 10_000
    yield "a number of thousands of digits", b'{"a":' + b"9" * 20_000 + b"}"
    yield "a byte too many", b"{}" + b" " * (MESSAGE_MAX - 1)


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in _packets()])
def test_a_packet_that_is_not_one_object_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"^it is "):
        decode(data, "it")


def test_a_packet_that_is_deep_and_whole_is_refused_or_taken() -> None:
    # Until 3.13 Python counts the depth; since then it looks how much of the stack is left, and may take this.
    with suppress(ProtocolError):
        decode(b'{"a":' + b"[" * 25_000 + b"]" * 25_000 + b"}", "it")


def test_the_largest_packet_is_taken() -> None:
    decode(b"{}" + b" " * (MESSAGE_MAX - 2), "it")


def test_a_message_is_written_down_up_to_the_size_of_a_packet_and_no_further() -> None:
    room = MESSAGE_MAX - len(encode({"a": ""}))
    assert len(encode({"a": "x" * room})) == MESSAGE_MAX
    with pytest.raises(ProtocolError, match="doesn't fit a packet"):
        encode({"a": "x" * (room + 1)})


@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,0aentrufls \\.-', max_size=60).map(str.encode))
@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_arrives_is_fields_or_a_protocol_error(data: bytes) -> None:
    with suppress(ProtocolError):
        assert isinstance(decode(data, "it"), Fields)


# --- fields --------------------------------------------------------------------------------------------------------


def test_bounds_are_included() -> None:
    fields = over_the_wire({"least": 3, "most": 7})
    assert fields.integer("least", 3, 7) == 3
    assert fields.integer("most", 3, 7) == 7


@pytest.mark.parametrize("value", [None, 0, 1, "true", [], {}, 1.0])
def test_what_is_neither_true_nor_false_is_refused(value: Any) -> None:
    with pytest.raises(ProtocolError, match="it: flag is neither true nor false"):
        over_the_wire({"flag": value}).boolean("flag")


def test_a_text_of_1024_characters_is_the_longest() -> None:
    assert over_the_wire({"a": LONG[:-1]}).text("a") == LONG[:-1]
    with pytest.raises(ProtocolError, match="a is no text"):
        over_the_wire({"a": LONG}).text("a")


def test_null_is_as_good_as_missing() -> None:
    fields = over_the_wire({"null": None, "false": False, "zero": 0})
    assert not fields.has("null")
    assert not fields.has("missing")
    assert fields.has("false")
    assert fields.has("zero")


# --- answers -------------------------------------------------------------------------------------------------------


def test_a_good_answer_is_what_is_in_it() -> None:
    assert take_answer(over_the_wire({"ok": {"a": 1}})).integer("a", 1, 1) == 1


@pytest.mark.parametrize("reason", Reason)
def test_every_error_arrives_as_it_was_raised(reason: Reason) -> None:
    error = SkeydError(reason, "what went wrong: ä", {"gfn": "0x1", "vm": "vms/web"})
    with pytest.raises(SkeydError) as raised:
        take_answer(decode(encode(error_message(error)), "it"))
    assert (raised.value.reason, raised.value.message) == (reason, error.message)
    assert raised.value.metadata == error.metadata


def test_what_a_terminal_would_take_for_a_command_arrives_as_question_marks() -> None:
    error = SkeydError(Reason.KERNEL_REFUSED, "a\n\0\x1b[2Jb", {"file": "\udc80"})
    with pytest.raises(SkeydError) as raised:
        take_answer(decode(encode(error_message(error)), "it"))
    assert (raised.value.message, raised.value.metadata) == ("a???[2Jb", {"file": "?"})


def test_an_error_of_any_length_fits_a_packet_and_arrives_cut() -> None:
    error = SkeydError(Reason.KERNEL_REFUSED, "m" * 100_000, {"long": "v" * 100_000})
    with pytest.raises(SkeydError) as raised:
        take_answer(decode(encode(error_message(error)), "it"))
    assert raised.value.message == "m" * 1024
    assert raised.value.metadata == {"long": "v" * 1024}


def test_an_error_of_a_later_version_is_a_failed_worker_that_is_quoted() -> None:
    answer = {"error": {"reason": "NEW_REASON", "message": "something new", "metadata": {}}}
    with pytest.raises(SkeydError) as raised:
        take_answer(over_the_wire(answer))
    assert raised.value.reason is Reason.WORKER_FAILED
    assert "NEW_REASON: something new" in raised.value.message


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"ok": None},
        *({"ok": value} for value in NO_OBJECT),
        *({"error": value} for value in NO_OBJECT if value is not None),
        {"error": {}},
        *({"error": {"reason": value, "message": "m", "metadata": {}}} for value in [*NO_TEXT, LONG]),
        *({"error": {"reason": "VM_DEAD", "message": value, "metadata": {}}} for value in [*NO_TEXT, LONG]),
        *({"error": {"reason": "VM_DEAD", "message": "m", "metadata": value}} for value in NO_OBJECT),
        *({"error": {"reason": "VM_DEAD", "message": "m", "metadata": {"a": value}}} for value in [*NO_TEXT, LONG]),
        {"error": {"reason": "VM_DEAD", "message": "m"}},
    ],
)
def test_an_answer_that_is_none_is_refused(answer: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        take_answer(over_the_wire(answer))
