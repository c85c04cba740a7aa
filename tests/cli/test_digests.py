"""skeyctl keys digest, compare and summary."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skeyd.cli.digests import EXIT_DIFFERENT, _runs
from skeyd.client import Difference
from skeyd.digest import Digester
from skeyd.gfn import GfnRange
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2
from tests.cli.running import NOBODY, Done, skeyctl
from tests.client.lying_daemon import LyingDaemon, chunk, header, trailer
from tests.daemon import DaemonProcess
from tests.examples import examples
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import Stubs, some_keys
from tests.rpc.test_digest_skeys import expected, tree_of

HEAD = "FRAMES                            COUNT  KEY   ACC  F  R  C  KEY   ACC  F  R  C\n"

Skeyctl = Callable[..., Done]


@pytest.fixture
def keys(shared_daemon: DaemonProcess) -> Skeyctl:
    """Run `skeyctl keys` on the shared daemon."""
    return lambda *arguments: skeyctl(shared_daemon.target, "keys", *arguments)


def digest_of(found: bytes, *, start: int = 0, rc: bool = False) -> str:
    digester = Digester(with_referenced_changed=rc)
    digester.add(GfnRange(start, len(found)), found)
    root = digester.tree().root
    assert root is not None
    return root.sha256.hex()


def heads(one: str, other: str) -> str:
    return f"{'':<41}{one:<20}{other}\n" + HEAD


# digest


def test_a_digest_is_shown_for_all_frames_and_for_ranges(keys: Skeyctl, stubs: Stubs, new_vm: NewVm) -> None:
    name, found = new_vm((0, 1)), some_keys(256)
    stubs.set(name, [(0, found)])
    assert keys("digest", name.removeprefix("vms/")) == Done(0, f"{digest_of(found)}  256 keys of {name}\n", "")
    part = digest_of(found[16:20], start=16)
    assert keys("digest", name, "0x10+2", "18-19") == Done(0, f"{part}  4 keys of {name}\n", "")
    whole = digest_of(found, rc=True)
    assert keys("digest", name, "--with-referenced-changed").out == f"{whole}  256 keys of {name}\n"
    assert keys("digest", name, "--with-referenced-changed", "--json").value == {
        "of": name,
        "uses_storage_keys": True,
        "with_referenced_changed": True,
        "digest": whole,
        "keys": 256,
        "frozen": False,
    }


def test_a_guest_without_keys_has_no_digest(keys: Skeyctl, new_vm: NewVm) -> None:
    name = new_vm((0, 1))
    assert keys("digest", name) == Done(0, f"{name} uses no storage keys, and so has no digest\n", "")
    value = keys("digest", name, "--json").value
    assert (value["uses_storage_keys"], value["digest"], value["keys"]) == (False, None, 0)


def test_a_file_has_the_digest_of_its_guest_and_no_daemon_is_asked(
    keys: Skeyctl, stubs: Stubs, new_vm: NewVm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, found = new_vm((0, 1)), some_keys(256)
    file = tmp_path / "web.skeys"
    assert keys("dump", name, str(file)).status == 0
    assert skeyctl(NOBODY, "keys", "digest", str(file)).out == f"{file} uses no storage keys, and so has no digest\n"
    stubs.set(name, [(0, found)])
    assert keys("dump", name, str(file)).status == 0
    assert skeyctl(NOBODY, "keys", "digest", str(file)).out == f"{digest_of(found)}  256 keys of {file}\n"
    part = f"{digest_of(found[3:5], start=3)}  2 keys of {file}\n"
    assert skeyctl(NOBODY, "keys", "digest", str(file), "3-4", "0x1000").out == part
    assert skeyctl(NOBODY, "keys", "digest", str(file), "256").out == f"{file} has no keys there, and so no digest\n"
    monkeypatch.chdir(tmp_path)
    for way in ("web.skeys", "./web.skeys"):
        assert skeyctl(NOBODY, "keys", "digest", way).out == f"{digest_of(found)}  256 keys of {way}\n"


# compare


def test_what_differs_is_shown_as_runs_and_the_exit_code_says_so(keys: Skeyctl, stubs: Stubs, new_vm: NewVm) -> None:
    one, other = new_vm((0, 1), (2, 1)), new_vm((0, 2))
    stubs.set(one, [(0, b"\x30" * 256)])
    stubs.set(other, [(0, b"\x30" * 16 + b"\x38" * 16 + b"\x40" * 4 + b"\x36" * 220)])
    assert keys("compare", one, one) == Done(0, f"the same: 512 keys of {one} and of {one}\n", "")
    done = keys("compare", one.removeprefix("vms/"), other.removeprefix("vms/"))
    assert done == Done(
        EXIT_DIFFERENT,
        heads(one, other) + "0x10-0x1f                            16  0x30    3  0  0  0  0x38    3  1  0  0\n"
        "0x20-0x23                             4  0x30    3  0  0  0  0x40    4  0  0  0\n"
        "0x100-0x1ff                         256  no key              0x00    0  0  0  0\n"
        "0x200-0x2ff                         256  0x00    0  0  0  0  no key\n"
        f"532 frames of {one} and {other} differ; 1024 keys were moved\n",
        "",
    )
    done = keys("compare", one, other, "0x0-0xff", "--json")
    assert (done.status, done.err) == (EXIT_DIFFERENT, "")
    assert json.loads(done.out) == {
        "vm": one,
        "other": other,
        "same": False,
        "uses_storage_keys": True,
        "other_uses_storage_keys": True,
        "with_referenced_changed": False,
        "differences": [
            {"start_gfn": 16, "count": 16, "key": 0x30, "other_key": 0x38},
            {"start_gfn": 32, "count": 4, "key": 0x30, "other_key": 0x40},
        ],
        "keys_moved": 512,
    }
    done = keys("compare", one, other, "0x30+2", "--with-referenced-changed", "--json")
    assert json.loads(done.out)["differences"] == [{"start_gfn": 0x30, "count": 2, "key": 0x30, "other_key": 0x36}]
    assert keys("compare", one, other, "0x30+2") == Done(0, f"the same: 2 keys of {one} and of {other}\n", "")


def test_guests_without_keys_are_compared(keys: Skeyctl, stubs: Stubs, new_vm: NewVm) -> None:
    one, other, keyed = new_vm((0, 1)), new_vm((0, 1)), new_vm((0, 1))
    stubs.set(keyed, [(0, b"\x10")])
    assert keys("compare", one, other) == Done(0, f"the same: {one} and {other} use no storage keys\n", "")
    says = f"{keyed} uses storage keys and {one} doesn't\n"
    assert keys("compare", one, keyed) == keys("compare", keyed, one) == Done(EXIT_DIFFERENT, says, "")
    done = keys("compare", one, keyed, "--json")
    assert done.status == EXIT_DIFFERENT
    value = json.loads(done.out)
    assert (value["same"], value["uses_storage_keys"], value["other_uses_storage_keys"]) == (False, False, True)
    assert (value["differences"], value["keys_moved"]) == ([], 0)


def test_a_guest_is_compared_with_a_file_where_that_was_asked_for(
    keys: Skeyctl, stubs: Stubs, new_vm: NewVm, tmp_path: Path
) -> None:
    name, larger, smaller = new_vm((0, 2)), new_vm((0, 3)), new_vm((0, 1))
    for one, frames in ((name, 512), (larger, 768), (smaller, 256)):
        stubs.set(one, [(0, b"\x30" * frames)])
    file, part = str(tmp_path / "web.skeys"), str(tmp_path / "part.skeys")
    keys("dump", name, file)
    keys("dump", name, part, "0x10+4")
    for one in (name, larger):
        assert keys("compare", one, file) == Done(0, f"the same: 512 keys of {one} and of {file}\n", "")
    assert keys("compare", smaller, part) == Done(0, f"the same: 4 keys of {smaller} and of {part}\n", "")
    done = keys("compare", smaller, file, "--json")
    assert done.status == EXIT_DIFFERENT
    gone = {"start_gfn": 256, "count": 256, "key": None, "other_key": 0x30}
    assert json.loads(done.out)["differences"] == [gone]
    assert keys("compare", smaller, file, "0x0-0xff").status == 0
    refused = keys("compare", smaller, file, "0x0-0x1ff", "--json")
    assert (refused.status, refused.error["reason"]) == (1, "GFN_NOT_MAPPED")
    stubs.set(name, [(0x12, b"\x48")])
    assert keys("compare", name, part).out == (
        heads(name, part) + "0x12-0x12                             1  0x48    4  1  0  0  0x30    3  0  0  0\n"
        f"1 frames of {name} and {part} differ; 4 keys were moved\n"
    )


def test_ranges_that_one_guest_has_not_are_refused(keys: Skeyctl, stubs: Stubs, new_vm: NewVm) -> None:
    one, other = new_vm((0, 2)), new_vm((0, 1))
    for name in (one, other):
        stubs.set(name, [(0, b"\x30")])
    for first, second in ((one, other), (other, one)):
        done = keys("compare", first, second, "0x0-0x1ff", "--json")
        assert (done.status, done.error["reason"]) == (1, "GFN_NOT_MAPPED")


def test_the_other_guest_may_be_another_daemons(
    keys: Skeyctl, stubs: Stubs, new_vm: NewVm, daemon: DaemonProcess
) -> None:
    here = new_vm((0, 1))
    stubs.set(here, [(0, b"\x30" * 256)])
    with Stubs(daemon.target) as elsewhere:
        there = elsewhere.create("there", (0, 1)).name
        elsewhere.set(there, [(0, b"\x30" * 255 + b"\x40")])
    done = keys("compare", here, there, "--other-target", daemon.target, "--json")
    assert done.status == EXIT_DIFFERENT
    wanted = [{"start_gfn": 255, "count": 1, "key": 0x30, "other_key": 0x40}]
    assert json.loads(done.out)["differences"] == wanted
    gone = keys("compare", here, there, "--json")
    assert (gone.status, gone.error["reason"]) == (1, "VM_NOT_FOUND")
    unreachable = keys("compare", here, there, "--other-target", NOBODY, "--json")
    assert unreachable.status == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("web", "a.skeys", "--other-target", NOBODY), "--other-target is for a VM"),
        (("web", "other", "--other-target", ""), "it is empty"),
        (("web",), "Missing argument 'OTHER'"),
        (("web", "other", "5-3"), "ends before it begins"),
    ],
)
def test_a_wrong_command_line_is_refused_before_a_daemon_is_asked(arguments: tuple[str, ...], message: str) -> None:
    done = skeyctl(NOBODY, "keys", "compare", *arguments)
    assert done.status == 2
    assert message in done.err


def test_a_file_that_is_not_there_or_none_is_named(keys: Skeyctl, new_vm: NewVm, tmp_path: Path) -> None:
    name, file = new_vm((0, 1)), tmp_path / "a.skeys"
    for command in (("digest", str(file)), ("compare", name, str(file))):
        done = keys(*command, "--json")
        assert (done.status, done.error["reason"]) == (5, "FILE")
        assert str(file) in done.error["message"]
    file.write_bytes(b"no snapshot")
    for command in (("digest", str(file)), ("compare", name, str(file))):
        done = keys(*command, "--json")
        assert (done.status, done.error["reason"]) == (4, "DAMAGED")
        assert str(file) in done.error["message"]


def test_a_difference_that_is_gone_when_it_is_looked_at_is_still_one(runtime_dir: Path) -> None:
    with LyingDaemon(runtime_dir) as daemon:
        daemon.looking = lambda _: vm_pb2.Vm(memory_slots=[vm_pb2.MemorySlot(count=1)])

        def digest(request: pb.DigestSkeysRequest) -> pb.DigestSkeysResponse:
            return expected(tree_of({0: 0x10 if request.vm == "vms/a" else 0x20}))

        daemon.digesting = digest

        def stream(_: Any) -> Iterator[pb.GetSkeysResponse]:
            return iter([header((0, 1)), chunk(0, b"\x20"), trailer(b"\x20")])

        daemon.reading = stream
        done = skeyctl(daemon.target, "keys", "compare", "a", "b")
    assert done.status == EXIT_DIFFERENT
    assert done.out == "vms/a and vms/b differed, and no more when it was looked where; 2 keys were moved\n"


@settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_runs_are_what_looking_at_every_frame_finds(data: st.DataObject) -> None:
    differences, frames, at = [], [], 0
    some = st.sampled_from([0x10, 0x20])
    for _ in range(data.draw(st.integers(0, 5))):
        at += data.draw(st.integers(0, 1))
        count = data.draw(st.integers(1, 6))
        sides = [data.draw(st.lists(some, min_size=count, max_size=count).map(bytes)) for _ in range(2)]
        alone = data.draw(st.sampled_from([None, 0, 1]))
        left, right = (None if alone == side else keys for side, keys in enumerate(sides))
        differences.append(Difference(GfnRange(at, count), left, right))
        for index in range(count):
            key = left[index] if left is not None else None
            frames.append((at + index, key, right[index] if right is not None else None))
        at += count

    wanted = []
    for _, group in groupby(enumerate(frames), lambda item: (item[1][0] - item[0], item[1][1:])):
        run = [frame for _, frame in group]
        wanted.append((GfnRange(run[0][0], len(run)), *run[0][1:]))
    assert [(run.frames, run.left, run.right) for run in _runs(differences)] == wanted


# summary


def test_a_summary_is_a_line_for_each_key_and_how_they_lie(keys: Skeyctl, stubs: Stubs, new_vm: NewVm) -> None:
    name = new_vm((0, 4), (8, 1))
    stubs.set(name, [(0, b"\x36" * 1 + b"\x40" * 255)])
    assert keys("summary", name.removeprefix("vms/")) == Done(
        0,
        "KEY   ACC  F  R  C           COUNT   SHARE\n"
        "0x00    0  0  0  0            1024   80.0%\n"
        "0x36    3  0  1  1               1   <0.1%\n"
        "0x40    4  0  0  0             255   19.9%\n"
        f"1280 keys of {name} in 4 runs of one key, 320.0 frames on average;\n"
        "the longest is 0x100-0x3ff with 768 frames of 0x00; 1024 frames are in no memory slot\n",
        "",
    )
    assert keys("summary", name, "1-2").out == (
        "KEY   ACC  F  R  C           COUNT   SHARE\n"
        "0x40    4  0  0  0               2  100.0%\n"
        f"2 keys of {name} in 1 runs of one key, 2.0 frames on average;\n"
        "the longest is 0x1-0x2 with 2 frames of 0x40\n"
    )
    assert keys("summary", name, "0-2", "--json").value == {
        "vm": name,
        "uses_storage_keys": True,
        "keys": 3,
        "gap_frames": 0,
        "counts": [
            {
                "key": 0x36,
                "count": 1,
                "access_control": 3,
                "fetch_protection": False,
                "referenced": True,
                "changed": True,
            },
            {
                "key": 0x40,
                "count": 2,
                "access_control": 4,
                "fetch_protection": False,
                "referenced": False,
                "changed": False,
            },
        ],
        "runs": 2,
        "longest_run": {"start_gfn": 1, "count": 2, "key": 0x40},
        "frozen": False,
    }


def test_what_is_not_all_is_not_shown_as_all(keys: Skeyctl, stubs: Stubs, new_vm: NewVm) -> None:
    name = new_vm((0, 8))
    stubs.set(name, [(0, b"\x36")])
    assert [line.split()[-1] for line in keys("summary", name).out.splitlines()[1:3]] == [">99.9%", "<0.1%"]


def test_a_summary_of_a_guest_without_keys_says_so(keys: Skeyctl, new_vm: NewVm) -> None:
    name = new_vm((0, 1))
    assert keys("summary", name) == Done(0, "the guest uses no storage keys\n", "")
    value = keys("summary", name, "--json").value
    assert (value["uses_storage_keys"], value["keys"], value["counts"]) == (False, 0, [])


@pytest.mark.parametrize("command", [("digest", "nobody"), ("summary", "nobody"), ("compare", "nobody", "nobody")])
def test_a_guest_that_is_not_there_is_refused(keys: Skeyctl, command: tuple[str, ...]) -> None:
    done = keys(*command, "--json")
    assert (done.status, done.error["reason"]) == (1, "VM_NOT_FOUND")


def test_a_daemon_that_lies_is_found_out(runtime_dir: Path) -> None:
    with LyingDaemon(runtime_dir) as daemon:
        daemon.digesting = lambda _: pb.DigestSkeysResponse(uses_storage_keys=True)
        daemon.summary = pb.SummarizeSkeysResponse(uses_storage_keys=True)
        for command in (("digest", "a"), ("summary", "a"), ("compare", "a", "b")):
            done = skeyctl(daemon.target, "keys", *command, "--json")
            assert (done.status, done.error["reason"]) == (4, "DAMAGED")
