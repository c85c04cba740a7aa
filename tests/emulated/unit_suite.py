"""The unit test suite on an emulated host: what it is made of, what doesn't run there, and one run of it.

By hand: ``python -m tests.emulated.unit_suite bookworm``
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests import examples
from tests.emulated.fixtures import require_image
from tests.emulated.host import NOT_NEEDED_INSIDE, EmulatedHost, Process

ROOT: Final = Path(__file__).resolve().parents[2]
INSIDE: Final = "/srv/unit"

NOT_COPIED: Final = (*NOT_NEEDED_INSIDE, ".?*", "*.egg-info", "build", "dist")
"""What the tests don't need of the checkout: environments, caches, what was built."""

NOT_THERE: Final = {
    "tests/rpc/test_reflection.py::test_buf_curl": "buf is made for no s390x, and comes from PyPI",
    "tests/test_makefile.py": "make is no part of the image",
    **dict.fromkeys(
        (
            "tests/rpc/test_shares.py",
            "tests/rpc/test_bulk.py::test_calls_that_never_send_their_request",
            "tests/rpc/test_stream_limit.py::test_more_calls",
        ),
        "they tell what takes no time from what takes 5 s, beside dozens of calls; there that may take as long",
    ),
    **dict.fromkeys(
        (
            "tests/test_sharing.py",
            "tests/contract/test_histories_worth.py",
            "tests/contract/test_mutations.py",
            "tests/emulated/test_not_there.py",
            "tests/faults/test_safeties.py",
        ),
        "a test of tests, which says nothing of the machine",
    ),
    "tests/adoption/": "tests/emulated/test_injection.py has them, with QEMU's own VMs",
    "tests/injection/": "tests/emulated/test_injection.py has them, with a victim that is compiled for the host",
    "tests/faults/test_random_kills.py": "tests/emulated/test_random_kills.py has them, over VMs of the real kernel",
}
"""Tests by the beginnings of their names, and why an emulated host doesn't run them. Everything else runs."""

_MANY_FAULTS: Final = """\
Some 3 s each there, a thousand of them, and about processes and connections, which no byte order changes. What a share
has of tests/faults is about checksums, old keys in a file and back, digests and lost keys."""

NOT_IN_A_SHARE: Final = {
    "tests/rpc/test_messages.py::test_the_most_ranges_of_all_are_read": "16,384 ioctls and chunks: over a minute there",
    **dict.fromkeys(
        (
            "tests/faults/test_connection.py",
            "tests/faults/test_front.py",
            "tests/faults/test_full_disk.py",
            "tests/faults/test_single_keys.py",
            *(
                f"tests/faults/test_client.py::test_{name}"
                for name in ("a_client_that_is_killed", "a_stream_that_ends_without_commit")
            ),
            *(
                f"tests/faults/test_worker.py::test_{name}"
                for name in (
                    "a_guest_that_use",
                    "a_worker_that_answers_nonsense",
                    "a_worker_that_is_killed",
                    "a_worker_that_stands_still",
                    "an_answer_that_comes_late",
                    "an_ioctl_",
                    "answers_to_what_was_read_ahead",
                    "old_keys_that_cant_be_kept",
                    "old_keys_that_the_kernel_never",
                )
            ),
        ),
        _MANY_FAULTS,
    ),
}
"""The same of what runs only where all tests do (`make test-big-endian`)."""

STARTERS: Final = (
    "tests/cli",
    "tests/client",
    "tests/faults",
    "tests/rpc",
    "tests/test_logs.py",
    "tests/test_malloc.py",
    "tests/test_server.py",
    "tests/test_server_listening.py",
)
"""Most of these start a daemon, which takes seconds: three quarters of the time. A share has a quarter of them."""

THEIR_WARNINGS: Final = (
    # protobuf 4.21 as it is imported by Python 3.12 and later
    "ignore:datetime.datetime.utcfromtimestamp() is deprecated:DeprecationWarning",
    "ignore:Type google.protobuf.pyext._message:DeprecationWarning",
)
"""Warnings of Debian's libraries about themselves; all others are failures, as everywhere."""

CPUS: Final = 2
"""And as many processes, between which the tests are dealt out one by one."""
TEST_SECONDS: Final = 900
"""For one test: an answer that comes late on a machine with much else to do is no fault."""

LOOK_SECONDS: Final = 30.0

# Each start of a program would have its code translated again at its random addresses.
APPEND: Final = "norandmaps"

_VERSIONS: Final = """
import importlib.metadata, json, platform, sys
print(json.dumps({
    "byte order": sys.byteorder,
    "machine": platform.machine(),
    "python": platform.python_version(),
    **{name: importlib.metadata.version(name) for name in ("grpcio", "protobuf", "structlog", "zstandard")},
}))
"""

_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed|xpassed)\b")


@dataclass(frozen=True)
class Half:
    """What one of the two pytest processes did."""

    status: int
    output: str

    @property
    def counts(self) -> dict[str, int]:
        """How many tests, by what became of them, as pytest's last line has it."""
        lines = self.output.rstrip().splitlines()
        return {what.rstrip("s"): int(number) for number, what in _COUNT.findall(lines[-1] if lines else "")}

    @property
    def end(self) -> str:
        """What it said of failures and at its end."""
        found = re.search(r"^=+ (FAILURES|ERRORS) =+$", self.output, re.MULTILINE)
        return self.output[found.start() if found else -4000 :][-60_000:]


@dataclass(frozen=True)
class Outcome:
    """A run of the suite."""

    versions: dict[str, str]
    halves: tuple[Half, ...]
    seconds: float

    def count(self, what: str) -> int:
        """How many tests passed, were skipped, and so on, in all."""
        return sum(half.counts.get(what, 0) for half in self.halves)


def run(suite: str, seconds: float, say: Callable[[str], None], share: int = 0, shares: int = 1) -> Outcome:
    """Run one of several shares of the unit suite on a host of its own, and say now and then how far it is.

    TimeoutError where it takes longer than `seconds` after the boot; carries what was printed by then.
    """
    with EmulatedHost(require_image(suite), cpus=CPUS, append=APPEND) as host:
        install(host)
        versions: dict[str, str] = json.loads(host.run(["python3", "-c", _VERSIONS]).stdout)
        say(f"{suite}: Linux {host.kernel}, " + ", ".join(f"{name} {value}" for name, value in versions.items()))
        begin = time.monotonic()
        logs = [f"/tmp/unit-{number}.log" for number in range(CPUS)]  # noqa: S108  inside
        left = (*left_out(shares), *(f"--quarter-of={path}" for path in STARTERS if shares > 1))
        running = [
            _start(host, f"{share * CPUS + number + 1}/{shares * CPUS}", left, log) for number, log in enumerate(logs)
        ]
        statuses: dict[int, int] = {}
        while len(statuses) < len(running):
            for number, process in enumerate(running):
                try:
                    statuses[number] = process.wait(LOOK_SECONDS / len(running))
                except subprocess.TimeoutExpired:
                    continue
            took = time.monotonic() - begin
            outputs = [host.get(log).decode(errors="replace") for log in logs]
            say(f"{suite}: {took:.0f} s: " + ", ".join(_progress(output) for output in outputs))
            if took > seconds and len(statuses) < len(running):
                raise TimeoutError(
                    f"the unit suite took more than {seconds:.0f} s on {suite}:\n"
                    + "\n".join("\n".join((*_failed(output), output[-4000:])) for output in outputs)
                )
        halves = tuple(Half(statuses[number], output) for number, output in enumerate(outputs))
        return Outcome(versions, halves, took)


def install(host: EmulatedHost) -> None:
    """Copy what the tests read, run and import into a host, and prepare its kernel."""
    host.put_tree(ROOT, INSIDE, exclude=NOT_COPIED)
    # Before the processes that make VMs are there; Linux 7.0 and later have no such switch and need none.
    host.run(["sysctl", "-w", "vm.allocate_pgste=1"], check=False)


def left_out(shares: int) -> list[str]:
    """Return pytest's options that leave out what is NOT_THERE, and of one of several shares what is NOT_IN_A_SHARE."""
    names = (*NOT_THERE, *(NOT_IN_A_SHARE if shares > 1 else ()))
    return [f"--{'deselect' if '::' in name else 'ignore'}={name}" for name in names]


def _start(host: EmulatedHost, share: str, left: tuple[str, ...], log: str) -> Process:
    return host.start(
        [
            *(
                "python3",
                "-m",
                "pytest",
                "tests",
                f"--share={share}",
                "-v",
                "--tb=short",
                "--durations=15",
                "-p",
                "no:cacheprovider",
            ),
            *("-m", "not emulated", *left),
            *(f"-W{warning}" for warning in THEIR_WARNINGS),
            *("--hypothesis-profile", examples.EMULATED, "-o", f"timeout={TEST_SECONDS}"),
        ],
        # PYTHONPATH stands for skeyd's being installed, as it is in .venv. And there is a real /dev/kvm: a test that
        # skips for want of it has a fault.
        env={"PYTHONPATH": INSIDE, "SKEYD_REQUIRE_KVM": "1"},
        cwd=INSIDE,
        stdout_path=log,
    )


def _progress(output: str) -> str:
    percents = re.findall(r"\[ *(\d+)%\]$", output, re.MULTILINE)
    bad = "".join(f", {line}" for line in _failed(output))
    return f"{percents[-1] if percents else 0}%{bad}"


def _failed(output: str) -> list[str]:
    """Return the lines of tests that failed so far."""
    return re.findall(r"^(tests/.* (?:FAILED|ERROR)) +\[.*$", output, re.MULTILINE)


def main(suites: list[str]) -> int:
    """Run the suite on the hosts that are named, one after the other; print what failed; 1 where anything did."""
    status = 0
    for suite in suites:
        outcome = run(suite, 7200, lambda line: print(line, flush=True))  # noqa: T201
        for half in outcome.halves:
            if half.status:
                status = 1
                print(half.end)  # noqa: T201
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
