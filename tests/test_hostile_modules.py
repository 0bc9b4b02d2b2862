"""Modules that look like a norm and are none, and what recognising one must leave as it was."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import Tensor, nn

from normkit import recognise

GLOBAL = 1.0


class Norm(nn.Module):
    """An rms norm in plain torch, of which each test changes one thing."""

    factor = 1.0

    def __init__(self, n: int = 64, **attributes: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n, dtype=torch.float32))
        self.eps = 1e-6
        for name, value in attributes.items():
            setattr(self, name, value)

    def rms(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.rms(x) * self.weight * self.factor


def fresh(forward=Norm.forward, **members):
    """A class that nothing is known of."""
    return type("FreshNorm", (Norm,), {"forward": forward, **members})


# ------------------------------------------------------------------------------- wrongly a norm


@pytest.mark.parametrize("n", [4, 8, 16, 64])
@pytest.mark.parametrize(
    "held",
    [torch.abs, torch.relu, lambda w: w.clamp(max=1.5), lambda w: w.clamp(-8, 8), torch.exp],
)
def test_a_weight_that_is_held_to_a_range_is_seen_at_every_width(n, held):
    assert recognise(fresh(lambda self, x: self.rms(x) * held(self.weight))(n)).reason


@pytest.mark.parametrize(
    "module",
    [nn.LayerNorm((4, 16)), nn.RMSNorm((4, 16)), nn.LayerNorm((4, 16), bias=False)],
)
def test_a_statistic_of_two_dimensions_is_no_norm_of_heads(module):
    assert "more than a row" in recognise(module).reason


@pytest.mark.parametrize(
    "is_other",
    [
        lambda x: x.ndim == 2,
        lambda x: x.ndim == 4,
        lambda x: x.shape[0] == 1,
        lambda x: x.shape[-2] == 1,
    ],
    ids=["rows", "images", "one sequence", "one token"],
)
def test_a_forward_that_depends_on_the_shape_of_x_is_refused(is_other):
    cls = fresh(lambda self, x: x * self.weight if is_other(x) else Norm.forward(self, x))
    assert recognise(cls()).reason == "what it computes depends on the shape of x"


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: Norm.forward(self, x.nan_to_num()), "hides infinities"),
        (lambda self, x: Norm.forward(self, x.clamp(-1e7, 1e7)), "no rms or layer norm"),
        (lambda self, x: Norm.forward(self, x.double()), "y is not of float32"),
        (lambda self, x: Norm.forward(self, x).to(torch.complex64), "y is not of float32"),
        (lambda self, x: Norm.forward(self, x).to_sparse(), "y is not of float32"),
        (lambda self, x: x.to("meta"), "y is not of float32"),
        (lambda self, x: x * self.weight / x.norm(dim=-1, keepdim=True).clamp(1e-12) * 8, "eps"),
    ],
)
def test_what_is_nearly_a_norm_is_refused_with_the_reason(forward, reason):
    found = recognise(fresh(forward)())
    assert reason in found.reason
    assert found.function is None


def test_a_gate_is_known_by_what_it_does_below_zero_too():
    def forward(self, x, gate=None):
        return Norm.forward(self, x) * nn.functional.silu(gate).abs()

    assert "gate" in recognise(fresh(forward)()).reason
    assert "gate" in recognise(fresh(lambda self, x, gate=None: Norm.forward(self, x))()).reason


def test_an_argument_that_is_called_almost_like_a_gate_is_none():
    assert not recognise(fresh(lambda self, x, aggregate=False: Norm.forward(self, x))()).reason


def test_a_call_that_does_more_than_forward_is_refused():
    class Twice(Norm):
        def __call__(self, x):
            return super().__call__(x) * 2

    assert recognise(Twice()).reason == "a call of it does more than forward"


def test_tensors_and_modules_that_torch_does_not_know_of_are_refused():
    assert "tensor" in recognise(Norm(scale=torch.ones(64))).reason
    assert "module" in recognise(Norm(inner=[nn.LayerNorm(64)])).reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert "tensor" in recognise(nn.utils.weight_norm(nn.LayerNorm(64), dim=None)).reason


def test_a_module_that_remembers_its_calls_is_refused_and_not_changed():
    def count(self, x):
        self.calls += 1
        return Norm.forward(self, x)

    def append(self, x):
        self.calls.append(1)
        return Norm.forward(self, x)

    def hold(self, x):
        self.weight.data.clamp_(-1, 1)
        return Norm.forward(self, x)

    for module in (fresh(count)(calls=0), fresh(append)(calls=[]), fresh(hold)(calls=0)):
        before = module.calls
        assert recognise(module).reason == "it changes itself when it is called"
        assert module.calls == before in (0, [])


def test_what_cannot_be_copied_is_refused():
    def refuse(self, protocol):
        raise RuntimeError("no copy")

    assert "cannot be copied" in recognise(fresh(__reduce_ex__=refuse)()).reason


def test_numbers_of_any_size_are_no_eps():
    assert not recognise(Norm(limit=10**400)).reason


# ------------------------------------------------------------------------------- what is remembered


def test_a_result_is_forgotten_with_what_it_came_from(monkeypatch):
    numbers = [1.0]

    def helped(self, x):
        return Norm.forward(self, x) * GLOBAL * numbers[0]

    for change in (
        lambda cls: monkeypatch.setattr(cls, "factor", 2.0, raising=False),
        lambda cls: monkeypatch.setattr(cls, "forward", lambda self, x: x),
        lambda cls: monkeypatch.setattr(cls, "rms", lambda self, x: x * 2, raising=False),
        lambda cls: monkeypatch.setitem(globals(), "GLOBAL", 3.0),
        lambda cls: numbers.__setitem__(0, 2.0),
    ):
        with monkeypatch.context():
            cls = fresh(helped)
            assert not recognise(cls()).reason
            change(cls)
            assert recognise(cls()).reason
        monkeypatch.undo()


def test_norms_of_torch_and_of_us_are_measured_once():
    for make in (lambda: nn.LayerNorm(72), lambda: nn.RMSNorm(72), lambda: Norm(72)):
        first = recognise(make())
        assert recognise(make()) is first


def test_a_function_that_holds_itself_is_no_end_of_looking():
    def wrap(function):
        def again(self, x):
            return again.function(self, x) if again else None

        again.function = function
        return again

    found = recognise(fresh(wrap(Norm.forward))())
    assert found.reason == ""


# --------------------------------------------------------------------------- what is left as it was


def test_neither_random_numbers_nor_warnings_are_changed():
    state, filters = torch.get_rng_state(), list(warnings.filters)
    recognise(fresh(lambda self, x: Norm.forward(self, x) + 0 * torch.rand(1))())
    classes = [fresh() for _ in range(24)]
    reasons: list[str] = []

    def run(part: list[type[Norm]]) -> None:
        reasons.extend(recognise(cls()).reason for cls in part)

    threads = [threading.Thread(target=run, args=(classes[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reasons == [""] * 24
    assert torch.equal(torch.get_rng_state(), state)
    assert warnings.filters == filters


@pytest.mark.parametrize("where", ["meta", "autocast", "float64", "inference", "deterministic"])
def test_what_the_caller_has_set_makes_no_difference(where):
    settings = {
        "meta": lambda: torch.device("meta"),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "inference": torch.inference_mode,
    }
    module = fresh()()
    expected = recognise(fresh()()).specs
    assert expected
    if where == "float64":
        torch.set_default_dtype(torch.float64)
    if where == "deterministic":
        torch.use_deterministic_algorithms(True)
    try:
        with settings.get(where, torch.no_grad)():
            assert recognise(module).specs == expected
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


def test_nothing_is_remembered_of_a_mode_in_which_nothing_is_computed():
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = fresh()()
    with FakeTensorMode():
        assert "FakeTensorMode" in recognise(module).reason
    assert not recognise(module).reason
