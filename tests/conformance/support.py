"""What the tests of this suite share: the ops, ways to call them, and bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import normkit
from normkit import _spec, reference, testing
from normkit._spec import FLAGS, PLAIN_OPTIONS
from normkit.reference import rotation

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (
    *(1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 96, 100, 127, 128, 129, 255, 256, 257),
    *(768, 1000, 1024, 4096, 4104, 5120, 8192, 12288),
)
dtypes = st.sampled_from(DTYPES)
# The options that round something on the way to y.
ROUNDINGS = tuple(flag for flag in FLAGS if flag.startswith("round_") and flag in PLAIN_OPTIONS)

# Without kernels the reason why none serves is always that there are none.
needs_kernels = pytest.mark.skipif(
    not normkit.backends()["cpu"].usable, reason="the automatic choice has nothing to choose from"
)

Call = Callable[..., Any]


class Inputs(NamedTuple):
    """Those of `testing.make_inputs`, and of fused norms."""

    x: Tensor
    residual: Tensor
    weight: Tensor | None
    bias: Tensor | None
    gate: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    z: Tensor | None = None
    next_weight: Tensor | None = None
    next_bias: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None


class Op(NamedTuple):
    """A norm: its function, and what it is made of."""

    name: str
    kind: str
    adds: bool = False  # a residual, to x as it is
    per_head: bool = False
    modulated: bool = False
    gated: bool = False
    post: bool = False
    of_sum: bool = False
    rotated: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{self.kind}" if self.selected else self.name

    @property
    def fused(self) -> bool:
        """Whether more than a sum stands around the norm."""
        return self.modulated or self.gated or self.post or self.rotated

    @property
    def has_next(self) -> bool:
        """Whether the sum with what was normalised is normalised."""
        return self.name == "norm_add_norm"

    @property
    def returns_both(self) -> bool:
        """Whether it returns a sum next to y."""
        return self.adds or self.has_next

    @property
    def selected(self) -> dict[str, Any]:
        """The options that make the function this op."""
        return {"kind": self.kind} if self.per_head or self.fused else {}

    @property
    def eps(self) -> float:
        """The default."""
        return 1e-5 if self.name in ("layer_norm", "add_layer_norm") else 1e-6

    @property
    def takes(self) -> tuple[str, ...]:
        """The names of its tensors, in the order of a call."""
        if self.of_sum:
            return ("x",)
        modulated = ("scale", "shift") * self.modulated
        gate = ("gate",) * (self.adds and self.modulated)
        if self.has_next:
            return ("x", "residual", "weight", "next_weight", "bias", "next_bias")
        residual = ("residual",) * (self.adds or self.post)
        z, table = ("z",) * self.gated, ("cos", "sin") * self.rotated
        return ("x", *residual, *gate, *modulated, *z, *table, "weight", "bias")

    def affine(self, inputs: Any) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias, as far as it takes them."""
        return (None, None) if self.of_sum else (inputs.weight, inputs.bias)

    def tensors(self, inputs: Any) -> list[Any]:
        return [self.tensor(name, inputs) for name in self.takes]

    def tensor(self, name: str, inputs: Any) -> Any:
        """One of them; x gates itself where there is no z, so that each row has its own."""
        made = getattr(inputs, name, None)
        if made is None and name in ("cos", "sin"):
            angles = torch.arange(inputs.x.shape[-1] // 2, device=inputs.x.device) + 0.5
            return angles.cos() if name == "cos" else angles.sin()
        return inputs.x if name == "z" and made is None else made


def kinds_of(spec: _spec.Op) -> tuple[str, ...]:
    """The kinds of an op that this suite takes."""
    if spec.of_sum:
        return ("l2",)
    if spec.layer is not None:
        return ("layer",) if spec.layer else ("rms",)
    # The other kind of these is seen in tests of their own: the suite has to be quick.
    if spec.fused:
        return (spec.fields["kind"].default,)
    return ("rms", "layer")


EVERY = tuple(
    Op(
        spec.name,
        kind,
        spec.adds and not spec.post,
        spec.per_head and not spec.gated,
        spec.modulated,
        spec.gated,
        spec.post,
        spec.of_sum,
        spec.rotated,
    )
    for spec in _spec.OPS.values()
    for kind in kinds_of(spec)
)
# The others begin with a norm and end with a sum, a norm of that, or a rotation: test_post_norm.py
# and test_rotation.py are about them, and the tests that take EVERY.
POST = tuple(op for op in EVERY if op.post)
ROTATED = tuple(op for op in EVERY if op.rotated)
OPS = tuple(op for op in EVERY if not (op.post or op.rotated))
RMS, LAYER, HEAD_RMS, HEAD_LAYER, ADD_RMS, ADD_LAYER, ADD_HEAD_RMS, ADD_HEAD_LAYER = OPS[:8]
# Each of ADDING normalises the sum as the one of PLAIN in its place does.
PLAIN, ADDING = (tuple(op for op in OPS if op.adds is adds) for adds in (False, True))
# Those with weight and bias, and options of these.
AFFINE, EVERY_AFFINE = (tuple(op for op in ops if not op.of_sum) for ops in (OPS, EVERY))
# Those whose results go by numbers of x alone.
NOT_GATED = tuple(op for op in OPS if not op.gated)
NOT_GATED_PLAIN = tuple(op for op in NOT_GATED if not op.adds)
NOT_GATED_AFFINE = tuple(op for op in AFFINE if not op.gated)
NOT_GATED_AFFINE_PLAIN = tuple(op for op in NOT_GATED_AFFINE if not op.adds)
# Those that end with the norm, for what only the norm itself shows.
BARE = tuple(op for op in OPS if not (op.fused or op.of_sum))
BARE_PLAIN, BARE_ADDING = (tuple(op for op in BARE if op.adds is adds) for adds in (False, True))


# Those whose x and output may have columns further apart than an element.
STRIDED = tuple(op for op in OPS if not (op.adds or op.fused))


class Result(NamedTuple):
    y: Tensor
    residual_out: Tensor | None


def run(call: Call, op: Op, inputs: Inputs, **options: Any) -> Result:
    """Call op out of place."""
    made = call(op.name, *op.tensors(inputs), **op.selected, **options)
    return Result(*made) if op.returns_both else Result(made, None)


def run_in_place(call: Call, op: Op, inputs: Inputs, **options: Any) -> Result:
    """Call op's in-place form on copies, and check that it returns what it was given."""
    x, residual = inputs.x.clone(), inputs.residual.clone()
    given = op.tensors(inputs._replace(x=x, residual=residual))
    made = call(f"{op.name}_", *given, **op.selected, **options)
    if not op.returns_both:
        written = residual if op.post else x
        assert made is written
        return Result(written, None)
    assert made[0] is x
    assert made[1] is residual
    return Result(x, residual)


def check(op: Op, result: Result, inputs: Inputs, **options: Any) -> None:
    """Check what `run` returned against float64."""
    if op.post:
        _check_post_norm(op, result, inputs, **options)
        return
    if op.rotated:
        _check_rotated(op, result, inputs, **options)
        return
    options.pop("out_dtype", None)
    if op.adds:
        options |= {"residual": inputs.residual, "residual_out": result.residual_out}
    options.setdefault("eps", op.eps)
    fused = [name for name in op.takes if name in _spec.FUSED_TENSORS]
    options |= {name: op.tensor(name, inputs) for name in fused}
    testing.assert_accurate(result.y, inputs.x, *op.affine(inputs), kind=op.kind, **options)


def _check_post_norm(
    op: Op,
    result: Result,
    inputs: Inputs,
    *,
    eps: float | None = 1e-6,
    next_eps: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    round_norm: bool = True,
    out_dtype: torch.dtype | None = None,
    **options: Any,
) -> None:
    """The sum within the bound of the norm and its own roundings, y within that of its norm."""
    given = inputs.x, inputs.weight, inputs.bias, eps
    options["kind"] = op.kind
    of_norm = inputs.x.dtype if round_norm else torch.float32
    n = reference.norm(*given, **options, out_dtype=torch.float64, compute_dtype=torch.float64)
    error = testing.error_bound(*given, **options, out_dtype=of_norm)
    kept = alpha * inputs.residual.double()
    h = result.residual_out if op.has_next else result.y
    total, bound = kept + beta * n, abs(beta) * error + 2.0**-22 * (kept.abs() + (beta * n).abs())
    if round_norm and beta != 1.0:
        bound = bound + half_ulp(beta * n, of_norm)
    if round_norm and alpha != 1.0:
        bound = bound + half_ulp(kept, h.dtype)
    close = (h.double() - total).abs() <= bound + half_ulp(total, h.dtype) * (1 + 2**-9)
    assert (close | ~total.isfinite()).all(), f"{int((~close).sum())} elements of h are off"
    assert (h.isnan() == total.isnan()).all()
    if op.has_next:
        given = h, inputs.next_weight, inputs.next_bias, eps if next_eps is None else next_eps
        testing.assert_accurate(result.y, *given, **options)


def _check_rotated(
    op: Op,
    result: Result,
    inputs: Inputs,
    *,
    eps: float | None = 1e-6,
    positions: Tensor | None = None,
    interleaved: bool = False,
    round_norm: bool = False,
    round_each: bool = False,
    out_dtype: torch.dtype | None = None,
    **options: Any,
) -> None:
    """y within the bound of the two norms in it, and of its own operations."""
    cos, sin = op.tensor("cos", inputs), op.tensor("sin", inputs)
    given = inputs.x, inputs.weight, inputs.bias, eps
    options["kind"] = op.kind
    of_norm = inputs.x.dtype if round_norm or round_each else torch.float32
    n = reference.norm(*given, **options, out_dtype=torch.float64, compute_dtype=torch.float64)
    error = testing.error_bound(*given, **options, out_dtype=of_norm)
    table = cos.double(), sin.double(), positions
    y = rotation.rotated(n, *table, interleaved=interleaved)
    # The sum of the sizes, as |a| * |cos| - (-|b|) * |sin| is one.
    sizes = cos.double().abs(), sin.double().abs()

    def summed(t: Tensor) -> Tensor:
        both = (
            rotation.rotated(t, sizes[0], sign * sizes[1], positions, interleaved=interleaved)
            for sign in (-1, 1)
        )
        return torch.maximum(*both)

    bound = summed(error) + 2.0**-22 * summed(n.abs())
    if round_each:
        product = torch.promote_types(inputs.x.dtype, cos.dtype)
        bound = bound + 2 * half_ulp(summed(n.abs()), product)
    dtype = result.y.dtype
    close = (result.y.double() - y).abs() <= bound + half_ulp(y, dtype) * (1 + 2**-9)
    assert (close | ~y.isfinite()).all(), f"{int((~close).sum())} elements of y are off"
    assert (result.y.isnan() == y.isnan()).all()


def half_ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half of the step of dtype at a float64 value."""
    info = torch.finfo(dtype)
    magnitude = value.abs().clamp(min=info.smallest_normal)
    return magnitude / torch.frexp(magnitude).mantissa / 4 * info.eps


def run_and_check(call: Call, op: Op, inputs: Inputs, **options: Any) -> Result:
    """Call op, check it against float64, and check that it left its inputs alone."""
    before = [None if t is None else bits(t).clone() for t in inputs]
    result = run(call, op, inputs, **options)
    for name, t, old in zip(inputs._fields, inputs, before, strict=True):
        assert t is None or torch.equal(bits(t), old), f"{name} was written"
    assert result.y.shape == inputs.x.shape
    default = inputs.residual if op.post and not op.has_next else inputs.x
    assert result.y.dtype == (options.get("out_dtype") or default.dtype)
    check(op, result, inputs, **options)
    return result


def formula(op: Op, inputs: Inputs, **options: Any) -> Result:
    """What an op is, in plain torch."""
    options = {"eps": op.eps, "kind": op.kind} | options
    if op.post:
        return _post_norm_formula(op, inputs, **options)
    if op.rotated:
        return Result(rotation.norm_rope(*op.tensors(inputs), **options), None)
    fused = [name for name in op.takes if name in _spec.FUSED_TENSORS]
    options |= {name: op.tensor(name, inputs) for name in fused}
    affine = op.affine(inputs)
    if op.adds:
        return Result(*reference.add_norm(inputs.x, inputs.residual, *affine, **options))
    return Result(reference.norm(inputs.x, *affine, **options), None)


def _post_norm_formula(
    op: Op,
    inputs: Inputs,
    *,
    next_eps: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    round_norm: bool = True,
    out_dtype: torch.dtype | None = None,
    **options: Any,
) -> Result:
    x, residual, weight, next_weight, bias, next_bias = (
        getattr(inputs, name)
        for name in ("x", "residual", "weight", "next_weight", "bias", "next_bias")
    )
    of_sum = {"alpha": alpha, "beta": beta, "round_norm": round_norm}
    h = reference.norm_add(x, residual, weight, bias, **of_sum, **options)
    if not op.has_next:
        return Result(h, None)
    options["eps"] = options["eps"] if next_eps is None else next_eps
    of_next = {"out_dtype": out_dtype or x.dtype, **options}
    return Result(reference.norm(h, next_weight, next_bias, **of_next), h)


def inputs_for(
    op: Op, rows: int | tuple[int, ...], n: int, dtype: torch.dtype, **rest: Any
) -> Inputs:
    """Inputs of an op; a head norm gets weights per head where x has heads."""
    shape = (rows, n) if isinstance(rows, int) else (*rows, n)
    per_head = op.per_head and len(shape) > 1 and shape[-2] > 0
    make = _inputs if math.prod(shape) < 1 << 18 else _inputs.__wrapped__
    made = make(op.modulated or op.post or op.rotated, shape, dtype, per_head, **rest)
    taken = {name: t for name, t in made._asdict().items() if name in (*MADE, *op.takes)}
    return Inputs(**{name: t if t is None else t.clone() for name, t in taken.items()})


MADE = ("x", "residual", "weight", "bias")


# The ops take the same inputs one after the other, and normal numbers cost more than most norms.
@lru_cache(maxsize=64)
def _inputs(
    fused: bool, shape: tuple[int, ...], dtype: torch.dtype, per_head: bool, **rest: Any
) -> Inputs:
    inputs = Inputs(*testing.make_inputs(shape, dtype, per_head=per_head, **rest))
    if not fused:
        return inputs
    options = {"seed": rest.get("seed", 0) + 1, "weight_dtype": rest.get("weight_dtype")}
    of_rows = testing.make_inputs((3, shape[-1]), dtype, **options)
    gate, scale, shift = of_rows.x.clamp(-3, 3)
    angles = of_rows.x[0, : shape[-1] // 2].float()
    cos, sin = (t.to(of_rows.weight.dtype) for t in (angles.cos(), angles.sin()))
    inputs = inputs._replace(next_weight=of_rows.weight, next_bias=of_rows.bias, cos=cos, sin=sin)
    return inputs._replace(gate=gate, scale=scale.to(of_rows.weight.dtype), shift=shift)


def bits(t: Tensor) -> Tensor:
    """The same memory as integers, so that NaN equals NaN and 0.0 does not equal -0.0."""
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def assert_same_bits(got: Tensor | None, expected: Tensor | None) -> None:
    if got is None or expected is None:
        assert got is expected
        return
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    different = bits(got) != bits(expected)
    assert not different.any(), f"{int(different.sum())} of {got.numel()} elements differ"


def assert_same_results(got: Result, expected: Result) -> None:
    assert_same_bits(got.y, expected.y)
    assert_same_bits(got.residual_out, expected.residual_out)


def lazily_negated(t: Tensor) -> Tensor:
    """The values of -t, as conjugates of complex numbers show them: by the negative bit."""
    negated = torch.complex(torch.zeros_like(t), t).conj().imag
    assert negated.is_neg()
    return negated


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# A NaN that no arithmetic makes: whatever is still this was not written.
_UNTOUCHED = {torch.float32: 0x7FA5A5A5, torch.float16: 0x7DA5, torch.bfloat16: 0x7FA5}


class Guarded:
    """A tensor of any strides in memory of its own, which shows writes round its elements."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        strides: tuple[int, ...] | None = None,
        offset: int = 0,
    ) -> None:
        strides = torch.empty(shape, device="meta").stride() if strides is None else strides
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        band = 256
        self.memory = torch.empty(band + offset + max(last, 0) + 1 + band, dtype=dtype)
        bits(self.memory).fill_(_UNTOUCHED[dtype])
        place = (shape, strides, band + offset)
        self.tensor = self.memory.as_strided(*place)
        self._inside = torch.zeros_like(self.memory, dtype=torch.bool)
        self._inside.as_strided(*place).fill_(True)

    def fill(self, values: Tensor) -> Tensor:
        """Store values; those of the first index in expanded dimensions."""
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in self.tensor.stride())
        self.tensor[once].copy_(values[once])
        return self.tensor

    def assert_only_elements_written(self) -> None:
        outside = bits(self.memory)[~self._inside]
        assert (outside == _UNTOUCHED[self.memory.dtype]).all(), (
            "memory round the tensor was written"
        )
