"""Starting workers: a child that serves, or an error and no child."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.vms import starter as starter_module
from skeyd.vms.runtime import LOG, RuntimeDirectory, VmDirectory
from skeyd.vms.session import Session
from skeyd.vms.starter import ChildStarter
from skeyd.worker.candidates import CANDIDATES_BYTES, Found
from skeyd.worker.packets import Fields
from tests.processes import Process, children, end, look_at, wait_for_end
from tests.worker.specs import simulated


@pytest.fixture
def web(runtime_dir: Path) -> Iterator[VmDirectory]:
    """Make the directory of a VM that has no worker."""
    with RuntimeDirectory.open(runtime_dir) as runtime:
        directory = runtime.create_vm(simulated((0, 4)))
        yield directory
        directory.close()


@pytest.fixture
def starter() -> Iterator[ChildStarter]:
    before = children()
    starter = ChildStarter()
    yield starter
    for child in children() - before:
        end(child)
    starter.reap()


def _program(monkeypatch: pytest.MonkeyPatch, runtime_dir: Path, program: str) -> None:
    # A child that lies, in the place of the worker's program.
    path = runtime_dir / "program.py"
    path.write_text(program)
    monkeypatch.setattr(starter_module, "_WORKER", str(path))


def _refusal(starter: ChildStarter, web: VmDirectory) -> SkeydError:
    before = children()
    with pytest.raises(SkeydError) as refused:
        starter.start(web, simulated((0, 4)))
    assert children() == before, "the child lives on"
    return refused.value


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
    _program(monkeypatch, runtime_dir, program)
    refusal = _refusal(starter, web)
    assert refusal.reason is Reason.WORKER_FAILED
    assert why in refusal.message


def test_a_child_that_never_says_anything_is_ended_after_its_time(
    starter: ChildStarter, web: VmDirectory, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _program(monkeypatch, runtime_dir, "import signal\nsignal.pause()")
    monkeypatch.setattr(starter_module, "WORKER_START_SECONDS", 0.2)
    refusal = _refusal(starter, web)
    assert refusal.reason is Reason.WORKER_FAILED
    assert "not ready after 0.2 s" in refusal.message


def test_what_a_child_says_on_standard_error_is_in_its_log(
    starter: ChildStarter, web: VmDirectory, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _program(monkeypatch, runtime_dir, "import sys\nprint('what went wrong', file=sys.stderr)")
    _refusal(starter, web)
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
    _program(monkeypatch, runtime_dir, program % (CANDIDATES_BYTES - 40))
    assert starter.find_candidates().integer("unreadable", 0, 1) == 1
    _program(monkeypatch, runtime_dir, program % CANDIDATES_BYTES)
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
    _program(monkeypatch, runtime_dir, "print('nonsense')")
    with pytest.raises(SkeydError) as refused:
        ask(starter)
    assert refused.value.reason is Reason.WORKER_FAILED


# --- through a launcher ----------------------------------------------------------------------------------------------

LAUNCHER = """
printf '%s\n' "$@" "$(env)" "$(pwd)" >"${0%/*}/seen"
exec "$@"
"""


@pytest.fixture
def launcher(runtime_dir: Path) -> Path:
    """Make a stand-in for skeyd-pgste, which only real kernels have a use for: it writes down what it was given."""
    path = runtime_dir / "launcher"
    _write_launcher(path, LAUNCHER)
    return path


def _write_launcher(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(0o755)


@pytest.fixture
def launching(launcher: Path) -> Iterator[ChildStarter]:
    before = children()
    starter = ChildStarter(launcher)
    yield starter
    for child in children() - before:
        end(child)
    starter.reap()


def test_a_launcher_is_what_is_started_and_becomes_the_worker(
    launching: ChildStarter, launcher: Path, web: VmDirectory
) -> None:
    before = children()
    launching.start(web, simulated((0, 4)))
    (worker,) = children() - before
    with Session.connect(web.fd) as session:
        assert session.hello.pid == worker.pid, "it was exec'ed, not forked"
    seen = launcher.with_name("seen").read_text().splitlines()
    command = [sys.executable, "-I", "-S", starter_module._WORKER, "vm", str(web.fd)]
    assert seen[: len(command)] == command
    assert seen[len(command) :] == ["PWD=/", "/"], "sh's own; nothing of the daemon's"
    assert os.getsid(worker.pid) == worker.pid
    assert web.worker_lives()


def test_the_host_is_looked_at_through_the_launcher_too(launching: ChildStarter, launcher: Path) -> None:
    before = children()
    assert len(launching.probe_host().objects("findings", 4)) == 4
    assert children() == before
    assert launcher.with_name("seen").read_text().splitlines()[:5] == [
        *(sys.executable, "-I", "-S", starter_module._WORKER),
        "probe",
    ]


def test_a_worker_that_refuses_gives_its_own_reason_through_a_launcher(
    launching: ChildStarter, web: VmDirectory
) -> None:
    before = children()
    with pytest.raises(SkeydError) as refused:
        launching.start(web, simulated((0, 2), (1, 2)))
    assert refused.value.reason is Reason.MEMORY_INVALID
    assert children() == before


def _gone(path: Path) -> None:
    path.unlink()


def _not_executable(path: Path) -> None:
    path.chmod(0o644)


def _a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _no_program(path: Path) -> None:
    path.write_bytes(b"\x7fELF and nothing more")


def _no_interpreter(path: Path) -> None:
    path.write_text("#!/no/such/interpreter\n")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_gone, "No such file or directory"),
        (_not_executable, "Permission denied"),
        (_a_directory, "Permission denied"),
        (_no_program, "Exec format error"),
        (_no_interpreter, "No such file or directory"),
    ],
)
def test_a_launcher_that_cannot_be_started_is_named_with_the_reason(
    launching: ChildStarter, launcher: Path, web: VmDirectory, spoil: Callable[[Path], None], why: str
) -> None:
    spoil(launcher)
    before = children()
    for use in (lambda: launching.start(web, simulated((0, 4))), launching.probe_host):
        with pytest.raises(SkeydError) as refused:
            use()
        assert refused.value.reason is Reason.WORKER_FAILED
        assert refused.value.message == f"no worker could be started through the launcher {launcher}: {why}"
    assert children() == before


@pytest.mark.parametrize(
    ("script", "why", "words"),
    [
        pytest.param(
            "echo 'launcher: python3: not found' >&2; exit 127",
            "ended with status 127: it could not run {python}, or could not be run itself; see its log",
            "launcher: python3: not found",
            id="no program",
        ),
        pytest.param(
            "exit 126",
            "ended with status 126: it could not run {python}, or could not be run itself; see its log",
            "",
            id="not to be run",
        ),
        pytest.param("echo oops >&2; exit 1", "ended before it was ready; see its log", "oops", id="fails"),
        pytest.param("exit 0", "ended before it was ready; see its log", "", id="does nothing"),
        pytest.param("kill -SEGV $$", "ended before it was ready; see its log", "", id="crashes"),
        pytest.param("exec >&-; kill -STOP $$", "ended before it was ready; see its log", "", id="says nothing"),
        pytest.param("echo hello", "the worker's first line is no JSON", "", id="another program"),
    ],
)
def test_a_launcher_that_does_not_become_the_worker_is_an_error_with_its_last_words(
    launching: ChildStarter, launcher: Path, web: VmDirectory, script: str, why: str, words: str
) -> None:
    _write_launcher(launcher, script)
    refusal = _refusal(launching, web)
    assert refusal.reason is Reason.WORKER_FAILED
    assert why.format(python=sys.executable) in refusal.message
    assert (str(launcher) in refusal.message) is ("JSON" not in why)
    assert web.log_end() == words

    before = children()
    with pytest.raises(SkeydError) as refused:
        launching.probe_host()
    assert refused.value.message == refusal.message
    # There is no file for it.
    assert refused.value.metadata == {"worker_log": words}
    assert children() == before


def test_a_python_that_the_launcher_cannot_find_is_named(
    launching: ChildStarter, web: VmDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    refusal = _refusal(launching, web)
    assert "ended with status 127: it could not run /no/such/python" in refusal.message
    assert "/no/such/python" in web.log_end()


def test_a_launcher_that_keeps_the_worker_as_a_child_leaves_none_behind_when_it_fails(
    launching: ChildStarter, launcher: Path, web: VmDirectory, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It says something wrong and stays; its parent would have been killed alone.
    _program(monkeypatch, runtime_dir, "import signal\nprint('hello', flush=True)\nsignal.pause()")
    _write_launcher(launcher, '"$@"\nexit')
    before = children()
    for use in (lambda: launching.start(web, simulated((0, 4))), launching.probe_host):
        with pytest.raises(SkeydError, match="no JSON"):
            use()
        for child in children() - before:  # an orphan by now; killed, it may take a moment to end
            pidfd = os.pidfd_open(child.pid)
            try:
                wait_for_end(pidfd)
            finally:
                os.close(pidfd)
    assert children() == before


def test_no_descriptor_is_left_of_a_probe(launching: ChildStarter, launcher: Path, open_fds: None) -> None:
    launching.probe_host()
    launcher.unlink()
    with pytest.raises(SkeydError):
        launching.probe_host()
