"""The machine code (SASS) in a cubin, as instructions that `sass_thread.py` can execute."""

from __future__ import annotations

import functools
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

M32, M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


class Unknown(Exception):
    """Something in the code that this interpreter does not know."""


# ---------------------------------------------------------------------------- operands


class Operand(NamedTuple):
    kind: str  # register, predicate, constant, immediate, address, other
    text: str
    number: int = 0  # of a register or predicate; an offset; the bits of an immediate
    negated: bool = False
    inverted: bool = False
    absolute: bool = False
    suffix: str = ""  # .64, .H1_H1, .B2 ...
    parts: tuple[tuple[int, str], ...] = ()  # registers of an address or a constant, with suffixes


# R0 ... are 0 ..., UR0 ... are 256 ...; the two that are always zero are out of reach of a pair.
UNIFORM, ZERO = 256, 600
TRUE = 15  # PT and UPT; P0 ... are 0 ..., UP0 ... are 8 ...


def _register(text: str) -> int:
    uniform, number = text.startswith("U"), text.lstrip("UR")
    return ZERO if number == "Z" else int(number) + UNIFORM * uniform


def _predicate(text: str) -> int:
    uniform, number = text.startswith("U"), text.lstrip("UP")
    return TRUE if number == "T" else int(number) + 8 * uniform


def bits_of(value: float) -> int:
    try:
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    except OverflowError:
        return 0x7F800000 if value > 0 else 0xFF800000


def float_of(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits & M32))[0])


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


_FLOATS = {"INF": "inf", "QNAN": "nan", "SNAN": "nan"}
_VALUE = re.compile(
    r"(?P<sign>[-~]?)(?P<absolute>\|?)"
    r"(?:(?P<register>U?R(?:\d+|Z))|c\[0x0\]\[(?P<constant>[^]]*)\])\|?(?P<suffix>[.\w]*)\|?"
)
_PART = re.compile(r"(U?R(?:\d+|Z))((?:\.\w+)*)|(-?0x[0-9a-f]+)")


def _inside(brackets: str) -> tuple[int, tuple[tuple[int, str], ...]]:
    """The offset of an address, and the registers that are added to it."""
    parts = _PART.findall(brackets)
    registers = tuple((_register(name), suffix) for name, suffix, _ in parts if name)
    return sum(int(offset, 16) for _, _, offset in parts if offset), registers


def _operand(text: str) -> Operand:
    text = text.strip().replace(".reuse", "")
    if re.fullmatch(r"!?U?P(\d|T)", text):
        return Operand("predicate", text, _predicate(text.lstrip("!")), negated=text[0] == "!")
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return Operand("immediate", text, int(text, 16) & M64)
    if real := re.fullmatch(r"([+-]?)(INF|QNAN|SNAN|[\d.]+(?:e[+-]?\d+)?)", text):
        value = float(real[1] + _FLOATS.get(real[2], real[2]))
        return Operand("immediate", text, bits_of(value))
    if match := _VALUE.fullmatch(text):
        kind = "register" if match["register"] else "constant"
        number, parts = _inside(match["constant"] or "")
        if match["register"]:
            number = _register(match["register"])
        sign, absolute = match["sign"], bool(match["absolute"])
        return Operand(
            kind, text, number, "-" in sign, "~" in sign, absolute, match["suffix"], parts
        )
    if text.endswith("]"):
        offset, parts = _inside(text[text.rindex("[") :])
        return Operand("address", text, offset, parts=parts)
    return Operand("other", text)


# ------------------------------------------------------------------------ instructions

# Opcodes whose first operand is no register that they write.
_TESTS = {"ISETP", "UISETP", "FSETP", "UFSETP", "PLOP3", "UPLOP3", "FCHK", "R2P", "UR2UP"}
_STORES = {"STG", "ST", "STS", "STL"}
_BRANCHES = {"BRA", "CALL", "RET", "EXIT", "BPT"}


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    name: str  # IMAD of IMAD.WIDE.U32
    flags: frozenset[str]  # WIDE and U32 of it
    guard: Operand | None
    operands: tuple[Operand, ...]
    sets: tuple[Operand, ...]  # predicates that it writes
    to: Operand | None  # the register that it writes first
    values: tuple[Operand, ...]  # what it reads but predicates,
    given: tuple[Operand, ...]  # and these
    reads: tuple[int, ...]  # every register, also when the guard is off: issue waits for them

    @property
    def words(self) -> int:
        return 4 if "128" in self.flags else 2 if "64" in self.flags else 1


def _instruction(address: int, text: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?U?P\w+)\s+)?([A-Z]\w*)((?:\.\w+)*)\s*(.*)", text)
    if not match:
        raise Unknown(f"{address:04x}: {text}")
    name, flags = match[2], frozenset(match[3].split(".")[1:])
    words = re.split(r",(?![^\[]*\])", match[4]) if match[4] else []
    if name == "RET":  # a register and the address it counts from
        words = words[0].split()
    operands = tuple(_operand(word) for word in words)
    rest, sets, to = list(operands), [], None
    reads_only = name in _STORES | _BRANCHES
    while rest and rest[0].kind == "predicate" and not reads_only:
        sets.append(rest.pop(0))
    if rest and rest[0].kind == "register" and not reads_only and name not in _TESTS:
        to = rest.pop(0)
        while rest and rest[0].kind == "predicate" and len(rest) > 1:
            sets.append(rest.pop(0))
    values = tuple(o for o in rest if o.kind != "predicate")
    made = Instruction(
        address,
        text,
        name,
        flags,
        _operand(match[1]) if match[1] else None,
        operands,
        tuple(sets),
        to,
        values,
        tuple(o for o in rest if o.kind == "predicate"),
        (),
    )
    return replace(made, reads=tuple(_reads(made)))


def _reads(i: Instruction) -> Iterator[int]:
    for operand in i.values:
        yield from (number for number, _ in operand.parts)
        if operand.kind == "register" and operand.number < ZERO:
            pair = "64" in operand.suffix or "F32x2" in operand.suffix
            yield from range(operand.number, operand.number + max(i.words, 2 if pair else 1))


class _Code(dict[int, Instruction]):
    """By address; what is never reached is never taken apart."""

    def __init__(self, lines: Iterable[tuple[int, str]]) -> None:
        self._lines = dict(lines)

    def __missing__(self, address: int) -> Instruction:
        if address not in self._lines:
            raise Unknown(f"{address:#x} is outside of the code")
        self[address] = _instruction(address, self._lines[address])
        return self[address]


@dataclass
class Program:
    """A kernel as a cubin has it."""

    symbol: str
    arch: int
    registers: int
    parameters: int  # where they begin in the bank of constants
    parameter_bytes: int
    lines: list[tuple[int, str]]

    @functools.cached_property
    def code(self) -> Mapping[int, Instruction]:
        return _Code(self.lines)

    @functools.cached_property
    def opcodes(self) -> Counter[str]:
        """How often each stands in the code, whether it is reached or not."""
        return Counter(re.sub(r"^@\S+\s+", "", text).split()[0] for _, text in self.lines)


def programs(cubin: Path, disassembled: str) -> dict[str, Program]:
    """The kernels of a cubin, by symbol; `disassembled` is what `cuobjdump -sass` says of it."""
    sections = _sections(cubin.read_bytes())
    registers = dict(
        struct.unpack("<II", value)
        for attribute, value in _attributes(sections[".nv.info"].data)
        if attribute == _REGISTERS
    )
    arch = re.search(r"\bcode for sm_(\d+)", disassembled)
    assert arch, disassembled[:200]
    found = {}
    for text in disassembled.split("Function : ")[1:]:
        symbol = text.split(maxsplit=1)[0]
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", text, re.MULTILINE)
        attributes = dict(_attributes(sections[f".nv.info.{symbol}"].data))
        # A kernel without parameters says nothing of them.
        _, offset, size = struct.unpack("<IHH", attributes.get(_PARAMETERS, bytes(8)))
        found[symbol] = Program(
            symbol,
            int(arch[1]),
            registers[sections[f".text.{symbol}"].info & 0xFFFFFF],
            offset,
            size,
            [(int(address, 16), line) for address, line in lines],
        )
    return found


# EIATTR_REGCOUNT and EIATTR_PARAM_CBANK, as `cuobjdump -elf` calls them.
_REGISTERS, _PARAMETERS = 0x2F, 0x0A


def _attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    """Those of .nv.info that have a value of their own: 4, what it is, its size, and the value."""
    at = 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == 4:
            yield attribute, info[at : at + size]
            at += size


class _Section(NamedTuple):
    info: int
    data: bytes


def _sections(elf: bytes) -> dict[str, _Section]:
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, table + size * k) for k in range(count)]
    names = elf[headers[of_names][4] :]
    return {
        names[h[0] : names.index(b"\0", h[0])].decode(): _Section(h[7], elf[h[4] : h[4] + h[5]])
        for h in headers
    }
