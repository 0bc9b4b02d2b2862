"""A converted model is the same model: its norms are normkit's, and nothing else changes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import normkit
from norm_models import (
    BF16,
    F16,
    F32,
    HeadsNorm,
    LlamaRMSNorm,
    UnweightedNorm,
    calls,
    converted,
    model,
    near,
    rows,
)
from normkit.conversion import _classes, _plan

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
    assert sum(calls(m, x) for x in views) >= (10 if type(m) is nn.LayerNorm else 8)


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


def test_what_writes_into_x_or_gives_other_strides_is_left():
    class InPlaceNorm(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x.mul_(1.0)) * 1.0 if x.requires_grad else self.written(x)

        def written(self, x):
            y = super().forward(x)
            x.zero_()
            return y

    class OtherStridesNorm(LlamaRMSNorm):
        def forward(self, x):
            y = super().forward(x)
            return torch.empty(*reversed(y.shape), dtype=y.dtype).permute(2, 1, 0).copy_(y)

    for cls, reason in ((InPlaceNorm, "writes into x"), (OtherStridesNorm, "lie in memory")):
        (entry,) = normkit.convert(cls(64)).left
        assert reason in entry.reason, entry


def test_an_l2_norm_is_an_l2_norm():
    class L2Norm(nn.Module):
        def forward(self, x):
            y = x.float()
            return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)

    m = L2Norm()
    for n in (64, 100):
        x = rows(BF16, 3, n)
        assert near(converted(L2Norm())(x), m(x))
        assert torch.equal(converted(L2Norm())(x), normkit.l2_norm(x))


# ----------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_weight_that_is_rounded_with_its_offset_is_so_still(dtype):
    class PlusOneLayerNorm(nn.LayerNorm):  # as of Nemotron and VideoPrism
        def forward(self, x):
            weight = self.weight + 1.0
            return nn.functional.layer_norm(x, self.normalized_shape, weight, self.bias, self.eps)

    m = nn.Sequential(PlusOneLayerNorm(64)).to(dtype)
    with torch.no_grad():
        m[0].weight.copy_(torch.linspace(-0.4, 0.4, 64))
    x = rows(dtype)
    expected = m(x)
    (loss_of,) = torch.autograd.grad(expected.float().square().sum(), m[0].weight)
    (entry,) = normkit.convert(m).converted
    assert entry.spec.round_weight == (dtype != F32)
    assert calls(m, x) == 1
    with torch.no_grad():
        assert (m(x) == expected).double().mean() > (0.99 if dtype != F32 else 0.3)
        assert near(m(x), expected)
    (got,) = torch.autograd.grad(m(x).float().square().sum(), m[0].weight)
    torch.testing.assert_close(got, loss_of, rtol=2e-2, atol=2e-2 * loss_of.abs().max().item())


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
    again = normkit.convert(m, strict=True, exclude="1")
    assert [(e.path, e.reason) for e in again.already] == [("0", "is converted already")]


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
    assert [e.reason for e in report.already] == ["is a module of normkit"] * 3


def test_a_second_report_says_which_norms_are_normkits_already():
    m = nn.Sequential(LlamaRMSNorm(64), nn.LayerNorm(64), normkit.RMSNorm(64), nn.BatchNorm1d(5))
    assert normkit.convert(m, include="0").headline() == (
        "1 of 4 norms converted, 1 is normkit's already"
    )
    report = normkit.convert(m, dry_run=True)
    assert report.headline() == "1 of 4 norms would be converted, 2 are normkit's already"
    normkit.convert(m)
    again = normkit.convert(m)
    lines = str(again).splitlines()
    assert lines[0] == "0 of 4 norms converted, 3 are normkit's already"
    assert [line.split()[0] for line in lines[1:]] == ["left", "already", "already", "already"]
    assert "already  1  LayerNorm     is converted already" in lines[3]
    assert "already  1  RMSNorm       is a module of normkit" in lines[4]
    data = json.loads(again.to_json())
    assert [(e["path"], e["reason"]) for e in data["already"]] == [
        ("0", "is converted already"),
        ("1", "is converted already"),
        ("2", "is a module of normkit"),
    ]
    again.revert()  # has nothing to undo
    assert calls(m[:2], rows()) == 2


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
