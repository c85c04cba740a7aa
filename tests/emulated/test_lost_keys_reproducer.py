"""docs/kernel/lost-keys.c on the real kernels, and what docs/kernel/lost-keys.txt says that it prints there."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.emulated.compiler import compiled
from tests.emulated.fixtures import EmulatedHosts, suites
from tests.emulated.host import EmulatedHost

pytestmark = [pytest.mark.emulated, pytest.mark.timeout(400)]  # longer than any boot may take

MAIL = Path(__file__).parents[2] / "docs" / "kernel" / "lost-keys.txt"
SOURCE = MAIL.with_suffix(".c")
INSIDE = "/root/lost-keys"

NONE_LOST, LOST, SKIPPED = 0, 1, 4
SEGMENT = 256  # frames of one page table
FRAMES = 8 * SEGMENT

PGSTE = "-Wl,--s390-pgste"
PGSTE_FOR_ALL = "vm.allocate_pgste"


@pytest.fixture(scope="module", params=suites())
def host(emulated_hosts: EmulatedHosts, request: pytest.FixtureRequest) -> Iterator[EmulatedHost]:
    """Give a host where no process gets PGSTE that doesn't ask for it."""
    host = emulated_hosts(request.param)
    setting = host.run(["sysctl", "-n", PGSTE_FOR_ALL], check=False)
    if setting.returncode != 0:  # gone with Linux 7.0
        assert not has_the_bug(host)
        yield host
        return
    host.run(["sysctl", "-w", f"{PGSTE_FOR_ALL}=0"])
    yield host
    host.run(["sysctl", "-w", f"{PGSTE_FOR_ALL}={setting.stdout.decode().strip()}"])


def has_the_bug(host: EmulatedHost) -> bool:
    return int(host.kernel.split(".")[0]) < 7


def reproduce(host: EmulatedHost, *flags: str) -> tuple[int, list[str]]:
    """Return the reproducer's status and what it prints after the line that names the kernel."""
    host.put(INSIDE, compiled(SOURCE, *flags), 0o755)
    done: subprocess.CompletedProcess[bytes] = host.run([INSIDE], check=False)
    assert done.stderr == b""
    first, *lines = done.stdout.decode().splitlines()
    assert first.startswith(f"Linux {host.kernel} ")
    return done.returncode, lines


def losses(lines: list[str]) -> list[list[int]]:
    """Return the frames that each line of results says have lost their keys."""
    results = [match for line in lines if (match := re.fullmatch(r"  .+: (\d+) of \d+ lost((?: \d+)*)", line))]
    lost = [[int(frame) for frame in result[2].split()] for result in results]
    assert [len(frames) for frames in lost] == [int(result[1]) for result in results]
    return lost


def quoted(host: EmulatedHost) -> list[str]:
    """Return what the mail quotes for the host's kernel: 6.1 prints what 6.12 does, and the 7.x move."""
    kernel = r"6\.12\." if has_the_bug(host) else r"7\."
    (block,) = re.findall(rf"^    Linux {kernel}.+\n((?:    .*\n|\n(?=    ))+)", MAIL.read_text(), re.MULTILINE)
    assert isinstance(block, str)
    return [line.removeprefix("    ") for line in block.splitlines()]


def test_the_first_key_of_each_page_table_that_is_not_there_is_lost_up_to_linux_6(host: EmulatedHost) -> None:
    status, lines = reproduce(host, PGSTE)

    first, sixth, single = (list(range(nth, FRAMES, SEGMENT)) for nth in (0, 5, 100))
    none: list[int] = []
    if has_the_bug(host):
        assert losses(lines) == [first, none, sixth, none, first, single, none, none, first]
        assert "  8 faults were served" in lines  # userfaultfd, which has fixup_user_fault() drop the mmap lock
        assert status == LOST
    else:
        assert losses(lines) == [none] * 9
        assert status == NONE_LOST


@pytest.mark.parametrize("name", ["init.c", "no-key.c"])
def test_the_programs_of_the_patchs_trial_compile(name: str) -> None:
    assert compiled(MAIL.parent / "trial" / name, "-static")[:4] == b"\x7fELF"


def test_the_mail_quotes_what_is_printed(host: EmulatedHost) -> None:
    _, lines = reproduce(host, PGSTE)

    assert lines == quoted(host)


def test_a_host_that_refuses_to_create_a_vm_is_no_verdict(host: EmulatedHost) -> None:
    status, lines = reproduce(host)

    if has_the_bug(host):
        assert lines[-1] == f"skipped: KVM_CREATE_VM (EINVAL: link with {PGSTE}): Invalid argument"
        assert status == SKIPPED
    else:  # where nothing needs PGSTE any more
        assert status == NONE_LOST
