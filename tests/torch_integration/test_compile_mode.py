"""compile_mode: a compiled norm is our operator or plain torch, with the same rounding points."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._inductor.utils import run_and_get_code

import normkit
from conformance.gradients import case_of, make_and_check
from conformance.support import ADD_RMS, HEAD_LAYER, Op, inputs_for
from normkit import HeadNorm, LayerNorm, RMSNorm, compile_mode, reference
from normkit._serving import inline
from normkit.testing import assert_accurate, make_inputs
from torch_integration.support import (
    FUNCTIONS,
    MODULES,
    Recorder,
    assert_equal_bits,
    called,
    clones,
    listed,
    loss_of,
    randomised,
    results_and_gradients,
    tensors,
)

# Torch's own modules warn about each other when inductor is imported, and its deep copies warn.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:.*LeafSpec:FutureWarning"
)

ROUNDING = {"round_before_weight": True, "round_rstd": True}
OPTIONS: list[dict[str, Any]] = [
    {"weight_offset": 1.0, "out_dtype": torch.float32, "eps": None},
    {"round_before_weight": True, "round_sum": False},
    {"round_rstd": True},
    {"clamp_inf": True, "eps": 0.3},
    {"memory_efficient": True},
]


@pytest.fixture(scope="module", autouse=True)
def _without_what_was_compiled_before(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with compile_mode("inline"):
        yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: Any = "aot_eager") -> Callable[..., Any]:
    # A symbol for every size would take most of the time of these tests.
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def operators_of(function: Callable[..., Any], given: list[Any]) -> list[str]:
    """The operators of normkit in the graph that a call runs now, compiled if it has to be."""
    recorder = Recorder()
    compiled(function, recorder.backend)(*given)
    return called(recorder.graphs[-1], "normkit")


# ---------------------------------------------------------------- the formula


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inlined_calls_are_plain_torch_with_the_bits_of_the_reference_path(name: str) -> None:
    function, recorder = getattr(normkit, name), Recorder()
    given = tensors(name, dtype=torch.bfloat16, residual_dtype=torch.float32)
    ours, mine = results_and_gradients(compiled(function, recorder.backend), given)
    assert len(recorder.graphs) == 2
    assert not any(called(graph, "normkit") for graph in recorder.graphs)
    with normkit.use_backend("reference"):
        eager, theirs = results_and_gradients(function, given)
    assert_equal_bits(ours, eager)
    assert_equal_bits(mine, theirs)
    assert all(g is not None and g.count_nonzero() for g in mine)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_inlined_calls_take_the_options(options: dict[str, Any]) -> None:
    def call(*given: Tensor) -> Any:
        return normkit.add_layer_norm(*given, **options)

    dtype = torch.float64 if "round_rstd" in options else torch.float16
    given = tensors("add_layer_norm", dtype=dtype, residual_dtype=torch.float16)
    if "clamp_inf" in options:
        given[0][0, 0, 0] = math.inf
    ours, mine = results_and_gradients(compiled(call), given)
    with normkit.use_backend("reference"):
        eager, theirs = results_and_gradients(call, given)
    assert_equal_bits(ours, eager)
    assert_equal_bits(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_by_bits_is_what_a_cast_does(dtype: torch.dtype) -> None:
    exact = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    # Each number of the dtype, the middle to the next one, and what float32 has around both.
    middle = (exact.view(torch.int32) + (1 << (15 if dtype == torch.bfloat16 else 12))).view(
        torch.float32
    )
    random = torch.randint(-(1 << 31), (1 << 31) - 1, (1 << 20,), dtype=torch.int32)
    points = torch.cat([exact, middle, random.view(torch.float32)])
    finite = points[points.isfinite()]
    points = torch.cat(
        [points, *(finite.nextafter(torch.tensor(s)) for s in (math.inf, -math.inf))]
    )
    points = torch.cat([points, torch.tensor([0.0, -0.0, 65519.996, 65520.0, 2.0**-25, 2.0**-126])])
    made, expected = reference._rounded_by_bits(points, dtype), points.to(dtype).float()
    assert torch.equal(made.isnan(), expected.isnan())
    assert torch.equal(
        made[~made.isnan()].view(torch.int32), expected[~made.isnan()].view(torch.int32)
    )


# ---------------------------------------------------------------- what inductor makes of it


def test_inductor_keeps_the_rounding_points() -> None:
    """A pair of casts it would leave out, and half of the elements would be others."""
    wide: dict[str, Any] = {"out_dtype": torch.float32}

    def call(
        half: Tensor, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
    ) -> list[Tensor]:
        return [
            normkit.rms_norm(half, None, round_before_weight=True, **wide),
            normkit.layer_norm(half, round_rstd=True, **wide),
            *normkit.add_rms_norm(x, residual, weight, **wide),
            *normkit.add_layer_norm(x, residual, weight, bias, **ROUNDING, **wide),
        ]

    half, given = make_inputs((32, 256), torch.float16).x, make_inputs((32, 256), torch.bfloat16)
    made = compiled(call, "inductor")(half, *given)
    with normkit.use_backend("reference"):
        expected = call(half, *given)
    for got, wanted in zip(made, expected, strict=True):
        far = (got - wanted).abs() > 2.0**-20 * wanted.abs().clamp(2.0**-6)
        assert far.float().mean() < 0.01  # only where float32 lies beside the middle of two
    x, residual, weight, bias = given
    assert_accurate(made[0], half, kind="rms", round_before_weight=True)
    assert_accurate(made[1], half, eps=1e-5, kind="layer", round_rstd=True)
    both = {"residual": residual, "residual_out": made[3]}
    assert_accurate(made[2], x, weight, kind="rms", **both)
    assert_accurate(made[4], x, weight, bias, 1e-5, kind="layer", **both, **ROUNDING)


def test_inductor_fuses_an_inlined_norm_with_its_neighbours() -> None:
    def call(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.sigmoid(normkit.layer_norm(x.relu()) * (1 + scale) + shift)

    given = [torch.randn(8, 64), torch.randn(64), torch.randn(64)]
    expected, counts = call(*given), {}
    for mode in ("op", "inline"):
        with compile_mode(mode):
            made, (code,) = run_and_get_code(compiled(call, "inductor"), *given)
        torch.testing.assert_close(made, expected)
        body = code[code.index("def call(") :].partition("def benchmark")[0]
        counts[mode] = body.count("cpp_fused"), body.count(" = torch.ops.normkit.")
    assert counts == {"op": (2, 1), "inline": (1, 0)}


@pytest.mark.parametrize("op", [ADD_RMS, HEAD_LAYER], ids=str)
def test_gradients_of_inductor_are_within_the_bound(op: Op) -> None:
    def call(name: str, *given: Tensor, **options: Any) -> Any:
        function = getattr(normkit, name)
        return compiled(lambda *g: function(*g, **options), "inductor")(*given)

    options = {"round_before_weight": True} if op is ADD_RMS else {"weight_offset": 1.0}
    inputs = inputs_for(op, (4, 6), 64, torch.bfloat16, seed=3)
    make_and_check(call, case_of(op, inputs, **options))


# ---------------------------------------------------------------- forms, modules, shapes


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inlined_forms_write_what_they_were_given(name: str) -> None:
    in_place, function = getattr(normkit, f"{name}_"), getattr(normkit, name)

    def call(out: Tensor, packed: Tensor, *given: Tensor) -> Any:
        doubled = packed * 2
        made = function(packed[..., 8:16], *given[1:], out=out)
        in_place(packed[..., 8:16], *given[1:])
        return made, doubled, in_place(*given)

    out, packed = torch.zeros(2, 3, 8, dtype=torch.float16), torch.randn(2, 3, 24)
    given = [out, packed, *tensors(name)]
    mine, theirs = clones(given), clones(given)
    recorder = Recorder()
    made = compiled(call, recorder.backend)(*mine)
    with normkit.use_backend("reference"):
        expected = call(*theirs)
    for ours, eager in zip(made, expected, strict=True):
        assert_equal_bits(ours, eager)
    assert_equal_bits(mine, theirs)
    assert listed(made[0])[0] is mine[0]
    assert listed(made[2])[0] is mine[2]
    assert not called(recorder.graphs[0], "normkit")


@pytest.mark.parametrize("grad", [False, True], ids=["", "with gradients"])
@pytest.mark.parametrize("kind", MODULES)
def test_inlined_modules_train_and_compile_once_for_any_number_of_rows(
    kind: str, grad: bool
) -> None:
    module = randomised(MODULES[kind](8, memory_efficient=kind == "LayerNorm"))
    module.requires_grad_(grad)
    recorder = Recorder()
    call = compiled(module, recorder.backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (2, 5, 33):
            given = [torch.randn(rows, 3, 8).requires_grad_(grad) for _ in range(2)]
            for t in given:
                torch._dynamo.mark_dynamic(t, 0)
            results = []
            for function in (call, module):
                module.zero_grad()
                with normkit.use_backend("auto" if function is call else "reference"):
                    made = function(*given)
                    if grad:
                        loss_of(made).backward()
                results.append([*made, *(t.grad for t in (*given, *module.parameters()))])
                for t in given:
                    t.grad = None
            assert_equal_bits(*results)
    assert not any(called(graph, "normkit") for graph in recorder.graphs)


def test_what_needs_no_gradient_gets_none() -> None:
    x, residual, weight, _ = tensors("add_rms_norm")
    y, total = compiled(normkit.add_rms_norm)(x, residual, weight.requires_grad_())
    assert (y.requires_grad, total.requires_grad) == (True, False)
    y.sum().backward()
    assert weight.grad is not None


def test_modules_of_several_dimensions_and_without_weights_are_inlined() -> None:
    x = torch.randn(4, 3, 8)
    for module in (
        RMSNorm((3, 8), bias=True),
        RMSNorm(8, elementwise_affine=False),
        LayerNorm(8, elementwise_affine=False),
        HeadNorm(None, 8),
    ):
        module.requires_grad_(False)
        assert operators_of(module, [x, x]) == []
        with normkit.use_backend("reference"):
            expected = module(x, x)
        assert_equal_bits(compiled(module)(x, x), expected)


def test_checks_hold_for_inlined_calls() -> None:
    x = torch.ones(4, 8)
    with pytest.raises(Exception, match=r"weight: expected shape \(8,\)"):
        compiled(normkit.rms_norm)(x, torch.ones(7))
    with pytest.raises(Exception, match="x: a gradient is needed"):
        compiled(lambda x: normkit.rms_norm_(x * 2))(x.requires_grad_())


def test_transforms_inside_of_inlined_functions_have_gradients() -> None:
    def loss(x: Tensor) -> Tensor:
        return normkit.rms_norm(x, round_before_weight=True, round_rstd=True).float().pow(3).sum()

    x = torch.randn(3, 8, dtype=torch.bfloat16)
    made = compiled(lambda x: torch.func.grad(loss)(x))(x)
    assert_equal_bits(made, torch.func.grad(loss)(x))
    assert made.count_nonzero()


def test_the_reference_has_gradients_inside_of_compiled_functions() -> None:
    def norm(x: Tensor) -> Tensor:
        return reference.norm(x, kind="rms", round_before_weight=True, round_rstd=True)

    x = torch.randn(3, 8).bfloat16()
    _, (mine,) = results_and_gradients(compiled(norm), [x])
    _, (theirs,) = results_and_gradients(norm, [x])
    assert_equal_bits(mine, theirs)
    assert theirs is not None
    assert theirs.count_nonzero()


# ---------------------------------------------------------------- the mode


@pytest.mark.parametrize("name", ["rms_norm", "add_layer_norm"])
def test_another_mode_compiles_another_graph(name: str) -> None:
    recorder = Recorder()
    call = compiled(getattr(normkit, name), recorder.backend)
    given = tensors(name)
    seen = []
    for mode in ("op", "inline", "op"):
        with compile_mode(mode):
            made = call(*given)
        seen.append(len(recorder.graphs))
        backend = "cpu" if mode == "op" else "reference"
        with normkit.use_backend(backend):
            assert_equal_bits(made, getattr(normkit, name)(*given))
    assert seen == [1, 2, 2]
    operators = [called(graph, "normkit") for graph in recorder.graphs]
    assert operators == [[f"normkit.{name}_kernel.default"], []]


def test_a_mode_holds_until_the_end_of_its_with_or_for_good() -> None:
    x = torch.ones(2, 8)
    try:
        compile_mode("op")
        assert operators_of(normkit.rms_norm, [x])
        with compile_mode("inline"), compile_mode("op"), compile_mode("inline"):
            assert not operators_of(normkit.rms_norm, [x])
        assert operators_of(normkit.rms_norm, [x])
        with pytest.raises(KeyError), compile_mode("inline"):
            raise KeyError
        assert operators_of(normkit.rms_norm, [x])
    finally:
        compile_mode("inline")


def test_a_mode_can_be_set_inside_of_a_compiled_function() -> None:
    def call(x: Tensor) -> Tensor:
        with compile_mode("op"):
            x = normkit.rms_norm(x)
        return normkit.layer_norm(x)

    x = torch.randn(3, 8)
    assert operators_of(call, [x]) == ["normkit.rms_norm_kernel.default"]
    assert operators_of(normkit.layer_norm, [x]) == []  # nothing is left behind
    torch.testing.assert_close(compiled(call)(x), call(x))


def test_a_mode_holds_in_every_thread() -> None:
    found: list[list[str]] = []
    x = torch.randn(3, 8)
    for mode in ("inline", "op"):
        with compile_mode(mode):
            thread = threading.Thread(
                target=lambda: found.append(operators_of(normkit.rms_norm, [x]))
            )
            thread.start()
            thread.join()
    assert found == [[], ["normkit.rms_norm_kernel.default"]]


def test_a_backend_that_is_asked_for_by_name_runs_the_operator() -> None:
    recorder = Recorder()
    call = compiled(normkit.rms_norm, recorder.backend)
    x = torch.randn(3, 8)

    def alternate() -> None:
        call(x)
        for _ in range(2):
            with normkit.use_backend("cpu"):
                call(x)
                with pytest.raises(ValueError, match='"cpu"\\) cannot serve this rms_norm'):
                    call(x.double())
            call(x)

    with ThreadPoolExecutor(1) as pool:  # a thread that has not named a backend before
        pool.submit(alternate).result()
    operators = [called(graph, "normkit") for graph in recorder.graphs]
    assert operators == [[], *[["normkit.rms_norm_kernel.default"]] * 2]


def test_modes_are_called_by_name() -> None:
    with pytest.raises(ValueError, match="mode: expected one of auto, op, inline, got 'fused'"):
        compile_mode("fused")
    assert operators_of(normkit.rms_norm, [torch.ones(2, 8)]) == []  # what held still holds


@pytest.mark.parametrize("mode", ["inline", "op"])
def test_a_compiled_call_looks_at_few_things(mode: str) -> None:
    """Dynamo looks at each of them at every call: 60 ns, of the 33 us of `F.rms_norm` compiled."""
    seen = []
    for count in (1, 2):
        norms = [RMSNorm(8) for _ in range(count)]

        def call(x: Tensor, norms: list[RMSNorm] = norms) -> Tensor:
            for norm in norms:
                x = norm(x)
            return x

        with compile_mode(mode):
            compiled(call)(torch.ones(2, 8))
        (entry,) = _debug_get_cache_entry_list(call.__code__)
        seen.append(str(entry.guard_manager).count("+- "))
        torch._dynamo.reset()
    first, second = seen
    assert first < 240
    assert second - first < 45


# ---------------------------------------------------------------- auto


def test_auto_inlines_small_calls_on_the_cpu_and_leaves_large_ones_to_the_kernels() -> None:
    small, large = torch.ones(inline.FEW_ELEMENTS // 8, 8), torch.ones(inline.FEW_ELEMENTS // 4, 8)
    with compile_mode("auto"):
        assert operators_of(normkit.rms_norm, [small]) == []
        assert operators_of(normkit.rms_norm, [large]) == ["normkit.rms_norm_kernel.default"]


def test_auto_compiles_at_most_two_graphs_for_all_numbers_of_rows() -> None:
    recorder = Recorder()
    call = torch.compile(normkit.rms_norm, fullgraph=True, dynamic=True, backend=recorder.backend)
    with compile_mode("auto"):
        for rows in (3, 40, inline.FEW_ELEMENTS, 7, 2 * inline.FEW_ELEMENTS):
            call(torch.ones(rows, 2))
    operators = [called(graph, "normkit") for graph in recorder.graphs]
    assert operators == [[], ["normkit.rms_norm_kernel.default"]]


def test_auto_takes_sizes_that_only_data_decide() -> None:
    def call(x: Tensor, kept: Tensor) -> Tensor:
        return normkit.rms_norm(x[kept.nonzero()[:, 0]])

    x, kept = torch.randn(5, 8), torch.tensor([True, False, True, True, False])
    with compile_mode("auto"), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        made = compiled(call)(x, kept)
    with normkit.use_backend("reference"):
        assert_equal_bits(made, call(x, kept))


def test_auto_is_what_holds_when_nobody_has_said_anything() -> None:
    script = "from normkit._serving import inline; assert inline._mode == 'auto'"
    subprocess.run([sys.executable, "-c", script], check=True)


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_exported_programs_hold_operators_unless_inline_is_asked_for(strict: bool) -> None:
    module = randomised(RMSNorm(8, round_before_weight=True))
    given = tensors("add_rms_norm", dtype=torch.bfloat16)[:2]

    def exported() -> Any:
        return torch.export.export(module, tuple(given), strict=strict)

    with compile_mode("auto"):
        assert called(exported().graph_module, "normkit") == ["normkit.add_rms_norm.default"]
    program = exported()
    assert not called(program.graph_module, "normkit")
    with normkit.use_backend("reference"):
        expected, theirs = results_and_gradients(module, given)
    made, mine = results_and_gradients(program.module(), given)
    assert_equal_bits(made, expected)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6)


def test_an_inlined_program_runs_where_normkit_is_not_imported(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    module = randomised(RMSNorm(8)).requires_grad_(False)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "norm.pt2")
    torch.save((x, module(x)), tmp_path / "tensors.pt")
    script = (
        "import sys, torch\n"
        "x, y = torch.load('tensors.pt')\n"
        "torch.testing.assert_close(torch.export.load('norm.pt2').module()(x), y)\n"
        "assert 'normkit' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
