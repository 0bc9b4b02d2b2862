"""The machine code that nvcc makes of the kernels; needs nvcc, and no GPU."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest
from compiled_kernels import (
    ARCHS,
    BATCH,
    CUDA,
    DTYPES,
    EVERYWHERE,
    FUSED,
    MOST_MIXED_PACKS,
    MOST_PACKS,
    POST_NORM,
    ROOT,
    STRIDED,
    WHOLE,
    Kernel,
    compile_all,
    constant,
    find,
)
from compiled_kernels import named_backward_instances as named_backward
from compiled_kernels import named_instances as named
from compiled_kernels import named_streamed_instances as named_streamed

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("NORMKIT_TEST_CODEGEN") == "0", reason="NORMKIT_TEST_CODEGEN=0 says so"
    ),
    pytest.mark.skipif(find("nvcc") is None, reason="there is no nvcc in PATH to compile with"),
]

REGISTERS = 65536  # of a processor, on every generation


@pytest.fixture(scope="session")
def kernels() -> list[Kernel]:
    return compile_all()


def number(kernel: Kernel) -> int:
    return int(kernel.arch.removeprefix("sm_"))


def has_clusters(kernel: Kernel) -> bool:
    return number(kernel) >= 90


def may_have_peers(kernel: Kernel) -> bool:
    """Whether it is one of those that a cluster may run."""
    most = {"Uniform": MOST_PACKS, "Mixed": MOST_MIXED_PACKS}.get(kernel.instance.access, 1 << 30)
    forward = not kernel.instance.backward
    return forward and has_clusters(kernel) and kernel.instance.packs > most // 2


def wrong(kernels: list[Kernel], is_right: Callable[[Kernel], bool]) -> list[str]:
    return [str(k) for k in kernels if not is_right(k)]


def uniform(kernels: list[Kernel]) -> list[Kernel]:
    found = [k for k in kernels if k.instance.access == "Uniform" and not k.instance.backward]
    assert found
    return found


def uniform_backward(kernels: list[Kernel]) -> list[Kernel]:
    found = [k for k in kernels if k.instance.access == "Uniform" and k.instance.backward]
    assert found
    return found


# A float32 a row: rstd, and mean where there is one.
def row_values(kernel: Kernel) -> int:
    return kernel.instance.rows * (1 if kernel.instance.statistic == "rms" else 2)


def test_flags_are_those_of_the_build() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    of_cuda = re.findall(r"\$<COMPILE_LANGUAGE:CUDA>:([^>]+)>", text)
    # The second is about the size of the file: machine code is the same with it.
    assert of_cuda == ["-fmad=false", "--compress-mode=size"]
    assert "set(CMAKE_CUDA_STANDARD 17)" in (ROOT / "cmake" / "Cuda.cmake").read_text()


# Compiles everything, unless another test has.
def test_every_instance_is_there_once(kernels: list[Kernel]) -> None:
    assert len(named()) == 4 * (MOST_PACKS + 1 + MOST_MIXED_PACKS) + 2
    expected = {dtype: named() for dtype in DTYPES} | {"streamed": named_streamed()}
    for source in (*(f"backward_{of}" for of in (*DTYPES, "any")), "launch_backward"):
        expected[source] = named_backward(source)
    everywhere = {source.removesuffix(".cu").removeprefix("instances_") for source in EVERYWHERE}
    for arch in ARCHS:
        for source in expected.keys() if arch == WHOLE else everywhere:
            found = [k.instance for k in kernels if (k.arch, k.dtype) == (arch, source)]
            assert len(found) == len(set(found)), (arch, source)
            assert set(found) == expected[source], (arch, source)
    assert len(named_streamed()) == 12


def test_every_source_of_the_build_is_compiled() -> None:
    built = set(re.findall(r"cuda/(\w+\.cu)\b", (ROOT / "CMakeLists.txt").read_text()))
    assert built == {path.name for path in CUDA.glob("*.cu")}
    assert {f"instances_{dtype}.cu" for dtype in DTYPES} < built


def test_nothing_is_spilled_or_kept_in_local_memory(kernels: list[Kernel]) -> None:
    assert wrong(kernels, lambda k: k.stack == k.spills == 0 and not k.local_in_ptx) == []


# Blocks are of 512 threads at most (256 where fewer packs are kept), and two blocks of 256 are to
# fit: 128 registers a thread.  Tighter where a thread has less in flight: then it takes warps, of
# which 24 fit at 80 registers and 20 at 96.
def budget(kernel: Kernel) -> int:
    i = kernel.instance
    if i.backward:
        return BACKWARD_BUDGETS.get((i.access, i.packs), MOST)
    # More tensors, or strides; of 65 to 128 registers the blocks are as many.
    if i.step in (FUSED, POST_NORM, BATCH, STRIDED):
        return STREAMED_BUDGET + 48
    if i.access == "streamed":
        return STREAMED_BUDGET + 8 * i.adds
    if i.rows == 4:
        return 96
    if (i.access, i.packs) == ("Uniform", 1):
        return 64
    return 80 if i.access == "Uniform" and i.packs <= 4 and not i.adds else MOST


MOST = REGISTERS // constant("kMostLanes")
STREAMED_BUDGET = REGISTERS // (2 * constant("kMostLanes"))  # one block loads while another adds
# Of the backward pass, blocks of kThreads for short rows, of which so many are to fit.
SHORT_BACKWARD = REGISTERS // (constant("kBackwardBlocks") * constant("kThreads"))
BACKWARD_BUDGETS = {
    ("Uniform", 1): SHORT_BACKWARD,
    ("streamed", 0): STREAMED_BUDGET,
    ("columns", 0): REGISTERS // (constant("kColumnBlocks") * constant("kThreads")),
    ("fold", 0): 32,
}


def test_registers_leave_room_for_warps(kernels: list[Kernel]) -> None:
    over = [f"{k}: {k.registers} > {budget(k)}" for k in kernels if k.registers > budget(k)]
    assert over == []


def test_uniform_kernels_reach_memory_16_bytes_at_a_time(kernels: list[Kernel]) -> None:
    for k in uniform(kernels):
        i = k.instance
        # x and weight, each pack once; with a residual also that, and the sum is written.
        for name, tensors in (("ld", 3 if i.adds else 2), ("st", 2 if i.adds else 1)):
            ops = {op: n for op, n in k.ptx.items() if op.startswith(f"{name}.global")}
            # What a shuffle has brought is of bits.
            narrow = ops.pop(f"{name}.global.f32", 0) + ops.pop(f"{name}.global.u32", 0)
            assert narrow == (row_values(k) if name == "st" else 0), f"{k}: {narrow}"
            assert set(ops) == {f"{name}.global.v4.u32"}, f"{k}: {ops}"
            assert sum(ops.values()) >= i.packs * tensors, f"{k}: {ops}"


def test_uniform_backward_kernels_reach_memory_16_bytes_at_a_time(kernels: list[Kernel]) -> None:
    for k in uniform_backward(kernels):
        ops = {op: n for op, n in k.ptx.items() if re.match(r"(ld|st)\.global", op)}
        # rstd and mean of a row, and of the next one where that is loaded ahead.
        values = row_values(k) * (2 if k.instance.packs <= 2 else 1)
        assert ops.pop("ld.global.f32", 0) == values, str(k)
        assert all(".v4." in op for op in ops), f"{k}: {ops}"


def test_generic_addresses_are_for_peers_only(kernels: list[Kernel]) -> None:
    def is_right(k: Kernel) -> bool:
        generic = {op for op in k.ptx if re.match(r"(ld|st)\.(volatile\.)?(v\d\.)?[a-z]\d+$", op)}
        return generic == ({"ld.f32"} if may_have_peers(k) else set())

    assert wrong(kernels, is_right) == []


def test_nothing_is_computed_in_double_precision(kernels: list[Kernel]) -> None:
    assert wrong(kernels, lambda k: not any(".f64" in op for op in k.ptx)) == []


def test_clusters_exchange_their_sums_where_there_are_clusters(kernels: list[Kernel]) -> None:
    peers = constant("kMaxCluster")
    for k in kernels:
        i = k.instance
        counts = [k.ptx[f"barrier.cluster.{op}"] for op in ("arrive.release", "wait.acquire")]
        if not may_have_peers(k):
            assert counts == [0, 0], str(k)
            assert not any(op.startswith("mapa") for op in k.ptx), str(k)
        else:
            sums = 1 if i.statistic == "rms" else 2
            quads = 1 if k.dtype == "float32" else 2
            assert counts == [sums + 1] * 2, str(k)  # and one before the blocks end
            assert k.ptx["mapa.u64"] == k.ptx["ld.f32"] == sums * quads * peers, str(k)


def test_kernels_wait_for_the_one_before_ahead_of_memory(kernels: list[Kernel]) -> None:
    def is_right(k: Kernel) -> bool:
        waits = [n for n, op in enumerate(k.ptx_order) if op == "griddepcontrol.wait"]
        memory = [n for n, op in enumerate(k.ptx_order) if re.match(r"(ld|st)\.global", op)]
        if not has_clusters(k):
            return not any(op.startswith("griddepcontrol") for op in k.ptx)
        once = k.ptx["griddepcontrol.launch_dependents"] == 1
        return once and len(waits) == 1 and waits[0] < min(memory)

    assert wrong(kernels, is_right) == []


@pytest.mark.skipif(
    find("cuobjdump") is None, reason="there is no cuobjdump in PATH, beside nvcc or in a wheel"
)
class TestMachineCode:
    """The same of the SASS, where it could differ from the PTX."""

    def test_every_kernel_is_there(self, kernels: list[Kernel]) -> None:
        assert wrong(kernels, lambda k: k.sass["EXIT"] > 0) == []

    def test_has_no_local_memory_and_no_double_precision(self, kernels: list[Kernel]) -> None:
        unwanted = re.compile(r"(LDL|STL|DADD|DFMA|DMUL|DSETP)\b")
        assert wrong(kernels, lambda k: not any(unwanted.match(op) for op in k.sass)) == []

    def test_uniform_kernels_reach_memory_16_bytes_at_a_time(self, kernels: list[Kernel]) -> None:
        for k in uniform(kernels):
            i = k.instance
            for name, least in (("LDG", i.packs * (3 if i.adds else 2)), ("STG", i.packs)):
                ops = {op: n for op, n in k.sass.items() if op.startswith(name)}
                narrow = sum(n for op, n in ops.items() if ".128" not in op)
                assert narrow == (row_values(k) if name == "STG" else 0), f"{k}: {ops}"
                assert sum(ops.values()) - narrow >= least, f"{k}: {ops}"

    def test_clusters_meet_at_their_barriers(self, kernels: list[Kernel]) -> None:
        def is_right(k: Kernel) -> bool:
            arrives, waits = (
                any(op.startswith(f"UCGABAR_{o}") for op in k.sass) for o in ("A", "W")
            )
            return arrives == waits == may_have_peers(k)

        assert wrong(kernels, is_right) == []
