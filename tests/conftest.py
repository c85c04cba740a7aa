"""What every test can ask for, and what every test is held to: no process stays behind."""

from __future__ import annotations

import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests import examples
from tests.daemon import DaemonProcess
from tests.emulated.recipe import SUITES
from tests.processes import adopt_orphans, children, end

_LONG: Final = 200

# Before the tests are imported, whose decorators ask for it; `--hypothesis-profile` chooses.
examples.register()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take --share and --quarter-of."""
    parser.addoption("--share", metavar="I/N", default="1/1", help="run one of N shares of the tests, the Ith")
    parser.addoption(
        "--quarter-of", metavar="PATH", default=[], action="append", help="of the tests there, a share has one in four"
    )


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a long value by its length. Spelt out, as older releases do, some megabytes take half a minute on a host."""
    return f"{argname}-of-{len(val)}" if isinstance(val, str | bytes) and len(val) > _LONG else None


class _Hosts:
    """With pytest-xdist: tests of one emulated host go to one process, which boots it, and the others don't."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if item.get_closest_marker("emulated"):
                suite = next((suite for suite in SUITES if suite in item.name), "any")
                item.add_marker(pytest.mark.xdist_group(suite))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of others' shares. All shares together are all tests, each once, but for what is quartered.

    Whoever collects deals alike: releases of pytest differ in the order of files, and in the names of some parameters.
    """
    which, of = map(int, config.getoption("share").split("/"))
    quartered = tuple(config.getoption("quarter_of"))
    ordinals: Counter[str] = Counter()
    mine: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        function = item.nodeid.partition("[")[0]
        ordinals[function] += 1
        dealt = zlib.crc32(f"{function} {ordinals[function]}".encode())
        left_out = function.startswith(quartered) and dealt // of % 4 > 0
        (mine if dealt % of == which - 1 and not left_out else others).append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = mine


def pytest_configure(config: pytest.Config) -> None:
    """Become the parent of whatever outlives its own, so that nothing can hide."""
    adopt_orphans()
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(_Hosts())


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Fail a test that leaves a process behind, and end it."""
    before = children()
    yield
    left = children() - before
    for process in left:
        end(process)
    assert not left, f"processes left behind: {sorted(map(str, left))}"


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """Make a private directory with a path short enough for gRPC's socket; gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="skeyd-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def daemon(runtime_dir: Path) -> Iterator[DaemonProcess]:
    """Run a daemon for one test, and end its workers afterwards."""
    process = DaemonProcess(runtime_dir)
    try:
        process.start()
        yield process
    finally:
        process.end_everything()


@pytest.fixture(scope="session")
def shared_daemon() -> Iterator[DaemonProcess]:
    """One daemon for all tests that only need one to talk with; each makes VMs with ids of its own."""
    path = Path(tempfile.mkdtemp(prefix="skeyd-"))
    process = DaemonProcess(path)
    try:
        process.start("--insecure-tcp", "127.0.0.1:0")
        yield process
    finally:
        process.end_everything()
        shutil.rmtree(path)


@pytest.fixture
def open_fds() -> Iterator[None]:
    """Fail a test that leaves a descriptor open. For tests without gRPC, whose own come and go as it likes."""
    before = _fds()
    yield
    assert _fds() == before


def _fds() -> dict[str, str]:
    found = {}
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found[fd.name] = str(fd.readlink())
        except FileNotFoundError:  # the listing's own
            continue
    return found
