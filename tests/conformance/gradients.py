"""Gradients of the ops, and how far they may be from those of float64.

With s what is normalised, xhat = (s - mean) * rstd, g = grad_y * (weight + weight_offset), and the
bound of docs/numerics.md, ulp / 2 * (1 + 2^-9) + 4 * 2^-24 * t:

    u = |s| * rstd, or (|s| + mean(|s|)) * rstd for a layer norm
    of x:       t = 2 * rstd * (|g| + mean(|g|) + u * mean(|g| * u)) + |grad_residual_out|, twice
                what it handles because rstd enters it three times
    of weight:  t = sum(|grad_y| * u)
    of bias:    t = sum(|grad_y|)
    of shift:   t = sum(|grad_y|); of scale: t = sum(|grad_y| * (u * |w| + |bias|))
    of gate:    t = sum(t of h * |x|), where h is the sum; of x: that of h times |gate|
    of z:       t = |grad_y| * (u * |w| + |bias|) * (|act'(z)| + 1)

With a scale, grad_y is grad_y * (1 + scale) in all but the last three lines, and with z it is
grad_y * act(z); the 4 is an 8 in all.
With round_rstd, rstd is in all of this what the forward pass multiplied by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import normkit
from conformance.support import Inputs, Op, run
from normkit.testing import make_inputs

_STORE = 1 + 2.0**-9
_ARITHMETIC = 4 * 2.0**-24
_FUSED = 8 * 2.0**-24  # 1 + scale or act(z), the products with it and with the gate, their sums


class Gradients(NamedTuple):
    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    gate: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    z: Tensor | None = None


class Case(NamedTuple):
    """A call, and what comes back to it."""

    op: Op
    inputs: Inputs
    grad_y: Tensor
    grad_residual_out: Tensor | None
    options: dict[str, Any]


def case_of(
    op: Op, inputs: Inputs, *, grad_dtype: torch.dtype | None = None, **options: Any
) -> Case:
    shape = tuple(inputs.x.shape)
    out_dtype = options.get("out_dtype") or inputs.x.dtype
    grad_y, grad_total, *_ = make_inputs(shape, grad_dtype or out_dtype, seed=7)
    grad_total = grad_total.to(inputs.residual.dtype) if op.adds else None
    return Case(op, inputs, grad_y - 0.25, grad_total, options)


def wanting(op: Op, inputs: Inputs) -> Inputs:
    """The same inputs as leaves that want gradients; those the op does not take are left alone."""
    if op.gated:
        inputs = inputs._replace(z=op.tensor("z", inputs))
    used = {id(t) for t in op.tensors(inputs) if t is not None}
    leaves = (t if t is None or id(t) not in used else t.detach().requires_grad_() for t in inputs)
    return Inputs(*leaves)


def gradients(call: Callable[..., Any], case: Case) -> Gradients:
    """Those of one forward and backward pass."""
    leaves = wanting(case.op, case.inputs)
    result = run(call, case.op, leaves, **case.options)
    wanted = {
        name: t
        for name, t in zip(leaves._fields, leaves, strict=True)
        if t is not None and t.requires_grad
    }
    outputs, grads = [result.y], [case.grad_y.to(result.y.dtype)]
    if case.grad_residual_out is not None:
        outputs.append(result.residual_out)
        grads.append(case.grad_residual_out)
    made = dict(
        zip(wanted, torch.autograd.grad(outputs, list(wanted.values()), grads), strict=True)
    )
    for name, gradient in made.items():
        assert gradient.dtype == wanted[name].dtype
        assert gradient.shape == wanted[name].shape
    return Gradients(*(made.get(name) for name in Gradients._fields))


def check(case: Case, made: Gradients) -> None:
    """Check what `gradients` returned against float64."""
    arithmetic = _FUSED if case.op.fused else _ARITHMETIC
    for name, expected, t in _expected(case):
        got = getattr(made, name)
        assert got is not None, name
        bound = _half_ulp(expected, got.dtype) * _STORE + arithmetic * t
        error = (got.double() - expected).abs()
        over = (error / bound).nan_to_num(torch.inf)
        assert (over <= 1).all(), (
            f"gradient of {name}: {int((over > 1).sum())} of {got.numel()} are out of bounds, the"
            f" worst by {over.max().item():.3g} times: {case.options}"
        )


def make_and_check(call: Callable[..., Any], case: Case) -> Gradients:
    made = gradients(call, case)
    check(case, made)
    return made


def _expected(case: Case) -> list[tuple[str, Tensor, Tensor]]:
    """Name, gradient in float64, and the t of its bound."""
    op, options = case.op, case.options
    s, dtype = _normalised(case)
    rounded_to = dtype if options.get("round_before_weight") else None
    eps = options.get("eps", op.eps)
    layer = op.kind == "layer"
    mean = s.mean(-1, keepdim=True) if layer else torch.zeros_like(s[..., :1])
    columns = 1 if op.of_sum else s.shape[-1]
    statistic = (s - mean).square().sum(-1, keepdim=True) / columns
    outside = options.get("eps_outside", False)
    rstd = (statistic + _float32(eps) * (not outside)).rsqrt()
    if outside:
        rstd = rstd.clamp_max(1 / _float32(eps))
    slack = torch.zeros_like(rstd)
    if options.get("round_rstd"):
        rstd, slack = _rounded(rstd, dtype, _ARITHMETIC * rstd)
    xhat = (s - mean) * rstd
    u = (s.abs() + (s.abs().mean(-1, keepdim=True) if layer else 0.0)) * rstd
    grad_y = case.grad_y.to(options.get("out_dtype") or case.inputs.x.dtype).double()
    (weight, bias), scale, gate = (
        op.affine(case.inputs),
        _double(case, "scale"),
        _double(case, "gate"),
    )
    of_y = grad_y
    z = op.tensor("z", case.inputs) if op.gated else None
    if scale is not None:
        grad_y = grad_y * (1 + scale)
    if z is not None:
        z = z.detach().double().requires_grad_()
        a = torch.nn.functional.silu(z)
        (slope,) = torch.autograd.grad(a.sum(), z)
        grad_y = grad_y * a.detach()
    g = grad_y
    if weight is not None:
        g = g * _whole(weight, options)
    inside = g - xhat * ((g * xhat).sum(-1, keepdim=True) / columns)
    size = g.abs() + u * ((g.abs() * u).sum(-1, keepdim=True) / columns)
    if outside:
        inside = torch.where(statistic.sqrt() < _float32(eps), g, inside)
    if layer:
        inside = inside - g.mean(-1, keepdim=True)
        size = size + g.abs().mean(-1, keepdim=True)
    of_x, t_x = inside * rstd, 2 * size * (rstd + 2 * slack / _ARITHMETIC)
    if case.grad_residual_out is not None:
        of_x = of_x + case.grad_residual_out.double()
        t_x = t_x + case.grad_residual_out.double().abs()
    gated = (of_x, t_x) if gate is None else (of_x * gate, t_x * gate.abs())
    expected = [("x", *gated)]
    if op.adds:
        expected.append(("residual", of_x, t_x))
    if gate is not None:
        x = case.inputs.x.double()
        sums = (of_x * x).sum_to_size(gate.shape), (t_x * x.abs()).sum_to_size(gate.shape)
        expected.append(("gate", *sums))
    if scale is not None or z is not None:
        w = 1.0 if weight is None else _whole(weight, options)
        b = torch.zeros(()) if bias is None else bias.double()
        forward, size = xhat, u * (1 + slack / rstd / _ARITHMETIC)
        if rounded_to is not None:
            forward, more = _rounded(xhat, rounded_to, _ARITHMETIC * u + slack / rstd * u)
            size = size + more / _ARITHMETIC
        n, t = forward * w + b, size * abs(w) + b.abs()
        if z is not None:
            expected.append(("z", of_y * n * slope, of_y.abs() * t * (slope.abs() + 1)))
        else:
            sums = (of_y * n).sum_to_size(scale.shape), (of_y.abs() * t).sum_to_size(scale.shape)
            expected.append(("scale", *sums))
    if op.modulated and case.inputs.shift is not None:
        shape = case.inputs.shift.shape
        expected.append(("shift", of_y.sum_to_size(shape), of_y.abs().sum_to_size(shape)))
    if weight is not None:
        forward, t = xhat, u * grad_y.abs() * (1 + slack / rstd / _ARITHMETIC)
        if rounded_to is not None:
            forward, slack = _rounded(xhat, rounded_to, _ARITHMETIC * u + slack / rstd * u)
            t = t + slack * grad_y.abs() / _ARITHMETIC
        expected.append(
            ("weight", (grad_y * forward).sum_to_size(weight.shape), t.sum_to_size(weight.shape))
        )
    if bias is not None:
        shape = bias.shape
        expected.append(("bias", grad_y.sum_to_size(shape), grad_y.abs().sum_to_size(shape)))
    return expected


def _normalised(case: Case) -> tuple[Tensor, torch.dtype]:
    """What is normalised, and the dtype that options round to."""
    x, residual = case.inputs.x, case.inputs.residual
    rounded_to = x.dtype
    s = x.double()
    if case.op.adds:
        gate = getattr(case.inputs, "gate", None)
        total = (x.float() if gate is None else x.float() * gate.float()) + residual.float()
        s = total.double()
        if case.options.get("round_sum", True):
            s, rounded_to = total.to(residual.dtype).double(), residual.dtype
    return s, rounded_to


def _whole(weight: Tensor, options: dict[str, Any]) -> Tensor:
    """The weight with its offset."""
    offset = _float32(options.get("weight_offset", 0.0))
    if options.get("round_weight") and weight.dtype != torch.float32:
        return (weight.float() + offset).to(weight.dtype).double()
    return weight.double() + offset


def _double(case: Case, name: str) -> Tensor | None:
    t: Tensor | None = getattr(case.inputs, name, None)
    return None if t is None else t.double()


def _rounded(value: Tensor, dtype: torch.dtype, error: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest in dtype, and how far from it the other neighbour is that may be right, too."""
    if dtype == torch.float32:  # which the bound has already
        return value, torch.zeros_like(value)
    nearest = value.to(dtype).double()
    step = 2 * _half_ulp(value, dtype)
    close_call = (value - nearest).abs() >= step / 2 - error
    return nearest, step.where(close_call, 0.0)


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def _half_ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    magnitude = value.abs().clamp(min=info.smallest_normal)
    return magnitude / torch.frexp(magnitude).mantissa / 2 * info.eps / 2


def call(name: str, *tensors: Any, **options: Any) -> Any:
    """What a user calls."""
    return getattr(normkit, name)(*tensors, **options)
