"""What an op is: the one place that says it.

A norm is a `NormSpec`; a call of an op is a `Call`, whose first fields are the arguments of the
extension, in its order.  `FIELDS` has the type, default and meaning of each argument, and `OPS` the
ops.  Schemas of operators, their fakes, the option table of docs/api.md and the lists of ops in
tests and benchmarks come from these; signatures are written by hand, and a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache, partial
from operator import attrgetter
from typing import Any, Literal, NamedTuple, TypedDict, cast

import torch
from torch import Tensor

Kind = Literal["rms", "layer"]
Activation = Literal["silu", "sigmoid"]
Statistic = Literal["rms", "layer", "l2"]

# What a call returns: y, or (y, residual_out).
Result = Tensor | tuple[Tensor, Tensor]
# What a forward pass made, and took of each row: y, residual_out, rstd, and mean, None for rms.
Saved = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
# Of x, residual, weight and bias; None where it is not wanted.  The first two may be one tensor.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
# Of a part of rows: y, rstd and mean, and the gradients of x, weight and bias.
PartSaved = tuple[Tensor, Tensor, Tensor | None]
PartGradients = tuple[Tensor | None, Tensor | None, Tensor | None]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOATS_TEXT = "float32, float16 or bfloat16"
DEFAULT_EPS: dict[Kind, float] = {"rms": 1e-6, "layer": 1e-5}


# The bits of a call's kind, as the extension has them; 0 is an rms norm of rows.  POST: x is
# normalised before it is added; with ADD the sum is normalised too.
LAYER, PER_HEAD, ADD, MODULATED, GATED, SIGMOID, NORM_FIRST = 1, 2, 4, 16, 32, 64, 128
FROM_OUTPUT = 8  # of gradients: x is the output, of which xhat is made again
POST, OF_SUM, EPS_OUTSIDE = 256, 512, 1024
# Rotated, in pairs of neighbours; and no statistic at all: y is x.
ROTATED, INTERLEAVED, AS_IS = 2048, 4096, 8192
# A call of any of these has FUSED arguments besides.
FUSED_KINDS = MODULATED | GATED | POST | ROTATED | AS_IS


def is_layer(kind: Kind) -> bool:
    """Whether a kind of norm subtracts the mean.

    Raises:
        ValueError: kind is neither "rms" nor "layer".
    """
    if kind not in ("rms", "layer"):
        raise ValueError(f'kind: expected "rms" or "layer", got {kind!r}')
    return kind == "layer"


def statistic_of(layer: bool, of_sum: bool) -> Statistic:
    """The word of `reference` for a norm."""
    return "layer" if layer else "l2" if of_sum else "rms"


def is_sigmoid(activation: Activation) -> bool:
    """Whether a gate is sigmoid(z) instead of silu(z) = z * sigmoid(z).

    Raises:
        ValueError: activation is neither "silu" nor "sigmoid".
    """
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f'activation: expected "silu" or "sigmoid", got {activation!r}')
    return activation == "sigmoid"


def is_set(name: str, flag: bool) -> bool:
    """The flag itself.

    Raises:
        TypeError: it is no bool.
    """
    if not isinstance(flag, bool):
        raise TypeError(f"{name}: expected True or False, got {type(flag).__name__}")
    return flag


def gated(kind: Kind, activation: Activation, norm_before_gate: bool) -> int:
    """The bits of a gated norm."""
    return (
        GATED
        | PER_HEAD
        | is_layer(kind) * LAYER
        | is_sigmoid(activation) * SIGMOID
        | is_set("norm_before_gate", norm_before_gate) * NORM_FIRST
    )


def rotated(kind: Kind, interleaved: bool) -> int:
    """The bits of a rotated norm."""
    interleaves = is_set("interleaved", interleaved) * INTERLEAVED
    return ROTATED | PER_HEAD | is_layer(kind) * LAYER | interleaves


def heads(kind: Kind) -> int:
    """The bits of a norm of heads."""
    return PER_HEAD | is_layer(kind) * LAYER


def length(eps_outside: bool) -> int:
    """The bits of an L2 norm.

    Raises:
        TypeError: eps_outside is no bool.
    """
    return OF_SUM | is_set("eps_outside", eps_outside) * EPS_OUTSIDE


@dataclass(frozen=True)
class NormSpec:
    """What a norm computes, whatever its weights are.

    Attributes:
        kind: "rms" or "layer".
        eps: added to the mean of squares or the variance; None for the computing dtype's.
        weight_offset: added to the weight in float32.
        round_before_weight: whether xhat is rounded to x's dtype before the weight multiplies it.
        has_bias: whether there is a bias.
        round_rstd: whether rstd is rounded to x's dtype before it multiplies.
        out_dtype: that of y; None for x's.
        round_weight: whether the weight with its offset is rounded to the weight's dtype.
    """

    kind: Kind
    eps: float | None
    weight_offset: float = 0.0
    round_before_weight: bool = False
    has_bias: bool = False
    round_rstd: bool = False
    out_dtype: torch.dtype | None = None
    round_weight: bool = False


class PlainOptions(TypedDict, total=False):
    """The options that change what is computed, of every norm."""

    weight_offset: float
    round_before_weight: bool
    clamp_inf: bool
    round_rstd: bool
    round_weight: bool


class Options(PlainOptions, total=False):
    """Those of a norm that may add a residual first."""

    round_sum: bool


@dataclass
class Call:
    """One call of an op: the extension's arguments, one that only Python knows, and FUSED ones.

    No NamedTuple, of which Dynamo of torch 2.10 cannot trace the properties.
    """

    kind: int
    x: Tensor
    residual: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float | None = None
    weight_offset: float = 0.0
    round_before_weight: bool = False
    round_sum: bool = True
    clamp_inf: bool = False
    round_rstd: bool = False
    round_weight: bool = False
    out_dtype: torch.dtype | None = None
    out: Tensor | None = None
    residual_out: Tensor | None = None
    memory_efficient: bool = False
    in_place: bool = False  # what is written is x or the residual, and so it is called
    gate: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    round_each: bool = False
    z: Tensor | None = None
    next_weight: Tensor | None = None
    next_bias: Tensor | None = None
    next_eps: float | None = None
    alpha: float = 1.0
    beta: float = 1.0
    round_norm: bool = True
    cos: Tensor | None = None
    sin: Tensor | None = None
    positions: Tensor | None = None
    cache: Tensor | None = None
    slots: Tensor | None = None

    @property
    def op(self) -> str:
        """The name of the function that was called."""
        return _NAMES[self.kind & ~_SAID_BY_ARGUMENTS] + "_" * self.in_place

    @property
    def layer(self) -> bool:
        """Whether the mean is subtracted."""
        return self.kind & LAYER != 0

    @property
    def per_head(self) -> bool:
        """Whether weight and bias may have a row per head."""
        return self.kind & PER_HEAD != 0

    @property
    def adds(self) -> bool:
        """Whether the sum with a residual is normalised."""
        return self.kind & ADD != 0

    @property
    def modulated(self) -> bool:
        """Whether it may have a gate, scale or shift."""
        return self.kind & MODULATED != 0

    @property
    def gated(self) -> bool:
        """Whether an activation of z multiplies it."""
        return self.kind & GATED != 0

    @property
    def post(self) -> bool:
        """Whether x is normalised before it is added to the residual."""
        return self.kind & POST != 0

    @property
    def rotated(self) -> bool:
        """Whether columns of the norm are rotated in pairs."""
        return self.kind & ROTATED != 0

    @property
    def interleaved(self) -> bool:
        """Whether neighbours are pairs, and not columns half of the rotated ones apart."""
        return self.kind & INTERLEAVED != 0

    @property
    def as_is(self) -> bool:
        """Whether x only goes to a cache."""
        return self.kind & AS_IS != 0

    def table(self) -> tuple[Tensor, Tensor]:
        """Of a rotated norm, cos and sin."""
        assert self.cos is not None
        assert self.sin is not None
        return self.cos, self.sin

    @property
    def fused(self) -> bool:
        """Whether it has FUSED arguments."""
        return self.kind & FUSED_KINDS != 0

    @property
    def activation(self) -> Activation:
        """Of z, in words."""
        return "sigmoid" if self.kind & SIGMOID else "silu"

    @property
    def norm_before_gate(self) -> bool:
        """Whether the norm is multiplied, and not what is normalised."""
        return self.kind & NORM_FIRST != 0

    @property
    def takes_residual(self) -> bool:
        """Whether there has to be a residual."""
        return self.kind & (ADD | POST) != 0

    @property
    def takes_strides(self) -> bool:
        """Whether columns of x and of what is written may be further apart than an element."""
        return not self.fused and not self.takes_residual

    @property
    def second_eps(self) -> float | None:
        """The eps of the norm behind the sum."""
        return self.eps if self.next_eps is None else self.next_eps

    @property
    def of_sum(self) -> bool:
        """Whether the statistic is the sum of squares: an L2 norm."""
        return self.kind & OF_SUM != 0

    @property
    def eps_outside(self) -> bool:
        """Whether the root of the statistic is at least eps, which is added to nothing."""
        return self.kind & EPS_OUTSIDE != 0

    @property
    def statistic(self) -> Statistic:
        """The norm in words."""
        return statistic_of(self.layer, self.of_sum)

    @property
    def rounds_within(self) -> bool:
        """Whether more than y and the sum is rounded, to the dtype of what is normalised."""
        return self.round_before_weight or self.round_rstd

    # Its tensors have a dimension for the groups, before it becomes a call.
    group_size = None

    def native(self) -> tuple[object, ...]:
        """The arguments of the extension."""
        values: tuple[object, ...] = _native_values(self)
        return values + _fused_values(self) if self.kind & FUSED_KINDS else values

    def fused_native(self) -> tuple[object, ...]:
        """The arguments of the extension with FUSED ones, whatever the kind."""
        values: tuple[object, ...] = _native_values(self) + _fused_values(self)
        return values

    def options(self) -> Options:
        """All of OPTIONS."""
        options: Options = self.named(OPTIONS)
        return options

    def plain_options(self) -> PlainOptions:
        """All of PLAIN_OPTIONS."""
        options: PlainOptions = self.named(PLAIN_OPTIONS)
        return options

    def named(self, names: tuple[str, ...]) -> Any:
        """A dict of some fields; no cast types it, since not every version of Dynamo traces one."""
        return {name: getattr(self, name) for name in names}

    def tensors(self) -> list[tuple[str, Tensor]]:
        """The tensors that were given, by name."""
        return self.inputs() if self.in_place else self.inputs() + self.written()

    def inputs(self) -> list[tuple[str, Tensor]]:
        """Those that the call reads."""
        return self._given("x", "residual", "weight", "bias", *FUSED_TENSORS)

    def indices(self) -> list[tuple[str, Tensor]]:
        """The tensors of integers."""
        return self._given(*INDICES)

    def written(self) -> list[tuple[str, Tensor]]:
        """Those that the call writes, under the names that its caller knows."""
        if not self.in_place:
            return self._given("out", "residual_out", "cache")
        return self._given(*("x",) * (self.adds or not self.post), "residual", "cache")

    def _given(self, *names: str) -> list[tuple[str, Tensor]]:
        return [(name, t) for name in names if (t := getattr(self, name)) is not None]

    def needs_gradient(self) -> str | None:
        """The name of a tensor that requires grad, if there is one and gradients are recorded."""
        if not torch.is_grad_enabled():
            return None
        return next((name for name, t in self.tensors() if t.requires_grad), None)

    def requires_grad(self) -> bool:
        """Whether an input requires grad and gradients are recorded; the quick way."""
        return torch.is_grad_enabled() and (
            self.x.requires_grad
            or (self.weight is not None and self.weight.requires_grad)
            or (self.bias is not None and self.bias.requires_grad)
            or (self.residual is not None and self.residual.requires_grad)
            or (self.fused and any(t.requires_grad for _, t in self._given(*FUSED_TENSORS)))
        )


# The fields that are the extension's arguments, in its order; a fused norm has more of them.
_CALL = tuple(field.name for field in fields(Call))
NATIVE = _CALL[: _CALL.index("in_place")]
FUSED = _CALL[_CALL.index("gate") :]
MODULATION = ("gate", "scale", "shift", "round_each")
MODULATORS = MODULATION[:-1]  # the tensors among them
GATING = ("z", "activation", "norm_before_gate")
NEXT = ("next_weight", "next_bias")  # of the norm behind a sum
POST_NORM = (*NEXT, "next_eps", "alpha", "beta", "round_norm")
ROTATION = ("cos", "sin", "positions", "interleaved", "round_norm", "round_each")
FUSED_TENSORS = (*MODULATORS, "z", *NEXT, "cos", "sin")
INDICES = ("positions", "slots")  # tensors of integers


def _defaults(begin: str | None, end: str | None) -> tuple[Any, ...]:
    """What a fused call hands over in the place of others' fields, from one to another."""
    first = 0 if begin is None else FUSED.index(begin)
    last = len(FUSED) if end is None else FUSED.index(end)
    return tuple(getattr(Call, name) for name in FUSED[first:last])


BEHIND_MODULATION, BEHIND_GATING = _defaults("z", None), _defaults("next_weight", None)
BEFORE_POST_NORM, BEHIND_POST_NORM = _defaults(None, "next_weight"), _defaults("cos", None)
BEFORE_ROTATION, BEHIND_ROTATION = _defaults("z", "round_norm"), _defaults("cache", None)
BEFORE_CACHE, NOTHING = _defaults(None, "cache"), _defaults(None, None)
# And a norm without weights and options, behind its x.
BEHIND_X = tuple(getattr(Call, name) for name in NATIVE[2:])
_native_values = attrgetter(*NATIVE)
_fused_values = attrgetter(*FUSED)

# The options that change what is computed, in the order of a call.
OPTIONS = NATIVE[NATIVE.index("eps") + 1 : NATIVE.index("out_dtype")]
PLAIN_OPTIONS = tuple(name for name in OPTIONS if name != "round_sum")


class Field(NamedTuple):
    """An argument of the ops: its type in an operator's schema, its default, what it means."""

    type: str
    default: object  # Ellipsis: none
    meaning: str

    def declared(self, name: str) -> str:
        """Write it as schemas do."""
        if self.default is ...:
            return f"{self.type} {name}"
        default = f'"{self.default}"' if isinstance(self.default, str) else self.default
        return f"{self.type} {name}={default}"


Fields = dict[str, Field]

FIELDS: Fields = {
    "x": Field("Tensor", ..., "what is normalised, row by row"),
    "residual": Field("Tensor", ..., "added to x first"),
    "z": Field("Tensor", ..., "gated: its activation multiplies the norm, or x before the norm"),
    "cos": Field("Tensor", ..., "rotated: multiplies each column of a pair"),
    "sin": Field("Tensor", ..., "rotated: multiplies the other column of a pair"),
    "gate": Field("Tensor?", None, "modulated: multiplies x before it is added; None for no gate"),
    "scale": Field("Tensor?", None, "modulated: 1 + scale multiplies the norm; None for no scale"),
    "shift": Field("Tensor?", None, "modulated: added last; None for no shift"),
    "weight": Field("Tensor?", None, "multiplies xhat; None for no weight"),
    "next_weight": Field("Tensor?", None, "sandwich: weight of the norm behind the sum"),
    "bias": Field("Tensor?", None, "added last; None for no bias"),
    "next_bias": Field("Tensor?", None, "sandwich: bias of the norm behind the sum"),
    "eps": Field(
        "float?",
        1e-6,
        "added to the statistic; None: epsilon of the computing dtype",
    ),
    "next_eps": Field("float?", None, "sandwich: eps of the norm behind the sum; None: eps"),
    "eps_outside": Field(
        "bool", False, "l2_norm: eps is the least length, as `F.normalize` has it"
    ),
    "kind": Field("str", "rms", '"rms" or "layer"; modulated: "layer" is the default'),
    "activation": Field("str", "silu", 'gated: "silu" or "sigmoid"'),
    "norm_before_gate": Field("bool", True, "gated: multiply the norm; False: x (Mamba-2)"),
    "positions": Field(
        "Tensor?", None, "rotated: rows of cos and sin for the tokens; None: all of them"
    ),
    "interleaved": Field("bool", False, "rotated: pairs are neighbours, as in GPT-J and Flux"),
    "alpha": Field("float", 1.0, "post-norm: multiplies the residual"),
    "beta": Field("float", 1.0, "post-norm: multiplies the norm before it is added"),
    "round_norm": Field(
        "bool",
        True,
        "post-norm: round the norm to x's dtype, and each product, as torch does;"
        " rotated: round the norm to x's dtype (default False)",
    ),
    "round_sum": Field(
        "bool",
        True,
        "fused adds: normalise the sum as rounded to residual's dtype",
    ),
    "round_each": Field(
        "bool",
        False,
        "modulated: round each operation, as torch does (Flux, SD3, Qwen-Image);"
        " gated: round the norm before it is multiplied (Qwen3-Next);"
        " rotated: the norm and each product, as torch does",
    ),
    "weight_offset": Field("float", 0.0, "added to the weight in float32 (Gemma: 1.0)"),
    "round_before_weight": Field("bool", False, "round xhat to x's dtype first (Llama, Qwen)"),
    "clamp_inf": Field("bool", False, "count +-inf in a float16 x as +-65504 (ExLlamaV2)"),
    "round_rstd": Field(
        "bool", False, "round rstd to x's dtype before it multiplies (DeepSeek-V4, GLM-5)"
    ),
    "round_weight": Field(
        "bool", False, "round weight + weight_offset to weight's dtype first (Nemotron, VideoPrism)"
    ),
    "out_dtype": Field("ScalarType?", None, "dtype of y; None: that of out, or x's"),
    "out": Field("Tensor?", None, "where y goes; None: a new tensor, packed"),
    "residual_out": Field("Tensor?", None, "fused adds: where the sum goes; None: a new tensor"),
    "memory_efficient": Field("bool", False, "keep y instead of x for the gradients"),
}
FLAGS = tuple(name for name in OPTIONS if FIELDS[name].type == "bool")
DEFAULT_OPTIONS = cast(Options, {name: FIELDS[name].default for name in OPTIONS})
# What only some fusions take.
_OF_FUSED = {*MODULATION, *GATING, *POST_NORM, *ROTATION}
# What forms that write in place do not take.
_OF_RESULTS = ("out_dtype", "out", "residual_out", "memory_efficient")


# Arguments that are bits of a call's kind.
_KIND_FLAGS = {
    "kind": LAYER,
    "activation": SIGMOID,
    "norm_before_gate": NORM_FIRST,
    "eps_outside": EPS_OUTSIDE,
    "interleaved": INTERLEAVED,
}
_SAID_BY_ARGUMENTS = SIGMOID | NORM_FIRST | INTERLEAVED | AS_IS
_IS_ON: dict[str, Callable[[Any], bool]] = {
    "kind": is_layer,
    "activation": is_sigmoid,
    "norm_before_gate": partial(is_set, "norm_before_gate"),
    "eps_outside": partial(is_set, "eps_outside"),
    "interleaved": partial(is_set, "interleaved"),
}


class Op(NamedTuple):
    """A norm, before it is called."""

    name: str
    layer: bool | None  # None: the argument `kind` says it
    per_head: bool = False
    adds: bool = False
    modulated: bool = False
    gated: bool = False
    post: bool = False
    of_sum: bool = False
    rotated: bool = False

    @property
    def fused(self) -> bool:
        """Whether its calls have FUSED arguments."""
        return self.modulated or self.gated or self.post or self.rotated

    @property
    def is_plain(self) -> bool:
        """Whether it is a norm with weight and bias, and nothing more."""
        return not (self.fused or self.of_sum)

    @property
    def bits(self) -> int:
        """The kind of its calls, but for what is said by `flags`."""
        given = self.per_head * PER_HEAD | self.adds * ADD | self.modulated * MODULATED
        given |= self.gated * GATED | self.post * POST | self.of_sum * OF_SUM
        given |= self.rotated * ROTATED
        return bool(self.layer) * LAYER | given

    @property
    def flags(self) -> dict[str, int]:
        """Arguments that are bits of a call's kind."""
        return _flags_of(self)

    def kind_of(self, given: Mapping[str, Any]) -> int:
        """The kind of a call with these arguments, of which the defaults may be left out."""
        bits = self.bits
        for name, bit in self.flags.items():
            value = given.get(name, self.fields[name].default)
            bits |= bit * _IS_ON[name](value)
        return bits

    @property
    def fields(self) -> Fields:
        """The arguments that every form takes, in the order of schemas."""
        return _fields_of(self)

    @property
    def results(self) -> Fields:
        """What the form that returns y takes besides."""
        kept = () if self.is_plain else ("memory_efficient",)
        left_out = (*kept, *(() if self.adds else ("residual_out",)))
        left_out += ("out_dtype",) * (self.post and not self.adds)  # which is residual's dtype
        return {name: FIELDS[name] for name in _OF_RESULTS if name not in left_out}

    @property
    def written(self) -> dict[str, str]:
        """What the form in place has as outputs, by their names."""
        if self.post and not self.adds:
            return {"out": "residual"}
        return {"out": "x", "residual_out": "residual"} if self.adds else {"out": "x"}

    def call(self, given: Mapping[str, Any], *, in_place: bool = False) -> Call:
        """Make the call that these arguments mean; those in place are written, too."""
        rest = {name: value for name, value in given.items() if name not in _KIND_FLAGS}
        if in_place:
            rest |= {output: rest[name] for output, name in self.written.items()}
        return Call(self.kind_of(given), in_place=in_place, **rest)


# Asked for 350 times while operators are registered, and at each call of one in Python.
@cache
def _fields_of(op: Op) -> Fields:
    eps = DEFAULT_EPS["layer" if op.layer else "rms"]
    if op.of_sum:
        return {name: FIELDS[name] for name in ("x", "eps", "eps_outside", "clamp_inf")}
    left_out = (*_OF_RESULTS, "eps_outside")
    taken = {name: field for name, field in FIELDS.items() if name not in left_out}
    taken["eps"] = taken["eps"]._replace(default=eps)
    if op.layer is not None:
        del taken["kind"]
    if not (op.adds or op.post):
        del taken["residual"]
    if not op.adds or op.post:
        del taken["gate"], taken["round_sum"]
    if op.modulated:
        taken["kind"] = taken["kind"]._replace(default="layer")
    own = MODULATION * op.modulated + (*GATING, "round_each") * op.gated
    if op.post:
        own += POST_NORM if op.adds else ("alpha", "beta", "round_norm")
    if op.rotated:
        own += ROTATION
        taken["round_norm"] = taken["round_norm"]._replace(default=False)
    return {name: f for name, f in taken.items() if name in own or name not in _OF_FUSED}


@cache
def _flags_of(op: Op) -> dict[str, int]:
    return {name: bit for name, bit in _KIND_FLAGS.items() if name in op.fields}


OPS = {
    op.name: op
    for op in (
        Op("rms_norm", False),
        Op("layer_norm", True),
        Op("head_norm", None, per_head=True),
        Op("add_rms_norm", False, adds=True),
        Op("add_layer_norm", True, adds=True),
        Op("add_head_norm", None, per_head=True, adds=True),
        Op("modulated_norm", None, modulated=True),
        Op("add_modulated_norm", None, adds=True, modulated=True),
        Op("gated_norm", None, per_head=True, gated=True),
        Op("norm_add", None, post=True),
        Op("norm_add_norm", None, adds=True, post=True),
        Op("l2_norm", False, of_sum=True),
        Op("norm_rope", None, per_head=True, rotated=True),
    )
}
_NAMES = {
    op.bits | layer: op.name
    for op in OPS.values()
    for layer in ((0, LAYER) if op.layer is None else (op.bits & LAYER,))
}
_NAMES[OF_SUM | EPS_OUTSIDE] = _NAMES[OF_SUM]


def all_options(function: str, given: PlainOptions) -> Options:
    """The options in a call's order: those given to a function, and the defaults of the others.

    Raises:
        TypeError: the function takes no such option.
    """
    for name in given:
        if name not in PLAIN_OPTIONS:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return {**DEFAULT_OPTIONS, **given} if given else DEFAULT_OPTIONS
