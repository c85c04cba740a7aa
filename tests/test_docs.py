"""What the documents show is what happens."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from skeyd.client import write_snapshot
from tests.daemon import DaemonProcess
from tests.vm_requests import fill, simulated

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of one language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def test_the_first_session_of_the_readme_is_what_skeyctl_prints(daemon: DaemonProcess, tmp_path: Path) -> None:
    (session,) = blocks("README.md", "console")
    steps = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", session, re.MULTILINE)
    assert len(steps) > 5
    environment = {**os.environ, "SKEYD_TARGET": daemon.target}
    for command, expected in steps:
        name, *arguments = shlex.split(command)
        assert name == "skeyctl"
        done = subprocess.run(
            [sys.executable, "-c", "from skeyd.cli import main; main()", *arguments],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.stdout == expected, command


def test_the_python_of_the_readme_runs(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (code,) = blocks("README.md", "python")
    with daemon.connect() as client:
        client.create_vm(simulated("web", 1))
    monkeypatch.setattr("skeyd.client.connection.default_target", lambda: daemon.target)
    exec(code, {})  # noqa: S102  it is ours
    assert capsys.readouterr().out == ""  # a new guest uses no storage keys


def test_the_reader_of_the_snapshot_page_reads_a_snapshot(daemon: DaemonProcess, tmp_path: Path) -> None:
    (code,) = blocks("docs/snapshot-format.md", "python")
    page: dict[str, Any] = {}
    exec(code, page)  # noqa: S102  it is ours
    file = tmp_path / "a.skeys"
    with daemon.connect() as client:
        client.create_vm(simulated("a", 1))
        keys = fill(client, "a", 256)
        with client.get_skeys("vms/a") as stream:
            write_snapshot(file, stream)
    assert list(page["keys_of"](file)) == [(0, keys)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_documents_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_the_exit_codes_of_the_document_are_those_of_skeyctl() -> None:
    rows = re.findall(r"^\| (\d+) \| `(EXIT_\w+)` \|", (ROOT / "docs" / "skeyctl.md").read_text(), re.MULTILINE)
    codes = {
        name: value
        for name, value in vars(importlib.import_module("skeyd.cli.skeyctl")).items()
        if name.startswith("EXIT_")
    }
    assert {name: int(code) for code, name in rows} == codes
