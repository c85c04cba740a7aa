"""skeyctl as it is run: in this process where nobody can tell the difference, else as a process, or on a terminal."""

from __future__ import annotations

import errno
import io
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pytest

from skeyd.cli import skeyctl as command

NOBODY: Final = "unix:/nonexistent/skeyd.sock"
"""A target that nobody serves: what is refused there was refused before a daemon was asked."""

SECONDS: Final = 60.0
"""How long anything may take: a test that waits for longer has failed."""

# Who starts the tests in the background has SIGINT ignored, and that is inherited.
PROGRAM: Final = [
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from skeyd.cli import main; main()",
]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment without what changes how Python writes, and `more`."""
    # Unbuffered, Python takes a write that was cut short for a whole one: a broken pipe goes unnoticed.
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONUNBUFFERED", "SKEYD_TARGET")}
    return {**kept, **(more or {})}


@dataclass(frozen=True)
class Done:
    """What came of it."""

    status: int
    out: str
    err: str

    @property
    def value(self) -> Any:
        """What `--json` printed, all of standard output; AssertionError where it failed or said anything else."""
        assert (self.status, self.err) == (0, "")
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        """What `--json` printed of an error, all of standard error; AssertionError where there is anything else."""
        assert self.status != 0
        assert self.out == ""
        (line,) = self.err.splitlines()
        (found,) = json.loads(line).items()
        name, error = found
        assert name == "error"
        assert set(error) == {"reason", "message", "metadata"}
        assert isinstance(error["message"], str)
        assert error["message"]
        return dict(error)


def skeyctl(target: str, *arguments: str) -> Done:
    """Run it in this process, with nobody at its standard input."""
    out, err = io.StringIO(), io.StringIO()
    with _nobody_at_stdin(), redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        command.main(["--target", target, *arguments])
    assert isinstance(ended.value.code, int)
    return Done(ended.value.code, out.getvalue(), err.getvalue())


def names_in(directory: Path) -> list[str]:
    """Names of all that lies in a directory, in order."""
    return sorted(path.name for path in directory.iterdir())


@contextmanager
def _nobody_at_stdin() -> Iterator[None]:
    before = sys.stdin
    with open(os.devnull) as null:  # noqa: PTH123  a name, not a path
        sys.stdin = null
        try:
            yield
        finally:
            sys.stdin = before


def skeyctl_process(
    *arguments: str, more: Mapping[str, str] | None = None, script: str = 'exec "$@"', **other: Any
) -> Done:
    """Run it as a process to its end.

    `more` goes into its environment; `script` is what a shell does with it: limits, redirections.
    """
    done = subprocess.run(
        ["/bin/sh", "-c", script, "sh", *PROGRAM, *arguments],
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **other},
        env=environment(more),
        timeout=SECONDS,
        check=False,
        text=True,
    )
    return Done(done.returncode, done.stdout or "", done.stderr or "")


class Terminal:
    """A terminal with skeyctl on it: standard input and error, and standard output where it isn't piped.

    What it shows has the terminal's line ends made plain again.
    """

    def __init__(self, *arguments: str, pipe_stdout: bool = True) -> None:
        self._fd, theirs = os.openpty()
        self.shown = ""
        try:
            self.process = subprocess.Popen(
                [*PROGRAM, *arguments],
                stdin=theirs,
                stdout=subprocess.PIPE if pipe_stdout else theirs,
                stderr=theirs,
                env=environment({"TERM": "xterm", "COLUMNS": "80"}),
            )
        except BaseException:
            os.close(self._fd)
            raise
        finally:
            os.close(theirs)

    def wait_for(self, text: str) -> None:
        """Wait until it shows a text. AssertionError where it ends without."""
        while text not in self.shown:
            assert self._read(), f"it ended and showed {self.shown!r}"

    def enter(self, text: str) -> None:
        """Type on its keyboard."""
        os.write(self._fd, text.encode())

    def end(self) -> Done:
        """Wait for the process's end. `err` is all that the terminal shows."""
        while self._read():
            pass
        out = ""
        if self.process.stdout is not None:
            out = self.process.stdout.read().decode()
        return Done(self.process.wait(SECONDS), out, self.shown)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._fd], [], [], SECONDS)
        assert ready, f"nothing more came; it shows {self.shown!r}"
        try:
            data = os.read(self._fd, 65536)
        except OSError as error:
            if error.errno != errno.EIO:  # what Linux says when nobody has the other side any more
                raise
            data = b""
        self.shown += data.decode().replace("\r\n", "\n")
        return bool(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(SECONDS)
        if self.process.stdout is not None:
            self.process.stdout.close()
        os.close(self._fd)
