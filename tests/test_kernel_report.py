"""docs/kernel/lost-keys.txt can be posted as it is: a mail in plain text that needs no other file."""

from __future__ import annotations

import email
import email.policy
import re
from email.utils import getaddresses
from pathlib import Path
from typing import Final

import pytest

DIRECTORY: Final = Path(__file__).resolve().parent.parent / "docs" / "kernel"
MAIL: Final = DIRECTORY / "lost-keys.txt"
PARTS: Final = {"The patch": "lost-keys-6.12.diff", "lost-keys.c": "lost-keys.c"}
"""Files in it, by their headings. They come last, the program at the end."""

COLUMNS: Final = 75
"""As the kernel's documents ask of a change's description."""
CODE_COLUMNS: Final = 80


def section(heading: str) -> str:
    """Return what comes below a heading, up to the next."""
    parts = re.split(r"^(\S.*)\n=+\n\n", MAIL.read_text(), flags=re.MULTILINE)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    return str(found[heading])


def too_long(text: str, columns: int) -> list[str]:
    return [line for line in text.expandtabs(8).splitlines() if len(line) > columns]


def test_it_begins_with_the_headers_of_a_mail_to_those_who_maintain_it() -> None:
    mail = email.message_from_bytes(MAIL.read_bytes(), policy=email.policy.default)
    assert mail.keys() == ["To", "Cc", "Subject"]
    assert not mail.defects
    assert mail["Subject"].startswith("[BUG] KVM: s390: ")
    assert "\n" not in mail["Subject"]
    to, cc = ({address for _, address in getaddresses([mail[name]])} for name in ("To", "Cc"))
    assert to == {f"{name}@linux.ibm.com" for name in ("borntraeger", "frankja", "imbrenda")}
    assert {"kvm@vger.kernel.org", "linux-s390@vger.kernel.org", "stable@vger.kernel.org", "david@kernel.org"} <= cc
    assert mail.get_content().startswith("Hello,\n")


@pytest.mark.parametrize(("heading", "name"), PARTS.items())
def test_it_has_the_program_and_the_patch_in_it(heading: str, name: str) -> None:
    assert section(heading).rstrip("\n") == (DIRECTORY / name).read_text().rstrip("\n")


def test_its_lines_are_as_long_as_a_mails_may_be() -> None:
    text = MAIL.read_text()
    for heading in PARTS:
        assert not too_long(section(heading), CODE_COLUMNS)
        text = text.replace(section(heading), "")
    assert len(text) > 10_000
    assert not too_long(text, COLUMNS)


def test_it_is_plain_text_that_no_mailer_has_to_encode() -> None:
    assert MAIL.read_bytes().isascii()
    assert not re.search(r"\]\(|^#+ |^```|^\|", MAIL.read_text().partition("The patch\n===")[0], re.MULTILINE)


@pytest.mark.parametrize("name", ["lost-keys.c", "trial/init.c", "trial/no-key.c"])
def test_the_programs_are_in_the_kernels_style_of_indentation(name: str) -> None:
    program = (DIRECTORY / name).read_text()
    assert not too_long(program, CODE_COLUMNS)
    for line in program.splitlines():
        assert not re.match(r" {2,}", line), line  # a comment's star has one space before it
        assert not line.endswith((" ", "\t")), line
