"""How a session begins: who answers, and with which memory; and with a real worker."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.gfn import GfnRange
from skeyd.linux import Peer
from skeyd.vms import session as session_module
from skeyd.vms.session import Session
from skeyd.worker.packets import MESSAGE_MAX, ProtocolError
from skeyd.worker.protocol import BUFFER_BYTES, PROTOCOL, SLICE_KEYS
from tests.vms.fake_worker import Caller, FakeWorker, answers, hello, says
from tests.vms.sessions import (
    OK,
    Use,
    directory_of,
    opened,
    read_frames,
    refusal_of,
    write_frames,
)
from tests.worker.processes import WorkerProcess
from tests.worker.specs import UID, simulated

# --- hello ---------------------------------------------------------------------------------------------------------


def test_a_worker_that_says_who_it_is_is_known(runtime_dir: Path) -> None:
    with (
        FakeWorker(runtime_dir, answers([("status", {"ok": {"uses_keys": True}})])),
        opened(runtime_dir) as session,
    ):
        assert (session.hello.vm_id, session.hello.uid, session.hello.pid) == ("web", UID, os.getpid())
        assert list(session.memory_map.mapped) == [GfnRange(0, 1 << 20)]
        assert session.uses_keys()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        pytest.param(
            hello(protocol=PROTOCOL + 1), f"protocol is no number from {PROTOCOL} to {PROTOCOL}", id="another protocol"
        ),
        pytest.param(
            hello(protocol=PROTOCOL - 1), f"protocol is no number from {PROTOCOL} to {PROTOCOL}", id="an older protocol"
        ),
        pytest.param(hello(pid=1), r"says it is pid 1, the kernel says pid \d+", id="another process"),
        pytest.param(hello(id="../web"), "id is no text", id="a bad id"),
        pytest.param(hello(slots=[]), "without memory slots", id="no memory"),
        pytest.param(
            hello(slots=[{"slot": 0, "start": 0, "count": 2, "backing": "none"}] * 2), "overlap", id="memory twice"
        ),
        pytest.param({"ok": {}}, "hello: protocol", id="another message"),
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\n", "hello is no JSON", id="another program"),
        pytest.param(b"\xff" * 1000, "hello is no JSON", id="no text"),
        pytest.param(b"[]", "hello is no object", id="no object"),
        pytest.param(b"[" * 60_000, "hello is no JSON", id="deep"),
        pytest.param(json.dumps(hello()).encode() + b" " * MESSAGE_MAX, "longer than a packet", id="too long"),
    ],
)
def test_what_answers_and_is_no_worker_of_this_protocol_is_refused(
    runtime_dir: Path, said: dict[str, Any] | bytes, why: str
) -> None:
    with (
        FakeWorker(runtime_dir, says(said)),
        directory_of(runtime_dir) as fd,
        pytest.raises(ProtocolError, match=why),
    ):
        Session.connect(fd)


def test_a_worker_of_another_user_is_refused_before_it_says_anything(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only root could make one for real; the kernel's word is faked here and nothing else.
    other = Peer(os.getpid(), os.geteuid() + 1, 0)
    monkeypatch.setattr(session_module, "peer_of", lambda _: other)
    with (
        FakeWorker(runtime_dir, says(hello())),
        directory_of(runtime_dir) as fd,
        pytest.raises(ProtocolError, match=f"belongs to uid {other.uid}"),
    ):
        Session.connect(fd)


def test_a_hello_that_brings_a_descriptor_is_a_hello_and_the_descriptor_is_closed(runtime_dir: Path) -> None:
    def script(caller: Caller) -> None:
        caller.say(hello(), caller.connection.fileno())
        caller.wait_for_end()

    with FakeWorker(runtime_dir, script), opened(runtime_dir) as session:
        assert session.hello.vm_id == "web"


def test_a_worker_that_hangs_up_before_its_hello_is_an_oserror(runtime_dir: Path) -> None:
    with (
        FakeWorker(runtime_dir, lambda _: None),
        directory_of(runtime_dir) as fd,
        pytest.raises(ConnectionResetError),
    ):
        Session.connect(fd)


def test_a_worker_that_never_says_who_it_is_is_a_timeout(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "WORKER_HELLO_SECONDS", 0.01)
    with FakeWorker(runtime_dir, says()), directory_of(runtime_dir) as fd, pytest.raises(TimeoutError):
        Session.connect(fd)


def test_where_nobody_listens_it_is_known_whether_there_is_a_socket(runtime_dir: Path) -> None:
    with directory_of(runtime_dir) as fd:
        with pytest.raises(FileNotFoundError):
            Session.connect(fd)
        FakeWorker(runtime_dir).close()
        with pytest.raises(ConnectionRefusedError):
            Session.connect(fd)


# --- the buffers ---------------------------------------------------------------------------------------------------


def _memfd(size: int, seals: int) -> int:
    fd = os.memfd_create("skeyd-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _reader() -> list[int]:
    reader, writer = os.pipe()
    os.close(writer)
    return [reader]


_SEALED = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

BAD_MEMORY: dict[str, Callable[[], list[int]]] = {
    "none": list,
    "unsealed": lambda: [_memfd(BUFFER_BYTES, 0)],
    "can be cut": lambda: [_memfd(BUFFER_BYTES, _SEALED & ~fcntl.F_SEAL_SHRINK)],
    "can be unsealed": lambda: [_memfd(BUFFER_BYTES, _SEALED & ~fcntl.F_SEAL_SEAL)],
    "too short": lambda: [_memfd(BUFFER_BYTES - 4096, _SEALED)],
    "empty": lambda: [_memfd(0, _SEALED)],
    "too long": lambda: [_memfd(BUFFER_BYTES + 4096, _SEALED)],
    "read only": lambda: [_memfd(BUFFER_BYTES, _SEALED | fcntl.F_SEAL_WRITE)],
    "a pipe": _reader,
    "two": lambda: [_memfd(BUFFER_BYTES, _SEALED), _memfd(BUFFER_BYTES, _SEALED)],
}


@pytest.mark.parametrize("use", [read_frames, write_frames])
@pytest.mark.parametrize("memory", BAD_MEMORY)
def test_memory_that_cannot_be_trusted_is_not_mapped(runtime_dir: Path, memory: str, use: Use) -> None:
    def script(caller: Caller) -> None:
        caller.say(hello())
        assert caller.take() == {"op": "attach"}
        fds = BAD_MEMORY[memory]()
        caller.say(OK, *fds)
        for fd in fds:
            os.close(fd)
        caller.wait_for_end()

    refusal = refusal_of(runtime_dir, script, use)
    assert refusal.reason is Reason.WORKER_FAILED
    assert refusal.metadata == {"vm": "vms/web"}


def test_memory_that_comes_with_a_refusal_is_not_mapped(runtime_dir: Path) -> None:
    def script(caller: Caller) -> None:
        caller.say(hello())
        caller.take()
        fd = _memfd(BUFFER_BYTES, _SEALED)
        caller.say({"error": {"reason": "OUT_OF_MEMORY", "message": "no", "metadata": {}}}, fd)
        os.close(fd)
        caller.wait_for_end()

    assert refusal_of(runtime_dir, script, read_frames).reason is Reason.OUT_OF_MEMORY


# --- a real worker -------------------------------------------------------------------------------------------------


def test_keys_go_in_and_come_out_of_a_real_worker(runtime_dir: Path) -> None:
    whole = SLICE_KEYS + 512
    with WorkerProcess(runtime_dir, simulated((0, (whole + 255) // 256), kernel="4.19")) as worker:
        assert worker.first_line() == OK
        with opened(runtime_dir) as session:
            assert not session.uses_keys()
            keys = bytes(range(0, 256, 2)) * (SLICE_KEYS // 128)
            repaired, enabled, took = session.write_slice(GfnRange(0, SLICE_KEYS), keys, allow_enable=True)
            # The first non-zero key of every MiB was lost at first.
            assert (repaired, enabled) == (SLICE_KEYS // 256, True)
            assert took > 0
            slices = [GfnRange(0, SLICE_KEYS), GfnRange(SLICE_KEYS, 512), GfnRange(1, 3)]
            found = list(session.read_slices(slices))
            assert [frames for frames, _ in found] == slices
            assert [part for _, part in found] == [keys, bytes(512), keys[1:4]]
        with opened(runtime_dir) as session:
            session.shut_down()
        assert worker.process.wait(30) == 0


def test_a_real_worker_that_is_killed_was_lost(runtime_dir: Path) -> None:
    with WorkerProcess(runtime_dir, simulated((0, 4))) as worker:
        worker.first_line()
        with opened(runtime_dir) as session:
            assert write_frames(session) == (0, True)
            worker.process.kill()
            worker.process.wait(30)
            for use in (write_frames, read_frames, Session.uses_keys):
                with pytest.raises(SkeydError) as refused:
                    use(session)
                assert refused.value.reason is Reason.WORKER_LOST
