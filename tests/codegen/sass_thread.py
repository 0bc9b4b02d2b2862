"""Executes one thread of a kernel's machine code, and tells what it issues and in what order.

Integers, predicates and branches are exact, floats as good as control flow needs them.  The thread
stands for a warp whose lanes all do as it does: a shuffle answers with its own value, everything in
memory is 1, and so is what other threads have put into shared memory.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from sass import M32, M64, ZERO, Instruction, Operand, Program, Unknown, bits_of, float_of, signed
from semantics import SEMANTICS, check_known

SHARED_WINDOW = 0xFF  # the upper half of generic addresses into shared memory
INSTRUCTION_BYTES = 16


class Launch(NamedTuple):
    arguments: bytes
    grid: tuple[int, int, int] = (1, 1, 1)
    block: tuple[int, int, int] = (32, 1, 1)
    cluster: int = 1


class Event(NamedTuple):
    at: int  # instructions issued before it
    kind: str  # load, use, store, or what SYNCHRONISES calls it
    tensor: str = ""  # of what is loaded, used or stored
    bytes: int = 0
    offset: int = 0  # of the bytes, in the tensor
    value: int = 0  # the first word of what is stored
    load: int = -1  # of a use: when the load was issued


# Where a launch is in the bank of constants; by the first architecture that has it there.
class _Bank(NamedTuple):
    block: int
    grid: int
    zeros: tuple[int, ...]  # the stack, and the descriptor of global memory
    is_cluster: int = -1  # -1: there are no clusters
    cluster: int = -1  # blocks of one along x
    clusters: int = -1  # along x
    blocks_of_cluster: int = -1


_BANKS = {
    75: _Bank(0x0, 0xC, (0x28, 0x118, 0x11C)),
    90: _Bank(0x0, 0xC, (0x28, 0x208, 0x20C), 0x140, 0x144, 0x15C, 0x188),
    100: _Bank(0x360, 0x370, (0x358, 0x35C, 0x37C), 0x36C, 0x2A0, 0x2C0, 0x2CC),
}


def _constants(program: Program, launch: Launch) -> dict[int, int]:
    """The words of the bank that are known."""
    got, expected = len(launch.arguments), program.parameter_bytes
    if got != expected:
        raise ValueError(f"arguments of {program.symbol}: expected {expected} bytes, got {got}")
    bank = _BANKS[max(arch for arch in _BANKS if arch <= program.arch)]
    words = dict.fromkeys(bank.zeros, 0)
    words |= {bank.block + 4 * k: size for k, size in enumerate(launch.block)}
    words |= {bank.grid + 4 * k: size for k, size in enumerate(launch.grid)}
    words[bank.is_cluster] = int(launch.cluster > 1)
    words[bank.cluster] = words[bank.blocks_of_cluster] = launch.cluster
    words[bank.clusters] = launch.grid[0] // launch.cluster
    words.pop(-1, None)
    padded = launch.arguments + bytes(-got % 4)
    for k, (word,) in enumerate(struct.iter_unpack("<I", padded)):
        words[program.parameters + 4 * k] = word
    return words


@dataclass
class Thread:
    program: Program
    launch: Launch
    thread: int = 0
    block: int = 0
    tensors: dict[int, str] = field(default_factory=dict)  # address / 2^40: name
    limit: int = 200_000  # instructions
    traced: bool = False

    def __post_init__(self) -> None:
        self.executed: Counter[int] = Counter()  # by address
        self.events: list[Event] = []
        self.trace: list[tuple[Instruction, bool]] = []  # each, and whether its guard held
        self.constants = _constants(self.program, self.launch)
        self.registers = [0] * (ZERO + 4)
        self.predicates = [False] * 15 + [True]
        self.own: dict[tuple[str, int], int] = {}  # what it has put into shared and local memory
        self.loads: dict[int, Event] = {}  # by register, until it is used
        self.issued = 0
        rest, x = divmod(self.thread, self.launch.block[0])
        z, y = divmod(rest, self.launch.block[1])
        self.special = {"SR_TID.X": x, "SR_TID.Y": y, "SR_TID.Z": z, "SR_LANEID": self.thread % 32}
        self.special |= {"SR_CTAID.X": self.block, "SR_CTAID.Y": 0, "SR_CTAID.Z": 0, "SRZ": 0}
        self.special["SR_CgaCtaId"] = self.block % self.launch.cluster
        # The bank of constants is reached by the first where the cluster is in it; see _BANKS.
        self.special |= {"SR_CgaSize": 0, "SR_SWINHI": SHARED_WINDOW}

    def run(self) -> Thread:
        code, address = self.program.code, 0
        while address >= 0:
            i = code[address]
            if self.issued == self.limit:
                raise Unknown(f"{self.program.symbol}: {self.limit} instructions, and no end")
            if not self.executed[address]:
                check_known(i, self.program.symbol)
            on = i.guard is None or self.holds(i.guard)
            if self.traced:
                self.trace.append((i, on))
            for register in i.reads if self.loads else ():
                if register in self.loads:
                    self._used(self.loads[register])
            target = SEMANTICS[i.name](self, i) if on else None
            if i.name != "NOP":
                self.executed[address] += 1
                self.issued += 1
            address = address + INSTRUCTION_BYTES if target is None else target
        return self

    def _used(self, load: Event) -> None:
        self.events.append(load._replace(at=self.issued, kind="use", load=load.at))
        self.loads = {r: other for r, other in self.loads.items() if other is not load}

    def saw(self, kind: str) -> None:
        self.events.append(Event(self.issued, kind))

    def saw_access(self, kind: str, address: int, size: int, value: int = 0) -> Event:
        tensor, offset = self.tensors.get(address >> 40), address & ((1 << 40) - 1)
        if address >> 32 == SHARED_WINDOW:
            tensor = "shared"
        if tensor is None:
            raise Unknown(f"address {address:#x} is in no tensor")
        self.events.append(Event(self.issued, kind, tensor, size, offset, value))
        return self.events[-1]

    # What operands stand for.

    def holds(self, o: Operand) -> bool:
        return self.predicates[o.number] != o.negated

    def raw(self, o: Operand, words: int = 1) -> int:
        """The bits of an operand, without the sign or the complement it is taken with."""
        if o.kind == "register":
            if words == 1:
                return self.registers[o.number]
            return sum(self.registers[o.number + k] << 32 * k for k in range(words))
        if o.kind == "immediate":
            return o.number & ((1 << 32 * words) - 1)
        if o.kind == "constant":
            return sum((self.constant(o, 4 * k) & M32) << 32 * k for k in range(words))
        raise Unknown(f"operand {o.text}")

    def integer(self, o: Operand, words: int = 1) -> int:
        value, mask = self.raw(o, words), M32 if words == 1 else M64
        if o.absolute:
            value = abs(signed(value, 32 * words))
        if o.negated:
            return -value & mask
        return ~value & mask if o.inverted else value

    def addend(self, o: Operand, words: int = 1) -> int:
        """As it enters a sum that has a carry: -0 is ~0 + 1, which carries."""
        if o.negated:
            return (~self.raw(o, words) & (M32 if words == 1 else M64)) + 1
        return self.integer(o, words)

    def real(self, o: Operand) -> float:
        value = float_of(self.raw(o))
        value = abs(value) if o.absolute else value
        return -value if o.negated else value

    def constant(self, o: Operand, beyond: int = 0) -> int:
        at = (o.number + sum(self.registers[r] for r, _ in o.parts) + beyond) & M32
        if at & ~3 not in self.constants:
            raise Unknown(f"{o.text}: nothing is known of constant {at:#x} ({self.program.arch})")
        return self.constants[at & ~3] >> 8 * (at & 3)

    def address(self, o: Operand, is_wide: bool = True) -> int:
        address = o.number
        for register, suffix in o.parts:
            address += self.registers[register]
            if is_wide and "U32" not in suffix:
                address += self.registers[register + 1] << 32
        return address & (M64 if is_wide else M32)

    def put(self, o: Operand | None, value: int, words: int = 1) -> None:
        if o is None or o.number >= ZERO:
            return
        for k in range(words):
            self.registers[o.number + k] = value >> 32 * k & M32
            self.loads.pop(o.number + k, None)

    def put_real(self, o: Operand | None, value: float) -> None:
        self.put(o, bits_of(value))

    def decide(self, o: Operand, value: bool) -> None:
        if o.number != 15:
            self.predicates[o.number] = value
