"""Starting workers: a child that serves, or an error and no child."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.vms import starter as starter_module
from skeyd.vms.runtime import LOG, VmDirectory
from skeyd.vms.session import Session
from skeyd.vms.starter import ChildStarter
from skeyd.worker.candidates import CANDIDATES_BYTES, Found
from skeyd.worker.packets import Fields
from tests.processes import Process, children, look_at
from tests.vms.starters import ended, put_program, refusal_of
from tests.vms.starters import web as web
from tests.worker.specs import simulated


@pytest.fixture
def starter() -> Iterator[ChildStarter]:
    yield from ended(ChildStarter())


def test_a_worker_that_was_started_serves_and_is_in_a_session_of_its_own(
    starter: ChildStarter, web: VmDirectory
) -> None:
    before = children()
    starter.start(web, simulated((0, 4)))
    (worker,) = children() - before
    with Session.connect(web.fd) as session:
        assert session.hello.pid == worker.pid
    assert os.getsid(worker.pid) == worker.pid
    assert Path(f"/proc/{worker.pid}/environ").read_bytes() == b""
    assert str(Path(f"/proc/{worker.pid}/cwd").readlink()) == "/"
    assert web.worker_lives()


def test_a_worker_gets_none_of_the_fronts_descriptors_but_its_directory(
    starter: ChildStarter, web: VmDirectory
) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    try:
        before = children()
        starter.start(web, simulated((0, 4)))
        (worker,) = children() - before
        os.close(writer)
        writer = -1
        # Nobody else has the other end.
        assert os.read(reader, 1) == b""
        links = [str(fd.readlink()) for fd in Path(f"/proc/{worker.pid}/fd").iterdir()]
        assert sum("front.lock" in link or link.endswith("/vms") for link in links) == 0
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


def test_a_worker_that_refuses_is_an_error_with_its_reason(starter: ChildStarter, web: VmDirectory) -> None:
    before = children()
    with pytest.raises(SkeydError) as refused:
        starter.start(web, simulated((0, 2), (1, 2)))
    assert refused.value.reason is Reason.MEMORY_INVALID
    assert children() == before


@pytest.mark.parametrize(
    ("program", "why"),
    [
        pytest.param("", "ended before it was ready", id="says nothing"),
        pytest.param("raise SystemExit(3)", "ended before it was ready", id="fails"),
        pytest.param("print('{', end='')", "ended before it was ready", id="half a line"),
        pytest.param("print('hello')", "first line is no JSON", id="another program"),
        pytest.param("print([])", "first line is no object", id="no object"),
        pytest.param("print('{}')", "first line: ok is no object", id="no answer"),
        pytest.param("print('{\"error\": 1}')", "first line: error is no object", id="no error"),
        pytest.param("print('x' * 1_000_000)", "says more than it should", id="too much"),
        pytest.param("print('[' * 60_000)", "first line is no JSON", id="deep"),
        pytest.param(
            "import os, signal\nos.write(1, b'{\"ok\": {}}\\n{}\\n')\nsignal.pause()", "no JSON", id="two lines"
        ),
        pytest.param("import sys\nsys.stdin.close()", "ended before it was ready", id="doesn't listen"),
    ],
)
def test_a_child_that_is_no_worker_is_an_error_and_does_not_live_on(
    starter: ChildStarter, web: VmDirectory, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, program: str, why: str
) -> None:
    put_program(monkeypatch, runtime_dir, program)
    refusal = refusal_of(starter, web)
    assert refusal.reason is Reason.WORKER_FAILED
    assert why in refusal.message


def test_a_child_that_never_says_anything_is_ended_after_its_time(
    starter: ChildStarter, web: VmDirectory, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_program(monkeypatch, runtime_dir, "import signal\nsignal.pause()")
    monkeypatch.setattr(starter_module, "WORKER_START_SECONDS", 0.2)
    refusal = refusal_of(starter, web)
    assert refusal.reason is Reason.WORKER_FAILED
    assert "not ready after 0.2 s" in refusal.message


def test_what_a_child_says_on_standard_error_is_in_its_log(
    starter: ChildStarter, web: VmDirectory, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_program(monkeypatch, runtime_dir, "import sys\nprint('what went wrong', file=sys.stderr)")
    refusal_of(starter, web)
    assert (runtime_dir / "vms" / "web" / LOG).read_text() == "what went wrong\n"


def test_a_python_that_cannot_be_started_is_an_error(
    starter: ChildStarter, web: VmDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    for use in (lambda: starter.start(web, simulated((0, 4))), starter.probe_host):
        with pytest.raises(SkeydError) as refused:
            use()
        assert refused.value.reason is Reason.WORKER_FAILED
        assert "No such file" in refused.value.message


def test_a_worker_that_ended_is_a_zombie_no_longer_than_until_the_next_reaping(
    starter: ChildStarter, web: VmDirectory
) -> None:
    before = children()
    starter.start(web, simulated((0, 4)))
    (worker,) = children() - before
    with Session.connect(web.fd) as session:
        pidfd = os.pidfd_open(worker.pid)
        try:
            session.shut_down()
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
        finally:
            os.close(pidfd)
    assert Path(f"/proc/{worker.pid}").exists()
    starter.reap()
    assert not Path(f"/proc/{worker.pid}").exists()


def test_reaping_leaves_living_workers_alone(starter: ChildStarter, web: VmDirectory) -> None:
    before = children()
    starter.start(web, simulated((0, 4)))
    (worker,) = children() - before
    starter.reap()
    assert isinstance(look_at(worker.pid), Process)
    assert web.worker_lives()


def test_the_host_is_looked_at_by_a_child_that_does_not_live_on(starter: ChildStarter) -> None:
    before = children()
    report = starter.probe_host()
    assert len(report.objects("findings", 4)) == 4
    assert children() == before


def test_candidates_are_looked_for_by_a_child_that_does_not_live_on(starter: ChildStarter) -> None:
    before = children()
    Found.from_message(starter.find_candidates())
    assert children() == before


def test_an_answer_that_is_larger_than_a_packet_is_taken_up_to_its_bound(
    starter: ChildStarter, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "print('{\"ok\": {\"unreadable\": 1}' + ' ' * %d + '}')"
    put_program(monkeypatch, runtime_dir, program % (CANDIDATES_BYTES - 40))
    assert starter.find_candidates().integer("unreadable", 0, 1) == 1
    put_program(monkeypatch, runtime_dir, program % CANDIDATES_BYTES)
    for ask in (starter.find_candidates, starter.probe_host):
        with pytest.raises(SkeydError) as refused:
            ask()
        assert (refused.value.reason, refused.value.message) == (
            Reason.WORKER_FAILED,
            "the worker says more than it should",
        )


@pytest.mark.parametrize("ask", [ChildStarter.probe_host, ChildStarter.find_candidates])
def test_a_probe_that_says_nonsense_is_an_error(
    starter: ChildStarter, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[ChildStarter], Fields]
) -> None:
    put_program(monkeypatch, runtime_dir, "print('nonsense')")
    with pytest.raises(SkeydError) as refused:
        ask(starter)
    assert refused.value.reason is Reason.WORKER_FAILED
