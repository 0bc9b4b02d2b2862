"""The norms as modules: drop-ins for torch's, with the options of `normkit.functional`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy, Tracer
from torch.nn import Parameter, init

from normkit._scripting import ScriptableNorm
from normkit._serving.backends import quick
from normkit._serving.checks import check_ending, check_eps, check_number, check_size, sizes_of
from normkit._serving.serve import serve
from normkit._spec import ADD, LAYER, PER_HEAD, Call, Kind, Result

if TYPE_CHECKING:
    from typing_extensions import Self

    from normkit.checkpoint import Source, StoredNorm


class _Affine(torch.nn.Module):
    """The weight, the bias and the options that all norms of this package have."""

    # reset_parameters runs in the constructors of torch's classes, before ours have set these
    weight_offset: float = 0.0
    round_before_weight: bool = False
    round_rstd: bool = False
    round_weight: bool = False
    memory_efficient: bool = False

    def reset_parameters(self) -> None:
        """Make the affine map the identity: weight 1 - weight_offset, bias 0.

        What is applied is weight + weight_offset, so an offset of 1 makes the stored weight zeros.
        """
        if self.weight is not None:
            init.constant_(self.weight, 1.0 - self.weight_offset)
        bias = getattr(self, "bias", None)  # torch's RMSNorm resets before ours has one
        if bias is not None:
            init.zeros_(bias)

    def extra_repr(self) -> str:
        """Show the options, those of this package where they are not the defaults."""
        shown = [super().extra_repr()]
        if self.weight_offset:
            shown.append(f"weight_offset={self.weight_offset}")
        flags = ("round_before_weight", "round_rstd", "round_weight", "memory_efficient")
        shown += [f"{name}=True" for name in flags if getattr(self, name)]
        return ", ".join(filter(None, shown))

    def _trace(self, x: object, residual: object, out_dtype: torch.dtype | None) -> Result:
        """Record a call of this module by torch.fx, which takes only torch's own for leaves."""
        given = (x,) if residual is None else (x, residual)
        options = {} if out_dtype is None else {"out_dtype": out_dtype}
        tracer = cast(Tracer, next(t.tracer for t in given if isinstance(t, Proxy)))
        call = tracer.create_proxy("call_module", tracer.path_of_module(self), given, options)
        return cast(Result, call)

    def _adopt(self, stored: StoredNorm) -> Self:
        self.weight = Parameter(stored.weight)
        if stored.bias is not None:
            self.bias = Parameter(stored.bias)
        return self


class _RowNorm(_Affine):
    """A norm over the last dimensions; with a class of torch it is whole."""

    normalized_shape: tuple[int, ...]
    eps: Any  # a float of torch's LayerNorm, and a float or None of its RMSNorm
    _kind: ClassVar[Kind]
    _bits: ClassVar[int]

    @overload
    def forward(
        self, x: Tensor, residual: None = None, *, out_dtype: torch.dtype | None = None
    ) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, residual: Tensor, *, out_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, out_dtype: torch.dtype | None = None
    ) -> Result:
        """Normalise x, or x + residual, over the dimensions of normalized_shape.

        Args:
            x: (..., *normalized_shape) in float32, float16, bfloat16 or float64.  Outer strides are
                free; if the normalised dimensions are not contiguous among themselves, x is copied
                once.
            residual: of x's shape; added to x before the norm.  None: nothing is added.
            out_dtype: dtype of y; None for x's.

        Returns:
            y of x's shape; with a residual (y, residual_out), where residual_out is x + residual in
            residual's dtype.

        Raises:
            TypeError: an argument is no tensor, or of the wrong dtype.
            ValueError: a shape or a device is wrong.
        """
        weight, bias = _affine(self)
        kind = self._bits if residual is None else self._bits | ADD
        call = (
            kind, x, residual, weight, bias, self.eps, self.weight_offset,
            self.round_before_weight, True, False, self.round_rstd, self.round_weight,
            out_dtype, None, None, self.memory_efficient,
        )  # fmt: skip
        # Without a weight nobody compares x's last size, nor that of several dimensions.
        if weight is not None and not is_dynamo_compiling():
            made = quick(*call)
            if made is not None:
                return made
        if isinstance(x, Proxy) or isinstance(residual, Proxy):
            return self._trace(x, residual, out_dtype)
        if weight is None or len(self.normalized_shape) > 1:
            return self._as_one_row(Call(*call))
        return serve(Call(*call))

    def _as_one_row(self, call: Call) -> Result:
        x, dims = call.x, len(self.normalized_shape)
        check_ending("x", x, self.normalized_shape)
        shape = x.shape
        if call.residual is not None:
            check_ending("residual", call.residual, shape)
        if dims == 1:
            return serve(call)

        def flat(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.flatten(-dims)

        rows = replace(
            call,
            x=x.flatten(-dims),
            residual=flat(call.residual),
            weight=flat(call.weight),
            bias=flat(call.bias),
        )
        made = serve(rows)
        if isinstance(made, tuple):
            return made[0].view(shape), made[1].view(shape)
        return made.view(shape)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """Return what torch.jit.script compiles in the place of this module."""
        return ScriptableNorm(self, self._kind, list(self.normalized_shape), per_head=False)

    @classmethod
    def from_checkpoint(
        cls,
        source: Source,
        key: str,
        *,
        eps: float | None = None,
        weight_offset: float | None = None,
        round_before_weight: bool | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Make the module of a norm that is stored in a checkpoint.

        Args:
            source: a .safetensors file, a model folder, a dict of tensors, or an object with
                get_tensor(name); as in `load_norm`, like all that follow.
            key: name of the norm ("model.norm") or of its weight ("model.norm.weight").
            eps: None for that of config.json, or, without one, the default of the class.
            weight_offset: None for what the model family in config.json adds, or 0.
            round_before_weight: None for what the model family in config.json does, or False.
            device: None for where the source gives its tensors.

        Returns:
            A module with copies of the weight, and of the bias if there is one, bit for bit and in
            the dtype stored.

        Raises:
            KeyError: source has no such norm; the message names the nearest.
            TypeError: source is none of these.
            ValueError: a file is malformed, or the stored shapes do not fit.
            OSError: a file is missing or cannot be read.

        Example:
            >>> import normkit, torch
            >>> normkit.RMSNorm.from_checkpoint({"norm.weight": torch.ones(4)}, "norm", eps=1e-5)
            RMSNorm((4,), eps=1e-05, elementwise_affine=True)
        """
        from normkit.checkpoint import read_norm  # a sixth of the time that normkit takes to import

        stored = read_norm(
            source,
            key,
            kind=cls._kind,
            eps=eps,
            weight_offset=weight_offset,
            round_before_weight=round_before_weight,
            device=device,
        )
        stored.warn_of_assumed(stacklevel=2)
        return cls.from_stored(stored)

    @classmethod
    def from_stored(cls, stored: StoredNorm) -> Self:
        """Make the module of what `normkit.checkpoint.read_norm` read; it owns those tensors."""
        module = cls(
            stored.weight.shape,
            stored.spec.eps,
            bias=stored.spec.has_bias,
            device="meta",  # these parameters are replaced
            weight_offset=stored.spec.weight_offset,
            round_before_weight=stored.spec.round_before_weight,
            round_rstd=stored.spec.round_rstd,
            round_weight=stored.spec.round_weight,
        )
        return module._adopt(stored)


class RMSNorm(_RowNorm, torch.nn.RMSNorm):
    """RMSNorm over the last dimensions; a `torch.nn.RMSNorm` with the same state dict.

        y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset) + bias

    Args:
        normalized_shape: the sizes of the last dimensions, or of the last one.
        eps: added to the mean of squares; None, torch's default, for the machine epsilon of the
            computing dtype.
        elementwise_affine: whether there is a weight; without it there is no bias either.
        device: of the parameters; None for torch's default.
        dtype: of the parameters; None for torch's default.
        bias: whether there is a bias, which torch's RMSNorm never has; it adds the key `bias` to
            the state dict.
        weight_offset: added to the weight in float32 (Gemma: 1.0); the stored weight then begins as
            1 - weight_offset.
        round_before_weight: round the normalised value to x's dtype before the weight multiplies
            it (Llama, Qwen).
        round_rstd: round rstd to x's dtype before it multiplies (DeepSeek-V4 and GLM-5, whose norms
            without a weight are `RMSNorm(n, eps, elementwise_affine=False, round_rstd=True)`).
        round_weight: round weight + weight_offset to weight's dtype before it multiplies (Nemotron
            and VideoPrism, as LayerNorm; it is seen where the weight has 16 bits).
        memory_efficient: keep y instead of x for the gradients, as in `normkit.rms_norm`.

    What it takes and where it rounds: `normkit.rms_norm`, with a residual `normkit.add_rms_norm`.

    Example:
        >>> import normkit, torch
        >>> norm = normkit.RMSNorm(4).requires_grad_(False)
        >>> y, residual = norm(torch.ones(2, 4), torch.ones(2, 4))
        >>> residual[0]
        tensor([2., 2., 2., 2.])
    """

    _kind = "rms"
    _bits = 0

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = 1e-6,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = False,
        weight_offset: float = 0.0,
        round_before_weight: bool = False,
        round_rstd: bool = False,
        round_weight: bool = False,
        memory_efficient: bool = False,
    ) -> None:
        _check_options(eps, weight_offset)
        shape = sizes_of(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, device, dtype)
        self.weight_offset = weight_offset
        self.round_before_weight = round_before_weight
        self.round_rstd = round_rstd
        self.round_weight = round_weight
        self.memory_efficient = memory_efficient
        self.register_parameter("bias", None)
        if bias and elementwise_affine:
            self.bias = Parameter(torch.empty_like(self.weight))
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Show the options, those of this package where they are not the defaults."""
        return super().extra_repr() + (", bias=True" if self.bias is not None else "")


class LayerNorm(_RowNorm, torch.nn.LayerNorm):
    """LayerNorm over the last dimensions; a `torch.nn.LayerNorm` with the same state dict.

        y = (x - mean(x)) / sqrt(var(x) + eps) * (weight + weight_offset) + bias

    The arguments are those of `RMSNorm`, in torch's order; eps is added to the variance, and there
    is a bias unless bias=False.

    What it takes and where it rounds: `normkit.layer_norm`, with a residual
    `normkit.add_layer_norm`.

    Example:
        >>> import normkit, torch
        >>> normkit.LayerNorm(2, eps=0.0)(torch.tensor([1.0, 3.0])).tolist()
        [-1.0, 1.0]
    """

    _kind = "layer"
    _bits = LAYER

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_offset: float = 0.0,
        round_before_weight: bool = False,
        round_rstd: bool = False,
        round_weight: bool = False,
        memory_efficient: bool = False,
    ) -> None:
        _check_options(eps, weight_offset)
        shape = sizes_of(normalized_shape)
        super().__init__(shape, cast(float, eps), elementwise_affine, bias, device, dtype)
        self.weight_offset = weight_offset
        self.round_before_weight = round_before_weight
        self.round_rstd = round_rstd
        self.round_weight = round_weight
        self.memory_efficient = memory_efficient
        self.reset_parameters()


class HeadNorm(_Affine):
    """A norm of every head of x, with a weight for each head or one for all.

        y = xhat * (weight + weight_offset) + bias,  xhat by `kind` as in `RMSNorm` or `LayerNorm`

    Args:
        num_heads: heads of x, each with its weight: (num_heads, head_dim).  None: any number of
            heads, which share one weight (head_dim,).
        head_dim: size of a head, the last dimension of x.
        eps: added to the mean of squares or the variance; None for the machine epsilon of the
            computing dtype.
        kind: "rms" or "layer".
        bias: whether there is a bias, of weight's shape.

    The other arguments are those of `RMSNorm`.

    Raises:
        ValueError: kind is neither "rms" nor "layer".

    What it takes and where it rounds: `normkit.head_norm`, with a residual `normkit.add_head_norm`.

    Example:
        >>> import normkit, torch
        >>> q = torch.randn(2, 7, 3 * 4).unflatten(-1, (3, 4))
        >>> normkit.HeadNorm(3, 4)(q).shape
        torch.Size([2, 7, 3, 4])
    """

    def __init__(
        self,
        num_heads: int | None,
        head_dim: int,
        eps: float | None = 1e-6,
        kind: Kind = "rms",
        *,
        bias: bool = False,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight_offset: float = 0.0,
        round_before_weight: bool = False,
        round_rstd: bool = False,
        round_weight: bool = False,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        _check_options(eps, weight_offset)
        for name, size in (("num_heads", num_heads), ("head_dim", head_dim)):
            if not (size is None and name == "num_heads"):
                check_size(name, size)
        if kind not in ("rms", "layer"):
            raise ValueError(f'kind: expected "rms" or "layer", got {kind!r}')
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.eps = eps
        self.kind: Kind = kind
        self.elementwise_affine = elementwise_affine
        self.weight_offset = weight_offset
        self.round_before_weight = round_before_weight
        self.round_rstd = round_rstd
        self.round_weight = round_weight
        self.memory_efficient = memory_efficient
        shape = (head_dim,) if num_heads is None else (num_heads, head_dim)
        for name, wanted in (("weight", True), ("bias", bias)):
            self.register_parameter(name, None)
            if wanted and elementwise_affine:
                setattr(self, name, Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Show the shape and the options, most of them where they are not the defaults."""
        shown = f"{self.num_heads}, {self.head_dim}, eps={self.eps}, kind={self.kind!r}"
        shown += "" if self.elementwise_affine else ", elementwise_affine=False"
        shown += ", bias=True" if self.bias is not None else ""
        return ", ".join(filter(None, (shown, super().extra_repr())))

    @overload
    def forward(
        self, x: Tensor, residual: None = None, *, out_dtype: torch.dtype | None = None
    ) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, residual: Tensor, *, out_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, out_dtype: torch.dtype | None = None
    ) -> Result:
        """Normalise each head of x (..., heads, head_dim), or of x + residual.

        Outer strides are free: q and k may be slices of a packed qkv.  The rest is as in `RMSNorm`.
        """
        weight, bias = _affine(self)
        kind = PER_HEAD | (self.kind == "layer") * LAYER | (residual is not None) * ADD
        call = (
            kind, x, residual, weight, bias, self.eps, self.weight_offset,
            self.round_before_weight, True, False, self.round_rstd, self.round_weight,
            out_dtype, None, None, self.memory_efficient,
        )  # fmt: skip
        if weight is not None and not is_dynamo_compiling():
            made = quick(*call)
            if made is not None:
                return made
        if isinstance(x, Proxy) or isinstance(residual, Proxy):
            return self._trace(x, residual, out_dtype)
        if weight is None:  # whose shape would have been compared
            heads = () if self.num_heads is None else (self.num_heads,)
            check_ending("x", x, (*heads, self.head_dim))
        return serve(Call(*call))

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """Return what torch.jit.script compiles in the place of this module."""
        heads = [] if self.num_heads is None else [self.num_heads]
        return ScriptableNorm(self, self.kind, [*heads, self.head_dim], per_head=True)

    @classmethod
    def from_checkpoint(
        cls, source: Source, key: str, *, kind: Kind | None = None, **options: Any
    ) -> Self:
        """Make the module of a head norm that is stored in a checkpoint.

        As `RMSNorm.from_checkpoint`, with its options; kind is "rms" or "layer", or None for what
        `load_norm` would find.  A weight (head_dim,) stays so, with num_heads None.

        Example:
            >>> import normkit, torch
            >>> stored = {"q_norm.weight": torch.ones(3, 4)}
            >>> normkit.HeadNorm.from_checkpoint(stored, "q_norm", eps=1e-5)
            HeadNorm(3, 4, eps=1e-05, kind='rms')
        """
        from normkit.checkpoint import read_norm

        stored = read_norm(source, key, kind=kind, **options)
        stored.warn_of_assumed(stacklevel=2)
        return cls.from_stored(stored)

    @classmethod
    def from_stored(cls, stored: StoredNorm) -> Self:
        """Make the module of what `normkit.checkpoint.read_norm` read; it owns those tensors."""
        shape = tuple(stored.weight.shape)
        if len(shape) > 2:
            raise ValueError(
                f"{stored.key}: expected shape (num_heads, head_dim) or (head_dim,), got {shape}"
            )
        module = cls(
            shape[0] if len(shape) == 2 else None,
            shape[-1],
            stored.spec.eps,
            stored.spec.kind,
            bias=stored.spec.has_bias,
            device="meta",  # these parameters are replaced
            weight_offset=stored.spec.weight_offset,
            round_before_weight=stored.spec.round_before_weight,
            round_rstd=stored.spec.round_rstd,
            round_weight=stored.spec.round_weight,
        )
        return module._adopt(stored)


def _affine(module: _Affine) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias; no method, which Module has a hook to look for."""
    try:  # self.weight takes ten times as long
        parameters = module._parameters
        return parameters["weight"], parameters["bias"]
    except KeyError:  # parametrised, pruned or sharded: still attributes, but not parameters
        return module.weight, module.bias


def _check_options(eps: float | None, weight_offset: float) -> None:
    check_eps(eps)
    check_number("weight_offset", weight_offset)
