"""A module is known by what it computes, not by its name or by what its weights happen to be."""

from __future__ import annotations

import math
import re
import time

import pytest
import torch
from torch import Tensor, nn

from normkit import HeadNorm, LayerNorm, RMSNorm, recognise
from normkit._spec import NormSpec
from normkit.recognition import Form

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class Norm(nn.Module):
    """An rms norm in plain torch, of which each test changes one thing."""

    def __init__(self, n: int = 64, eps: float = 1e-6, dtype: torch.dtype = BF16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n, dtype=dtype))
        self.variance_epsilon = eps

    def xhat(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class Llama(Norm):
    def forward(self, x):
        return self.weight * self.xhat(x).to(x.dtype)


class Gemma(Norm):
    def forward(self, x):
        return (self.xhat(x) * (1.0 + self.weight.float())).to(x.dtype)


class OnceRounded(Norm):
    def forward(self, x):
        return (self.xhat(x) * self.weight).to(x.dtype)


def spec_of(module, dtype=BF16):
    found = recognise(module)
    assert not found.reason
    return found.specs[dtype]


# ---------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Llama(), NormSpec("rms", 1e-6, round_before_weight=True)),
        (Llama(eps=3.1e-4), NormSpec("rms", 3.1e-4, round_before_weight=True)),
        (Gemma(), NormSpec("rms", 1e-6, 1.0)),
        (OnceRounded(), NormSpec("rms", 1e-6)),
        (nn.LayerNorm(64, 1e-12).bfloat16(), NormSpec("layer", 1e-12, has_bias=True)),
        (nn.LayerNorm(64, bias=False).bfloat16(), NormSpec("layer", 1e-5)),
        (nn.RMSNorm(64).bfloat16(), NormSpec("rms", torch.finfo(F32).eps)),
        (RMSNorm(64, dtype=BF16, weight_offset=1.0), NormSpec("rms", 1e-6, 1.0)),
        (LayerNorm(64, dtype=BF16), NormSpec("layer", 1e-5, has_bias=True)),
        (HeadNorm(4, 64, kind="layer", dtype=BF16), NormSpec("layer", 1e-6)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_kind_eps_offset_and_rounding_are_measured(module, expected):
    assert spec_of(module) == expected


def test_the_rounding_is_seen_though_a_new_weight_is_all_ones():
    module = Llama()
    assert torch.equal(module.weight, torch.ones(64, dtype=BF16))
    assert spec_of(module).round_before_weight
    assert not spec_of(OnceRounded()).round_before_weight


def test_the_same_name_says_nothing_of_the_rounding():
    first = type("FamilyRMSNorm", (Llama,), {})
    once = type("FamilyRMSNorm", (OnceRounded,), {})
    assert spec_of(first()).round_before_weight
    assert not spec_of(once()).round_before_weight


@pytest.mark.parametrize("n", [8, 64, 2048, 8192])
@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-5, 3e-3])
def test_eps_is_found_at_every_width_and_beside_a_bias(n, eps):
    assert spec_of(nn.LayerNorm(n, eps), F32).eps == eps
    assert spec_of(Llama(n, eps, F32), F32).eps == eps


def test_eps_outside_of_the_root_is_no_norm_of_ours():
    class Outside(Norm):
        def forward(self, x):
            return x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-3) * self.weight

    found = recognise(Outside(dtype=F32))
    assert found.function is None
    assert found.specs == {}
    assert re.search("eps is|no rms or layer norm", found.reason)


def test_an_l2_norm_without_a_weight_is_no_rms_norm_of_another_eps():
    class L2Norm(nn.Module):
        def forward(self, x):
            y = x.float()
            return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)

    found = recognise(L2Norm())
    assert found.function is not None
    assert found.function.is_l2
    assert found.function.spec.eps == 1e-6


def test_a_norm_that_depends_on_the_width_otherwise_is_refused():
    class OfSqrtNorm(nn.Module):
        eps = 1e-6

        def forward(self, x):
            rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
            return x * rstd if x.shape[-1] == 40 else x * rstd * 1.5

    assert recognise(OfSqrtNorm()).reason


def test_an_unused_buffer_does_not_matter_and_one_in_use_does():
    class Weightless(Llama):
        def __init__(self, used):
            super().__init__()
            del self.weight
            self.register_buffer("weight", torch.ones(64), persistent=False)
            self.used = used

        def forward(self, x):
            y = self.xhat(x)
            return (y * self.weight if self.used else y).to(x.dtype)

    Weightless.__name__ = "WeightlessNorm"
    Weightless.normalized_shape = (64,)
    assert not recognise(Weightless(used=False)).reason
    assert recognise(Weightless(used=True)).reason


def test_a_parametrised_weight_is_refused():
    module = Llama(dtype=F32)
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())
    assert recognise(module).reason == "a parameter is parametrised"


def test_a_float32_weight_makes_the_output_of_llama_float32():
    found = recognise(Llama(dtype=F32))
    assert found.specs[BF16].out_dtype == F32
    assert recognise(Gemma(dtype=F32)).specs[BF16].out_dtype is None


def test_an_rstd_that_is_rounded_is_seen():
    class Unweighted(nn.Module):
        eps = 1e-6

        def forward(self, x):
            rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
            return x * rstd.to(x.dtype)

    found = recognise(Unweighted())
    assert not found.reason
    assert found.specs[BF16] == NormSpec("rms", 1e-6, round_rstd=True)
    assert found.specs[F32] == NormSpec("rms", 1e-6)


def test_nothing_is_said_of_float64_which_models_compute_in_float32():
    assert torch.float64 not in recognise(Llama()).specs


class PlusOneRounded(Norm):
    def forward(self, x):
        return (self.xhat(x) * (self.weight + 1)).to(x.dtype)


def test_a_weight_that_is_rounded_with_its_offset_is_seen():
    class Layer(nn.LayerNorm):  # Nemotron's and VideoPrism's
        def forward(self, x):
            weight = self.weight + 1.0
            return nn.functional.layer_norm(x, self.normalized_shape, weight, self.bias, self.eps)

    for module in (PlusOneRounded(), Layer(64).bfloat16()):
        found = recognise(module)
        assert not found.reason
        assert found.specs[BF16].weight_offset == 1.0
        assert found.specs[BF16].round_weight
    assert recognise(PlusOneRounded()).specs[F32].round_weight
    of_float32 = recognise(PlusOneRounded(dtype=F32))
    assert not any(spec.round_weight for spec in of_float32.specs.values())
    assert not recognise(Gemma()).specs[BF16].round_weight


def test_what_rounds_elsewhere_is_said_for_16_bits_and_known_in_float32():
    class ProductRounded(nn.LayerNorm):
        def forward(self, x):
            y = torch.nn.functional.layer_norm(x.float(), (64,), None, None, self.eps).to(x.dtype)
            return self.weight * y + self.bias

    class OfOffset(ProductRounded):
        def forward(self, x):
            y = torch.nn.functional.layer_norm(x.float(), (64,), None, None, self.eps).to(x.dtype)
            return (self.weight + 1) * y + self.bias

    for module, offset in ((OfOffset(64), 1.0), (ProductRounded(64), 0.0)):
        found = recognise(module.bfloat16())
        assert "rounds elsewhere" in found.reasons[BF16]
        assert found.reason == found.reasons[BF16]
        assert found.function.spec.weight_offset == offset


def test_dropout_in_training_is_refused():
    class Dropping(Llama):
        def forward(self, x):
            return torch.nn.functional.dropout(
                super().forward(x), 0.0 if not self.training else 0.5
            )

    assert recognise(Dropping().train()).reason
    assert not recognise(Dropping().eval()).reason


# ------------------------------------------------------------------------------ what is no norm


class NoNorm(Norm):
    def forward(self, x):
        return x * self.weight


class RstdOnly(nn.Module):
    eps = 1e-6

    def forward(self, x):
        return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (NoNorm(), "normalises nothing"),
        (RstdOnly(), "not of x's shape"),
        (nn.GroupNorm(4, 64), "more than a row"),
        (nn.BatchNorm1d(64), "buffer"),
        (nn.Linear(64, 64), "not those of a norm"),
        (nn.Embedding(1000, 64), "not those of a norm"),
        (nn.Sequential(nn.LayerNorm(64)), "children"),
        (nn.GELU(), "neither a parameter nor the name"),
        (nn.PReLU(), "too narrow"),
        (nn.LayerNorm(64, dtype=torch.float64), "float64"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_norm_of_rows_is_refused_with_the_reason(module, reason):
    found = recognise(module)
    assert reason in found.reason
    assert not found.specs
    assert found.function is None


def test_a_table_is_not_probed():
    table = nn.Embedding(30_000, 768)
    start = time.perf_counter()
    recognise(table)
    assert time.perf_counter() - start < 0.1


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module, got str"):
        recognise("LlamaRMSNorm")


# ------------------------------------------------------------------------------------ other forms


def test_gates_groups_and_channels_first_are_told_apart():
    class Gated(Norm):
        def __init__(self, before, sigmoid=False, groups=1):
            super().__init__()
            self.before, self.sigmoid, self.groups = before, sigmoid, groups

        def forward(self, x, gate=None):
            dtype, x = x.dtype, x.float()
            factor = gate.float().sigmoid() if self.sigmoid else nn.functional.silu(gate.float())
            x = x * factor if self.before else x
            y = self.xhat(x.unflatten(-1, (self.groups, -1))).flatten(-2)
            y = self.weight * y.to(dtype)
            return y if self.before else (y * factor).to(dtype)

    class ChannelsFirst(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    assert recognise(Gated(True)).form.gate == "before-silu"
    assert recognise(Gated(False)).form.gate == "after-silu"
    assert recognise(Gated(False, sigmoid=True)).form.gate == "after-sigmoid"
    assert recognise(Gated(True, groups=4)).form.groups == 4
    assert recognise(ChannelsFirst(64)).form.channels_first
    assert recognise(HeadNorm(4, 64)).form.heads == 4
    assert recognise(Llama()).form == Form()


# ------------------------------------------------------------------------- the module is left alone


def test_the_module_is_neither_called_nor_changed():
    module = Llama()
    module.register_forward_hook(lambda *_: pytest.fail("called"))
    module.register_forward_pre_hook(lambda *_: pytest.fail("called"))
    before = dict(module.__dict__)
    assert spec_of(module)
    assert module.__dict__ == before
    assert torch.equal(module.weight, torch.ones(64, dtype=BF16))


def test_a_module_on_meta_is_recognised():
    with torch.device("meta"):
        module = Llama(eps=3.1e-4)
    assert module.weight.is_meta
    assert spec_of(module) == NormSpec("rms", 3.1e-4, round_before_weight=True)


def test_a_forward_replaced_on_the_instance_is_refused_and_a_bound_one_is_not():
    module = Llama()
    module.forward = type(module).forward.__get__(module)
    assert spec_of(module)
    module.forward = lambda x: x
    assert recognise(module).reason == "forward is replaced on the instance"


def test_private_attributes_are_part_of_what_a_module_is():
    class Hidden(Norm):
        def __init__(self, eps):
            super().__init__()
            self._eps = eps

        def forward(self, x):
            y = x.float()
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self._eps)
            return self.weight * y.to(x.dtype)

    assert [spec_of(Hidden(eps)).eps for eps in (1e-6, 1e-5, 1e-6)] == [1e-6, 1e-5, 1e-6]


def test_500_norms_take_less_than_a_second():
    modules = [Llama(256) for _ in range(250)] + [nn.LayerNorm(256) for _ in range(250)]
    recognise(nn.RMSNorm(64))  # what is imported and allocated once
    start = time.thread_time()  # whatever else this machine does
    assert all(not recognise(module).reason for module in modules)
    assert time.thread_time() - start < 1.0


def test_16_bit_outputs_at_the_ends_of_the_range_break_no_bound():
    found = recognise(Llama(1024, dtype=F16))
    assert not found.reason
    assert min(found.equal_shares.values()) > 0.4
    assert found.equal_shares[F16] >= 0.995
    assert math.isfinite(found.equal_shares[F16])


@pytest.mark.parametrize(
    ("module", "layout"),
    [(nn.LayerNorm(64), "packed"), (Llama(dtype=F32), "as x"), (RMSNorm(64), "packed")],
    ids=["LayerNorm", "Llama", "normkit.RMSNorm"],
)
def test_how_y_lies_in_memory_is_measured(module, layout):
    found = recognise(module)
    assert (found.layout, found.writes_x) == (layout, False)


def test_a_view_that_cannot_be_of_every_x_is_no_error():
    class OfRows(Norm):
        def forward(self, x):
            return (self.xhat(x.view(-1, x.shape[-1])) * self.weight).view(x.shape)

    found = recognise(OfRows(dtype=F32))
    assert (found.reason, found.layout) == ("", "")


def test_writing_into_x_is_seen():
    class InPlaceNorm(Norm):
        def forward(self, x):
            rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.variance_epsilon)
            return x.mul_(rstd) * self.weight

    found = recognise(InPlaceNorm(dtype=F32))
    assert (found.reason, found.writes_x) == ("", True)
