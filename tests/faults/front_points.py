"""The points of a front, each `.before` and `.after`, and what these tests make small in it.

session.begin session.write_slice session.commit session.abandon session.status session.keyop     requests to a worker
answer.begun answer.progress answer.result                                                       messages to the client
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from skeyd import limits, server
from skeyd.rpc import storage_key_service
from skeyd.vms import pacing, session, starter
from skeyd.vms.session import Session
from tests.faults.trigger import Trigger

WORKER: Final = Path(__file__).parent / "worker" / "__main__.py"
SLICE_KEYS: Final = 64
"""So that a chunk of a few hundred keys has several slices."""
PATIENCE: Final = "answer_seconds"
"""Where this file is, the front waits no longer than it says for a worker's answer."""


def run(runtime_dir: str, ready_fd: int) -> None:
    """Be a daemon that has points; says so on a descriptor when it serves."""
    trigger = Trigger("front", runtime_dir)
    starter._WORKER = str(WORKER)  # type: ignore[misc]
    # Slices as small as the first one for ever: a pace that follows the clock would make another case of each run.
    pacing.FIRST_KEYS = SLICE_KEYS  # type: ignore[misc]
    pacing.Pace.took = _took  # type: ignore[method-assign, assignment]
    for name in ("begin", "write_slice", "commit", "abandon", "status", "keyop"):
        _wrap(Session, name, functools.partial(_around, trigger, f"session.{name}"))
    _wrap(Session, "connect", functools.partial(_patiently, Path(runtime_dir, PATIENCE)))
    _wrap(storage_key_service, "set_skeys", functools.partial(_answers, trigger))
    _wrap(server.Daemon, "serve", functools.partial(_say_when_ready, ready_fd))
    server.main(
        [
            *("--runtime-dir", runtime_dir),
            *("--insecure-tcp", "127.0.0.1:0"),
            *("--log-format", "json"),
            *("--worker-launcher", "none"),
        ]
    )


def _took(pace: pacing.Pace, _keys: int, _nanoseconds: int) -> None:
    pace.measured = True


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        return around(original, *arguments, **named)

    setattr(owner, name, wrapped)


def _around(trigger: Trigger, name: str, original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    trigger.at(f"{name}.before")
    try:
        return original(*arguments, **named)
    finally:
        trigger.at(f"{name}.after")


def _patiently(file: Path, original: Callable[..., Session], *arguments: Any) -> Session:
    answer, hello = limits.WORKER_ANSWER_SECONDS, limits.WORKER_HELLO_SECONDS
    with suppress(FileNotFoundError):
        answer = hello = float(file.read_text())
    vars(session).update(WORKER_ANSWER_SECONDS=answer, WORKER_HELLO_SECONDS=hello)
    return original(*arguments)


def _answers(trigger: Trigger, original: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
    answers = original(*arguments)
    try:
        for answer in answers:
            part = answer.WhichOneof("part")
            trigger.at(f"answer.{part}.before")
            yield answer
            trigger.at(f"answer.{part}.after")
    finally:
        answers.close()  # type: ignore[attr-defined]  # a generator


def _say_when_ready(ready_fd: int, original: Callable[..., None], daemon: server.Daemon) -> None:
    original(daemon)
    address = next(one for one in daemon.addresses if not one.startswith("unix:"))
    os.write(ready_fd, address.encode())
    os.close(ready_fd)
