"""QEMU outlives whatever becomes of the workers that serve its VM: adopted again and again, killed at any moment.

SKEYD_ADOPTIONS and SKEYD_KILLS_ADOPTED say how often.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from typing import Final

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


def test_adopting_again_and_again_leaves_qemu_as_it_was(daemon: DaemonProcess, qemu: Qemu) -> None:
    rng = random.Random(11)  # noqa: S311  no secret
    keys = bytearray(some_keys(11, FRAMES))
    with Stubs(daemon.target) as stubs, daemon.connect() as client:
        adopt(client, qemu)
        stubs.set(NAME, [(0, bytes(keys))])
        client.delete_vm(NAME)
        qemu.answers()
        before = look_at_process(qemu.pid)
        for cycle in range(CYCLES):
            # One in eight finds the memory itself, which takes longest.
            adopt(client, qemu, 64 if cycle % 8 else None)
            start = rng.randrange(FRAMES - SOME)
            keys[start : start + SOME] = some_keys(cycle, SOME)
            stubs.set(NAME, [(start, bytes(keys[start : start + SOME]))])
            assert acc_and_f(stubs.get(NAME, (start, SOME)).keys) == keys[start : start + SOME]
            client.delete_vm(NAME)
            qemu.answers()
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
