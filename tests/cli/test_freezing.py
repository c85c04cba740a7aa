"""--frozen and --freeze-budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import Done, skeyctl
from tests.daemon import DaemonProcess
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import Stubs

Skeyctl = Callable[..., Done]


@pytest.fixture
def keys(shared_daemon: DaemonProcess) -> Skeyctl:
    def run(*arguments: Any) -> Done:
        return skeyctl(shared_daemon.target, "keys", *map(str, arguments))

    return run


@pytest.fixture
def name(new_vm: NewVm, stubs: Stubs) -> str:
    name = new_vm((0, 1))
    stubs.set(name, [(0, b"\x30" * 256)])
    return name


def test_it_is_shown_that_all_keys_are_of_one_moment(keys: Skeyctl, name: str, tmp_path: Path) -> None:
    live = keys("get", name).out
    assert keys("get", name, "--frozen").out == live + "all of one moment\n"
    file = tmp_path / "a.skeys"
    done = keys("dump", name, file, "--frozen", "--freeze-budget", "2.5")
    assert (done.status, done.out) == (0, f"256 keys of {name} saved in {file}; all of one moment\n")
    for command in (("digest",), ("summary",)):
        assert keys(*command, name, "--frozen").out == keys(*command, name).out


def test_the_same_as_json(keys: Skeyctl, name: str, tmp_path: Path) -> None:
    for command in (("get", name), ("dump", name, tmp_path / "a.skeys")):
        value = keys(*command, "--frozen", "--json").value
        assert (value["frozen"], value["frozen_seconds"]) == (True, 0)
    for command in (("digest", name), ("summary", name)):
        assert keys(*command, "--frozen", "--json").value["frozen"] is True


@pytest.mark.parametrize(
    "wrong",
    [
        ("--freeze-budget", "1"),
        ("--frozen", "--freeze-budget", "0"),
        ("--frozen", "--freeze-budget", "10.1"),
        ("--frozen", "--freeze-budget", "soon"),
    ],
)
@pytest.mark.parametrize("command", ["get", "digest", "summary"])
def test_what_makes_no_sense_is_no_command(keys: Skeyctl, name: str, command: str, wrong: tuple[str, ...]) -> None:
    done = keys(command, name, *wrong)
    assert (done.status, done.out) == (2, "")


def test_a_file_is_of_its_own_moment(keys: Skeyctl, name: str, tmp_path: Path) -> None:
    file = tmp_path / "a.skeys"
    keys("dump", name, file)
    done = keys("digest", file, "--frozen")
    assert done.status == 2
    assert "--frozen is for a VM" in done.err
