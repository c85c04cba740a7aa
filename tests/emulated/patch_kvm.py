"""Make an s390x kvm.ko load on a machine without the SIE instruction, which QEMU's emulation lacks.

Two instructions change, and the signature goes since it no longer fits:

* kvm_s390_init() answers ENODEV unless ``sclp.has_sief2`` is set: the branch after that test always goes the
  good way.
* plo_test_bit() asks the machine which PLO functions it has by executing PLO, an operation exception under
  emulation: it becomes an instruction that does nothing. Guests would be told a wrong list of PLO functions;
  there are none.

Both are found by what they are (a relocation, an opcode in its idiom), never by where they are. A kernel in
which they are not found exactly once is an `UnpatchableKernel`: someone has to read its code before it is
trusted.

By hand: ``python -m tests.emulated.patch_kvm OLD.ko NEW.ko``
"""

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SIGNATURE_MARK = b"~Module signature appended~\n"
SIGNATURE_INFO = 12  # bytes of struct module_signature, which ends with the signature's length (be32)

SHF_EXECINSTR = 0x4
MINUS_ENODEV = struct.pack(">h", -19)  # the last two bytes of lhi or lghi %rX,-19
LGR_R0 = bytes.fromhex("b90400")  # lgr %r0,%rX without its last byte, which names X
PLO = bytes.fromhex("ee0000000000")  # plo %r0,0(%r0),%r0,0(%r0)
NOP = bytes.fromhex("c00400000000")  # brcl 0,.: as long as PLO, and does nothing

# How many instructions after the reference to sclp the branch may come, and after which many the ENODEV.
TEST_REACH = 4
FAILURE_REACH = 8

# Condition codes after a test of one bit, as a branch's mask: 8 is "it was 0", 7 is "not so", 1 is "it was
# 1", 14 "not so".
BRANCHES_IF_SET = (7, 1)
BRANCHES_IF_CLEAR = (8, 14)
ALWAYS, NEVER = 15, 0


class UnpatchableKernel(Exception):  # noqa: N818 (says what is wrong)
    """This kvm.ko does not have the code that `patch` knows; the message says which piece is missing."""


class Section(NamedTuple):
    """One section of an ELF file: where its bytes are, and what they belong to."""

    name: str
    flags: int
    offset: int
    size: int
    link: int


def patch(module: bytes) -> bytes:
    """Return the module with its two instructions replaced and without its signature.

    Raises:
        UnpatchableKernel: not a 64-bit big-endian ELF file, or one of the two places is not there exactly
        once.
    """
    elf = bytearray(_unsigned(module))
    try:
        sections = _sections(elf)
        at, mask = _sief2_branch(elf, sections)
        elf[at + 1] = mask << 4 | elf[at + 1] & 0x0F
        at = _plo(elf, sections)
        elf[at : at + len(NOP)] = NOP
    except (struct.error, IndexError, ValueError) as error:
        raise UnpatchableKernel(f"the module is a damaged ELF file: {error}") from error
    return bytes(elf)


def _unsigned(module: bytes) -> bytes:
    if not module.endswith(SIGNATURE_MARK):
        return module
    end = len(module) - len(SIGNATURE_MARK)
    if end < SIGNATURE_INFO:
        raise UnpatchableKernel("the module ends in a damaged signature")
    (length,) = struct.unpack_from(">I", module, end - 4)
    return module[: max(end - SIGNATURE_INFO - length, 0)]


def _sections(elf: bytes | bytearray) -> list[Section]:
    if elf[:6] != b"\x7fELF\x02\x02":
        raise UnpatchableKernel("the module is not a 64-bit big-endian ELF file")
    (table,) = struct.unpack_from(">Q", elf, 40)
    entry_size, count, names_index = struct.unpack_from(">3H", elf, 58)
    raw = [struct.unpack_from(">2I4Q2I", elf, table + index * entry_size) for index in range(count)]
    names = raw[names_index][4]
    return [
        Section(_string(elf, names + name_at), flags, offset, size, link)
        for name_at, _, flags, _, offset, size, link, _ in raw
    ]


def _string(elf: bytes | bytearray, at: int) -> str:
    return elf[at : elf.index(b"\0", at)].decode()


def _named(sections: list[Section], name: str) -> Section:
    for section in sections:
        if section.name == name:
            return section
    raise UnpatchableKernel(f"the module has no section {name}, where kvm_s390_init() tests sclp.has_sief2")


def _references(elf: bytes | bytearray, sections: list[Section], code: str, symbol: str) -> list[int]:
    # Where the code refers to the symbol: offsets into the section of the relocated fields.
    relocations = _named(sections, f".rela{code}")
    symbols = sections[relocations.link]
    names = sections[symbols.link]
    places = []
    for at in range(relocations.offset, relocations.offset + relocations.size, 24):
        place, info = struct.unpack_from(">2Q", elf, at)
        (name_at,) = struct.unpack_from(">I", elf, symbols.offset + (info >> 32) * 24)
        if _string(elf, names.offset + name_at) == symbol:
            places.append(place)
    return places


def _instructions(elf: bytes | bytearray, at: int, most: int) -> Iterator[tuple[int, bytes]]:
    # An instruction's first two bits tell its length: 2, 4, 4 or 6 bytes.
    for _ in range(most):
        length = (2, 4, 4, 6)[elf[at] >> 6]
        yield at, bytes(elf[at : at + length])
        at += length


def _tests_bits(code: bytes) -> bool:
    # tm; tmy; tmlh, tmll, tmhh, tmhl
    return code[0] == 0x91 or (code[0] == 0xEB and code[5] == 0x51) or (code[0] == 0xA7 and code[1] & 0xF < 4)


def _branch(at: int, code: bytes) -> tuple[int, int] | None:
    # The mask and the target of a relative branch on condition, short or long.
    if code[0] == 0xA7 and code[1] & 0xF == 4:
        return code[1] >> 4, at + 2 * int(struct.unpack_from(">h", code, 2)[0])
    if code[0] == 0xC0 and code[1] & 0xF == 4:
        return code[1] >> 4, at + 2 * int(struct.unpack_from(">i", code, 2)[0])
    return None


def _answers_enodev(elf: bytes | bytearray, at: int) -> bool:
    for place, code in _instructions(elf, at, FAILURE_REACH):
        if code[0] == 0xA7 and code[1] & 0xF in (8, 9) and code[2:] == MINUS_ENODEV:
            return True
        if (_branch(place, code) or (NEVER, 0))[0] == ALWAYS or (code[0] == 0x07 and code[1] >> 4 == ALWAYS):
            break  # what follows is not reached from here
    return False


def _sief2_branch(elf: bytes | bytearray, sections: list[Section]) -> tuple[int, int]:
    # The file offset of the branch after the has_sief2 test, and the mask with which it never goes to the
    # failure.
    text = _named(sections, ".init.text")
    found = []
    for place in _references(elf, sections, ".init.text", "sclp"):
        tested = False
        # The relocated field is the last four bytes of the instruction that loads sclp's address.
        for at, code in _instructions(elf, text.offset + place + 4, TEST_REACH):
            branch = _branch(at, code)
            if branch is None:
                tested = tested or _tests_bits(code)
                continue
            mask, target = branch
            if tested and mask in BRANCHES_IF_SET and _answers_enodev(elf, at + len(code)):
                found.append((at, ALWAYS))
            elif tested and mask in BRANCHES_IF_CLEAR and _answers_enodev(elf, target):
                found.append((at, NEVER))
            break
    if len(found) != 1:
        raise UnpatchableKernel(
            f".init.text should test sclp.has_sief2 and answer ENODEV in one place, but does so in {len(found)}"
        )
    return found[0]


def _plo(elf: bytes | bytearray, sections: list[Section]) -> int:
    # The file offset of the PLO that plo_test_bit() executes, its function code just put into register 0.
    found = []
    for section in sections:
        if not section.flags & SHF_EXECINSTR:
            continue
        end = section.offset + section.size
        at = elf.find(PLO, section.offset, end)
        while at >= 0:
            if at % 2 == 0 and elf[at - 4 : at - 1] == LGR_R0 and elf[at - 1] < 0x10:
                found.append(at)
            at = elf.find(PLO, at + 2, end)
    if len(found) != 1:
        raise UnpatchableKernel(f"the module should ask for PLO's functions in one place, but does so in {len(found)}")
    return found[0]


def main(arguments: list[str]) -> None:
    """Patch the module named first into the file named second."""
    source, destination = arguments
    Path(destination).write_bytes(patch(Path(source).read_bytes()))


if __name__ == "__main__":
    main(sys.argv[1:])
