"""What only the CPU kernels have: instruction sets, threads, caches, a place among torch's ops."""

from __future__ import annotations

import inspect
import math
import multiprocessing
import re
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import normkit
from conformance.support import assert_same_bits
from normkit import _C
from normkit._spec import NATIVE
from normkit.testing import assert_accurate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def best_instruction_set():
    """Puts back what a test has chosen."""
    best = _C.cpu_instruction_set()
    yield best
    _C.use_cpu_instruction_set(best)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 1.5 + 0.5).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [31, 64, 96, 1025, 2176, 70001])
def test_options_give_the_same_bits_on_every_instruction_set(n, dtype, best_instruction_set):
    x, residual = _randn(5, n, dtype=dtype, seed=n), _randn(5, n, dtype=torch.bfloat16, seed=n + 1)
    weight, bias = _randn(n, dtype=torch.float16, seed=2), _randn(n, dtype=dtype, seed=3)

    def results():
        with normkit.use_backend("cpu"):
            for rounded in (False, True):
                yield normkit.rms_norm(x, weight, round_before_weight=rounded)
                yield normkit.layer_norm(x, bias, bias, round_before_weight=rounded, clamp_inf=True)
                yield from normkit.add_layer_norm(x, residual, weight, round_sum=rounded)
                yield from normkit.add_rms_norm(x, x, bias, bias, out_dtype=torch.bfloat16)

    by_set = {}
    for name in _C.cpu_instruction_sets():
        _C.use_cpu_instruction_set(name)
        by_set[name] = list(results())
    expected = by_set[best_instruction_set]
    for name, got in by_set.items():
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n"), [(5, 31), (70, 96), (9, 1025), (2, 70001)])
def test_gradients_have_the_same_bits_on_every_instruction_set(
    dtype, rows, n, best_instruction_set
):
    x, residual, grad_y = (_randn(rows, n, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    affines = [_randn(n, dtype=kind, seed=4) for kind in (dtype, torch.float16)]

    def results():
        for affine in affines:
            for norm in (normkit.add_rms_norm, normkit.add_layer_norm):
                leaves = [t.clone().requires_grad_() for t in (x, residual, affine, affine)]
                outputs = norm(*leaves)
                yield from torch.autograd.grad(outputs, leaves, (grad_y, residual))

    by_set = {}
    for name in _C.cpu_instruction_sets():
        _C.use_cpu_instruction_set(name)
        by_set[name] = list(results())
    expected = by_set[best_instruction_set]
    for name, got in by_set.items():
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the system does not tell elsewhere")
def test_instruction_sets_are_those_that_the_system_tells_of():
    told = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    if told is None:  # no x86
        assert _C.cpu_instruction_sets() == ["neon"]
        return
    flags = set(told[1].split())
    needed = {"avx2": {"avx2", "fma", "f16c"}}
    needed["avx512"] = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    needed["avx512bf16"] = {*needed["avx512"], "avx512_bf16"}
    usable = [name for name, of_set in reversed(needed.items()) if of_set <= flags]
    assert _C.cpu_instruction_sets() == usable


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="expected one of"):
        _C.use_cpu_instruction_set("mmx")


def test_subnormal_results_are_rounded_not_flushed(best_instruction_set):
    # The bfloat16 conversion of AVX512_BF16 takes subnormals for zero.
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    weight = torch.full((64,), 2.0**-130, dtype=torch.float32)
    for name in _C.cpu_instruction_sets():
        _C.use_cpu_instruction_set(name)
        y = normkit.rms_norm(x, weight, eps=0.0)
        assert torch.equal(y.float(), weight.expand(1, 64)), name


@pytest.mark.parametrize("n", [1_000_003, 1 << 20])
def test_row_of_a_million_keeps_the_bound(n):
    x = torch.stack([_randn(n, dtype=torch.float32, seed=n), torch.full((n,), 0.7)])
    weight = _randn(n, dtype=torch.float32, seed=1)
    with normkit.use_backend("cpu"):
        assert_accurate(normkit.rms_norm(x, weight), x, weight, kind="rms")
        assert_accurate(normkit.layer_norm(x, weight), x, weight, eps=1e-5, kind="layer")


@pytest.mark.parametrize("dtype", DTYPES)
def test_stores_around_the_caches_give_the_same_bits(dtype):
    n, rows = 4096, 1024
    weight = _randn(n, dtype=dtype, seed=1)

    def plan(x: Tensor, out: Tensor) -> str:
        return normkit.explain("rms_norm", x, weight, out=out).plan

    def pair(rows: int) -> tuple[Tensor, Tensor]:
        """Two outputs, one on a line and one off it; untouched memory costs nothing."""
        storage = torch.empty(rows * n + 1, dtype=dtype)
        return storage[:-1].view(rows, n), storage[1:].view(rows, n)

    while "around the caches" not in plan(torch.empty(rows, n, dtype=dtype), pair(rows)[0]):
        rows *= 2
        assert rows <= 1 << 18, "no cache is that large"
    x, (aligned, off_by_one) = _randn(rows, n, dtype=dtype, seed=0), pair(rows)
    assert "around the caches" in plan(x, aligned)
    assert "around the caches" not in plan(x, off_by_one)
    expected = normkit.rms_norm(x, weight, out=aligned).clone()
    assert torch.equal(normkit.rms_norm(x, weight, out=off_by_one), expected)
    assert torch.equal(normkit.rms_norm_(x, weight), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_end_within_a_line_are_stored_through_the_caches(dtype):
    """Stores around the caches need whole lines, and what lies behind such a row is not its own."""
    n, line_multiple, rows = 4100, 4128, 1024
    while "around the caches" not in _plan_of(rows, line_multiple, dtype):
        rows *= 2
    x = _randn(4, n, dtype=dtype, seed=0).repeat(rows // 4, 1)
    out = torch.full((rows, line_multiple), 7.0, dtype=dtype)
    assert "around the caches" not in normkit.explain("rms_norm", x, out=out[:, :n]).plan
    normkit.rms_norm(x, out=out[:, :n])
    assert torch.equal(out[:4, :n], normkit.rms_norm(x[:4]))
    assert torch.equal(out[-4:, :n], out[:4, :n])
    assert bool((out[:, n:] == 7.0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "n"), [(7, 2048), (34, 2176), (1103, 4096)])
def test_a_row_has_the_bits_that_it_has_alone(rows, n, threads, dtype, two_threads):
    """The sum of a row is taken beside the row in front of it, or beside the sum with a residual:
    from a cache and from memory, with more rows in a block and less, and not of the first row."""
    torch.set_num_threads(threads)
    distinct = _randn(5, n, dtype=dtype, seed=n)
    distinct[2, 7], distinct[3, n - 1], distinct[4] = math.nan, math.inf, 0.0
    residuals = _randn(5, n, dtype=dtype, seed=n + 1)
    weight, wide = _randn(n, dtype=dtype, seed=2), _randn(n, dtype=torch.float32, seed=3)
    turn = torch.arange(rows) % 5
    x, residual, out = distinct[turn], residuals[turn], torch.empty(rows, n, dtype=dtype)
    calls = (
        (normkit.rms_norm, (weight,), {}),
        (normkit.rms_norm, (weight,), {"round_before_weight": True}),
        (normkit.rms_norm, (wide,), {"weight_offset": 1.0}),
        (normkit.rms_norm, (wide, wide), {}),
        (normkit.layer_norm, (weight, weight), {}),
        (normkit.layer_norm, (wide,), {}),
    )
    with normkit.use_backend("cpu"):
        for norm, affine, options in calls:
            alone = torch.cat([norm(row[None], *affine, **options) for row in distinct])
            assert_same_bits(norm(x, *affine, out=out, **options), alone[turn])
            shared = distinct[1].expand(rows, n)
            assert_same_bits(norm(shared, *affine, **options), alone[1].expand(rows, n))
            in_place = getattr(normkit, f"{norm.__name__}_")
            assert_same_bits(in_place(x.clone(), *affine, **options), alone[turn])

            add = f"add_{norm.__name__}"
            made = getattr(normkit, add)(x, residual, *affine, **options)
            if 4 * x.nbytes >= 32 << 20:  # then the sum goes around the caches, in place or off a
                off = torch.empty(rows * n + 1, dtype=dtype)[1:].view(rows, n)  # line it does not
                around = "around the caches, of the sum too"
                assert around in normkit.explain(add, x, residual).plan
                assert around not in normkit.explain(add, x, residual, residual_out=off).plan
                y = getattr(normkit, add)(x, residual, *affine, residual_out=off, **options)[0]
                assert_same_bits(y, made[0])
                assert_same_bits(off, made[1])
            in_place = getattr(normkit, f"{add}_")(x.clone(), residual.clone(), *affine, **options)
            sums = made[1][:5]
            alone = torch.cat([norm(row[None], *affine, **options) for row in sums])
            for y, total in (made, in_place):
                assert_same_bits(y, alone[turn])
                assert_same_bits(total, sums[turn])


def _plan_of(rows: int, n: int, dtype: torch.dtype) -> str:
    x, out = torch.empty(rows, n, dtype=dtype), torch.empty(rows, n, dtype=dtype)
    return normkit.explain("rms_norm", x, out=out).plan


def test_torch_sets_the_number_of_threads(two_threads):
    x = torch.randn(64, 4096)
    assert "2 threads" in normkit.explain("rms_norm", x).plan
    torch.set_num_threads(1)
    assert "1 thread," in normkit.explain("rms_norm", x).plan


def test_small_calls_stay_on_their_thread(two_threads):
    assert "1 thread," in normkit.explain("rms_norm", torch.randn(4, 64)).plan


def _norm_in_a_child(x: Tensor, queue) -> None:
    queue.put(normkit.rms_norm(x)[-1, -1].item())  # nothing here may use torch's own threads


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_does_not_wait_for_threads_it_has_not(two_threads):
    x = torch.ones(64, 4096)
    normkit.rms_norm(x)  # the pool is up in the parent
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_norm_in_a_child, args=(x, queue), daemon=True)
    child.start()
    assert queue.get(timeout=20) == pytest.approx(1.0, rel=1e-5)
    child.join(20)
    assert child.exitcode == 0


def test_python_threads_at_once_get_their_own_results(two_threads):
    inputs = [_randn(64, 1000 + i, dtype=DTYPES[i % 3], seed=i) for i in range(8)]
    expected = [normkit.layer_norm(x) for x in inputs]
    wrong = []

    def work(i: int) -> None:
        for _ in range(30):
            if not torch.equal(normkit.layer_norm(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_autograd_learns_of_every_write():
    x, residual, out = torch.ones(2, 4), torch.ones(2, 4), torch.empty(2, 4)
    normkit.rms_norm(x, out=out)
    normkit.add_rms_norm_(x, residual)
    assert (x._version, residual._version, out._version) == (1, 1, 1)


def test_backward_refuses_what_was_overwritten_in_between():
    x, weight = torch.ones(2, 4), torch.ones(4, requires_grad=True)
    y = x * weight
    normkit.rms_norm_(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inference_mode_is_served_natively():
    with torch.inference_mode(), normkit.use_backend("cpu"):
        x = torch.randn(2, 8)
        expected = normkit.rms_norm(x)
        assert torch.equal(normkit.rms_norm_(x), expected)


def test_result_lies_in_memory_as_torch_s_own_norms_lay_it():
    x = torch.randn(3, 5, 8).transpose(0, 1)
    assert normkit.rms_norm(x).stride() == torch.nn.functional.rms_norm(x, (8,)).stride()


@pytest.mark.parametrize("entry", [_C.try_norm, _C.norm, _C.norm_saving, _C.plan])
def test_kernels_need_every_field_of_a_call(entry):
    for given in (2, len(NATIVE) - 1, len(NATIVE) + 1, len(_C.fields) - 1, len(_C.fields) + 1):
        with pytest.raises(TypeError, match=str(len(NATIVE))):
            entry(0, torch.ones(4), *[None] * (given - 2))
    for count in (len(NATIVE), len(_C.fields)):
        with pytest.raises(TypeError, match="str"):
            entry("rms", torch.ones(4), *[None] * (count - 2))
    assert list(inspect.signature(entry).parameters) == list(NATIVE)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime_is_loaded(two_threads):
    normkit.rms_norm(torch.ones(64, 4096))
    maps = Path("/proc/self/maps").read_text().splitlines()
    pools = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
    assert len(pools) == 1
