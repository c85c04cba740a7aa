"""skeyctl keys get and set."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skeyd.limits import DEFAULT_CHUNK_KEYS
from skeyd.v1 import vm_pb2
from tests.cli.running import NOBODY, Done, skeyctl
from tests.daemon import DaemonProcess
from tests.examples import examples
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import KEEP, Stubs, chunk, header

HEAD = "FRAMES                            COUNT  KEY   ACC  F  R  C\n"
FRAMES = 256  # in 1 MiB

Skeyctl = Callable[..., Done]


@pytest.fixture
def keys(shared_daemon: DaemonProcess) -> Skeyctl:
    """Run `skeyctl keys` on the shared daemon."""
    return lambda *arguments: skeyctl(shared_daemon.target, "keys", *arguments)


@pytest.fixture
def vm(new_vm: NewVm) -> str:
    """One VM of 1 MiB for all examples of a property."""
    return new_vm((0, 1))


def runs_of(done: Done) -> list[tuple[int, int, int]]:
    return [(run["start_gfn"], run["count"], run["key"]) for run in done.value["runs"]]


def test_keys_that_are_set_are_those_that_are_shown(keys: Skeyctl, new_vm: NewVm) -> None:
    name = new_vm((0, 1), (2, 1))
    vm = name.removeprefix("vms/")
    assert keys("get", vm) == Done(0, "the guest uses no storage keys\n", "")
    assert keys("set", vm, "0x10-0x1f", "--acc", "3", "--fetch", "--allow-enable") == Done(
        0, f"16 keys of {name} set and verified; the guest uses storage keys from now on\n", ""
    )
    assert keys("set", vm, "0x20+8", "--key", "0xf6") == Done(0, f"8 keys of {name} set and verified\n", "")
    assert keys("set", name, "40", "0x2ff", "--acc", "0", "--changed") == Done(
        0, f"2 keys of {name} set and verified\n", ""
    )
    assert keys("get", vm) == Done(
        0,
        HEAD + "0x0-0xf                              16  0x00    0  0  0  0\n"
        "0x10-0x1f                            16  0x38    3  1  0  0\n"
        "0x20-0x27                             8  0xf6   15  0  1  1\n"
        "0x28-0x28                             1  0x02    0  0  0  1\n"
        "0x29-0xff                           215  0x00    0  0  0  0\n"
        "0x100-0x1ff                         256  no memory\n"
        "0x200-0x2fe                         255  0x00    0  0  0  0\n"
        "0x2ff-0x2ff                           1  0x02    0  0  0  1\n",
        "",
    )


def test_the_same_as_json(keys: Skeyctl, new_vm: NewVm, stubs: Stubs) -> None:
    name = new_vm((0, 1), (2, 1))
    vm = stubs.look_at(name)
    assert keys("get", name, "--json").value == {
        "vm": name,
        "uid": vm.uid,
        "kernel": "simulated Linux 7.2",
        "uses_storage_keys": False,
        "runs": [],
        "gaps": [],
        "frozen": False,
        "frozen_seconds": None,
    }
    result = {"vm": name, "keys_set": 256, "keys_repaired": 0, "enabled": True, "validated_only": False}
    assert keys("set", name, "0x200-0x2ff", "--key", "0x9e", "--allow-enable", "--json").value == result
    assert keys("set", name, "0x200-0x2ff", "--key", "0x9e", "--json").value == {**result, "enabled": False}
    zero = {"key": 0, "access_control": 0, "fetch_protection": False, "referenced": False, "changed": False}
    assert keys("get", name, "0xf0+0x200", "--json").value == {
        "vm": name,
        "uid": vm.uid,
        "kernel": "simulated Linux 7.2",
        "uses_storage_keys": True,
        "runs": [
            {"start_gfn": 0xF0, "count": 16, **zero},
            {
                "start_gfn": 0x200,
                "count": 0xF0,
                "key": 0x9E,
                "access_control": 9,
                "fetch_protection": True,
                "referenced": True,
                "changed": True,
            },
        ],
        "gaps": [{"start_gfn": 0x100, "count": 0x100}],
        "frozen": False,
        "frozen_seconds": None,
    }


def test_keys_that_the_kernel_had_lost_are_counted(keys: Skeyctl, new_vm: NewVm) -> None:
    name = new_vm((0, 4), kernel=vm_pb2.SIMULATED_KERNEL_LINUX_4_19)
    assert keys("set", name, "0+512", "--acc", "1", "--allow-enable").out == (
        f"512 keys of {name} set and verified; the kernel had lost 2, set again; "
        "the guest uses storage keys from now on\n"
    )
    assert keys("set", name, "512+512", "--acc", "1", "--json").value == {
        "vm": name,
        "keys_set": 512,
        "keys_repaired": 2,
        "enabled": False,
        "validated_only": False,
    }


def test_a_run_goes_on_over_the_edges_of_chunks(keys: Skeyctl, new_vm: NewVm) -> None:
    name = new_vm((0, 2048))  # two chunks of the stream
    edge, frames = DEFAULT_CHUNK_KEYS, 2048 * FRAMES
    assert frames == 2 * edge
    # Four chunks of the API from the command line too: `set` cuts what it sends.
    assert keys("set", name, f"0-{frames - 1}", "--key", "0x10", "--allow-enable", "--json").value["keys_set"] == frames
    assert runs_of(keys("get", name, "--json")) == [(0, frames, 0x10)]
    keys("set", name, f"{edge - 7}+12", "--key", "0x20")
    assert runs_of(keys("get", name, "--json")) == [
        (0, edge - 7, 0x10),
        (edge - 7, 12, 0x20),
        (edge + 5, edge - 5, 0x10),
    ]
    assert keys("get", name).out == (
        HEAD + "0x0-0x3fff8                      262137  0x10    1  0  0  0\n"
        "0x3fff9-0x40004                      12  0x20    2  0  0  0\n"
        "0x40005-0x7ffff                  262139  0x10    1  0  0  0\n"
    )


def test_runs_join_only_frames_that_follow_one_another(keys: Skeyctl, new_vm: NewVm, stubs: Stubs) -> None:
    name = new_vm((0, 1))
    stubs.set(name, [(0, b"\x10" * FRAMES)])
    touching = keys("get", name, "0-3", "4-9", "10", "--json")
    assert runs_of(touching) == [(0, 11, 0x10)]
    apart = keys("get", name, "0-3", "5-9", "11", "--json")
    assert runs_of(apart) == [(0, 4, 0x10), (5, 5, 0x10), (11, 1, 0x10)]


@settings(deadline=None, max_examples=examples(25), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(0, FRAMES - 1), st.integers(1, FRAMES), st.integers(0, 127).map(lambda key: key * 2)),
        max_size=6,
    )
)
def test_what_is_shown_is_what_was_set_last(
    keys: Skeyctl, vm: str, stubs: Stubs, wanted: list[tuple[int, int, int]]
) -> None:
    stubs.set(vm, [(0, bytes(FRAMES))])
    model = bytearray(FRAMES)
    for start, most, key in wanted:
        count = min(most, FRAMES - start)
        acc = ["--acc", str(key >> 4)]
        acc += [option for bit, option in ((8, "--fetch"), (4, "--referenced"), (2, "--changed")) if key & bit]
        assert keys("set", vm, f"{start}+{count}", *acc).status == 0
        model[start : start + count] = bytes([key]) * count
    runs = runs_of(keys("get", vm, "--json"))
    assert b"".join(bytes([key]) * count for _, count, key in runs) == model
    assert [start for start, _, _ in runs] == [sum(count for _, count, _ in runs[:n]) for n in range(len(runs))]
    assert all(one[2] != other[2] for one, other in pairwise(runs)), "no run could be longer"


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("0x39", "key 0x39 has the reserved bit 0x01"),
        ("1", "key 0x01 has the reserved bit 0x01"),
        ("0x100", "a storage key is one byte, not 0x100"),
        ("0x" + "f" * 5000, "a storage key is one byte"),
        *(
            (bad, "is no number")
            for bad in ("", "-2", "+2", "0b10", "0o10", "1_0", "٢", "0x", "x10", "10h", " 2", "010")
        ),
    ],
    ids=lambda value: repr(value)[:16],
)
def test_a_key_that_is_none_is_refused_before_any_daemon_is_asked(key: str, why: str) -> None:
    done = skeyctl(NOBODY, "keys", "set", "a", "0", f"--key={key}", "--json")
    assert done.status == 2
    error = done.error
    assert error["reason"] == "USAGE"
    assert "--key" in error["message"]
    assert why in error["message"]


@pytest.mark.parametrize("acc", ["16", "-1", "0x3", "three", "", "1.0", "9" * 5000])
def test_access_control_bits_are_0_to_15(acc: str) -> None:
    done = skeyctl(NOBODY, "keys", "set", "a", "0", f"--acc={acc}", "--json")
    assert done.status == 2
    assert "--acc" in done.error["message"]


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--fetch",),
        ("--referenced", "--changed"),
        ("--allow-enable",),
        ("--key", "0x10", "--acc", "1"),
        ("--key", "0x10", "--fetch"),
        ("--key", "0x10", "--referenced"),
        ("--key", "0x10", "--changed"),
    ],
    ids=" ".join,
)
def test_a_key_is_said_in_one_way_and_not_in_two(options: tuple[str, ...]) -> None:
    done = skeyctl(NOBODY, "keys", "set", "a", "0", *options)
    assert done.status == 2
    assert "say either --key, or --acc with --fetch, --referenced and --changed as needed" in done.err


@pytest.mark.parametrize("arguments", [("get",), ("set",), ("set", "a", "--acc", "1"), ("dump", "a"), ("load", "a")])
def test_what_is_missing_on_the_command_line_is_named(arguments: tuple[str, ...]) -> None:
    done = skeyctl(NOBODY, "keys", *arguments)
    assert done.status == 2
    assert "Missing argument" in done.err


@pytest.mark.parametrize("verb", ["get", "set", "dump"])
@pytest.mark.parametrize("ranges", [("5", "3"), ("0-9", "9-12"), ("0-9", "0-9"), ("0-9", "4")], ids=" ".join)
def test_ranges_in_disorder_are_a_wrong_command_line_whatever_is_done_with_them(
    verb: str, ranges: tuple[str, ...], tmp_path: Any
) -> None:
    more = {"get": [], "set": ["--acc", "1"], "dump": []}[verb]
    file = [str(tmp_path / "a.skeys")] if verb == "dump" else []
    done = skeyctl(NOBODY, "keys", verb, "a", *file, *ranges, *more, "--json")
    assert done.status == 2
    error = done.error
    assert error["reason"] == "RANGES_NOT_ASCENDING"
    assert error["metadata"].keys() == {"gfn"}
    assert list(tmp_path.iterdir()) == []


def test_a_guest_that_uses_no_keys_is_made_to_use_them_only_on_demand(
    keys: Skeyctl, new_vm: NewVm, stubs: Stubs
) -> None:
    name = new_vm((0, 1))
    done = keys("set", name, "0-3", "--acc", "1", "--json")
    assert done.status == 1
    assert done.error["reason"] == "SKEYS_NOT_ENABLED"
    assert not stubs.look_at(name).uses_storage_keys


@pytest.mark.parametrize("frames", ["0x100", "0xff-0x100", "0xffffffffffffffff", "1-0xffffffffffffffff"])
def test_frames_without_memory_are_named_and_nothing_is_set(
    keys: Skeyctl, new_vm: NewVm, stubs: Stubs, frames: str
) -> None:
    name = new_vm((0, 1))
    stubs.set(name, [(0, b"\x10" * FRAMES)])
    for done in (keys("set", name, "0", frames, "--acc", "2", "--json"), keys("get", name, frames, "--json")):
        assert done.status == 1
        error = done.error
        assert error["reason"] == "GFN_NOT_MAPPED"
        assert int(error["metadata"]["gfn"], 16) >= FRAMES
    assert stubs.get(name).keys == b"\x10" * FRAMES


# --- all or none ---------------------------------------------------------------------------------------------------


def test_what_is_only_validated_is_not_set(keys: Skeyctl, new_vm: NewVm, stubs: Stubs) -> None:
    name = new_vm((0, 1))
    done = keys("set", name, "0+256", "--acc", "1", "--allow-enable", "--validate-only")
    assert done == Done(0, f"256 keys for {name} checked; nothing was set\n", "")
    assert not stubs.look_at(name).uses_storage_keys
    done = keys("set", name, "0+256", "--acc", "1", "--validate-only")
    assert done.status == 1
    assert done.err.endswith(" [SKEYS_NOT_ENABLED]\n  no key was changed\n")
    value = keys("set", name, "0+256", "--acc", "1", "--allow-enable", "--validate-only", "--json").value
    assert value == {"vm": name, "keys_set": 256, "keys_repaired": 0, "enabled": False, "validated_only": True}


def test_a_request_id_is_applied_once(keys: Skeyctl, new_vm: NewVm, stubs: Stubs) -> None:
    name = new_vm((0, 1))
    arguments = ("set", name, "0+256", "--acc", "1", "--allow-enable", "--request-id", "once")
    first = keys(*arguments)
    stubs.set(name, [(0, b"\x20")])
    assert keys(*arguments) == first
    assert stubs.get(name).keys == b"\x20" + b"\x10" * 255
    done = keys("set", name, "0+255", "--acc", "1", "--allow-enable", "--request-id", "once")
    assert done.status == 1
    assert "[REQUEST_ID_REUSED]" in done.err
    assert keys("set", name, "0+16", "--acc", "2", "--request-id", "a b").status == 1


def test_the_vm_and_its_keys_before_and_afterwards_can_be_said(keys: Skeyctl, new_vm: NewVm, stubs: Stubs) -> None:
    name = new_vm((0, 1))
    stubs.set(name, [(0, b"\x24" * 256)])
    arguments = ("set", name, "0+256", "--acc", "1")
    before = {
        flag: keys("digest", name, *flag, "--json").value["digest"] for flag in ((), ("--with-referenced-changed",))
    }
    both = "--digests-with-referenced-changed"

    def refused(*more: str) -> str:
        done = keys(*arguments, *more)
        assert (done.status, done.out) == (1, "")
        assert stubs.get(name).keys == b"\x24" * 256
        return done.err

    assert "[VM_REPLACED]" in refused("--incarnation", "0" * 32)
    assert "[EXPECTED_DIGEST_MISMATCH]" in refused("--expected-digest", "0" * 64)
    assert "[EXPECTED_DIGEST_MISMATCH]" in refused("--expected-digest", before[()], both)
    assert "[RESULT_DIGEST_MISMATCH]" in refused("--resulting-digest", before[()])
    incarnation = stubs.look_at(name).incarnation
    good = keys(
        *arguments, "--incarnation", incarnation, "--expected-digest", before["--with-referenced-changed",], both
    )
    assert good.status == 0
    after = keys("digest", name, "--json").value["digest"]
    assert keys(*arguments, "--expected-digest", after.upper(), "--resulting-digest", after).status == 0
    done = keys(*arguments, "--expected-digest", after[:-1])
    assert done.status == 2
    assert "is no SHA-256" in done.err


def test_what_was_kept_is_gone_on_with(
    shared_daemon: DaemonProcess, keys: Skeyctl, new_vm: NewVm, stubs: Stubs
) -> None:
    name = new_vm((0, 1))
    stubs.set(name, [(0, bytes(256))])
    wanted = ((0, 256),)
    cut = stubs.send(
        header(name, *wanted, on_interrupt=KEEP, request_id="job", allow_enable=True), chunk(0, b"\x30" * 100)
    )
    assert cut[1] is not None
    shown = skeyctl(shared_daemon.target, "vm", "show", name)
    assert "last write:  kept, 100 keys were set; request job\n" in shown.out
    value = skeyctl(shared_daemon.target, "vm", "show", name, "--json").value["last_write"]
    assert value == {"outcome": "kept", "request_id": "job", "keys_set": 100, "next_gfn": 100, "dirty": []}
    resumed = ("set", name, "0+256", "--acc", "3", "--allow-enable", "--request-id", "job", "--resume")
    assert keys(*resumed).out == f"256 keys of {name} set and verified\n"
    assert stubs.get(name).keys == b"\x30" * 256
    assert (
        "last write:  applied, 256 keys were set; request job\n"
        in skeyctl(shared_daemon.target, "vm", "show", name).out
    )


def test_other_keys_than_those_that_were_kept_are_no_going_on(keys: Skeyctl, new_vm: NewVm, stubs: Stubs) -> None:
    name = new_vm((0, 1))
    stubs.set(name, [(0, bytes(256))])
    stubs.send(header(name, (0, 256), on_interrupt=KEEP, request_id="job"), chunk(0, b"\x30" * 100))
    done = keys("set", name, "0+256", "--acc", "4", "--request-id", "job", "--resume")
    assert done.status == 4
    assert "[DAMAGED]" in done.err


def test_resuming_needs_a_request_id(keys: Skeyctl) -> None:
    done = keys("set", "web", "0", "--acc", "1", "--resume")
    assert done.status == 2
    assert "--request-id" in done.err
