"""The patcher on small modules that are made here, with the code that Debian's kernels have in the two places."""

import struct

import pytest

from tests.emulated.patch_kvm import NOP, PLO, SIGNATURE_MARK, UnpatchableKernel, patch

LOAD_SCLP = bytes.fromhex("c41800000000")  # lgrl %r1,sclp, its last four bytes relocated
TEST = bytes.fromhex("91801001")  # tm 1(%r1),128
ENODEV = bytes.fromhex("a728ffed")  # lhi %r2,-19
RETURN = bytes.fromhex("07fe")
OTHER = bytes.fromhex("a7280000")  # lhi %r2,0
LGR = bytes.fromhex("b9040001")  # lgr %r0,%r1


def jump(mask: int, halfwords: int) -> bytes:
    return struct.pack(">BBh", 0xA7, mask << 4 | 4, halfwords)


# As GCC 12 and 14 lay it out: a jump over the failure; and the way round: a jump to it.
JUMPS_OVER = LOAD_SCLP + TEST + jump(7, 5) + ENODEV + RETURN + OTHER + RETURN
JUMPS_TO = LOAD_SCLP + TEST + jump(8, 5) + OTHER + RETURN + ENODEV + RETURN
ASKS_PLO = LGR + PLO + bytes.fromhex("b2220010")  # and ipm %r1


def module(init: bytes, text: bytes = ASKS_PLO, symbols: tuple[tuple[int, str], ...] = ((2, "sclp"),)) -> bytes:
    """Make a relocatable ELF file; `symbols` are what .init.text refers to, and at which offset."""
    names = sorted({name for _, name in symbols} | {"printk"})
    strtab = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    symtab = bytes(24) + b"".join(
        struct.pack(">I20x", strtab.index(b"\0" + name.encode() + b"\0") + 1) for name in names
    )
    rela = b"".join(struct.pack(">QQq", place, names.index(name) + 1 << 32 | 26, 2) for place, name in symbols)
    contents = {
        "": (b"", 0, 0),
        ".text": (text, 6, 0),
        ".data": (PLO + LGR + PLO, 3, 0),
        ".init.text": (init, 6, 0),
        ".rela.init.text": (rela, 0, 5),
        ".symtab": (symtab, 0, 6),
        ".strtab": (strtab, 0, 0),
        ".shstrtab": (b"", 0, 0),
    }
    shstrtab = b"\0".join(name.encode() for name in contents) + b"\0"
    contents[".shstrtab"] = (shstrtab, 0, 0)
    body, headers = bytearray(64), b""
    for name, (content, flags, link) in contents.items():
        name_at = shstrtab.index(name.encode() + b"\0")
        headers += struct.pack(">2I4Q2I2Q", name_at, 1, flags, 0, len(body), len(content), link, 0, 2, 0)
        body += content + bytes(-len(content) % 8)
    start = b"\x7fELF\x02\x02\x01".ljust(16, b"\0")
    body[:64] = struct.pack(">16s2HI3QI6H", start, 1, 22, 1, 0, 0, len(body), 0, 64, 0, 0, 64, 8, 7)
    return bytes(body) + headers


def test_the_branch_over_the_failure_is_always_taken_and_plo_does_nothing() -> None:
    old = module(JUMPS_OVER)
    new = patch(old)
    assert new == old.replace(jump(7, 5), jump(15, 5)).replace(ASKS_PLO, ASKS_PLO.replace(PLO, NOP))
    assert new != old


def test_the_branch_to_the_failure_is_never_taken() -> None:
    old = module(JUMPS_TO)
    assert patch(old) == old.replace(jump(8, 5), jump(0, 5)).replace(ASKS_PLO, ASKS_PLO.replace(PLO, NOP))


def test_the_place_is_found_behind_other_uses_of_sclp() -> None:
    other = LOAD_SCLP + TEST + jump(7, 3) + OTHER + RETURN
    old = module(other + JUMPS_OVER, symbols=((2, "sclp"), (len(other) + 2, "sclp")))
    new = patch(old)
    assert other in new
    assert jump(15, 5) in new


def test_plo_is_found_in_the_init_code_too() -> None:
    old = module(JUMPS_OVER + ASKS_PLO, text=RETURN)
    assert LGR + NOP in patch(old)


def test_the_signature_is_dropped() -> None:
    old = module(JUMPS_OVER)
    signature = b"signed" * 10
    signed = old + signature + struct.pack(">8xI", len(signature)) + SIGNATURE_MARK
    assert patch(signed) == patch(old)


@pytest.mark.parametrize(
    ("what", "broken"),
    [
        ("ELF", b"MZ"),
        ("ELF", module(JUMPS_OVER)[:5] + b"\x01" + module(JUMPS_OVER)[6:]),
        ("damaged", module(JUMPS_OVER)[:-100]),
        ("damaged", SIGNATURE_MARK),
        ("does so in 0", module(JUMPS_OVER, symbols=((2, "printk"),))),
        ("does so in 0", module(JUMPS_OVER.replace(ENODEV, OTHER))),
        ("does so in 0", module(JUMPS_OVER.replace(TEST, OTHER))),
        ("does so in 2", module(JUMPS_OVER * 2, symbols=((2, "sclp"), (len(JUMPS_OVER) + 2, "sclp")))),
        ("PLO's functions in one place, but does so in 0", module(JUMPS_OVER, text=PLO)),
        ("PLO's functions in one place, but does so in 2", module(JUMPS_OVER, text=ASKS_PLO * 2)),
    ],
)
def test_a_kernel_that_has_changed_says_what_is_missing(what: str, broken: bytes) -> None:
    with pytest.raises(UnpatchableKernel, match=what):
        patch(broken)
