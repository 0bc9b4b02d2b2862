"""What each opcode of the machine code does to a thread of `sass_thread.py`."""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from sass import M32, M64, ZERO, Instruction, Operand, Unknown, bits_of, float_of, signed

if TYPE_CHECKING:
    from sass_thread import Thread

# Where the thread goes on, if not behind the instruction.
Semantics = Callable[["Thread", Instruction], "int | None"]
ONES = 0x3F803F80  # what memory holds: 1 and 1 as bfloat16, and about 1 as float32

SEMANTICS: dict[str, Semantics] = {}
_FLAGS: dict[str, frozenset[str]] = {}  # that it may have; what others mean is not known


def opcode(*names: str, flags: str = "") -> Callable[[Semantics], Semantics]:
    def enter(semantics: Semantics) -> Semantics:
        for name in names:
            SEMANTICS[name], _FLAGS[name] = semantics, frozenset(flags.split())
        return semantics

    return enter


def check_known(i: Instruction, symbol: str) -> None:
    if i.name not in SEMANTICS or not i.flags <= _FLAGS[i.name]:
        raise Unknown(f"unknown instruction {i.text!r} at {i.address:#x} of {symbol}")


@opcode("NOP", "ERRBAR", "CGAERRBAR", "YIELD")
@opcode("BSSY", "BSYNC", "BMOV", "WARPSYNC", flags="RECONVERGENT 32 CLEAR ALL")
@opcode("MEMBAR", "CCTL", flags="ALL GPU SC CTA IVALL")
def _nothing(t: Thread, i: Instruction) -> None:
    pass


SYNCHRONISES = {
    "BAR": "barrier",
    "ACQBULK": "wait for the previous kernel",
    "PREEXIT": "trigger of the next kernel",
    "UCGABAR_ARV": "arrive at the cluster",
    "UCGABAR_WAIT": "wait for the cluster",
}


@opcode(*SYNCHRONISES, flags="SYNC DEFER_BLOCKING")
def _synchronise(t: Thread, i: Instruction) -> None:
    t.saw(SYNCHRONISES[i.name])


@opcode("EXIT")
def _exit(t: Thread, i: Instruction) -> int | None:
    return -1 if all(map(t.holds, i.given)) else None


@opcode("BRA", flags="U DIV")
def _branch(t: Thread, i: Instruction) -> int | None:
    if "DIV" in i.flags:  # taken where lanes differ
        return None
    return i.values[-1].number if all(map(t.holds, i.given)) else None


@opcode("CALL", flags="REL NOINC")
def _call(t: Thread, i: Instruction) -> int:
    return i.values[-1].number


@opcode("RET", flags="REL NODEC")
def _return(t: Thread, i: Instruction) -> int:
    return t.integer(i.values[0]) + i.values[-1].number


@opcode("MOV", "UMOV", "R2UR", flags="64")
def _move(t: Thread, i: Instruction) -> None:
    t.put(i.to, t.integer(i.values[0], i.words), i.words)


@opcode("S2R", "S2UR", "CS2R", flags="32")
def _special(t: Thread, i: Instruction) -> None:
    name = i.values[0].text
    if name not in t.special:
        raise Unknown(f"{i.text}: nothing is known of {name}")
    t.put(i.to, t.special[name], 2 if i.name == "CS2R" and "32" not in i.flags else 1)


@opcode("LDC", "ULDC", "LDCU", flags="64 128 U8 S8 U16 S16")
def _load_constant(t: Thread, i: Instruction) -> None:
    words = [t.constant(i.values[0], 4 * k) for k in range(i.words)]
    for flag, bits in (("8", 8), ("16", 16)):
        if f"U{flag}" in i.flags:
            words[0] &= (1 << bits) - 1
        if f"S{flag}" in i.flags:
            words[0] = signed(words[0] & ((1 << bits) - 1), bits)
    t.put(i.to, sum((word & M32) << 32 * k for k, word in enumerate(words)), i.words)


def _bytes(i: Instruction) -> int:
    narrow = 1 if i.flags & {"U8", "S8"} else 2 if i.flags & {"U16", "S16"} else 4
    return 4 * i.words if i.words > 1 else narrow


@opcode("LDG", "LD", flags="E SYS 64 128 U8 U16 CONSTANT STRONG GPU")
def _load(t: Thread, i: Instruction) -> None:
    load = t.saw_access("load", t.address(i.values[0]), _bytes(i))
    ones = ONES if _bytes(i) >= 4 else ONES & ((1 << 8 * _bytes(i)) - 1)
    t.put(i.to, sum(ones << 32 * k for k in range(i.words)), i.words)
    if i.to and i.to.number < ZERO:
        t.loads |= dict.fromkeys(range(i.to.number, i.to.number + i.words), load)


@opcode("STG", "ST", flags="E SYS 64 128 U8 U16 EF STRONG GPU")
def _store(t: Thread, i: Instruction) -> None:
    t.saw_access("store", t.address(i.values[0]), _bytes(i), t.raw(i.values[1]))


# Shared and local memory: by the letter of each, and the address in it.


@opcode("LDS", "LDL", flags="U LU 64 128")
def _load_own(t: Thread, i: Instruction) -> None:
    at = t.address(i.values[0], is_wide=False)
    words = [t.own.get((i.name[2], at + 4 * k), bits_of(1.0)) for k in range(i.words)]
    t.put(i.to, sum(word << 32 * k for k, word in enumerate(words)), i.words)


@opcode("STS", "STL", flags="64 128")
def _store_own(t: Thread, i: Instruction) -> None:
    at = t.address(i.values[0], is_wide=False)
    value = t.raw(i.values[1], i.words)
    t.own |= {(i.name[2], at + 4 * k): value >> 32 * k & M32 for k in range(i.words)}


@opcode("SHFL", flags="BFLY IDX UP DOWN")
def _shuffle(t: Thread, i: Instruction) -> None:
    t.put(i.to, t.integer(i.values[0]))
    t.decide(i.sets[0], True)


# Integers.


@opcode("IMAD", "UIMAD", flags="HI IADD MOV SHL U32 WIDE X")
def _multiply_add(t: Thread, i: Instruction) -> None:
    is_wide = "WIDE" in i.flags
    a, b = t.integer(i.values[0]), t.integer(i.values[1])
    if i.flags & {"WIDE", "HI"} and "U32" not in i.flags:
        a, b = signed(a), signed(b)
    c = t.integer(i.values[2], 2 if i.flags & {"WIDE", "HI"} else 1)
    sum_ = a * b + c + ("X" in i.flags and t.holds(i.given[0]))
    if "HI" in i.flags:
        sum_ >>= 32
    t.put(i.to, sum_ & M64, 2 if is_wide else 1)
    for o in i.sets:
        t.decide(o, sum_ >> 64 != 0)


@opcode("IADD3", "UIADD3", "IADD", "UIADD", "VIADD", "UVIADD", flags="64 X")
def _add(t: Thread, i: Instruction) -> None:
    bits = 64 if "64" in i.flags else 32
    total, carries = 0, []
    for k, o in enumerate(i.values):
        total += t.addend(o, bits // 32)
        if k == 0:
            total += sum(map(t.holds, i.given)) if "X" in i.flags else 0
        else:
            carries.append(total >> bits != 0)
            total &= (1 << bits) - 1
    t.put(i.to, total, bits // 32)
    only_one = len(i.sets) < 2 or i.sets[1].number == 15
    for k, o in enumerate(i.sets):
        t.decide(o, any(carries) if only_one else carries[k])


@opcode("LEA", "ULEA", flags="HI SX32 X")
def _shift_add(t: Thread, i: Instruction) -> None:
    a, b, shift = t.integer(i.values[0]), t.addend(i.values[1]), i.values[-1].number
    if "SX32" in i.flags:
        a = signed(a) & M64
    elif "HI" in i.flags:
        a |= t.integer(i.values[2]) << 32
    shifted = (a << shift >> 32 if "HI" in i.flags else a << shift) & M32
    total = shifted + b + ("X" in i.flags and t.holds(i.given[0]))
    t.put(i.to, total)
    for o in i.sets[:1]:
        t.decide(o, total >> 32 != 0)


@opcode("SHF", "USHF", flags="HI L R S32 S64 U32 U64 W")
def _shift(t: Thread, i: Instruction) -> None:
    low, shift, high = map(t.integer, i.values)
    is_signed = bool(i.flags & {"S32", "S64"})
    bits = 64 if i.flags & {"U64", "S64"} else 32
    shift = shift & (bits - 1) if "W" in i.flags else min(shift, bits)
    if "L" in i.flags:
        result = (high << 32 | low) << shift
        result = result >> 32 if "HI" in i.flags else result
    elif "HI" in i.flags:
        result = (signed(high) if is_signed else high) >> shift
    else:
        both = high << 32 | low
        result = (signed(both, 64) if is_signed else both) >> shift
    t.put(i.to, result & M32)


@opcode("LOP3", "ULOP3", flags="LUT")
def _logic(t: Thread, i: Instruction) -> None:
    a, b, c = map(t.integer, i.values[:3])
    result = 0
    for k in range(8):
        if i.values[3].number >> k & 1:
            result |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    t.put(i.to, result & M32)
    for o in i.sets:
        t.decide(o, result & M32 != 0 or (bool(i.given) and t.holds(i.given[-1])))


@opcode("PRMT", "UPRMT")
def _permute(t: Thread, i: Instruction) -> None:
    a, select, b = map(t.integer, i.values)
    result = 0
    for k in range(4):
        at = select >> 4 * k & 15
        byte = (b << 32 | a) >> 8 * (at & 7) & 255
        result |= (255 * (byte >> 7) if at & 8 else byte) << 8 * k
    t.put(i.to, result)


@opcode("SGXT", "USGXT", flags="U32")
def _extend(t: Thread, i: Instruction) -> None:
    bits = t.integer(i.values[1])
    low = t.integer(i.values[0]) & ((1 << bits) - 1)
    t.put(i.to, low if "U32" in i.flags else signed(low, bits) & M32)


@opcode("IABS")
def _absolute(t: Thread, i: Instruction) -> None:
    t.put(i.to, abs(signed(t.integer(i.values[0]))))


@opcode("SEL", "USEL", "FSEL", flags="64")
def _select(t: Thread, i: Instruction) -> None:
    o = i.values[0] if t.holds(i.given[0]) else i.values[1]
    is_real = i.name == "FSEL"
    t.put(i.to, bits_of(t.real(o)) if is_real else t.integer(o, i.words), i.words)


@opcode("IMNMX", "UIMNMX", "VIMNMX", "UVIMNMX", "VIADDMNMX", flags="S32 U32 S64 U64")
def _least_or_most(t: Thread, i: Instruction) -> None:
    bits = 64 if i.flags & {"S64", "U64"} else 32
    values = [t.integer(o, bits // 32) for o in i.values]
    if i.name == "VIADDMNMX":
        values = [(values[0] + values[1]) & M32, values[2]]
    if not i.flags & {"U32", "U64"}:
        values = [signed(v, bits) for v in values]
    t.put(i.to, (min if t.holds(i.given[0]) else max)(values) & M64, bits // 32)


_COMPARE = {
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}


def _combine(t: Thread, i: Instruction, result: bool) -> None:
    """Into two predicates: with `result` and with its opposite."""
    other = t.holds(i.given[0]) if i.given else True
    for o, value in zip(i.sets, (result, not result), strict=False):
        if "OR" in i.flags:
            t.decide(o, value or other)
        else:
            t.decide(o, value != other if "XOR" in i.flags else value and other)


@opcode("ISETP", "UISETP", flags="EQ NE LT LE GT GE AND OR XOR EX S64 U32 U64")
def _compare(t: Thread, i: Instruction) -> None:
    bits = 64 if i.flags & {"S64", "U64"} else 32
    a, b = (t.integer(o, bits // 32) for o in i.values)
    if not i.flags & {"U32", "U64"}:
        a, b = signed(a, bits), signed(b, bits)
    test = next(flag for flag in i.flags if flag in _COMPARE)
    low_words_decide = "EX" in i.flags and a == b
    _combine(t, i, t.holds(i.given[1]) if low_words_decide else _COMPARE[test](a, b))


@opcode("PLOP3", "UPLOP3", flags="LUT")
def _logic_of_predicates(t: Thread, i: Instruction) -> None:
    *_, a, b, c, first, second = i.operands
    index = 4 * t.holds(a) + 2 * t.holds(b) + t.holds(c)
    for o, table in zip(i.operands[:2], (first, second), strict=True):
        t.decide(o, bool(table.number >> index & 1))


def _shift_of_byte(o: Operand) -> int:
    return 8 * int(o.suffix[2:]) if o.suffix.startswith(".B") else 0


@opcode("P2R", "UP2UR")
def _predicates_to_register(t: Thread, i: Instruction) -> None:
    first = 8 if i.name == "UP2UR" else 0
    bits = sum(value << k for k, value in enumerate(t.predicates[first : first + 7]))
    assert i.to is not None
    shift, mask = _shift_of_byte(i.to), t.integer(i.values[2])
    t.put(i.to, t.integer(i.values[1]) & ~(mask << shift) | (bits & mask) << shift)


@opcode("R2P", "UR2UP")
def _register_to_predicates(t: Thread, i: Instruction) -> None:
    first = 8 if i.name == "UR2UP" else 0
    word, mask = (o for o in i.values if o.text not in ("PR", "UPR"))
    bits = t.integer(word) >> _shift_of_byte(word)
    for k in range(7):
        if t.integer(mask) >> k & 1:
            t.predicates[first + k] = bool(bits >> k & 1)


# Floats.


@opcode("FADD", "FMUL", "FFMA", flags="FTZ RM RP RZ")  # to the nearest: near enough
def _arithmetic(t: Thread, i: Instruction) -> None:
    a, b, *c = map(t.real, i.values)
    t.put_real(i.to, a + b if i.name == "FADD" else a * b if i.name == "FMUL" else a * b + c[0])


@opcode("FADD2", "FMUL2", "FFMA2")
def _arithmetic_of_pairs(t: Thread, i: Instruction) -> None:
    assert i.to is not None
    results = []
    for k in range(2):
        words = (t.raw(o, 2) >> 32 * k for o in i.values)
        a, b, *c = (
            -float_of(w) if o.negated else float_of(w) for w, o in zip(words, i.values, strict=True)
        )
        results.append(a + b if i.name == "FADD2" else a * b + (c[0] if c else 0.0))
    t.put(i.to, bits_of(results[0]) | bits_of(results[1]) << 32, 2)


@opcode("FMNMX", flags="NAN FTZ")
def _least_or_most_real(t: Thread, i: Instruction) -> None:
    t.put_real(i.to, (min if t.holds(i.given[0]) else max)(map(t.real, i.values)))


@opcode("FSETP", "UFSETP", flags="AND OR XOR FTZ NAN NUM EQ NE LT LE GT GE EQU NEU LTU LEU GTU GEU")
def _compare_reals(t: Thread, i: Instruction) -> None:
    a, b = map(t.real, i.values)
    unordered = math.isnan(a) or math.isnan(b)
    test = next(flag for flag in i.flags if flag[:2] in _COMPARE or flag in ("NAN", "NUM"))
    if test in ("NAN", "NUM"):
        return _combine(t, i, unordered == (test == "NAN"))
    return _combine(t, i, test.endswith("U") if unordered else _COMPARE[test[:2]](a, b))


@opcode("FCHK")
def _check_division(t: Thread, i: Instruction) -> None:
    """Whether a quotient, or a step on the way to it, may leave the normal numbers."""
    of, by = (t.integer(o) >> 23 & 255 for o in i.values)
    t.decide(i.sets[0], not (0 < of < 255 and 0 < by < 253) or not -125 < of - by < 126)


@opcode("MUFU", flags="RCP RSQ SQRT EX2")
def _special_function(t: Thread, i: Instruction) -> None:
    a = t.real(i.values[0])
    if "RCP" in i.flags:
        result = 1 / a if a else math.copysign(math.inf, a)
    elif "RSQ" in i.flags:
        result = a**-0.5 if a > 0 else math.inf if a == 0 else math.nan
    elif "SQRT" in i.flags:
        result = a**0.5 if a >= 0 else math.nan
    else:
        result = 2.0 ** min(a, 200.0)
    t.put_real(i.to, result)


@opcode("I2F", "UI2F", "I2FP", "UI2FP", flags="F32 S32 U32 S64 U64 RP")
def _real_of_integer(t: Thread, i: Instruction) -> None:
    bits = 64 if i.flags & {"S64", "U64"} else 32
    value = t.integer(i.values[0], bits // 32)
    if not i.flags & {"U32", "U64"}:
        value = signed(value, bits)
    word = bits_of(float(value))
    if "RP" in i.flags and float_of(word) < value:
        word += 1
    t.put(i.to, word)


@opcode("F2I", "UF2I", flags="FTZ NTZ TRUNC U32")
def _integer_of_real(t: Thread, i: Instruction) -> None:
    a = t.real(i.values[0])
    least, most = (0, M32) if "U32" in i.flags else (-(1 << 31), (1 << 31) - 1)
    if "TRUNC" not in i.flags or math.isnan(a):
        raise Unknown(f"{i.text} of {a}")
    t.put(i.to, int(max(least, min(most, a))) & M32)


def _float_of_half(word: int, flags: frozenset[str]) -> float:
    if flags & {"BF16", "BF16_V2"}:
        return float_of((word & 0xFFFF) << 16)
    return float(struct.unpack("<e", struct.pack("<H", word & 0xFFFF))[0])


def _half_of(value: float, flags: frozenset[str]) -> int:
    if flags & {"BF16", "BF16_V2"}:
        word = bits_of(value)
        return (word + 0x7FFF + (word >> 16 & 1) >> 16) & 0xFFFF
    try:
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    except OverflowError:
        return 0x7C00 if value > 0 else 0xFC00


@opcode("F2F", "F2FP", flags="BF16 F16 F32 PACK_AB")
def _narrow(t: Thread, i: Instruction) -> None:
    halves = [_half_of(t.real(o), i.flags) for o in i.values]
    t.put(i.to, halves[0] if len(halves) == 1 else halves[0] << 16 | halves[1])


def _halves(t: Thread, o: Operand, flags: frozenset[str]) -> tuple[float, float]:
    """The low and the high half, as numbers of 16 bits."""
    word = t.raw(o)
    both = (_float_of_half(word, flags), _float_of_half(word >> 16, flags))
    low, high = {".H0_H0": (0, 0), ".H1_H1": (1, 1)}.get(o.suffix, (0, 1))
    sign = -1.0 if o.negated else 1.0
    return sign * both[low], sign * both[high]


@opcode("HADD2", "HMUL2", "HFMA2", flags="F32 MMA BF16 BF16_V2")
def _arithmetic_of_halves(t: Thread, i: Instruction) -> None:
    operands: list[tuple[float, float]] = []
    immediates: list[float] = []  # high and low, as float32
    for o in i.values:
        if o.kind != "immediate":
            operands.append(_halves(t, o, i.flags))
            continue
        immediates.append(float_of(o.number))
        if len(immediates) == 2:
            operands.append((immediates.pop(), immediates.pop()))
    results = []
    for a, b, *c in zip(*operands, strict=True):
        results.append(a + b if i.name == "HADD2" else a * b + (c[0] if c else 0.0))
    if "F32" in i.flags:
        return t.put_real(i.to, results[0])
    low, high = (_half_of(value, i.flags) for value in results)
    return t.put(i.to, high << 16 | low)
