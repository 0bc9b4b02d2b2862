"""A converted model is the same model: its norms are normkit's, and nothing else changes."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import normkit
from normkit.conversion import _classes, _plan

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class LlamaRMSNorm(nn.Module):
    """As in Hugging Face's transformers."""

    def __init__(self, n: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(n) + 0.5)
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(dtype)


class UnweightedNorm(nn.Module):
    eps = 1e-6

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class HeadsNorm(nn.Module):
    """A LayerNorm of heads with a weight for each, as Cohere's."""

    def __init__(self, heads: int, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(heads, n) + 0.5)

    def forward(self, x):
        y = x.float()
        y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)
        return (self.weight.float() * y).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.norm, self.linear = LlamaRMSNorm(n), nn.Linear(n, n)

    def forward(self, x):
        return x + self.linear(self.norm(x))


def model(dtype: torch.dtype = F32, n: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(Layer(n), Layer(n), nn.LayerNorm(n))
    nn.init.normal_(made[2].weight)
    nn.init.normal_(made[2].bias)
    return made.to(dtype)


def rows(dtype: torch.dtype = F32, *shape: int) -> Tensor:
    return torch.randn(shape or (2, 5, 64), generator=torch.Generator().manual_seed(1)).to(dtype)


@contextmanager
def counted() -> Iterator[list[Tensor]]:
    """The x of every call that normkit ran for a converted module."""
    seen: list[Tensor] = []
    run = _plan.Plan.run

    def count(self, module, x):
        y = run(self, module, x)
        if y is not None:
            seen.append(x)
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_plan.Plan, "run", count)
        yield seen


def calls(module: nn.Module, x: Tensor) -> int:
    with counted() as seen:
        module(x)
    return len(seen)


def near(y: Tensor, expected: Tensor) -> bool:
    same_place = (y.shape, y.dtype, y.stride()) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
    )
    step = {F32: 2e-6, BF16: 2**-7, F16: 2**-10}[y.dtype]
    return same_place and torch.allclose(y, expected, step, step)


# ----------------------------------------------------------------------- what changes, and what not


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_every_norm_is_run_by_normkit_and_gives_what_it_gave(dtype):
    m, x = model(dtype), rows(dtype)
    expected = m(x)
    report = normkit.convert(m)
    assert [e.path for e in report.converted] == ["0.norm", "1.norm", "2"]
    assert report.left == []
    assert near(m(x), expected)
    assert calls(m, x) == 3
    with torch.no_grad():
        assert calls(m, x) == 3
        assert near(m(x), expected)


def test_nothing_that_can_be_seen_of_a_module_changes():
    m = model()
    before = (
        repr(m),
        list(m.state_dict()),
        dict(m.named_parameters()),
        [n for n, _ in m.named_modules()],
    )
    held = [m[0].norm]
    normkit.convert(m)
    after = (
        repr(m),
        list(m.state_dict()),
        dict(m.named_parameters()),
        [n for n, _ in m.named_modules()],
    )
    assert before[::3] == after[::3]
    assert before[1] == after[1]
    assert all(p is after[2][name] for name, p in before[2].items())
    assert held[0] is m[0].norm  # and so references from elsewhere are converted too
    assert isinstance(m[0].norm, LlamaRMSNorm)
    assert isinstance(m[2], nn.LayerNorm)
    for module, cls in ((m[0].norm, LlamaRMSNorm), (m[2], nn.LayerNorm)):
        names = ("__name__", "__qualname__", "__module__", "__doc__")
        assert [getattr(type(module), n) for n in names] == [getattr(cls, n) for n in names]
    assert m[0].norm.variance_epsilon == 1e-5


def test_a_revert_is_exact():
    m, x = model(BF16), rows(BF16)
    expected = m(x)
    before = {name: (type(sub), dict(vars(sub))) for name, sub in m.named_modules()}
    report = normkit.convert(m)
    assert type(m[2]) is not nn.LayerNorm
    report.revert()
    after = {name: (type(sub), vars(sub)) for name, sub in m.named_modules()}
    assert before == after
    assert torch.equal(m(x), expected)
    assert calls(m, x) == 0
    report.revert()  # again: nothing is left to do


def test_a_dry_run_reports_and_changes_nothing():
    m = model()
    classes = [type(sub) for sub in m.modules()]
    report = normkit.convert(m, dry_run=True)
    assert len(report.converted) == 3
    assert [type(sub) for sub in m.modules()] == classes
    report.revert()
    assert calls(m, rows()) == 0


def test_modules_of_one_class_and_plan_share_their_class():
    m = nn.Sequential(*(nn.LayerNorm(64) for _ in range(3)), nn.LayerNorm(72))
    normkit.convert(m)
    assert type(m[0]) is type(m[1]) is type(m[2])
    assert type(m[3]) is not type(m[0])  # x of another width is none of theirs


def test_a_module_at_two_paths_is_reported_once():
    m = model()
    m[1].norm = m[0].norm
    report = normkit.convert(m)
    assert [e.path for e in report.converted] == ["0.norm", "2"]
    assert m[1].norm is m[0].norm
    assert calls(m, rows()) == 3


def test_one_norm_is_a_model_too():
    m = nn.LayerNorm(64)
    assert [e.path for e in normkit.convert(m).converted] == [""]
    assert calls(m, rows()) == 1


def test_on_meta_too_and_what_is_loaded_later_is_used():
    with torch.device("meta"):
        m = model()
    normkit.convert(m)
    assert m(torch.empty(2, 5, 64, device="meta")).is_meta
    m.load_state_dict(model().state_dict(), assign=True)
    assert near(m(rows()), model()(rows()))
    assert calls(m, rows()) == 3


def test_weights_are_read_at_each_call():
    m, x = model(), rows()
    normkit.convert(m)
    other = {name: t * 2 for name, t in model().state_dict().items()}
    m.load_state_dict(other)
    reference = model()
    reference.load_state_dict(other)
    assert near(m(x), reference(x))
    m[2].weight = nn.Parameter(torch.zeros(64))
    m[2].bias = nn.Parameter(torch.zeros(64))
    assert m(x).abs().max() == 0


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_another_dtype_after_converting_is_run_too(dtype):
    m = model(BF16 if dtype == F32 else F32)
    normkit.convert(m)
    m.to(dtype)
    reference = model(BF16 if dtype == F32 else F32).to(dtype)
    assert near(m(rows(dtype)), reference(rows(dtype)))
    assert calls(m, rows(dtype)) == 3


def test_an_x_of_another_dtype_gives_the_dtype_that_it_gave():
    m = LlamaRMSNorm(64)
    expected = m(rows(BF16))
    assert expected.dtype == F32
    normkit.convert(m)
    assert near(m(rows(BF16)), expected)
    assert calls(m, rows(BF16)) == 1


# ------------------------------------------------------------- what was not measured runs as before


def converted(module: nn.Module) -> nn.Module:
    assert normkit.convert(module).converted
    return module


def test_float64_runs_the_modules_own_forward():
    m = converted(LlamaRMSNorm(64))
    x = rows().double()
    assert torch.equal(m(x), LlamaRMSNorm.forward(m, x))
    assert calls(m, x) == 0


def test_a_width_that_the_module_refuses_is_refused_as_before():
    m = converted(nn.LayerNorm(64, elementwise_affine=False))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        m(rows(F32, 2, 32))
    m = converted(nn.LayerNorm(64))
    m.weight = nn.Parameter(torch.ones(32))
    m.bias = nn.Parameter(torch.ones(32))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        m(rows(F32, 2, 32))


def test_what_broadcast_before_does_so_still():
    m = converted(LlamaRMSNorm(64))
    assert m(rows(F32, 3, 1)).shape == (3, 64)


def test_without_a_weight_every_width_is_taken_that_was():
    m = converted(UnweightedNorm())
    for n in (8, 64, 100):
        assert near(m(rows(BF16, 3, n)), UnweightedNorm()(rows(BF16, 3, n)))
        assert calls(m, rows(BF16, 3, n)) == 1


def test_under_autocast_the_original_runs():
    m = converted(model())
    with torch.autocast("cpu", BF16):
        y = m(rows())
        assert calls(m, rows()) == 0
        assert torch.equal(y, model()(rows()))


def test_a_tensor_subclass_is_handed_to_the_original():
    class Marked(Tensor):
        pass

    m = converted(nn.LayerNorm(64))
    x = rows().as_subclass(Marked)
    assert type(m(x)) is Marked
    assert calls(m, x) == 0


@pytest.mark.parametrize("x", [rows().to_sparse(), rows().to(torch.complex64), [1.0]], ids=type)
def test_what_is_no_row_of_floats_gives_the_originals_error(x):
    def error(m):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            m(x)
        return type(caught.value), str(caught.value)

    m = nn.LayerNorm(64)
    expected = error(m)
    assert error(converted(m)) == expected


def test_functions_of_torch_func_see_the_original():
    m = converted(nn.LayerNorm(64))
    x = rows()
    y = torch.func.vmap(m)(x)
    assert torch.allclose(y, m(x), atol=1e-5)
    gradient = torch.func.grad(lambda x: m(x).square().sum())(x)
    assert gradient.shape == x.shape
    _, tangent = torch.func.jvp(m, (x,), (torch.ones_like(x),))
    assert tangent.abs().max() < 1e-4
    parameters = {name: p * 2 for name, p in m.named_parameters()}
    assert torch.allclose(torch.func.functional_call(m, parameters, (x,)), m(x) * 2, atol=1e-5)


def test_dispatch_modes_see_the_operators_of_the_original():
    from torch.utils.flop_counter import FlopCounterMode

    m = converted(nn.LayerNorm(64))
    with FlopCounterMode(display=False):
        assert calls(m, rows()) == 0


def test_further_arguments_go_to_the_original():
    class Scaled(LlamaRMSNorm):
        def forward(self, hidden_states, scale=None):
            y = super().forward(hidden_states)
            return y if scale is None else y * scale

    m = converted(Scaled(64))
    x = rows()
    assert calls(m, x) == 1
    assert torch.equal(m(x, 2.0), m(hidden_states=x, scale=2.0))
    assert near(m(x, scale=2.0), m(x) * 2)


def test_the_backend_that_is_asked_for_is_used_or_says_why_not():
    m, x = converted(nn.LayerNorm(64)), rows()
    with normkit.use_backend("reference"):
        assert calls(m, x) == 0
    with normkit.use_backend("cuda"), torch.no_grad(), pytest.raises(ValueError, match="cuda"):
        m(x)


def test_where_no_kernel_would_run_the_original_does(monkeypatch):
    from normkit._serving import backends

    m, x = converted(nn.LayerNorm(64)), rows()
    monkeypatch.setitem(backends.natives, "auto", backends.Native.refusing("not built"))
    monkeypatch.setattr(_plan, "quick", lambda *call: None)
    assert calls(m, x) == 0
    assert torch.equal(m(x), nn.LayerNorm.forward(m, x))


# --------------------------------------------------------------------------- where y lies in memory


@pytest.mark.parametrize(
    "make", [lambda: LlamaRMSNorm(64), lambda: nn.LayerNorm(64), lambda: nn.RMSNorm(64)]
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_y_has_the_strides_that_it_had(make, dtype):
    m = make().to(dtype)
    views = [
        rows(dtype, 2, 3, 7, 64),
        rows(dtype, 2, 7, 3, 64).transpose(1, 2),
        rows(dtype, 7, 2, 3, 64).permute(1, 2, 0, 3),
        rows(dtype, 2, 3, 7, 192)[..., 64:128],
        rows(dtype, 2, 7, 3, 192).transpose(1, 2)[..., :64],
        rows(dtype, 2, 64, 3, 7).movedim(1, -1),
        rows(dtype, 2, 1, 7, 64).expand(2, 3, 7, 64),
        rows(dtype, 4, 3, 7, 64)[::2],
        rows(dtype, 64),
        rows(dtype, 0, 64),
    ]
    expected = [m(x) for x in views]
    normkit.convert(m)
    for x, y in zip(views, expected, strict=True):
        assert near(m(x), y)
    assert sum(calls(m, x) for x in views) >= 8


def test_heads_keep_their_weights_whatever_the_strides_are():
    m = HeadsNorm(3, 64)
    views = [rows(F32, 2, 7, 3, 64), rows(F32, 2, 3, 7, 64).transpose(1, 2)]
    expected = [m(x) for x in views]
    normkit.convert(m)
    for x, y in zip(views, expected, strict=True):
        assert near(m(x), y)
    assert calls(m, views[0]) == 1


def test_a_weight_of_more_dimensions_is_taken():
    m = LlamaRMSNorm(64)
    m.weight = nn.Parameter(m.weight.detach().reshape(1, 1, 64))
    x = rows()
    expected = m(x)
    normkit.convert(m)
    assert near(m(x), expected)
    assert calls(m, x) == 1


def test_an_l2_norm_is_an_rms_norm_with_a_weight():
    class L2Norm(nn.Module):
        def forward(self, x):
            y = x.float()
            return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)

    m = L2Norm()
    for n in (64, 100):
        assert near(converted(L2Norm())(rows(BF16, 3, n)), m(rows(BF16, 3, n)))


# ------------------------------------------------------------------------------- copies and files


def test_a_deep_copy_is_independent_and_converted_and_can_be_reverted():
    m, x = model(), rows()
    report = normkit.convert(m)
    other = copy.deepcopy(m)
    assert calls(other, x) == 3
    y = m(x)
    for p in other.parameters():
        p.data.zero_()
    assert other(x).abs().max() == 0
    assert torch.equal(m(x), y)
    report.revert()
    assert calls(other, x) == 3
    normkit.revert(other)
    assert calls(other, x) == 0
    assert type(other[2]) is nn.LayerNorm


def test_a_shallow_copy_is_converted():
    m = converted(nn.LayerNorm(64))
    other = copy.copy(m)
    assert other.weight is m.weight
    assert type(other) is type(m)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_has_the_original_class_and_nothing_of_normkit(protocol):
    m = converted(model())
    data = pickle.dumps(m, protocol)
    assert b"normkit" not in data
    loaded = pickle.loads(data)
    assert type(loaded[2]) is nn.LayerNorm
    assert type(loaded[0].norm) is LlamaRMSNorm
    assert near(loaded(rows()), m(rows()))
    assert calls(loaded, rows()) == 0


def test_what_torch_saves_is_loaded_as_the_original():
    m = converted(model())
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded[0].norm) is LlamaRMSNorm
    loaded[2].weight.data.zero_()
    loaded[2].bias.data.zero_()
    assert loaded(rows()).abs().max() == 0


def test_a_state_dict_goes_both_ways():
    m = converted(model())
    plain = model()
    plain.load_state_dict(m.state_dict())
    m.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("name", ["__deepcopy__", "__reduce_ex__", "__init_subclass__"])
def test_a_class_with_its_own_way_of_copying_is_left(name):
    own = classmethod(lambda cls: None) if name == "__init_subclass__" else lambda self, *_: self
    cls = type("OwnNorm", (LlamaRMSNorm,), {name: own})
    (entry,) = normkit.convert(cls(64)).left
    assert "own way" in entry.reason or "cannot be copied" in entry.reason


# ------------------------------------------------------------------------------- hooks and wrappers


def test_hooks_from_before_and_after_are_called():
    m, seen = model(), []
    m[2].register_forward_hook(lambda *_: seen.append("before"))
    m[2].register_forward_pre_hook(lambda *_: seen.append("pre"))
    m[2].register_full_backward_hook(lambda *_: seen.append("backward"))
    normkit.convert(m)
    m[2].register_forward_hook(lambda *_: seen.append("after"))
    m(rows()).sum().backward()
    assert seen == ["pre", "before", "after", "backward"]


def test_keyword_calls_go_by_the_names_of_the_original():
    m = converted(LlamaRMSNorm(64))
    assert torch.equal(m(hidden_states=rows()), m(rows()))
    assert near(converted(nn.LayerNorm(64))(input=rows()), nn.LayerNorm(64)(input=rows()))


def wrapped(module: nn.Module) -> nn.Module:
    """Replace forward on the instance, as accelerate does."""
    module._old_forward = module.forward
    module.forward = lambda *args, **kwargs: module._old_forward(*args, **kwargs)
    return module


def test_a_forward_that_was_replaced_before_is_left_with_the_reason():
    m = model()
    wrapped(m[2])
    report = normkit.convert(m)
    assert [(e.path, e.reason) for e in report.left] == [
        ("2", "forward is replaced on the instance")
    ]


def test_a_forward_that_is_replaced_afterwards_runs_normkit_until_the_revert():
    m, x = model(), rows()
    report = normkit.convert(m)
    wrapped(m[2])
    assert calls(m, x) == 3
    report.revert()
    assert calls(m, x) == 0
    m[2].forward = m[2]._old_forward  # as accelerate takes its hook off
    assert m[2].forward.__func__ is nn.LayerNorm.forward


def test_a_forward_that_was_bound_again_is_converted_and_comes_back():
    m, x = model(), rows()
    m[2].forward = m[2].forward  # as kernelize of transformers leaves it
    report = normkit.convert(m)
    assert calls(m, x) == 3
    report.revert()
    assert m[2].forward == nn.LayerNorm.forward.__get__(m[2])
    assert calls(m, x) == 0


def test_a_parametrisation_afterwards_is_used_and_must_be_undone_before_the_revert():
    class Twice(nn.Module):
        def forward(self, weight):
            return weight * 2

    m, x = LlamaRMSNorm(64), rows()
    report = normkit.convert(m)
    y = m(x)
    parametrize.register_parametrization(m, "weight", Twice())
    assert near(m(x), y * 2)
    assert calls(m, x) == 1
    assert calls(copy.deepcopy(m), x) == 1
    with pytest.raises(RuntimeError, match="ParametrizedLlamaRMSNorm, which was derived from it"):
        report.revert()
    assert calls(m, x) == 1
    parametrize.remove_parametrizations(m, "weight", leave_parametrized=False)
    report.revert()
    assert type(m) is LlamaRMSNorm


def test_a_parametrised_norm_is_left_with_the_reason():
    m = model()
    parametrize.register_parametrization(m[2], "weight", nn.Identity())
    assert [(e.path, e.reason) for e in normkit.convert(m).left] == [
        ("2", "a parameter is parametrised")
    ]


def test_pruning_afterwards_is_used():
    m, x = converted(LlamaRMSNorm(64)), rows()
    prune.random_unstructured(m, "weight", 0.5)
    assert (m(x) == 0).any()
    assert calls(m, x) == 1


def test_the_replicas_of_data_parallel_run_normkit():
    m = converted(nn.LayerNorm(64))
    replica = m._replicate_for_data_parallel()
    for name, p in m._parameters.items():
        setattr(replica, name, p.detach() * 2)
    assert near(replica(rows()), m(rows()).detach() * 2)
    assert calls(replica, rows()) == 1


# ----------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_are_those_of_the_original(dtype):
    ours, plain = model(dtype).train(), model(dtype).train()
    normkit.convert(ours)
    for m in (ours, plain):
        m(rows(dtype)).square().mean().backward()
    assert calls(ours, rows(dtype)) == 3
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        error = (p.grad.double() - q.grad.double()).norm() / q.grad.double().norm()
        assert error < (1e-5 if dtype == F32 else 2e-2)


def test_second_derivatives_are_those_of_the_original():
    m, x = nn.LayerNorm(64), rows().requires_grad_()

    def second():
        (g,) = torch.autograd.grad(m(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    expected = second()
    normkit.convert(m)
    assert torch.allclose(second(), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_gradient_checkpointing_too(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    m = converted(model())
    gradients = []
    for through in (m, lambda x: checkpoint(m, x, use_reentrant=use_reentrant)):
        x = rows().requires_grad_()
        through(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_a_step_of_an_optimizer_is_seen_by_the_next_call():
    m = converted(model())
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    before = m(rows())
    before.square().mean().backward()
    optimizer.step()
    assert m(rows()).square().mean() < before.square().mean()


def test_a_norm_that_drops_elements_in_training_is_left_in_evaluation_too():
    class DroppingNorm(LlamaRMSNorm):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    (entry,) = normkit.convert(DroppingNorm(64).eval()).left
    assert entry.reason


# -------------------------------------------------------------------- compiled, exported and traced


def test_compiled_whole_it_is_the_graph_of_the_original():
    graphs = []

    def keep(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    m, x = model(BF16), rows(BF16)
    expected = torch.compile(m, fullgraph=True, backend=keep)(x)
    torch.compiler.reset()
    normkit.convert(m)
    assert torch.equal(torch.compile(m, fullgraph=True, backend=keep)(x), expected)
    assert graphs[0] == graphs[1]
    assert calls(m, x) == 3


@pytest.mark.parametrize("strict", [False, True])
def test_exported_it_is_the_original(strict):
    m, x = converted(model()), rows()
    program = torch.export.export(m, (x,), strict=strict)
    assert "normkit." not in str(program.graph)
    assert torch.allclose(program.module()(x), m(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_traced_it_is_the_original():
    m, x = converted(model()), rows()
    traced = torch.jit.trace(m, x)
    assert "normkit::" not in str(traced.inlined_graph)
    assert torch.allclose(traced(x), m(x), atol=1e-5)


def test_traced_by_fx_it_has_the_arguments_of_the_original():
    m, x = converted(LlamaRMSNorm(64)), rows()
    graph = torch.fx.symbolic_trace(m)
    assert torch.allclose(graph(x), m(x), atol=1e-5)
    assert [n.name for n in graph.graph.nodes if n.op == "placeholder"] == ["hidden_states"]


def test_a_module_of_torch_is_still_a_leaf_of_fx():
    graph = torch.fx.symbolic_trace(converted(nn.Sequential(nn.LayerNorm(64))))
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["0"]


def test_under_fake_tensors_nothing_is_converted_and_a_converted_module_runs():
    from torch._subclasses.fake_tensor import FakeTensorMode

    m = converted(nn.LayerNorm(64))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert m(torch.empty(2, 64)).shape == (2, 64)
        (entry,) = normkit.convert(nn.LayerNorm(64)).left
        assert "tensor subclass" in entry.reason
        (entry,) = normkit.convert(UnweightedNorm()).left
        assert "FakeTensorMode" in entry.reason


# ----------------------------------------------------------------------------------------- choosing


def test_patterns_and_functions_choose_modules():
    def paths(**selection):
        report = normkit.convert(model(), dry_run=True, **selection)
        assert all(e.reason == "not selected by include or exclude" for e in report.left)
        return [e.path for e in report.converted]

    assert paths(include="*.norm") == ["0.norm", "1.norm"]
    assert paths(include=["0.*", "2"]) == ["0.norm", "2"]
    assert paths(exclude="*.norm") == ["2"]
    assert paths(include="*.norm", exclude=["1.*"]) == ["0.norm"]
    assert paths(include=lambda path, module: isinstance(module, nn.LayerNorm)) == ["2"]
    assert paths(exclude=lambda path, module: path == "2") == ["0.norm", "1.norm"]


def test_what_matches_nothing_or_is_no_choice_is_an_error():
    for arguments, error in (
        ({"include": "no.such.*"}, "include: expected what matches a path"),
        ({"fuse": "all"}, "fuse: expected"),
    ):
        with pytest.raises(ValueError, match=error):
            normkit.convert(model(), **arguments)
    for arguments, error in (({"include": 3}, "include: exp"), ({"exclude": [1]}, "exclude: exp")):
        with pytest.raises(TypeError, match=error):
            normkit.convert(model(), **arguments)
    for function in (normkit.convert, normkit.revert):
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
            function("model")


def test_strict_names_what_would_be_left_and_converts_nothing():
    m = nn.Sequential(nn.LayerNorm(64), nn.BatchNorm1d(5), nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\): has a buffer, running_mean"):
        normkit.convert(m, strict=True)
    assert type(m[0]) is nn.LayerNorm
    assert len(normkit.convert(m, strict=True, exclude="1").converted) == 1
    assert normkit.convert(m, strict=True, exclude="1").left[0].reason == "is converted already"


def test_a_second_call_leaves_what_the_first_converted_to_its_own_report():
    m = model()
    first = normkit.convert(m, include="0.*")
    second = normkit.convert(m)
    assert [e.path for e in second.converted] == ["1.norm", "2"]
    second.revert()
    assert calls(m, rows()) == 1
    first.revert()
    assert calls(m, rows()) == 0


def test_norms_of_normkit_are_none_to_convert():
    m = nn.Sequential(normkit.RMSNorm(64), normkit.LayerNorm(64), normkit.HeadNorm(2, 64))
    report = normkit.convert(m, strict=True)
    assert (report.converted, report.left) == ([], [])


# --------------------------------------------------------------------------------------- the report


def test_a_report_says_what_each_computes_or_why_it_was_left():
    m = nn.Sequential(*(LlamaRMSNorm(64) for _ in range(2)), nn.GroupNorm(4, 64)).bfloat16()
    report = normkit.convert(m)
    entry = report.converted[0]
    assert (entry.path, entry.cls, entry.reason) == ("0", "LlamaRMSNorm", "")
    assert entry.spec == normkit.recognise(LlamaRMSNorm(64).bfloat16()).specs[BF16]
    assert entry.equal_share >= 0.995
    assert set(entry.dtypes) == {F32, F16, BF16}
    lines = str(report).splitlines()
    assert lines[0] == "2 of 3 norms converted"
    assert "LlamaRMSNorm  rms, eps 1e-05, rounded before the weight" in lines[1]
    assert "GroupNorm     its statistic is of more than a row" in lines[2]


def test_a_report_is_json():
    m = nn.Sequential(UnweightedNorm(), nn.BatchNorm1d(5))
    data = json.loads(normkit.convert(m, dry_run=True).to_json())
    (entry,) = data["converted"]
    assert entry["spec"]["kind"] == "rms"
    assert entry["spec"]["out_dtype"] is None
    assert entry["dtypes"] == ["float32", "float16", "bfloat16"]
    assert data["left"][0]["spec"] is None
    assert data["dry_run"] is True


def test_a_class_that_nobody_uses_any_more_is_let_go():
    import gc

    class OnceNorm(LlamaRMSNorm):
        pass

    m = OnceNorm(64)
    normkit.convert(m).revert()
    gc.collect()
    assert OnceNorm.__subclasses__() == []
    assert not _classes.is_converted(m)
