"""Compiled calls: one graph, of our operators, with the bits of eager ones."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit
from conformance.support import ROUNDINGS
from normkit import HeadNorm, LayerNorm, RMSNorm
from torch_integration.support import (
    FUNCTIONS,
    MODULES,
    Recorder,
    adds,
    assert_equal_bits,
    called,
    clones,
    compiled,
    listed,
    randomised,
    results_and_gradients,
    tensors,
)

# Torch's own modules warn about each other when inductor is imported.
uses_inductor = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


OPTIONS: list[dict[str, Any]] = [
    {"weight_offset": 1.0, "out_dtype": torch.float32, "eps": None},
    {"round_before_weight": True, "memory_efficient": True},
    {"clamp_inf": True, "eps": 0.3},
    {"memory_efficient": True},
    *({rounding: True} for rounding in ROUNDINGS),
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_calls_equal_eager_ones_bit_for_bit(name: str) -> None:
    function = getattr(normkit, name)
    given = tensors(name, dtype=torch.bfloat16, residual_dtype=torch.float32)
    assert_equal_bits(compiled(function)(*given), function(*given))
    ours, mine = results_and_gradients(compiled(function), given)
    eager, theirs = results_and_gradients(function, given)
    assert_equal_bits(ours, eager)
    assert_equal_bits(mine, theirs)
    assert all(g is not None and g.count_nonzero() for g in mine)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_compiled_calls_take_the_options(options: dict[str, Any]) -> None:
    call = functools.partial(normkit.add_layer_norm, **options)
    given = tensors("add_layer_norm", dtype=torch.float16, weight_dtype=torch.float32)
    ours, mine = results_and_gradients(compiled(lambda *g: call(*g)), given)
    eager, theirs = results_and_gradients(call, given)
    assert_equal_bits(ours, eager)
    assert_equal_bits(mine, theirs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_graphs_hold_our_operators_and_nothing_of_plain_torch(name: str) -> None:
    recorder = Recorder()
    call = compiled(getattr(normkit, name), recorder.backend)
    made = call(*tensors(name, grad=True))
    torch.autograd.backward(listed(made), [torch.ones_like(t) for t in listed(made)])
    forward, backward = recorder.graphs
    assert called(forward, "normkit") == [f"normkit.{name}_kernel.default"]
    assert called(backward, "normkit") == ["normkit.norm_backward_kernel.default"]
    neither_reads_nor_writes = {"aten.sym_size.int", "aten.detach.default"}
    assert set(called(forward, "aten") + called(backward, "aten")) <= neither_reads_nor_writes


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["layer_norm", "head_norm", "add_rms_norm"])
def test_another_number_of_rows_compiles_nothing_again(name: str, grad: bool) -> None:
    call = compiled(getattr(normkit, name))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (2, 5, 64, 7):
            given = tensors(name, (rows, 3, 8), grad=grad)
            assert_equal_bits(call(*given), getattr(normkit, name)(*given))


def test_without_rows_is_the_same_graph_or_one_more() -> None:
    call = compiled(normkit.rms_norm)
    weight = torch.ones(8)
    for rows in (4, 0, 1):
        assert call(torch.ones(rows, 8), weight).shape == (rows, 8)


class Layers(nn.Module):
    """The way of decoding: the residual is updated in place through all layers."""

    def __init__(self, n: int, count: int, step: Callable[..., Any]) -> None:
        super().__init__()
        self.step = step
        self.linears = nn.ModuleList(nn.Linear(n, n, bias=False) for _ in range(count))
        self.weights = nn.ParameterList(torch.rand(n) for _ in range(count))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        for linear, weight in zip(self.linears, self.weights, strict=True):
            x, residual = self.step(linear(x), residual, weight)
        return x, residual


@pytest.mark.parametrize("step", [normkit.add_rms_norm_, normkit.add_layer_norm_])
def test_a_loop_of_in_place_layers_is_one_graph(step: Callable[..., Any]) -> None:
    model = Layers(16, 4, step).requires_grad_(False)
    recorder = Recorder()
    call = compiled(model, recorder.backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (3, 9, 17):
            given = tensors("add_rms_norm", (rows, 16))[:2]
            mine, theirs = clones(given), clones(given)
            assert_equal_bits(call(*mine), model(*theirs))
            assert_equal_bits(mine, theirs)
            assert not torch.equal(mine[1], given[1])
    assert len(recorder.graphs) == 1
    written = [t for t in called(recorder.graphs[0]) if "auto_functionalized" in t]
    assert len(written) == 4


@pytest.mark.parametrize("name", FUNCTIONS)
def test_in_place_forms_write_what_they_were_given(name: str) -> None:
    function = getattr(normkit, f"{name}_")

    def call(*given: Tensor) -> Any:
        doubled = given[0] * 2
        return function(*given), doubled + given[0]

    mine, theirs = clones(tensors(name)), clones(tensors(name))
    made, seen = compiled(call)(*mine)
    expected, seen_eagerly = call(*theirs)
    assert_equal_bits(made, expected)
    assert_equal_bits(seen, seen_eagerly)
    assert_equal_bits(mine, theirs)
    assert listed(made)[0] is mine[0]


@pytest.mark.parametrize("name", ["head_norm", "add_rms_norm"])
def test_in_place_forms_write_views_of_what_they_were_given(name: str) -> None:
    function = getattr(normkit, f"{name}_")

    def call(packed: Tensor, *others: Tensor) -> Tensor:
        function(packed[..., 8:16], *others)
        return packed + 1

    packed, rest = torch.randn(2, 3, 24), tensors(name)[1:]
    mine, theirs = clones([packed, *rest]), clones([packed, *rest])
    assert_equal_bits(compiled(call)(*mine), call(*theirs))
    assert_equal_bits(mine, theirs)
    assert torch.equal(mine[0][..., :8], packed[..., :8])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_outputs_are_written_inside_compiled_functions(name: str) -> None:
    def call(out: Tensor, residual_out: Tensor, *given: Tensor) -> Any:
        rest = {"residual_out": residual_out} if adds(name) else {}
        return getattr(normkit, name)(*given, out=out, **rest)

    given = tensors(name, dtype=torch.bfloat16, residual_dtype=torch.float32)
    outputs = [torch.zeros(2, 3, 8, dtype=torch.float16), torch.zeros(2, 3, 8)]
    made = compiled(call)(*outputs, *given)
    assert_equal_bits(made, call(*clones(outputs), *given))
    assert all(a is b for a, b in zip(listed(made), outputs, strict=False))


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if adds(name)])
def test_one_output_alone_can_be_given(name: str) -> None:
    given = tensors(name)
    for one in ("out", "residual_out"):
        output = torch.zeros(2, 3, 8)
        call = compiled(lambda t, *g, one=one: getattr(normkit, name)(*g, **{one: t}))
        assert_equal_bits(call(output, *given), getattr(normkit, name)(*given))
        assert output.any()


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_compiled_modules_train_like_eager_ones(kind: str, memory_efficient: bool) -> None:
    module = randomised(MODULES[kind](8, memory_efficient=memory_efficient))
    given = tensors("add_rms_norm", dtype=torch.bfloat16)[: 1 + memory_efficient]
    results = []
    for function in (compiled(module), module):
        module.zero_grad()
        made, gradients = results_and_gradients(function, given)
        results.append([*made, *gradients, *(p.grad for p in module.parameters())])
    assert_equal_bits(*results)


@pytest.mark.parametrize("kind", MODULES)
def test_modules_compile_once_for_any_number_of_rows(kind: str) -> None:
    module = randomised(MODULES[kind](8))
    call = compiled(module)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (2, 5, 33):
            x = torch.randn(rows, 3, 8)
            assert_equal_bits(call(x, x), module(x, x))


def test_modules_without_affine_and_of_several_dimensions_compile() -> None:
    x = torch.randn(4, 3, 8)
    for module, given in (
        (RMSNorm((3, 8), bias=True), [x, x]),
        (LayerNorm((3, 8)), [x]),
        (RMSNorm(8, elementwise_affine=False), [x, x]),
        (LayerNorm(8, elementwise_affine=False), [x]),
        (HeadNorm(3, 8, elementwise_affine=False), [x, x]),
        (HeadNorm(None, 8), [x]),
    ):
        module.requires_grad_(False)
        assert_equal_bits(compiled(module)(*given), module(*given))
        torch._dynamo.reset()


def test_errors_inside_compiled_functions_name_the_argument() -> None:
    x, residual, weight, _ = tensors("add_rms_norm", (4, 8))
    wrong: list[tuple[str, Callable[[], Any]]] = [
        (r"weight: expected shape .*, got \(7,\)", lambda: normkit.rms_norm(x, torch.ones(7))),
        (r"residual: expected x's shape", lambda: normkit.add_rms_norm(x, residual[:3], weight)),
        (r"bias: expected shape", lambda: normkit.layer_norm(x, weight, torch.ones(2, 8))),
        (r"x: expected float32", lambda: normkit.rms_norm(x.int(), weight)),
        (r"out: expected x's shape", lambda: normkit.rms_norm(x, weight, out=torch.empty(8))),
        (
            r"out: expected a last stride of 1",
            lambda: normkit.add_rms_norm(x, residual, out=x.t().contiguous().t()),
        ),
        (r"kind: expected", lambda: normkit.head_norm(x, weight, kind="batch")),
        (r"eps: expected", lambda: normkit.rms_norm(x, weight, eps=-1.0)),
        (r"x: expected a shape that ends in", lambda: RMSNorm((2, 8))(x)),
    ]
    for pattern, call in wrong:
        with pytest.raises(Exception, match=pattern):
            compiled(call)()
        torch._dynamo.reset()


@uses_inductor
@pytest.mark.parametrize("grad", [False, True])
def test_inductor_gives_the_bits_of_eager(grad: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = randomised(RMSNorm(16)), randomised(LayerNorm(16))

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            y, residual = self.first(x.t().contiguous().t(), residual)
            return self.second(y, residual)

    block = Block().requires_grad_(grad)
    call = compiled(block, "inductor")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (4, 11):
            given = tensors("add_rms_norm", (rows, 16))[:2]
            if grad:
                mine, theirs = (results_and_gradients(f, given) for f in (call, block))
                assert_equal_bits(mine[0], theirs[0])
                assert_equal_bits(mine[1], theirs[1])
            else:
                assert_equal_bits(call(*given), block(*given))


@uses_inductor
def test_inductor_reuses_memory_only_of_what_is_dead() -> None:
    model = Layers(16, 3, normkit.add_rms_norm_).requires_grad_(False)
    given = tensors("add_rms_norm", (5, 16))[:2]
    mine, theirs = clones(given), clones(given)
    assert_equal_bits(compiled(model, "inductor")(*mine), model(*theirs))
    assert_equal_bits(mine, theirs)


def test_compiled_modules_can_be_saved() -> None:
    module, file = randomised(RMSNorm(8)), io.BytesIO()
    call = torch.compile(module, backend="aot_eager")
    torch.save(call.state_dict(), file)
    file.seek(0)
    twin = torch.compile(RMSNorm(8), backend="aot_eager")
    twin.load_state_dict(torch.load(file))
    x = torch.randn(2, 8)
    assert_equal_bits(twin(x), module(x))
