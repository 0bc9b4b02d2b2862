"""Converted norms with a gate are gated norms, and stay the modules that they were."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle

import pytest
import torch
from torch import Tensor, nn

import normkit
from norm_models import (
    BF16,
    F16,
    F32,
    GATED,
    ChoiceNorm,
    GateFirstNorm,
    GateLastNorm,
    LlamaRMSNorm,
    SigmoidLastNorm,
    _Gated,
    calls,
    converted,
    gates,
    near,
    rows,
)

DTYPES = (F32, BF16, F16)
every_gated = pytest.mark.parametrize("cls", GATED, ids=lambda cls: cls.__name__)
without_gate = pytest.mark.parametrize("cls", [GateFirstNorm, ChoiceNorm])


def alike(y: Tensor, expected: Tensor) -> bool:
    """Nearly all bits in 16 bits, and near in float32."""
    if (y.dtype, y.shape, y.stride()) != (expected.dtype, expected.shape, expected.stride()):
        return False
    if y.dtype == F32:
        return torch.allclose(y, expected, 2e-6, 2e-6)
    return (y == expected).double().mean().item() >= 0.998


# --------------------------------------------------------------------------------- what it computes


@every_gated
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("own", DTYPES)
def test_a_gated_norm_is_run_by_normkit_and_gives_what_it_gave(cls, groups, own):
    m = cls(64, groups).to(own)
    plain = copy.deepcopy(m)
    report = normkit.convert(m)
    assert (len(report.converted), report.left) == (1, [])
    for of_x, of_gate in itertools.product(DTYPES, DTYPES):
        x, z = rows(of_x, 64, 64), gates(of_gate, 64, 64)
        with torch.no_grad():
            y, expected = m(x, gate=z), plain(x, z)
        if (
            expected.dtype != of_x
        ):  # torch's for a weight of another dtype; what it is of has fewer bits
            assert y.dtype == F32
            assert near(y.to(of_x), expected.to(of_x))
        else:
            assert alike(y, expected), (of_x, of_gate)
        assert calls(m, x, z) == 1


def test_the_norm_is_rounded_before_the_gate_only_where_the_product_with_the_weight_is():
    def rounds(own):
        return normkit.recognise(GateLastNorm().to(own)).round_each

    assert rounds(BF16)[BF16, BF16] is True
    assert rounds(F32)[BF16, BF16] is False  # torch's product with a float32 weight is float32
    assert rounds(BF16)[F32, BF16] is False
    assert set(rounds(BF16)) == set(itertools.product(DTYPES, DTYPES))
    assert normkit.recognise(SigmoidLastNorm().to(BF16)).round_each[BF16, F32] is False


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.3])
def test_a_gate_in_front_is_known_at_every_eps_and_in_float16(eps):
    m = GateFirstNorm().half()
    m.variance_epsilon = eps
    found = normkit.recognise(m)
    assert (found.reason, found.form.gate) == ("", "before-silu")
    assert found.specs[F16].eps == eps
    assert found.equal_shares[F16] >= 0.995


@without_gate
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_gate_it_is_the_norm_alone(cls, groups, dtype):
    m = cls(64, groups).to(dtype)
    expected = m(rows(dtype))
    converted(m)
    for y in (m(rows(dtype)), m(rows(dtype), None), m(hidden_states=rows(dtype), gate=None)):
        assert near(y, expected)
    assert calls(m, rows(dtype)) == calls(m, rows(dtype), None) == 1


@pytest.mark.parametrize("cls", [GateLastNorm, SigmoidLastNorm])
def test_where_a_gate_is_needed_its_absence_is_the_error_that_it_was(cls):
    def errors(m):
        for inputs in ((rows(),), (rows(), None)):
            with pytest.raises((TypeError, AttributeError)) as caught:
                m(*inputs)
            yield type(caught.value), str(caught.value)

    assert list(errors(converted(cls()))) == list(errors(cls()))


def test_what_it_does_without_a_gate_may_be_something_else():
    class Halved(ChoiceNorm):
        def forward(self, hidden_states, gate=None):
            y = super().forward(hidden_states, gate)
            return y / 2 if gate is None else y

    m = converted(Halved())
    assert torch.equal(m(rows()), ChoiceNorm.forward(m, rows()) / 2)
    assert calls(m, rows()) == 0
    assert calls(m, rows(), gates()) == 1


def test_a_norm_in_groups_without_any_gate_is_converted_too():
    class GroupedNorm(_Gated):
        def forward(self, x):
            return self.weight * self.xhat(x.float()).to(x.dtype)

    m = GroupedNorm(64, 4).bfloat16()
    expected = m(rows(BF16))
    (entry,) = normkit.convert(m).converted
    assert (entry.groups, entry.gate) == (4, "")
    assert alike(m(rows(BF16)), expected)
    assert calls(m, rows(BF16)) == 1
    assert m(rows(BF16, 0, 64)).shape == (0, 64)


# ------------------------------------------------------------------------------ what stays as it is


@every_gated
def test_gradients_are_those_of_the_original(cls):
    def gradients(m):
        x, z = rows().requires_grad_(), gates().requires_grad_()
        return torch.autograd.grad(m.train()(x, z).square().mean(), (x, z, m.weight))

    m = cls(64, 4)
    want = gradients(m)
    got = gradients(converted(m))
    assert calls(m, rows(), gates()) == 1
    for mine, other in zip(got, want, strict=True):
        assert (mine - other).norm() < 1e-5 * other.norm()


@every_gated
def test_second_derivatives_are_those_of_the_original(cls):
    m, x, z = cls(64, 4), rows().requires_grad_(), gates().requires_grad_()

    def second():
        first = torch.autograd.grad(m(x, z).pow(3).sum(), (x, z), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, z))

    expected = second()
    converted(m)
    assert calls(m, x, z) == 1
    for mine, other in zip(second(), expected, strict=True):
        assert (mine - other).norm() < 1e-4 * other.norm()


def test_under_gradient_checkpointing_too():
    from torch.utils.checkpoint import checkpoint

    m, gradients = converted(GateFirstNorm()), []
    for through in (m, lambda x, z: checkpoint(m, x, z, use_reentrant=False)):
        x, z = rows().requires_grad_(), gates().requires_grad_()
        through(x, z).square().sum().backward()
        gradients.append(torch.stack([x.grad, z.grad]))
    assert torch.equal(*gradients)


def test_a_revert_is_exact():
    m = nn.Sequential(GateFirstNorm(), LlamaRMSNorm(64))
    before = {name: (type(sub), dict(vars(sub))) for name, sub in m.named_modules()}
    report = normkit.convert(m)
    assert type(m[0]) is not GateFirstNorm
    report.revert()
    assert {name: (type(sub), vars(sub)) for name, sub in m.named_modules()} == before
    assert calls(m[0], rows(), gates()) == 0


def test_copies_are_converted_and_files_have_the_original():
    m, x, z = converted(GateFirstNorm()), rows(), gates()
    other = copy.deepcopy(m)
    other.weight.data.zero_()
    assert other(x, z).abs().max() == 0
    assert calls(other, x, z) == 1
    assert m(x, z).abs().max() > 0
    data = pickle.dumps(m)
    assert b"normkit" not in data
    assert type(pickle.loads(data)) is GateFirstNorm
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    plain = GateFirstNorm()
    plain.load_state_dict(torch.load(file))
    assert near(m(x, z), plain(x, z))


def test_hooks_are_called_with_the_gate():
    m, seen = GateFirstNorm(), []
    m.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    normkit.convert(m)
    m.register_forward_hook(lambda *_: seen.append("after"))
    m(rows(), gate=gates())
    assert torch.equal(seen[0]["gate"], gates())
    assert seen[1:] == ["after"]
    assert calls(m, rows(), gates()) == 1


@every_gated
def test_compiled_it_is_the_graph_of_the_original(cls):
    graphs = []

    def keep(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    m, x, z = cls().bfloat16(), rows(BF16), gates(BF16)
    expected = torch.compile(m, fullgraph=True, backend=keep)(x, gate=z)
    torch.compiler.reset()
    normkit.convert(m)
    assert torch.equal(torch.compile(m, fullgraph=True, backend=keep)(x, gate=z), expected)
    assert graphs[0] == graphs[1]
    assert calls(m, x, z) == 1
    torch.compiler.reset()


@pytest.mark.parametrize(("cls", "default"), [(GateFirstNorm, (None,)), (GateLastNorm, ())])
def test_traced_by_fx_it_has_the_arguments_of_the_original(cls, default):
    m = converted(cls())
    graph = torch.fx.symbolic_trace(m)
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    assert [n.name for n in placeholders] == ["hidden_states", "gate"]
    assert placeholders[1].args == default


def test_a_gate_among_further_arguments_is_found_by_its_name():
    class Scaled(GateFirstNorm):
        def forward(self, hidden_states, scale=None, gate=None):
            y = super().forward(hidden_states, gate)
            return y if scale is None else y * scale

    m, x, z = converted(Scaled()), rows(), gates()
    expected = GateFirstNorm()(x, z)
    assert near(m(x, gate=z), expected)
    assert near(m(x, 2.0, z), expected * 2)
    with normkit.use_backend("cpu"), torch.no_grad():
        assert near(m(gate=z, hidden_states=x), expected)
    with pytest.raises(TypeError, match="multiple values"):
        m(x, None, z, gate=z)


# ------------------------------------------------------------- what was not measured runs as before


def test_gates_of_which_nothing_is_known_go_to_the_original():
    class Marked(Tensor):
        pass

    m, x = converted(GateFirstNorm()), rows()
    others = [
        gates(F32, 64),  # broadcasts
        gates(F32, 2, 1, 64),
        gates(F32, 5, 2, 64).transpose(0, 1),  # y may lie as the gate does
        gates().double(),
        gates().as_subclass(Marked),
    ]
    for z in others:
        y = m(x, z)
        assert calls(m, x, z) == 0
        assert torch.equal(y, GateFirstNorm.forward(m, x, z))
    with torch.autocast("cpu", BF16):
        assert calls(m, x, gates()) == 0
    assert torch.func.vmap(m)(x, gates()).shape == x.shape


def test_strides_of_x_and_gate_are_kept_as_they_were():
    packed = gates(F32, 2, 5, 192)
    pairs = [
        (rows(), packed[..., 64:128]),
        (packed[..., :64], packed[..., 64:128]),
        (rows(F32, 5, 2, 64).transpose(0, 1), gates(F32, 5, 2, 64).transpose(0, 1)),
        (rows(F32, 2, 7, 3, 64).transpose(1, 2), gates(F32, 2, 7, 3, 64).transpose(1, 2)),
        (rows(F32, 7, 64), gates(F32, 7, 64)),
    ]
    for cls in (GateFirstNorm, GateLastNorm):
        m = cls(64, 4)
        expected = [m(*pair) for pair in pairs]
        normkit.convert(m)
        for pair, y in zip(pairs, expected, strict=True):
            assert near(m(*pair), y)
            assert calls(m, *pair) == 1


def test_on_meta_and_with_another_backend_the_original_runs():
    with torch.device("meta"):
        m = GateFirstNorm()
    normkit.convert(m)
    assert m(torch.empty(2, 64, device="meta"), torch.empty(2, 64, device="meta")).is_meta
    m = converted(GateFirstNorm())
    with normkit.use_backend("reference"):
        assert calls(m, rows(), gates()) == 0


class RoundedGate(_Gated):
    def forward(self, hidden_states, gate):
        x = self.weight.float() * self.xhat(hidden_states.float())
        return (x * nn.functional.silu(gate)).to(hidden_states.dtype)


class TanhGateNorm(_Gated):
    def forward(self, hidden_states, gate):
        return self.weight * self.xhat(hidden_states) * gate.tanh()


class WritingGate(_Gated):
    def forward(self, hidden_states, gate):
        return self.weight * self.xhat(hidden_states) * nn.functional.silu(gate, inplace=True)


class ReversedGate(_Gated):
    def forward(self, hidden_states, gate):
        return self.weight * self.xhat(hidden_states) * nn.functional.silu(gate.flip(-1))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (RoundedGate().bfloat16(), "rounds elsewhere, with a gate: at best 0."),
        (TanhGateNorm(), "a gate that is neither silu nor sigmoid"),
        (WritingGate(), "writes into its gate"),
        (ReversedGate(), "rounds elsewhere, with a gate: at best 0."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_gates_that_normkit_has_not_are_left_with_the_reason(module, reason):
    (entry,) = normkit.convert(module).left
    assert reason in entry.reason
    assert type(module) in (RoundedGate, TanhGateNorm, WritingGate, ReversedGate)


def test_a_gate_that_is_rounded_in_16_bits_is_known_in_float32():
    m = converted(RoundedGate())
    assert calls(m, rows(), gates()) == 1
    x, z = rows(BF16), gates(BF16)
    assert torch.equal(m(x, z), RoundedGate.forward(m, x, z))
    assert calls(m, x, z) == 0


# --------------------------------------------------------------------------------------- the report


def test_the_report_says_what_the_gate_does():
    m = nn.ModuleList([GateFirstNorm(64, 4), GateLastNorm(), SigmoidLastNorm()]).bfloat16()
    report = normkit.convert(m, dry_run=True)
    said = [entry.summary() for entry in report.converted]
    assert said == [
        "rms, eps 1e-06, rounded before the weight, in 4 groups, silu of a gate before it",
        "rms, eps 1e-06, rounded before the weight, silu of a gate after it",
        "rms, eps 1e-06, sigmoid of a gate after it",
    ]
    assert report.headline() == "3 of 3 norms would be converted"
    entry = report.converted[0]
    assert entry.equal_share >= 0.995
    assert set(entry.dtypes) == set(DTYPES)
    data = json.loads(report.to_json())
    assert [(e["groups"], e["gate"]) for e in data["converted"]] == [
        (4, "before-silu"),
        (1, "after-silu"),
        (1, "after-sigmoid"),
    ]


ACTIVATIONS = {"silu": nn.functional.silu, "sigmoid": torch.sigmoid}


class ByName(_Gated):
    def forward(self, hidden_states, gate):
        x = self.weight.float() * self.xhat(hidden_states.float())
        return (x * ACTIVATIONS["silu"](gate.float())).to(hidden_states.dtype)


def test_modules_that_read_a_table_of_activations_are_measured_once(monkeypatch):
    from normkit import recognition

    measured = []
    measure = recognition._measured
    monkeypatch.setattr(recognition, "_measured", lambda m: measured.append(m) or measure(m))
    found = [normkit.recognise(ByName().bfloat16()) for _ in range(3)]
    assert len(measured) == 1
    assert found[0] is found[2]
    monkeypatch.setitem(ACTIVATIONS, "silu", torch.sigmoid)
    assert normkit.recognise(ByName().bfloat16()).form.gate == "after-sigmoid"
