"""Every kind of error: its exit code, what people read and what programs read."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest

from skeyd.cli import skeyctl as command
from skeyd.client import connection
from skeyd.errors import Reason, SkeydError
from skeyd.rpc import status
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import vm_pb2
from tests.cli.running import NOBODY, SECONDS, Done, skeyctl
from tests.client.lying_daemon import LyingDaemon, chunk, header, trailer
from tests.daemon import DaemonProcess


@pytest.fixture
def liar(runtime_dir: Path) -> Iterator[LyingDaemon]:
    """Serve lies."""
    with LyingDaemon(runtime_dir) as daemon:
        yield daemon


def check(
    run: Callable[..., Done], code: int, reason: str, message: str, metadata: dict[str, str] | None = None
) -> None:
    """Run a command as people do and as programs do, and hold both to one error."""
    text = run()
    assert text.status == code
    assert text.out == ""
    assert message in text.err
    assert "Traceback" not in text.err
    if reason != "USAGE":
        assert text.err.splitlines()[0].endswith(f" [{reason}]")
    as_json = run("--json")
    assert as_json.status == code
    error = as_json.error
    assert error["reason"] == reason
    assert message in error["message"]
    if metadata is not None:
        assert error["metadata"] == metadata


def test_the_codes_are_the_documented_ones() -> None:
    # docs/skeyctl.md names the constants (tests/test_docs.py holds it to that); these are what programs compare with.
    codes = {name: value for name, value in vars(command).items() if name.startswith("EXIT_")}
    assert codes == {
        "EXIT_REFUSED": 1,
        "EXIT_USAGE": 2,
        "EXIT_UNREACHABLE": 3,
        "EXIT_DAMAGED": 4,
        "EXIT_FILE": 5,
        "EXIT_DIFFERENT": 6,
        "EXIT_INTERRUPTED": 130,
    }


def test_help_names_every_code(shared_daemon: DaemonProcess) -> None:
    done = skeyctl(shared_daemon.target, "--help")
    assert (done.status, done.err) == (0, "")
    listed = done.out.partition("Exit codes:\n")[2].partition("\n\n")[0]
    assert [int(line.split()[0]) for line in listed.splitlines()] == [0, 1, 2, 3, 4, 5, 6, 130]


class Refusal(NamedTuple):
    """A command on the shared daemon that is refused."""

    arguments: tuple[str, ...]
    reason: str
    message: str
    metadata: dict[str, str]


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(("vm", "show", "nope"), "VM_NOT_FOUND", "there is no vms/nope", {"vm": "vms/nope"}),
        Refusal(("vm", "show", "no/pe"), "VM_ID_INVALID", "'no/pe'", {}),
        Refusal(("vm", "delete", "nope", "--yes"), "VM_NOT_FOUND", "there is no vms/nope", {"vm": "vms/nope"}),
        Refusal(("keys", "get", "nope"), "VM_NOT_FOUND", "there is no vms/nope", {"vm": "vms/nope"}),
        Refusal(
            ("keys", "set", "nope", "0", "--acc", "1"),
            "VM_NOT_FOUND",
            "there is no vms/nope",
            {"vm": "vms/nope", "outcome": "UNCHANGED"},
        ),
        Refusal(
            ("vm", "create", "nope", "--kind", "simulated", "--memory", "4096"),
            "MEMORY_INVALID",
            "memory slot 0: a size is a multiple of 1 MiB",
            {},
        ),
        Refusal(
            ("vm", "create", "nope", "--kind", "owned", "--memory", "1M:file=x"),
            "MEMORY_FILE_UNUSABLE",
            "--memory-dir",
            {},
        ),
        Refusal(
            ("vm", "create", "nope", "--kind", "owned", "--memory", "1M", "--simulated-kernel", "7.2"),
            "REQUEST_INVALID",
            "simulated_kernel is for VMs of kind simulated",
            {},
        ),
    ],
    ids=lambda refusal: " ".join(refusal.arguments),
)
def test_a_refusal_of_the_daemon_is_exit_code_1_with_its_reason(
    shared_daemon: DaemonProcess, refusal: Refusal, tmp_path: Path
) -> None:
    check(
        lambda *more: skeyctl(shared_daemon.target, *refusal.arguments, *more),
        1,
        refusal.reason,
        refusal.message,
        refusal.metadata,
    )


def test_a_dump_that_is_refused_leaves_no_file(shared_daemon: DaemonProcess, tmp_path: Path) -> None:
    file = str(tmp_path / "a.skeys")
    check(lambda *more: skeyctl(shared_daemon.target, "keys", "dump", "nope", file, *more), 1, "VM_NOT_FOUND", "nope")
    assert list(tmp_path.iterdir()) == []


def test_a_status_without_a_reason_goes_by_its_grpc_name(liar: LyingDaemon) -> None:
    # What listens there is gRPC, and not skeyd.
    check(lambda *more: skeyctl(liar.target, "host", *more), 1, "UNIMPLEMENTED", "", {})


def test_a_mistake_of_the_daemon_is_not_said_to_be_unreachable(liar: LyingDaemon) -> None:
    def fail(context: grpc.ServicerContext) -> vm_pb2.Vm:
        context.abort(grpc.StatusCode.INTERNAL, "skeyd failed; its log says how")
        raise AssertionError

    liar.looking = fail
    check(lambda *more: skeyctl(liar.target, "vm", "show", "a", *more), 1, "INTERNAL", "skeyd failed", {})


def test_a_worker_that_was_lost_is_not_a_daemon_that_cant_be_reached(liar: LyingDaemon) -> None:
    # The status is UNAVAILABLE in both cases.
    def fail(context: grpc.ServicerContext) -> vm_pb2.Vm:
        status.abort(context, SkeydError(Reason.WORKER_LOST, "the worker was lost", {"vm": "vms/a"}))

    liar.looking = fail
    run = lambda *more: skeyctl(liar.target, "vm", "show", "a", *more)  # noqa: E731
    check(run, 1, "WORKER_LOST", "the worker was lost", {"vm": "vms/a"})


@pytest.mark.parametrize(
    "arguments",
    [
        ("host",),
        ("vm", "list"),
        ("vm", "show", "a"),
        ("vm", "delete", "a", "--yes"),
        ("vm", "create", "a", "--kind", "simulated", "--memory", "1M"),
        ("keys", "get", "a"),
        ("keys", "set", "a", "0", "--acc", "1"),
    ],
    ids=" ".join,
)
def test_a_daemon_that_isnt_there_is_exit_code_3(arguments: tuple[str, ...]) -> None:
    check(lambda *more: skeyctl(NOBODY, *arguments, *more), 3, "UNAVAILABLE", "/nonexistent/skeyd.sock", {})


@pytest.mark.parametrize("verb", ["dump", "load"])
def test_nor_is_it_there_for_files(verb: str, liar: LyingDaemon, tmp_path: Path) -> None:
    file = tmp_path / "a.skeys"
    if verb == "load":
        liar.says(header((0, 2)), chunk(0, b"\x10\x20"), trailer(b"\x10\x20"))
        assert skeyctl(liar.target, "keys", "dump", "a", str(file)).status == 0
    check(lambda *more: skeyctl(NOBODY, "keys", verb, "a", str(file), *more), 3, "UNAVAILABLE", "nonexistent", {})
    assert file.exists() == (verb == "load")


def test_a_daemon_that_doesnt_answer_is_one_that_cant_be_reached(
    liar: LyingDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(context: grpc.ServicerContext) -> vm_pb2.Vm:
        over = threading.Event()
        context.add_callback(over.set)
        assert over.wait(SECONDS)
        return vm_pb2.Vm()

    liar.looking = hang
    monkeypatch.setattr(connection, "UNARY_SECONDS", 0.2)
    check(lambda *more: skeyctl(liar.target, "vm", "show", "a", *more), 3, "DEADLINE_EXCEEDED", "", {})


def test_a_set_that_broke_in_the_middle_says_how_far_it_came(liar: LyingDaemon) -> None:
    how_far = {"next_gfn": "0x100", "keys_set": "256", "uncertain": "0x100-0x1ff", "vm": "vms/a"}

    def break_off(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[pb.SetSkeysResponse]:
        next(requests)
        yield pb.SetSkeysResponse(begun=pb.SetSkeysResponse.Begun())
        yield pb.SetSkeysResponse(progress=pb.SetSkeysResponse.Progress(next_gfn=0x100, keys_set=256))
        status.abort(context, SkeydError(Reason.WORKER_LOST, "the worker was lost", how_far))

    liar.writing = break_off
    arguments = ("keys", "set", "a", "0-0xfff", "--acc", "1")
    assert skeyctl(liar.target, *arguments) == Done(
        1,
        "",
        "skeyctl: the worker was lost [WORKER_LOST]\n  next_gfn: 0x100\n  keys_set: 256\n  uncertain: 0x100-0x1ff\n",
    )
    error = skeyctl(liar.target, *arguments, "--json").error
    assert (error["reason"], error["metadata"]) == ("WORKER_LOST", how_far)


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [pb.SetSkeysResponse(progress=pb.SetSkeysResponse.Progress(next_gfn=4, keys_set=4))],
        [pb.SetSkeysResponse(result=pb.SetSkeysResponse.Result(keys_set=3))],
        [pb.SetSkeysResponse(result=pb.SetSkeysResponse.Result(keys_set=5))],
        [pb.SetSkeysResponse(result=pb.SetSkeysResponse.Result(keys_set=4, crc32=1))],
    ],
    ids=["nothing", "no-result", "too-few", "too-many", "others"],
)
def test_a_result_that_doesnt_fit_what_was_sent_is_no_success(
    liar: LyingDaemon, answers: list[pb.SetSkeysResponse]
) -> None:
    def answer(requests: Iterator[pb.SetSkeysRequest], _: grpc.ServicerContext) -> Iterator[pb.SetSkeysResponse]:
        next(requests)
        yield pb.SetSkeysResponse(begun=pb.SetSkeysResponse.Begun())
        assert list(requests)
        yield from answers

    liar.writing = answer
    check(lambda *more: skeyctl(liar.target, "keys", "set", "a", "0-3", "--acc", "1", *more), 4, "DAMAGED", "", {})


def test_an_id_under_which_other_keys_were_set_is_no_success(liar: LyingDaemon) -> None:
    result = pb.SetSkeysResponse.Result(
        keys_set=4, outcome=pb.SetSkeysResponse.OUTCOME_APPLIED, crc32=zlib.crc32(b"\x10" * 4)
    )
    liar.writing = lambda *_: iter([pb.SetSkeysResponse(result=result)])
    arguments = ("keys", "set", "a", "0-3", "--request-id", "job")
    assert skeyctl(liar.target, *arguments, "--acc", "1").status == 0
    check(
        lambda *more: skeyctl(liar.target, *arguments, "--acc", "2", *more),
        4,
        "OTHER_KEYS",
        "'job' was applied before with other keys",
        {},
    )


@pytest.mark.parametrize(
    "arguments",
    [("--colour",), ("--target",), ("guests",), ("vm",), ("keys", "copy", "a"), ("host", "here"), ("host", "--target")],
    ids=" ".join,
)
def test_a_wrong_command_line_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    if arguments == ("vm",):  # alone it is help, with exit code 0 or 2 depending on click's version
        arguments = ("vm", "--all")
    check(lambda *more: skeyctl(NOBODY, *arguments, *more), 2, "USAGE", "", {})


def test_an_empty_target_is_a_mistake_and_not_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SKEYD_TARGET", raising=False)
    check(lambda *more: skeyctl("", "vm", "delete", "a", "--yes", *more), 2, "USAGE", "--target", {})


def test_a_mistake_of_skeyctl_itself_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection.Client, "list_vms", lambda _: threading.Lock().release())
    with pytest.raises(RuntimeError):
        command.main(["--target", NOBODY, "vm", "list"])


@pytest.mark.parametrize("target", ["unix:/" + "n" * 200, "unix:", "127.0.0.1:notaport", "127.0.0.1:1"])
def test_a_target_that_leads_nowhere_cant_be_reached(target: str) -> None:
    assert skeyctl(target, "vm", "list").status == 3
    done = skeyctl(target, "vm", "list", "--json")
    assert done.status == 3
    assert done.error["reason"] in ("UNAVAILABLE", "UNKNOWN")
