"""How many instructions kernels issue for a pack of 16 bytes of x, and in what order.

    python tests/codegen/issue_slots.py                            all cases, for sm_90
    python tests/codegen/issue_slots.py --arch 100 --case heads    those whose name has the word
    python tests/codegen/issue_slots.py --case "rms 8192" --order  when loads are issued and used
    python tests/codegen/issue_slots.py --case "rms 8192" --trace  every instruction it issues

Only the kernels that are asked for are compiled, and kept in build/codegen for the next time.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from compiled_kernels import CUDA, compile_text
from launches import KernelLaunch, Planned, planned
from sass import Program
from sass_thread import Thread

WARP = 32
MANY = 1 << 17  # rows that fill every device
BF16, FP16, FP32 = "bfloat16", "float16", "float32"


class Case(NamedTuple):
    name: str
    most: float  # instructions that a warp may issue for 32 packs of x; for one row, in all
    n: int
    x: str = BF16
    weight: str = ""  # x's dtype where none is given, as for out
    out: str = ""
    residual: str = ""
    bias: bool = False
    layer: bool = False
    rows: int = MANY
    more: tuple[tuple[str, int | str], ...] = ()  # of the call, in its words
    backward: bool = False

    @property
    def call(self) -> dict[str, int | str]:
        call: dict[str, int | str] = {"n": self.n, "rows": self.rows, "x": self.x}
        call |= {"layer": int(self.layer), "weight": self.weight or self.x, **dict(self.more)}
        if self.bias:
            call["bias"] = self.weight or self.x
        if self.backward:
            return {**call, "backward": 1, "grad_y": self.x, "grad_x": self.x}
        if self.residual:
            call |= {"residual": self.residual, "residual_out": self.residual}
        return {"round_sum": 1, **call, "out": self.out or self.x}


ROTATED = (("heads_of_qkv", 32), ("width", 128), ("cos", FP32), ("sin", FP32))
ALL_OPTIONS = (("round_before_weight", 1), ("round_rstd", 1), ("clamp_inf", 1))
CASES = (
    Case("rms 8192", 90, 8192),
    Case("rms 16384", 91, 16384),
    Case("rms 4096", 113, 4096),
    Case("rms 1024", 109, 1024),
    Case("rms 512", 149, 512),
    Case("heads 128", 138, 128),
    Case("heads 64", 138, 64),
    Case(
        "heads 128, 3 dimensions, 32 weights", 184, 128, more=(("heads_of_qkv", 32), ("heads", 32))
    ),
    Case("add_rms 8192", 127, 8192, residual=BF16),
    Case("add_rms 4096", 151, 4096, residual=BF16),
    Case("layer 8192", 144, 8192, bias=True, layer=True),
    Case("layer 1024", 174, 1024, bias=True, layer=True),
    # Lanes are a power of two: threads without columns count, too.
    Case("rms 2560", 110, 2560),
    Case("rms 2880", 140, 2880),
    Case("rms 3072", 131, 3072),
    Case("rms 5120", 112, 5120),
    Case("rms 6144", 101, 6144),
    Case("rms 7168", 95, 7168),
    Case("rms 12288", 103, 12288),
    Case("rms 18432", 156, 18432),
    Case("rms 32768", 108, 32768),
    Case("rms 262144", 247, 262144, rows=1 << 12),
    Case("rms float16 8192", 90, 8192, FP16),
    Case("rms float32 8192", 47, 8192, FP32),
    # Of several dtypes, or where rows do not begin at 16 bytes.
    Case("rms 8192, float32 weight", 121, 8192, weight=FP32),
    Case("rms 4096, float32 weight", 118, 4096, weight=FP32),
    Case("heads 128, float32 weight", 127, 128, weight=FP32),
    Case("rms 8192, float32 out", 127, 8192, out=FP32),
    Case("add_rms float32 8192, bfloat16 residual", 150, 8192, FP32, residual=BF16),
    Case("rms 4097", 782, 4097),
    Case("heads 128, rotated", 681, 128, more=ROTATED),
    Case("heads 128, rotated pairs", 696, 128, more=(*ROTATED, ("interleaved", 1))),
    # What few calls ask for.
    Case("rms 8192, bias and options", 130, 8192, bias=True, more=ALL_OPTIONS),
    Case("rms 4096, bias and options", 156, 4096, bias=True, more=ALL_OPTIONS),
    # One row: instructions of the longest warp.
    Case("rms 4096, one row", 346, 4096, rows=1),
    Case("rms 8192, one row", 485, 8192, rows=1),
    Case("rms 4096, one row, float32 weight", 355, 4096, weight=FP32, rows=1),
    Case("backward rms 4096", 369, 4096, rows=1 << 13, backward=True),
)


class Count(NamedTuple):
    case: Case
    planned: Planned
    program: Program
    threads: list[Thread]  # some of each warp, in their order
    per_pack: float  # by all warps of a block, for 32 packs of x; those without columns count, too
    longest: int  # of a warp

    @property
    def issued(self) -> float:
        """What the case limits: where there is one row, time is latency."""
        return self.longest if self.case.rows == 1 else self.per_pack

    @property
    def late(self) -> int:
        return late_loads(self.threads[0])


def late_loads(thread: Thread) -> int:
    """Loads of x, residual and weight that are issued after the first use of another."""
    events = [e for e in thread.events if e.tensor in ("x", "residual", "weight")]
    first_use = next((k for k, e in enumerate(events) if e.kind == "use"), len(events))
    return sum(e.kind == "load" for e in events[first_use:])


def count(case: Case, plan: Planned, kernel: KernelLaunch, program: Program) -> Count:
    """Executes a block amid the grid, or a cluster of them.  A warp issues what any lane does."""
    launch = kernel.launch
    first_block = launch.grid[0] // launch.cluster // 2 * launch.cluster
    pack = 4 if case.x == FP32 else 8
    # Lanes differ where a row ends within a warp's packs, and more so where it ends within a pack.
    lanes = range(WARP) if case.n % pack else (0, WARP - 1) if case.n % (WARP * pack) else (0,)
    threads: list[Thread] = []
    of_warps = []
    for block in range(first_block, first_block + launch.cluster):
        for warp in range(0, launch.block[0], WARP):
            issued: Counter[int] = Counter()
            for number in (warp + lane for lane in lanes if warp + lane < launch.block[0]):
                thread = Thread(program, launch, number, block, plan.tensors, traced=not threads)
                threads.append(thread.run())
                issued |= threads[-1].executed
            of_warps.append(issued.total())
    rows = case.rows / (launch.grid[0] / launch.cluster)
    packs = rows * -(-case.n // pack) / WARP
    return Count(case, plan, program, threads, sum(of_warps) / packs, max(of_warps))


def compile_kernels(kernels: Iterable[KernelLaunch], arch: int) -> dict[str, Program]:
    """Those alone, by symbol, by two compilers side by side."""
    names = {kernel.symbol: kernel.declaration for kernel in kernels}
    headers = sorted(path for path in CUDA.glob("*.cuh") if path.name != "hip.cuh")
    includes = "".join(f'#include "{path}"\n' for path in headers)

    def compiled(symbols: list[str]) -> dict[str, Program]:
        # What the sources of the build instantiate, from the same headers.
        # What is no template is there already.
        templates = [names[symbol] for symbol in symbols if "<" in names[symbol]]
        asked_for = "".join(f"template __global__ {name};\n" for name in templates)
        return compile_text(includes + asked_for, arch) if symbols else {}

    with ThreadPoolExecutor(2) as pool:
        halves = pool.map(compiled, [sorted(names)[k::2] for k in range(2)])
        found = {symbol: program for half in halves for symbol, program in half.items()}
    missing = names.keys() - found.keys()
    assert not missing, f"nvcc gives other names to {missing}"
    return found


def counts(
    cases: Sequence[Case], arch: int, compiled: dict[str, Program] | None = None
) -> list[Count]:
    """Of each case its first launch; compiles the kernels, if they are not given."""
    plans = planned(arch, [case.call for case in cases])
    kernels = [plan.launches[0] for plan in plans]
    of_symbol = compile_kernels(kernels, arch) if compiled is None else compiled
    return [
        count(case, plan, kernel, of_symbol[kernel.symbol])
        for case, plan, kernel in zip(cases, plans, kernels, strict=True)
    ]


# ---------------------------------------------------------------------------- printing


def order(thread: Thread) -> str:
    """Loads of 16 bytes and their first uses, with what else orders memory."""
    words = []
    for event in thread.events:
        if event.kind in ("load", "store") and event.bytes < 16:
            continue
        if event.kind == "use":
            if event.bytes == 16:
                words.append(f"{event.at}:use of {event.tensor}@{event.load}")
        else:
            words.append(f"{event.at}:{event.kind} {event.tensor}".strip())
    return "\n    ".join(words)


def spilled(program: Program) -> int:
    return sum(n for opcode, n in program.opcodes.items() if opcode.startswith(("LDL", "STL")))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument(
        "--case", default="", help="the one of this name, or those that have it in theirs"
    )
    parser.add_argument("--order", action="store_true", help="loads, first uses, stores, barriers")
    parser.add_argument(
        "--trace", action="store_true", help="every instruction of the first thread"
    )
    parser.add_argument("--opcodes", action="store_true", help="how often each is issued")
    chosen = parser.parse_args()
    cases = [case for case in CASES if chosen.case == case.name]
    cases = cases or [case for case in CASES if chosen.case in case.name]
    if not cases:
        parser.error(f"--case: expected part of one of {[case.name for case in CASES]}")
    print(
        f"sm_{chosen.arch}: instructions for a warp's 32 packs of x; of the longest warp;"
        " registers; spills; loads after a first use"
    )
    for c in counts(cases, chosen.arch):
        print(
            f"{c.case.name:40} {c.per_pack:7.1f} {c.longest:6} {c.program.registers:4}"
            f" {spilled(c.program):3} {c.late:3}  {c.planned.plan}"
        )
        thread = c.threads[0]
        if chosen.order:
            print(f"    {order(thread)}")
        if chosen.opcodes:
            issued = Counter(i.name for i, _ in thread.trace)
            print("   ", ", ".join(f"{name} {n}" for name, n in issued.most_common()))
        if chosen.trace:
            for instruction, on in thread.trace:
                print(f"  {instruction.address:05x} {'' if on else '(off) '}{instruction.text}")


if __name__ == "__main__":
    main()
