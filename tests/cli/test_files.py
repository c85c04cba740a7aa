"""skeyctl keys dump and load: a file is whole or it isn't there, and one that isn't whole sets nothing."""

from __future__ import annotations

import json
import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from skeyd.client import Snapshot
from skeyd.v1 import storage_key_service_pb2 as pb
from tests.cli.running import NOBODY, Done, names_in, skeyctl, skeyctl_process
from tests.client.lying_daemon import LyingDaemon, chunk, gap, header, trailer
from tests.daemon import DaemonProcess
from tests.examples import examples
from tests.rpc.fixtures import NewVm
from tests.rpc.stubs import Stubs, some_keys

FRAMES = 256  # in 1 MiB
OLD = b"what was there before"
KEYS = b"\x10\x20\x30\x40"

Skeyctl = Callable[..., Done]


@pytest.fixture
def keys(shared_daemon: DaemonProcess) -> Skeyctl:
    """Run `skeyctl keys` on the shared daemon."""
    return lambda *arguments: skeyctl(shared_daemon.target, "keys", *map(str, arguments))


@pytest.fixture
def holed(new_vm: NewVm, stubs: Stubs) -> str:
    """Make a VM of two slots with keys in both, so that its file has two records of keys."""
    name = new_vm((0, 1), (2, 1))
    stubs.set(name, [(0, some_keys(FRAMES, 1)), (2 * FRAMES, some_keys(FRAMES, 2))])
    return name


@pytest.fixture
def whole(keys: Skeyctl, holed: str, tmp_path: Path) -> Path:
    """Make a file of its keys."""
    file = tmp_path / "whole.skeys"
    assert keys("dump", holed, file).status == 0
    return file


@pytest.fixture
def paper(runtime_dir: Path) -> Iterator[Skeyctl]:
    """Run `skeyctl keys` on a daemon that has four keys of any VM and takes four keys: quicker than a VM."""
    begun = pb.SetSkeysResponse(begun=pb.SetSkeysResponse.Begun())
    result = pb.SetSkeysResponse.Result(keys_set=4, crc32=zlib.crc32(KEYS))

    def write(requests: Iterator[pb.SetSkeysRequest], _: object) -> Iterator[pb.SetSkeysResponse]:
        next(requests)
        yield begun
        if list(requests):
            yield pb.SetSkeysResponse(result=result)

    with LyingDaemon(runtime_dir) as daemon:
        daemon.says(header((0, 4)), chunk(0, KEYS), trailer(KEYS))
        daemon.writing = write
        yield lambda *arguments: skeyctl(daemon.target, "keys", *map(str, arguments))


def records(data: bytes) -> Iterator[tuple[int, bytes, int, int]]:
    """Take a file apart as docs/snapshot-format.md says: (where it begins, kind, where its payload begins, its end)."""
    at = 8
    while at < len(data):
        kind, size = struct.unpack_from(">cI", data, at)
        yield at, kind, at + 5, at + 5 + size + 4
        at += 5 + size + 4


def test_keys_that_were_dumped_and_loaded_into_another_guest_are_the_same(
    keys: Skeyctl, holed: str, new_vm: NewVm, stubs: Stubs, tmp_path: Path
) -> None:
    file, other = tmp_path / "a.skeys", new_vm((0, 1), (2, 1))
    assert keys("dump", holed, file) == Done(0, f"512 keys of {holed} saved in {file}\n", "")
    assert names_in(tmp_path) == ["a.skeys"]
    assert keys("load", other, file, "--allow-enable") == Done(
        0, f"512 keys of {other} set and verified; the guest uses storage keys from now on\n", ""
    )
    assert stubs.get(other).keys == stubs.get(holed).keys == some_keys(FRAMES, 1) + some_keys(FRAMES, 2)


def test_the_same_as_json(keys: Skeyctl, holed: str, new_vm: NewVm, tmp_path: Path) -> None:
    file, other = tmp_path / "a.skeys", new_vm((0, 1), (2, 1))
    dumped = keys("dump", holed, file, "--json")
    assert dumped.value == {
        "vm": holed,
        "file": str(file),
        "keys": 512,
        "uses_storage_keys": True,
        "frozen": False,
        "frozen_seconds": None,
    }
    loaded = keys("load", other, file, "--json", "--allow-enable")
    assert loaded.value == {
        "vm": other,
        "keys_set": 512,
        "keys_repaired": 0,
        "enabled": True,
        "validated_only": False,
    }


def test_a_part_of_a_guest_is_dumped_and_only_that_part_is_loaded(
    keys: Skeyctl, holed: str, new_vm: NewVm, stubs: Stubs, tmp_path: Path
) -> None:
    file, other = tmp_path / "a.skeys", new_vm((0, 1), (2, 1))
    stubs.set(other, [(0, b"\x70" * FRAMES), (2 * FRAMES, b"\x70" * FRAMES)])
    before, after = stubs.get(other).keys, bytearray(b"\x70" * 2 * FRAMES)
    assert before == after
    assert keys("dump", holed, file, "0x10-0x1f", "0xff-0x200", "--json").value["keys"] == 16 + 2
    assert keys("load", other, file, "--json").value["keys_set"] == 16 + 2
    wanted = some_keys(FRAMES, 1) + some_keys(FRAMES, 2)
    for index in (*range(0x10, 0x20), 0xFF, 0x100):
        after[index] = wanted[index]
    assert stubs.get(other).keys == after


def test_a_file_that_is_there_is_replaced_whole(keys: Skeyctl, holed: str, tmp_path: Path) -> None:
    file = tmp_path / "a.skeys"
    file.write_bytes(b"x" * 100_000)
    assert keys("dump", holed, file, "0-9").status == 0
    with Snapshot(file) as snapshot:
        assert [str(one) for one in snapshot.verify()] == ["0x0-0x9"]


def test_a_file_of_a_guest_without_keys_says_so_and_is_not_loaded(
    keys: Skeyctl, new_vm: NewVm, stubs: Stubs, tmp_path: Path
) -> None:
    keyless, other, file = new_vm((0, 1)), new_vm((0, 1)), tmp_path / "a.skeys"
    assert keys("dump", keyless, file) == Done(0, f"{keyless} uses no storage keys; {file} says so\n", "")
    assert keys("dump", keyless, file, "--json").value == {
        "vm": keyless,
        "file": str(file),
        "keys": 0,
        "uses_storage_keys": False,
        "frozen": False,
        "frozen_seconds": None,
    }
    stubs.set(other, [(0, b"\x70" * FRAMES)])
    done = keys("load", other, file, "--json", "--allow-enable")
    # Nothing is wrong with the file, so it must not be said to be damaged.
    assert done.status == 2
    error = done.error
    assert error["reason"] == "USAGE"
    assert "uses no storage keys" in error["message"]
    assert stubs.get(other).keys == b"\x70" * FRAMES
    assert keys("load", keyless, file, "--allow-enable").status == 2
    assert not stubs.look_at(keyless).uses_storage_keys


def test_a_file_that_is_cut_off_anywhere_sets_nothing(
    keys: Skeyctl, holed: str, whole: Path, tmp_path: Path, stubs: Stubs
) -> None:
    data = whole.read_bytes()
    parts = list(records(data))
    assert [kind for _, kind, _, _ in parts] == [b"H", b"K", b"K", b"E"]
    edges = {edge for start, _, payload, end in parts for edge in (start, payload, payload + 8, end - 4, end)}
    cuts = {edge + by for edge in edges for by in (-1, 0, 1)} | {0, 1, 7, 8, 9}
    stubs.set(holed, [(0, b"\x70" * FRAMES), (2 * FRAMES, b"\x70" * FRAMES)])
    file = tmp_path / "cut.skeys"
    for cut in sorted(cut for cut in cuts if cut < len(data)):
        file.write_bytes(data[:cut])
        done = keys("load", holed, file, "--json")
        assert done.status == 4, cut
        error = done.error
        assert error["reason"] == "DAMAGED"
        assert str(file) in error["message"]
    assert stubs.get(holed).keys == b"\x70" * 2 * FRAMES
    assert keys("load", holed, whole).status == 0, "and what it was cut from would have set them"
    assert stubs.get(holed).keys == some_keys(FRAMES, 1) + some_keys(FRAMES, 2)


@settings(deadline=None, max_examples=examples(100), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_with_any_bit_flipped_is_refused_before_any_daemon_is_asked(whole: Path, data: st.DataObject) -> None:
    good = whole.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[at] ^= 1 << data.draw(st.integers(0, 7))
    file = whole.with_name("flipped.skeys")
    file.write_bytes(bad)
    done = skeyctl(NOBODY, "keys", "load", "a", str(file), "--json")
    assert done.status == 4
    assert done.error["reason"] == "DAMAGED"


@settings(deadline=None, max_examples=examples(50), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
@example(b"")
@example(b"\x89SKEYS\n\x1a")
@example(b"\x89SKEYS\r\n\x1a")
def test_a_file_of_anything_is_refused_before_any_daemon_is_asked(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "any"
    file.write_bytes(content)
    assert skeyctl(NOBODY, "keys", "load", "a", str(file), "--json").error["reason"] == "DAMAGED"


def record(kind: bytes, payload: bytes) -> bytes:
    head = struct.pack(">cI", kind, len(payload))
    return head + payload + struct.pack(">I", zlib.crc32(head + payload))


def snapshot(*parts: tuple[int, bytes], about: object = None, keys: int | None = None, after: bytes = b"") -> bytes:
    """Make a file whose checksums are right whatever it says."""
    sent = b"".join(part for _, part in parts)
    told = {"format": 1, "uses_storage_keys": True} if about is None else about
    return (
        b"\x89SKEYS\n\x1a"
        + record(b"H", json.dumps(told).encode())
        + b"".join(record(b"K", struct.pack(">Q", start) + part) for start, part in parts)
        + record(b"E", struct.pack(">QI", len(sent) if keys is None else keys, zlib.crc32(sent)))
        + after
    )


@pytest.mark.parametrize(
    "content",
    [
        snapshot((0, b"\x10\x11")),
        snapshot((0, b"")),
        snapshot((2**64 - 1, b"\x10\x10")),
        snapshot((4, b"\x10"), (0, b"\x10")),
        snapshot((0, b"\x10" * 4), (3, b"\x10")),
        snapshot((0, b"\x10"), keys=2),
        snapshot((0, b"\x10"), after=b"\0"),
        snapshot((0, b"\x10"), after=record(b"E", struct.pack(">QI", 1, zlib.crc32(b"\x10")))),
        snapshot(about=[]),
        snapshot(about={}),
        snapshot(about={"format": 2, "uses_storage_keys": True}),
        snapshot(about={"format": 1, "uses_storage_keys": 1}),
        b"\x89SKEYS\n\x1a" + record(b"H", b"[" * 100_000),
        b"\x89SKEYS\n\x1a" + record(b"E", struct.pack(">QI", 0, 0)),
    ],
    ids=[
        *(
            "reserved-bit",
            "no-keys",
            "beyond-2^64",
            "descending",
            "overlapping",
            "wrong-count",
            "byte-after",
            "two-ends",
        ),
        *("header-is-a-list", "empty-header", "format-2", "no-boolean", "deep-header", "no-header"),
    ],
)
def test_a_file_that_lies_with_right_checksums_is_refused_before_any_daemon_is_asked(
    tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "lie.skeys"
    file.write_bytes(content)
    done = skeyctl(NOBODY, "keys", "load", "a", str(file), "--json")
    assert done.status == 4
    assert done.error["reason"] == "DAMAGED"


def test_what_the_lies_are_made_of_is_loaded_where_it_is_true(
    keys: Skeyctl, holed: str, tmp_path: Path, stubs: Stubs
) -> None:
    file = tmp_path / "true.skeys"
    file.write_bytes(snapshot((0, b"\x10"), (1, b"\x20"), (0x200, b"\x30")))
    assert keys("load", holed, file).out == f"3 keys of {holed} set and verified\n"
    assert stubs.get(holed, (0, 2)).keys + stubs.get(holed, (0x200, 1)).keys == b"\x10\x20\x30"


def test_a_file_of_a_larger_guest_sets_nothing_of_a_smaller_one(
    keys: Skeyctl, whole: Path, new_vm: NewVm, stubs: Stubs
) -> None:
    name = new_vm((0, 1))
    stubs.set(name, [(0, b"\x70" * FRAMES)])
    done = keys("load", name, whole, "--json")
    assert done.status == 1
    error = done.error
    assert (error["reason"], error["metadata"]["gfn"]) == ("GFN_NOT_MAPPED", "0x200")
    assert stubs.get(name).keys == b"\x70" * FRAMES


def test_a_file_is_not_loaded_into_a_guest_without_keys_unless_that_is_allowed(
    keys: Skeyctl, whole: Path, new_vm: NewVm, stubs: Stubs
) -> None:
    name = new_vm((0, 1), (2, 1))
    assert keys("load", name, whole, "--json").error["reason"] == "SKEYS_NOT_ENABLED"
    assert not stubs.look_at(name).uses_storage_keys


@pytest.mark.parametrize("file", ["nowhere/a.skeys", "file/a.skeys", ".", "dir", "dir/", "n" * 300])
@pytest.mark.parametrize("verb", ["dump", "load"])
def test_a_file_that_cant_be_is_a_trouble_with_files(
    paper: Skeyctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, file: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").write_bytes(OLD)
    done = paper(verb, "a", file, "--json")
    assert done.status == 5
    assert done.error["reason"] == "FILE"
    text = paper(verb, "a", file)
    assert text.status == 5
    assert text.err.startswith("skeyctl: ")
    assert text.err.endswith(" [FILE]\n")
    assert names_in(tmp_path) == ["dir", "file"]
    assert names_in(tmp_path / "dir") == []


def test_a_file_that_isnt_there_is_named(tmp_path: Path) -> None:
    file = tmp_path / "nope.skeys"
    assert skeyctl(NOBODY, "keys", "load", "a", str(file)).err == f"skeyctl: {file}: No such file or directory [FILE]\n"


def test_a_name_of_any_bytes_is_fine_for_a_file(paper: Skeyctl, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff \n\x1b'.skeys")
    assert paper("dump", "a", tmp_path / name, "--json").value["file"] == str(tmp_path / name)
    assert paper("load", "a", tmp_path / name).status == 0
    assert names_in(tmp_path) == [name]


def test_a_directory_a_fifo_a_socket_and_a_terminal_stay_what_they_are(paper: Skeyctl, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    # A device that nobody else needs: what is renamed over /dev/null as root is nobody's any more.
    ours, theirs = os.openpty()
    (tmp_path / "device").symlink_to(os.ttyname(theirs))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        before = {path.name: path.lstat() for path in tmp_path.iterdir()}
        try:
            for name in ("directory", "fifo", "socket", "device"):
                done = paper("dump", "a", tmp_path / name, "--json")
                assert done.status == 5, name
                error = done.error
                assert error["reason"] == "FILE"
                assert str(tmp_path / name) in error["message"]
            assert Path(os.ttyname(theirs)).stat() == os.fstat(theirs)
        finally:
            os.close(ours)
            os.close(theirs)
        assert {path.name: (path.lstat().st_ino, path.lstat().st_mode) for path in tmp_path.iterdir()} == {
            name: (found.st_ino, found.st_mode) for name, found in before.items()
        }


def test_a_link_stays_a_link_and_what_it_leads_to_is_replaced(paper: Skeyctl, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    there, link, new = tmp_path / "elsewhere" / "a.skeys", tmp_path / "link", tmp_path / "new"
    there.write_bytes(OLD)
    link.symlink_to("elsewhere/a.skeys")
    new.symlink_to("elsewhere/b.skeys")
    assert paper("dump", "a", link, "--json").value["file"] == str(link)
    assert paper("dump", "a", new).status == 0
    assert (link.is_symlink(), new.is_symlink()) == (True, True)
    assert names_in(there.parent) == ["a.skeys", "b.skeys"]
    assert there.read_bytes() == new.read_bytes() != OLD
    assert paper("load", "a", link).status == 0


def test_a_disk_that_takes_no_more_leaves_what_was_there(
    shared_daemon: DaemonProcess, new_vm: NewVm, stubs: Stubs, tmp_path: Path
) -> None:
    name, file = new_vm((0, 16)), tmp_path / "a.skeys"
    stubs.set(name, [(0, some_keys(16 * FRAMES))])
    file.write_bytes(OLD)
    # A limit on the size of files fails in the middle of the first record, where a full disk would; 512 bytes or 1 KiB.
    arguments = ("--target", shared_daemon.target, "keys", "dump", name, str(file), "--json")
    done = skeyctl_process(*arguments, script='ulimit -f 1; exec "$@"', more={"PYTHONDONTWRITEBYTECODE": "1"})
    assert done.status == 5
    error = done.error
    assert error["reason"] == "FILE"
    assert "File too large" in error["message"]
    assert names_in(tmp_path) == ["a.skeys"]
    assert file.read_bytes() == OLD


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [chunk(0, KEYS)],
        [header((0, 4))],
        [header((0, 4)), chunk(0, KEYS)],
        [header((0, 4)), chunk(0, KEYS, crc32=1), trailer(KEYS)],
        [header((0, 4)), chunk(0, KEYS, encoding=9), trailer(KEYS)],
        [header((0, 4)), chunk(0, b"\x11" * 4), trailer(b"\x11" * 4)],
        [header((0, 4)), chunk(0, KEYS[:2]), trailer(KEYS[:2])],
        [header((0, 4)), chunk(2, KEYS[:2]), chunk(0, KEYS[2:]), trailer(KEYS)],
        [header((0, 4)), chunk(0, KEYS), trailer(KEYS, crc32=1)],
        [header((0, 4)), chunk(0, KEYS), trailer(KEYS, keys=5)],
        [header((0, 4)), gap(0, 4), trailer(b"", gap_frames=3)],
        [header((0, 4)), chunk(0, KEYS), trailer(KEYS), trailer(KEYS)],
        [header((0, 4)), chunk(0, KEYS), header((0, 4))],
    ],
    ids=[
        *("nothing", "no-header", "header-only", "no-trailer", "checksum", "encoding", "reserved-bit", "missing"),
        *("disorder", "sum", "count", "gap", "after-the-end", "two-headers"),
    ],
)
def test_a_stream_that_is_not_whole_leaves_what_was_there(
    runtime_dir: Path, tmp_path: Path, parts: list[object]
) -> None:
    file = tmp_path / "a.skeys"
    file.write_bytes(OLD)
    with LyingDaemon(runtime_dir) as daemon:
        daemon.says(*parts)  # type: ignore[arg-type]
        dumped = skeyctl(daemon.target, "keys", "dump", "a", str(file), "--json")
        got = skeyctl(daemon.target, "keys", "get", "a", "--json")
    for done in (dumped, got):
        assert done.status == 4
        assert done.error["reason"] == "DAMAGED"
    assert names_in(tmp_path) == ["a.skeys"]
    assert file.read_bytes() == OLD
