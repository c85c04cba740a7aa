"""Starting workers through a launcher: it becomes the worker, or the error names it with the reason."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skeyd.errors import Reason, SkeydError
from skeyd.vms import starter as starter_module
from skeyd.vms.runtime import VmDirectory
from skeyd.vms.session import Session
from skeyd.vms.starter import ChildStarter
from tests.processes import children, wait_for_end
from tests.vms.starters import ended, put_program, refusal_of
from tests.vms.starters import web as web
from tests.worker.specs import simulated

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
    yield from ended(ChildStarter(launcher))


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
    refusal = refusal_of(launching, web)
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
    refusal = refusal_of(launching, web)
    assert "ended with status 127: it could not run /no/such/python" in refusal.message
    assert "/no/such/python" in web.log_end()


def test_a_launcher_that_keeps_the_worker_as_a_child_leaves_none_behind_when_it_fails(
    launching: ChildStarter, launcher: Path, web: VmDirectory, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It says something wrong and stays; its parent would have been killed alone.
    put_program(monkeypatch, runtime_dir, "import signal\nprint('hello', flush=True)\nsignal.pause()")
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
