"""What kernels issue for a call, counted by executing their machine code."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator

import pytest
from compiled_kernels import ARCHS, DTYPES, WHOLE, Kernel, compile_all, find
from issue_slots import BF16, CASES, FP32, MANY, Case, Count, counts, late_loads
from launches import Call, Planned, planned
from sass import Program
from sass_thread import Thread

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("NORMKIT_TEST_CODEGEN") == "0", reason="NORMKIT_TEST_CODEGEN=0 says so"
    ),
    pytest.mark.skipif(
        find("nvcc") is None or find("cuobjdump") is None, reason="there is no nvcc, or cuobjdump"
    ),
]


@pytest.fixture(scope="session")
def kernels() -> list[Kernel]:
    return compile_all()


def number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def programs(kernels: list[Kernel], arch: str) -> dict[str, Program]:
    found = [k.program for k in kernels if k.arch == arch and k.program]
    return {program.symbol: program for program in found}


@pytest.fixture(scope="module")
def counted(kernels: list[Kernel]) -> list[Count]:
    return counts(CASES, number(WHOLE), programs(kernels, WHOLE))


def test_kernels_issue_no_more_than_their_limit(counted: list[Count]) -> None:
    over = [
        f"{c.case.name}: {c.issued:.1f} > {c.case.most}" for c in counted if c.issued > c.case.most
    ]
    assert over == []


# Of what all architectures have machine code for.
ELSEWHERE = {
    "sm_75": {"rms 8192": 180, "rms 4096": 200, "heads 128": 226},
    "sm_80": {"rms 8192": 85, "rms 4096": 109, "heads 128": 141},
    "sm_100": {"rms 8192": 88, "rms 4096": 112, "heads 128": 130},
    "sm_120": {"rms 8192": 85, "rms 4096": 109, "heads 128": 129},
}


def test_no_architecture_issues_more_than_its_limit(kernels: list[Kernel]) -> None:
    assert {WHOLE, *ELSEWHERE} == set(ARCHS)
    over = []
    for arch, limits in ELSEWHERE.items():
        cases = [case for case in CASES if case.name in limits]
        for c in counts(cases, number(arch), programs(kernels, arch)):
            if c.issued > limits[c.case.name]:
                over.append(f"{arch} {c.case.name}: {c.issued:.1f}")
    assert over == []


def test_rows_in_registers_are_read_once_and_written_once(counted: list[Count]) -> None:
    def bytes_of(thread: Thread, kind: str, tensor: str) -> dict[int, int]:
        events = [e for e in thread.events if (e.kind, e.tensor) == (kind, tensor)]
        found = {e.offset: e.bytes for e in events}
        assert len(found) == len(events), f"{kind} of {tensor} twice"
        return found

    for c in counted:
        if c.case.backward or not in_registers(c.planned):
            continue
        sizes = {dtype: 4 if dtype == FP32 else 2 for dtype in DTYPES}
        launch = c.planned.launches[0].launch
        rows = c.case.rows * launch.cluster / launch.grid[0]
        for thread in c.threads:
            read = sum(bytes_of(thread, "load", "x").values()) / sizes[c.case.x]
            out = c.case.out or c.case.x
            assert read == sum(bytes_of(thread, "store", "out").values()) / sizes[out]
            if c.case.residual:
                for kind, tensor in (("load", "residual"), ("store", "residual_out")):
                    moved = sum(bytes_of(thread, kind, tensor).values())
                    assert read == moved / sizes[c.case.residual], (c.case.name, tensor)
            # All threads have as many columns as each other where those are a power of two.
            if c.case.n & (c.case.n - 1) == 0 and c.case.rows == MANY:
                assert read * launch.block[0] * launch.cluster == c.case.n * rows, c.case.name


def test_usual_hidden_sizes_leave_at_most_a_tenth_of_the_threads_idle() -> None:
    sizes = (2560, 2880, 3072, 5120, 6144, 7168, 12288, 18432)
    plans = planned(number(WHOLE), [Case("", 0, n).call for n in sizes])
    for n, plan in zip(sizes, plans, strict=True):
        match = re.search(r"(\d+) lanes with up to (\d) packs?", plan.plan)
        assert match, plan.plan
        slots = int(match[1]) * int(match[2]) * plan.launches[0].launch.cluster
        assert 0.9 <= n / 8 / slots <= 1, plan.plan


# The order of loads, in every kernel that keeps its rows in registers.


def in_registers(plan: Planned) -> bool:
    assert plan.plan.startswith(("row in registers", "row read again")), plan.plan
    return plan.plan.startswith("row in registers")


def calls() -> Iterator[Call]:
    """So many that each kernel is reached by one of them."""
    lengths = (32768, 16384, 8192, 7168, 6144, 5120, 4096, 2048, 1536, 1024, 512, 256, 64)
    for x, layer, adds, n, other_weight, rows in itertools.product(
        DTYPES, (0, 1), (False, True), lengths, (False, True), (1, MANY)
    ):
        weight = (BF16 if x == FP32 else FP32) if other_weight else x
        call: dict[str, int | str] = {"n": n, "rows": rows, "layer": layer}
        call |= {"x": x, "weight": weight, "out": x}
        if adds:
            call |= {"residual": x, "residual_out": x, "round_sum": 1}
        yield call


def kind(call: Call, plan: Planned) -> str:
    """A kernel in words, without the dtype of x."""
    match = re.search(r"(\d+) lanes with up to (\d) packs?, (\d+) to a block of (\d+)", plan.plan)
    assert match, plan.plan
    lanes, packs, rows, threads = map(int, match.groups())
    words = ["add" if "residual" in call else "", "layer" if call["layer"] else "rms"]
    words += [f"{packs}x{rows * lanes // threads}", "cluster" if "clusters" in plan.plan else ""]
    words += ["mixed" if "several dtypes" in plan.plan else ""]
    return " ".join(filter(None, words))


# Loads of x, residual and weight that may come after the first use of another, by kind of kernel;
# none where it is not named.  Beside eight packs of x and of the residual a thread has no registers
# for those of the weight: they are asked for when the sum is made, before the reduction.  With six
# or seven, ptxas puts some of them there on its own, and the one of four rows too.
LATE = {
    **{
        f"add {statistic} {packs}x1": packs for statistic in ("rms", "layer") for packs in (6, 7, 8)
    },
    **{f"add {statistic} 8x1 cluster": 8 for statistic in ("rms", "layer")},
    **{f"add {statistic} 1x4": 1 for statistic in ("rms", "layer")},
}


def test_loads_are_in_flight_before_the_first_use(kernels: list[Kernel]) -> None:
    compiled = programs(kernels, WHOLE)
    asked_for = list(calls())
    most: dict[str, int] = {}
    reached, seen = set(), set()
    for call, plan in zip(asked_for, planned(number(WHOLE), asked_for), strict=True):
        kernel = plan.launches[0]
        reached.add(kernel.symbol)
        if not in_registers(plan) or (kernel.symbol, call["weight"]) in seen:
            continue
        seen.add((kernel.symbol, call["weight"]))
        block = kernel.launch.grid[0] // 2 if call["rows"] == MANY else 0
        thread = Thread(compiled[kernel.symbol], kernel.launch, 0, block, plan.tensors).run()
        assert sum(e.kind == "load" for e in thread.events) >= 2, kind(call, plan)
        most[kind(call, plan)] = max(most.get(kind(call, plan), 0), late_loads(thread))
    of_dtypes = [k for k in kernels if k.arch == WHOLE and k.dtype in DTYPES]
    assert reached == {k.program.symbol for k in of_dtypes if k.program}
    over = {k: n for k, n in most.items() if n > LATE.get(k, 0)}
    assert not over, str(over)
