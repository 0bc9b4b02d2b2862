"""The measurements: a copy of a module is run, and what it gives is compared with candidates."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normkit._spec import FLOATS, FLOATS_TEXT, Kind, NormSpec
from normkit.functional import head_norm
from normkit.recognition._identity import OF_EVERY_MODULE
from normkit.recognition._result import Form, Function
from normkit.recognition._screen import gate_of, parameters_of
from normkit.reference import offset_weight

# The steps of a norm in float32, in any order, stay this far from float64, in units of 2^-24 of the
# terms of y: torch's own reach 10, normkit's 6; a wrong norm is off by thousands.
_FLOAT32_BOUND = 24.0
# Of 16-bit elements, those that two ways to sum in float32 round alike: 0.998 was the least of
# 1,635 norms. Rounding at another place changes a quarter.
_LEAST_EQUAL_SHARE = 0.995
BIG_GATE = 64.0  # sigmoid of it is 1 in float32, and silu of it itself
_TINY = 2e-12  # its square is nothing beside any eps, and a normal number of float32
_ULP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


class Unknown(Exception):
    """Why a module is no norm that can be told."""


class Probe:
    """A copy of a module on the CPU, with random parameters, that is called with rows.

    Rows are (rows, n) in order, or (rows, heads, n), others for each head, where weights have a row
    per head.
    """

    def __init__(
        self, module: nn.Module, n: int, form: Form, dtype: torch.dtype | None = None
    ) -> None:
        self.n, self.form = n, form
        self._module = _with_random_tensors(module, dtype)
        self._gate = gate_of(module)
        self.dtype = next((p.dtype for p in self.parameters().values()), None)

    def parameters(self) -> dict[str, Tensor]:
        """The random parameters, by name."""
        return parameters_of(self._module)

    def with_tensors(self, values: Mapping[str, Tensor]) -> Probe:
        """The same with these parameters."""
        other = copy.copy(self)
        other._module = _shallow(self._module)
        for name, own in self.parameters().items():
            if name in values:
                other._module._parameters[name] = _frozen(values[name].reshape(own.shape))
        return other

    def rows(self, dtype: torch.dtype, eps: float, seed: int = 7) -> Tensor:
        """Rows that tell candidates apart, in the order that `run` takes."""
        rows = _telling_rows(self.n, dtype, eps, seed)
        if self.form.gate == "before-silu":  # so that `run` divides them without rounding
            rows = rows / BIG_GATE * BIG_GATE
        return self.arranged(rows)

    def arranged(self, rows: Tensor) -> Tensor:
        """The rows for every head, in another order for each: a statistic may be of all heads."""
        heads = self.form.heads
        return torch.stack([rows.roll(head, 0) for head in range(heads)], 1) if heads else rows

    def run(
        self,
        rows: Tensor,
        gate: float | Tensor | None = BIG_GATE,
        outer: tuple[int, ...] = (2, -1),
    ) -> Tensor:
        """What the module gives for rows, in the same order, where x has these outer sizes.

        The gate is the same number everywhere, and then y is the norm; or has rows as x; or is None
        for a call without one.
        """
        form = self.form
        scaled = isinstance(gate, float)
        x = rows / BIG_GATE if scaled and form.gate == "before-silu" else rows
        x = self.in_x(x, outer)
        z = self.in_x(gate, outer) if isinstance(gate, Tensor) else gate
        y = self.call(x, z)
        if type(y) not in (Tensor, nn.Parameter) or y.shape != x.shape:
            raise Unknown("y is not of x's shape")
        if y.dtype not in FLOATS or y.layout != torch.strided or y.device.type != "cpu":
            raise Unknown(f"y is not of {FLOATS_TEXT} as x is")
        if form.channels_first:
            y = y.movedim(1, -1)
        like_rows: Tensor = y.reshape(rows.shape)
        return like_rows / BIG_GATE if scaled and form.gate == "after-silu" else like_rows

    def in_x(self, rows: Tensor, outer: tuple[int, ...] = (2, -1)) -> Tensor:
        """A new x of these outer sizes: some norms write into it."""
        if self.form.channels_first:  # images, of height 1 where nobody says another
            outer = outer if len(outer) == 3 else (outer[0], 1, outer[1])
        x = rows.reshape(*outer, *rows.shape[1:])
        if self.form.channels_first:
            x = x.movedim(-1, 1)
        return x.clone(memory_format=torch.contiguous_format)

    def call(self, x: Tensor, gate: float | Tensor | None) -> Any:
        """What the module gives, which must leave it as it was."""
        module = self._module
        before, tensors = _state(module), [t.clone() for t in _tensors(module)]
        z = torch.full_like(x, gate) if isinstance(gate, float) else gate
        given = {} if self._gate is None else {self._gate: z}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as of torch's for dtypes that are probed on purpose
            try:
                y = type(module).forward(module, x, **given)
            except Exception as error:  # whatever a module's own code raises
                text = " ".join(str(error).split())[:80]
                raise Unknown(
                    f"does not take x of {tuple(x.shape)}: {type(error).__name__}: {text}"
                ) from error
        if _state(module) != before or not all(map(torch.equal, _tensors(module), tensors)):
            raise Unknown("it changes itself when it is called")
        return y

    def differs_in_eval(self) -> bool:
        """Whether evaluation gives other bits than training, as with dropout."""
        other = copy.copy(self)
        other._module = _shallow(self._module)
        other._module.training = not self._module.training
        x = self.rows(self.dtype or torch.float32, 1e-6)
        return not torch.equal(other.run(x), self.run(x))

    def writes_x(self) -> bool:
        """Whether a call changes its x."""
        x = self.in_x(self.rows(self.dtype or torch.float32, 1e-6))
        before = x.clone()
        self.call(x, BIG_GATE)
        return not torch.equal(x, before)


def _shallow(module: nn.Module) -> nn.Module:
    """A copy with containers of its own, and no hooks."""
    try:
        other = copy.copy(module)
        for name, value in other.__dict__.items():
            if isinstance(value, (list, dict, set)) and name not in OF_EVERY_MODULE:
                other.__dict__[name] = copy.deepcopy(value)
    except Exception as error:  # whatever a module's own code raises
        raise Unknown(f"cannot be copied: {type(error).__name__}") from error
    other._parameters, other._buffers = dict(module._parameters), dict(module._buffers)
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        setattr(other, hooks, type(getattr(module, hooks))())
    return other


def _state(module: nn.Module) -> dict[str, object]:
    """What a module could remember a call with; a container or object by its text."""
    return {
        name: value if isinstance(value, (int, float, str, bytes)) else repr(value)
        for name, value in module.__dict__.items()
        if name not in OF_EVERY_MODULE
    }


def _tensors(module: nn.Module) -> list[Tensor]:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [t for t in tensors if t is not None]


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _with_random_tensors(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The module with other tensors: full mantissas and both signs, and two far from the others.

    At the weights of a new model, ones, no rounding can be seen; where none is negative or large,
    no limit that they are held to.
    """
    generator = torch.Generator().manual_seed(3)

    def like(t: Tensor, to: torch.dtype | None = None) -> Tensor:
        values = normal(generator, *t.shape) * 0.5 + 0.4
        values.view(-1)[:2] = torch.tensor([-11.3, 19.7], dtype=torch.float32)[: t.numel()]
        return values.to(to or t.dtype)

    other = _shallow(module)
    other._parameters = {
        name: None if p is None else _frozen(like(p, dtype))
        for name, p in module._parameters.items()
    }
    other._buffers = {name: None if b is None else like(b) for name, b in module._buffers.items()}
    return other


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Random numbers of float32."""
    # the default dtype is the caller's
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _telling_rows(n: int, dtype: torch.dtype, eps: float, seed: int) -> Tensor:
    """22 rows: of several scales, with a large mean, a spike, about sqrt(eps), and of zeros."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: int) -> Tensor:
        return normal(generator, rows, n)

    small = math.sqrt(eps) if eps else 1e-3
    spike = drawn(2)
    spike[:, n // 3] += 40.0
    largest = 3e3 if dtype == torch.float16 else 3e15
    scaled = [drawn(6), drawn(2) * 50, drawn(2) * 1e-2, drawn(3) + 20, spike]
    of_eps = [drawn(2) * small, drawn(2) * small * 4, drawn(1) * small * 0.2]
    ends = [drawn(1) * largest, torch.zeros(1, n, dtype=torch.float32)]
    return torch.cat(scaled + of_eps + ends).to(dtype)


# ------------------------------------------------------------------------------ what it computes


def tensors_of(function: Function, probe: Probe) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a probe, with a row for every head or group."""
    given, form = probe.parameters(), probe.form
    shape = (form.heads or form.groups, -1) if form.heads or form.groups > 1 else (-1,)
    weight, bias = (
        None if name is None else given[name].reshape(shape)
        for name in (function.weight, function.bias)
    )
    return weight, bias


def measured_eps(probe: Probe) -> float:
    """Measure eps on rows so small that it is all of the statistic, then match a number written.

    The slope there is weight / sqrt(eps).  One parameter is 1 and the others 0, since a bias of 1
    would hide it.
    """
    parameters = probe.parameters()
    names: list[str | None] = list(parameters)
    x = torch.zeros_like(probe.rows(torch.float32, 1e-6))
    x[..., 0], x[..., 1] = _TINY, -_TINY  # a mean of 0
    width = probe.n // probe.form.groups
    slope, scale = 0.0, 1.0
    for name in names or [None]:
        given = {k: torch.full_like(p, float(k == name)) for k, p in parameters.items()}
        one = probe.with_tensors(given)
        at_zero = one.run(torch.zeros_like(x)).double()
        large = _mean(one.run(x * (1e3 / _TINY)).double() - at_zero) / math.sqrt(width / 2)
        if large > scale or (slope == 0 and large > 0):
            scale, slope = large, _mean(one.run(x).double() - at_zero) / _TINY
    if not math.isfinite(slope) or slope <= 0:
        raise Unknown("eps is not where a norm has it")
    measured = (scale / slope) ** 2
    if measured < 1e-20:
        return 0.0
    if not names and abs(scale * math.sqrt(width) - 1) < 1e-3:
        measured *= width  # added to a sum of squares
    nearest = min(_numbers_written(probe), key=lambda value: abs(math.log(value / measured)))
    if abs(nearest / measured - 1) > 1e-3:
        raise Unknown(f"eps is about {measured:.3g}, which no attribute is")
    return nearest


def _mean(y: Tensor) -> float:
    return y[..., 0].abs().mean().item()


def _numbers_written(probe: Probe) -> Iterator[float]:
    for value in probe._module.__dict__.values():
        if isinstance(value, (int, float)) and 0 < value < math.inf and value < 1e30:
            yield float(value)
    yield torch.finfo(torch.float32).eps
    yield from (digit * 10.0**-power for power in range(3, 16) for digit in (1, 2, 5))


def measured_function(probe: Probe, eps: float) -> Function:
    """The candidate whose float64 the module's float32 is near to."""
    x = probe.rows(torch.float32, eps)
    y = probe.run(x).double()
    errors = [(_error(y, x, probe, one), one) for one in _candidates(eps, list(probe.parameters()))]
    error, best = min(errors, key=lambda pair: pair[0])
    if not error < _FLOAT32_BOUND:
        raise Unknown(
            f"no rms or layer norm; the nearest, {best.spec.kind} with an offset of"
            f" {best.spec.weight_offset:g}, is off by {error:.3g} of 2^-24 of its terms"
        )
    if not agreement(probe, best, best.spec, torch.float32)[1]:
        raise Unknown("its eps is none that is added under the root")
    _check_of_any_shape(probe, x, best)
    _check_not_finite(probe, x)
    return best


def _check_of_any_shape(probe: Probe, x: Tensor, function: Function) -> None:
    """Raise if x with other outer sizes, of those that it takes, is normalised otherwise."""
    images = ((1, 2, -1), (2, -1, 1), (-1, 1, 2))
    others = ((-1,), (-1, 1), (1, -1), (2, 1, -1))
    for outer in images if probe.form.channels_first else others:
        try:
            y = probe.run(x, outer=outer)
        except Unknown:
            continue
        if not _error(y.double(), x, probe, function) < _FLOAT32_BOUND:
            raise Unknown("what it computes depends on the shape of x")


def _check_not_finite(probe: Probe, x: Tensor) -> None:
    """Raise if an infinity or a NaN does not reach y."""
    given = x.clone()
    given.view(-1, probe.n)[:2, 0] = torch.tensor([math.inf, math.nan], dtype=x.dtype)
    if probe.run(given).view(-1, probe.n)[:2, 0].isfinite().any():
        raise Unknown("it hides infinities or NaN of x")


def _candidates(eps: float, names: list[str]) -> Iterator[Function]:
    pairs: list[tuple[str | None, str | None]] = [(None, None)]
    if len(names) == 1:
        pairs = [(names[0], None), (None, names[0])]
    elif names:
        pairs = [(names[0], names[1]), (names[1], names[0])]
    kinds: tuple[Kind, ...] = ("rms", "layer")
    for kind, (weight, bias) in itertools.product(kinds, pairs):
        for offset in (0.0, 1.0) if weight else (0.0,):
            spec = NormSpec(kind, eps, offset, has_bias=bias is not None)
            yield Function(spec, weight, bias)
    if not names:
        yield Function(NormSpec("rms", eps), None, None, is_l2=True)


def _error(y: Tensor, x: Tensor, probe: Probe, candidate: Function) -> float:
    """The largest distance from float64, in units of 2^-24 of the terms that make y."""
    true, terms = exact(x, probe, candidate)
    return ((y - true).abs() / terms).nan_to_num(math.inf).max().item() * 2**24


def exact(x: Tensor, probe: Probe, candidate: Function) -> tuple[Tensor, Tensor]:
    """Give y in float64, and what its rounding errors scale with: its terms without their signs."""
    weight, bias = tensors_of(candidate, probe)
    spec, rows = candidate.spec, in_groups(x, probe.form).double()
    size = rows.abs()
    if spec.kind == "layer":
        mean = rows.mean(-1, keepdim=True)
        rows, size = rows - mean, size + size.mean(-1, keepdim=True)
    squares = rows.square()
    statistic = (squares.sum if candidate.is_l2 else squares.mean)(-1, keepdim=True)
    rstd = torch.rsqrt(statistic + (spec.eps or 0.0))
    if spec.eps == 0:
        rstd = rstd.nan_to_num(posinf=0.0)
    scale = (
        1.0
        if weight is None
        else offset_weight(weight, spec.weight_offset, torch.float64, spec.round_weight)
    )
    added = 0.0 if bias is None else bias.double()
    magnitude = 1.0 if weight is None else weight.double().abs() + abs(spec.weight_offset)
    terms = size * rstd * magnitude + (0.0 if bias is None else bias.double().abs())
    y = rows * rstd * scale + added
    return y.reshape(x.shape), terms.reshape(x.shape) + 1e-30


def in_groups(x: Tensor, form: Form) -> Tensor:
    """Rows with a dimension for the parts that have a statistic of their own."""
    return x.reshape(*x.shape[:-1], form.groups, -1) if form.groups > 1 else x


# ------------------------------------------------------------------------------- where it rounds


def measured_dtypes(
    probe: Probe, function: Function
) -> tuple[dict[torch.dtype, NormSpec], dict[torch.dtype, float], dict[torch.dtype, str]]:
    """What it computes for each dtype of x, the shares of equal elements, and what is not known."""
    specs: dict[torch.dtype, NormSpec] = {}
    shares: dict[torch.dtype, float] = {}
    reasons: dict[torch.dtype, str] = {}
    for dtype in FLOATS:
        try:
            specs[dtype], shares[dtype] = _rounding(probe, function, dtype)
        except Unknown as why:
            reasons[dtype] = str(why)
    return specs, shares, reasons


def _rounding(probe: Probe, function: Function, dtype: torch.dtype) -> tuple[NormSpec, float]:
    no_or_yes, offset = (False, True), function.spec.weight_offset
    within = no_or_yes if dtype != torch.float32 else (False,)
    places = itertools.product(
        # Of float32 it is no other number; and what need not be rounded comes first.
        no_or_yes if offset and probe.dtype != torch.float32 else (False,),
        within,
        within if function.weight else (False,),
    )
    specs = [
        replace(function.spec, round_rstd=rstd, round_before_weight=first, round_weight=weight)
        for weight, rstd, first in places
    ]
    tried = [(agreement(probe, function, spec, dtype), spec) for spec in specs]
    (share, near), spec = max(tried, key=lambda pair: pair[0][0])
    if not near:
        raise Unknown(f"rounds elsewhere: at best {share:.4f} of the elements are equal")
    x = probe.rows(dtype, function.spec.eps or 0.0)
    _check_not_finite(probe, x)
    out_dtype = probe.run(x).dtype
    return replace(spec, out_dtype=None if out_dtype == dtype else out_dtype), share


def agreement(
    probe: Probe,
    function: Function,
    spec: NormSpec,
    dtype: torch.dtype,
    gate: float | None = BIG_GATE,
) -> tuple[float, bool]:
    """The share of elements with normkit's bits for x of a dtype, and whether it is the same norm.

    In 16 bits nearly all must be equal; in float32 sums differ in their last bits, and all must be
    as near as those let them.
    """
    x = many_rows(probe, dtype, spec.eps or 0.0)
    y, function = probe.run(x, gate), replace(function, spec=spec)
    ours = _ours(x, probe, function, y.dtype)
    _, terms = exact(x, probe, function)
    return share_of_equals(y, ours, terms, [dtype] * spec.round_before_weight)


def many_rows(probe: Probe, dtype: torch.dtype, eps: float) -> Tensor:
    """As many rows as tell a share of 0.995 from 0.99, which 10,000 elements do."""
    seeds = (7,) if dtype == torch.float32 or probe.n >= 512 else (7, 8, 9)
    return torch.cat([probe.rows(dtype, eps, seed) for seed in seeds])


def share_of_equals(
    y: Tensor, ours: Tensor, terms: Tensor, rounded_to: Sequence[torch.dtype]
) -> tuple[float, bool]:
    """The share of elements with normkit's bits, and whether all are as near as they must be.

    On the way to y, results were rounded to these dtypes.
    """
    finite = y.isfinite()
    if not torch.equal(finite, ours.isfinite()):
        return 0.0, False
    step = max((_ULP[dtype] for dtype in rounded_to), default=0.0)
    step = max(step, _ULP[y.dtype] if y.dtype != torch.float32 else 0.0)
    step *= max(2, 1 + len(rounded_to))
    smallest = torch.finfo(y.dtype).tiny
    bound = step * (y.double().abs() + smallest) + _FLOAT32_BOUND * 2**-24 * terms
    near = (ours.double() - y.double()).abs()[finite] <= bound[finite]
    share = (ours == y)[finite].double().mean().item()
    enough = y.dtype == torch.float32 or share >= _LEAST_EQUAL_SHARE
    return share, enough and bool(near.all())


def _ours(x: Tensor, probe: Probe, function: Function, out_dtype: torch.dtype) -> Tensor:
    spec, rows = function.spec, in_groups(x, probe.form)
    y = head_norm(  # of rows, too, which are heads with one weight
        rows,
        *arguments_of(function, probe, rows.shape[-1]),
        kind=spec.kind,
        weight_offset=spec.weight_offset,
        round_before_weight=spec.round_before_weight,
        round_rstd=spec.round_rstd,
        round_weight=spec.round_weight,
        out_dtype=out_dtype,
    )
    return y.reshape(x.shape)


def arguments_of(
    function: Function, probe: Probe, n: int
) -> tuple[Tensor | None, Tensor | None, float | None]:
    """Weight, bias and eps of the call of normkit that computes the same of rows of n."""
    weight, bias = tensors_of(function, probe)
    eps = function.spec.eps
    if function.is_l2:
        weight, eps = torch.full((n,), n**-0.5, dtype=torch.float32), (eps or 0.0) / n
    return weight, bias, eps
