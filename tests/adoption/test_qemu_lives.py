"""QEMU outlives whatever becomes of the workers that serve its VM: adopted again and again, killed at any moment.

SKEYD_ADOPTIONS and SKEYD_KILLS_ADOPTED say how often.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import socket
import threading
import time
from typing import Final, Self

import pytest

from skeyd.v1 import vm_pb2
from tests.adoption.qemu_vm import NAME, acc_and_f, adopt, buffers_in, some_keys
from tests.daemon import DaemonProcess
from tests.injection.qemu import FRAMES, Qemu
from tests.injection.victims import SECONDS, differences, look_at_process, wait_for
from tests.rpc.stubs import Refusal, Stubs, chunk, commit, header

pytestmark = [
    pytest.mark.timeout(7200),
    pytest.mark.parametrize("qemu", ["plain", "sandboxed"], indirect=True),
]

CYCLES: Final = int(os.environ.get("SKEYD_ADOPTIONS", "1000"))
KILLS: Final = int(os.environ.get("SKEYD_KILLS_ADOPTED", "200"))
SOME: Final = 512
LATE: Final = 5.0
"""Seconds in which QEMU answers whatever is done to it; some milliseconds where nothing is emulated."""


class Asking:
    """Asks QEMU's other monitor how it is, again and again, from entering the context to leaving it."""

    def __init__(self, qemu: Qemu) -> None:
        self._path = str(qemu.monitor)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.seconds: list[float] = []
        """How long each answer took."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()

    def _ask(self) -> None:
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(SECONDS)
            monitor.connect(self._path)
            with monitor.makefile("rb") as answers:
                assert "QMP" in json.loads(answers.readline())
                for command in itertools.chain(["qmp_capabilities"], itertools.repeat("query-status")):
                    began = time.monotonic()
                    monitor.sendall(json.dumps({"execute": command}).encode())
                    while "return" not in json.loads(answers.readline()):
                        pass  # an event
                    self.seconds.append(time.monotonic() - began)
                    if self._over.wait(0.05):
                        return


def test_adopting_again_and_again_leaves_qemu_as_it_was(daemon: DaemonProcess, qemu: Qemu) -> None:
    rng = random.Random(11)  # noqa: S311  no secret
    keys = bytearray(some_keys(11, FRAMES))
    with Stubs(daemon.target) as stubs, daemon.connect() as client:
        adopt(client, qemu)
        stubs.set(NAME, [(0, bytes(keys))])
        client.delete_vm(NAME)
        qemu.answers()
        with Asking(qemu) as asking:
            pass  # what QEMU has for a monitor that somebody uses it has from then on
        before = look_at_process(qemu.pid)
        with Asking(qemu) as asking:
            for cycle in range(CYCLES):
                # One in eight finds the memory itself, which takes longest.
                adopt(client, qemu, 64 if cycle % 8 else None)
                start = rng.randrange(FRAMES - SOME)
                keys[start : start + SOME] = some_keys(cycle, SOME)
                stubs.set(NAME, [(start, bytes(keys[start : start + SOME]))])
                assert acc_and_f(stubs.get(NAME, (start, SOME)).keys) == keys[start : start + SOME]
                client.delete_vm(NAME)
                qemu.answers()
        assert len(asking.seconds) > 2 * CYCLES
        assert max(asking.seconds) < LATE, sorted(asking.seconds)[-5:]
        assert differences(before, look_at_process(qemu.pid)) == {}
        assert buffers_in(qemu.pid) == []
        assert acc_and_f(qemu.dumped()) == keys


def test_a_worker_that_is_killed_at_any_moment_leaves_qemu_answering(daemon: DaemonProcess, qemu: Qemu) -> None:
    rng = random.Random(12)  # noqa: S311  no secret
    old, new = some_keys(12, FRAMES), some_keys(13, FRAMES)
    with Stubs(daemon.target) as stubs, daemon.connect() as client:
        adopt(client, qemu)
        began = time.monotonic()
        stubs.set(NAME, [(0, old)])
        whole = time.monotonic() - began
        for kill in range(KILLS):
            # QEMU's buffer, and what it was in the middle of, are the next worker's to find.
            worker = client.get_vm(NAME).worker_pid
            told: list[Refusal | None] = []
            call = threading.Thread(target=lambda told=told: told.append(_set(stubs, new)))
            call.start()
            call.join(rng.random() * whole * 1.1)
            os.kill(worker, signal.SIGKILL)
            call.join(SECONDS)
            # It was done just before, or the client is told.
            assert [one and one.reason for one in told] in ([None], ["WORKER_LOST"], ["VM_DEAD"]), told
            qemu.answers()
            wait_for(lambda: client.get_vm(NAME).state == vm_pb2.VM_STATE_DEAD)
            client.delete_vm(NAME)
            # Each frame has a key that somebody set; and the next worker has it its way.
            adopt(client, qemu, 64 if kill % 8 else None)
            found = acc_and_f(stubs.get(NAME).keys)
            assert all(key in pair for key, pair in zip(found, zip(old, new, strict=True), strict=True))
            stubs.set(NAME, [(0, old)])
        client.delete_vm(NAME)
        qemu.answers()
        assert buffers_in(qemu.pid) == []
        assert acc_and_f(qemu.dumped()) == old


def _set(stubs: Stubs, keys: bytes) -> Refusal | None:
    return stubs.send(header(NAME, (0, FRAMES)), chunk(0, keys), commit())[1]
