"""What arrives from another process: values that are none of a type's, and JSON as a packet has it."""

from __future__ import annotations

import json
from typing import Any

from skeyd.worker.packets import Fields, decode

NO_OBJECT: list[Any] = [None, True, 0, 1.5, "{}", []]
NO_LIST: list[Any] = [None, True, 0, 1.5, "[]", {}]
NO_TEXT: list[Any] = [None, True, 0, 1.5, [], {}, ["a"]]
# Python's JSON knows NaN and the infinities, and in Python true is a number.
NO_INTEGER: list[Any] = [None, True, False, "1", 1.0, 1.5, [], {}, [1], float("nan"), float("inf"), 10**4000, -(10**99)]
NO_FLAG: list[Any] = [None, 0, 1, 1.5, "true", [], {}]
LONG = "x" * 1025


def over_the_wire(message: dict[str, Any]) -> Fields:
    """Write a message down, and read it."""
    return decode(json.dumps(message).encode(), "it")
