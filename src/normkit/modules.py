"""The norms as modules: drop-ins for torch's, with the options of `normkit.functional`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import Tensor
from torch.nn import Parameter, init

from normkit import _dispatch
from normkit._checks import Call
from normkit.checkpoint import Source, StoredNorm, read_norm
from normkit.functional import (
    Kind,
    add_layer_norm,
    add_rms_norm,
    head_norm,
    layer_norm,
    rms_norm,
)

if TYPE_CHECKING:
    from typing_extensions import Self


class _Affine(torch.nn.Module):
    """The parameters and options that all norms of this package have."""

    eps: float | None
    # reset_parameters runs in the constructor of torch's class, before ours has set the instance's own
    weight_offset: float = 0.0
    round_before_weight: bool = False

    def reset_parameters(self) -> None:
        """Make the norm's affine map the identity.

        The stored weight becomes 1 - weight_offset, zeros where the offset is 1, so that the weight that is applied,
        weight + weight_offset, is 1; the bias becomes 0.
        """
        if self.weight is not None:
            init.constant_(self.weight, 1.0 - self.weight_offset)  # type: ignore[arg-type]
        bias = getattr(self, "bias", None)  # torch's RMSNorm resets before it has one
        if bias is not None:
            init.zeros_(bias)

    def extra_repr(self) -> str:
        """Show the options, those of this package where they are not the defaults."""
        shown = [super().extra_repr()] if super().extra_repr() else []
        shown += [f"weight_offset={self.weight_offset}"] if self.weight_offset else []
        shown += ["round_before_weight=True"] if self.round_before_weight else []
        return ", ".join(shown)

    def _adopt(self, stored: StoredNorm) -> Self:
        self.weight = Parameter(stored.weight)
        if stored.bias is not None:
            self.bias = Parameter(stored.bias)
        return self


class _RowNorm(_Affine):
    """One row norm over the last dimensions; the bases of torch and the two functions make it a norm."""

    normalized_shape: tuple[int, ...]
    _kind: ClassVar[Kind]
    _norm: ClassVar[Callable[..., Any]]
    _add_norm: ClassVar[Callable[..., Any]]

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
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x, or x + residual, over the dimensions of normalized_shape.

        Args:
            x: (..., *normalized_shape) in float32, float16, bfloat16 or float64.  Outer strides are free; where the
                normalised dimensions are not contiguous among themselves, x is copied once.
            residual: of x's shape; added to x before the norm.  None: no addition.
            out_dtype: dtype of y; None for x's.

        Returns:
            y of x's shape; with a residual (y, residual_out), residual_out = x + residual in residual's dtype.

        Raises:
            TypeError: an argument is no tensor, or of the wrong dtype.
            ValueError: a shape or a device is wrong.
        """
        try:  # torch's own attribute access takes several times as long
            parameters = self._parameters
            weight, bias = parameters["weight"], parameters["bias"]
        except (
            KeyError
        ):  # parametrised, pruned or sharded: no longer parameters, but still attributes
            weight, bias = self.weight, self.bias  # type: ignore[assignment]
        if weight is None or len(self.normalized_shape) > 1:
            return self._as_one_row(x, residual, weight, bias, out_dtype)
        if residual is None:
            return self._norm(  # type: ignore[no-any-return]
                x,
                weight,
                bias,
                self.eps,
                weight_offset=self.weight_offset,
                round_before_weight=self.round_before_weight,
                out_dtype=out_dtype,
            )
        return self._add_norm(  # type: ignore[no-any-return]
            x,
            residual,
            weight,
            bias,
            self.eps,
            weight_offset=self.weight_offset,
            round_before_weight=self.round_before_weight,
            out_dtype=out_dtype,
        )

    def _as_one_row(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        out_dtype: torch.dtype | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        _check_ending("x", x, self.normalized_shape)
        first = -len(self.normalized_shape)
        affine = [None if t is None else t.flatten() for t in (weight, bias)]
        options: dict[str, Any] = {
            "weight_offset": self.weight_offset,
            "round_before_weight": self.round_before_weight,
            "out_dtype": out_dtype,
        }
        if residual is None:
            y: Tensor = self._norm(x.flatten(first), *affine, self.eps, **options)
            return y.view(x.shape)
        _check_ending("residual", residual, x.shape)
        y, residual_out = self._add_norm(
            x.flatten(first), residual.flatten(first), *affine, self.eps, **options
        )
        return y.view(x.shape), residual_out.view(x.shape)

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
            source: a .safetensors file, a model folder, a dict of tensors, or an object with get_tensor(name); as in
                `load_norm`.
            key: name of the norm ("model.norm") or of its weight ("model.norm.weight").
            eps: None for that of config.json, or, without one, the default of the class.
            weight_offset: None for what the model family of config.json has, or 0.
            round_before_weight: None for what the model family of config.json does, or False.
            device: None for where the source gives its tensors.

        Returns:
            A module with copies of the weight, and of the bias if there is one, bit for bit and in the dtype stored.

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
        options = {"eps": eps, "weight_offset": weight_offset}
        return cls._from_stored(
            read_norm(
                source,
                key,
                kind=cls._kind,
                round_before_weight=round_before_weight,
                device=device,
                **options,
            )
        )

    @classmethod
    def _from_stored(cls, stored: StoredNorm) -> Self:
        module = cls(  # on the meta device, since its parameters are replaced
            stored.weight.shape,
            stored.eps,
            bias=stored.bias is not None,
            device="meta",
            weight_offset=stored.weight_offset,
            round_before_weight=stored.round_before_weight,
        )
        return module._adopt(stored)


class RMSNorm(_RowNorm, torch.nn.RMSNorm):
    """RMSNorm over the last dimensions; a `torch.nn.RMSNorm` with the same state dict.

        y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset) + bias

    Args:
        normalized_shape: the sizes of the last dimensions, or of the last one.
        eps: added to the mean of squares; torch's default is None, for the machine epsilon of the computing dtype.
        elementwise_affine: whether there is a weight; without it there is no bias either.
        device: of the parameters; None for torch's default.
        dtype: of the parameters; None for torch's default.
        bias: whether there is a bias, which torch's RMSNorm never has; it adds the key `bias` to the state dict.
        weight_offset: added to the weight in float32 (Gemma: 1.0); the weight is then initialised to 1 - weight_offset.
        round_before_weight: round the normalised value to x's dtype before the weight multiplies it (Llama, Qwen).

    Where it rounds, and which x it takes: `normkit.rms_norm`, and with a residual `normkit.add_rms_norm`.

    Example:
        >>> import normkit, torch
        >>> norm = normkit.RMSNorm(4)
        >>> y, residual = norm(torch.ones(2, 4), torch.ones(2, 4))
        >>> residual[0]
        tensor([2., 2., 2., 2.], grad_fn=<SelectBackward0>)
    """

    _kind = "rms"
    _norm = staticmethod(rms_norm)
    _add_norm = staticmethod(add_rms_norm)

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
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        has_bias = bias and elementwise_affine
        empty = torch.empty(self.normalized_shape, device=device, dtype=dtype) if has_bias else None
        self.register_parameter("bias", None if empty is None else Parameter(empty))
        self.weight_offset = weight_offset
        self.round_before_weight = round_before_weight
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Show the options, those of this package where they are not the defaults."""
        return super().extra_repr() + (", bias=True" if self.bias is not None else "")


class LayerNorm(_RowNorm, torch.nn.LayerNorm):
    """LayerNorm over the last dimensions; a `torch.nn.LayerNorm` with the same state dict.

        y = (x - mean(x)) / sqrt(var(x) + eps) * (weight + weight_offset) + bias

    Args:
        normalized_shape: the sizes of the last dimensions, or of the last one.
        eps: added to the variance; None for the machine epsilon of the computing dtype.
        elementwise_affine: whether there is a weight; without it there is no bias either.
        bias: whether there is a bias.
        device: of the parameters; None for torch's default.
        dtype: of the parameters; None for torch's default.
        weight_offset: added to the weight in float32; the weight is then initialised to 1 - weight_offset.
        round_before_weight: round the normalised value to x's dtype before the weight multiplies it.

    Where it rounds, and which x it takes: `normkit.layer_norm`, and with a residual `normkit.add_layer_norm`.

    Example:
        >>> import normkit, torch
        >>> normkit.LayerNorm(2, eps=0.0)(torch.tensor([1.0, 3.0])).tolist()
        [-1.0, 1.0]
    """

    _kind = "layer"
    _norm = staticmethod(layer_norm)
    _add_norm = staticmethod(add_layer_norm)

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
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.weight_offset = weight_offset
        self.round_before_weight = round_before_weight
        self.reset_parameters()


class HeadNorm(_Affine):
    """A norm of every head of x, with a weight for each head or one for all.

        y = xhat * (weight + weight_offset) + bias,  xhat by `kind` as in `RMSNorm` or `LayerNorm`

    Args:
        num_heads: heads of x, each with a weight: (num_heads, head_dim).  None: any number of heads, which share one
            weight (head_dim,).
        head_dim: size of a head, the last dimension of x.
        eps: added to the mean of squares or the variance; None for the machine epsilon of the computing dtype.
        kind: "rms" or "layer".
        bias: whether there is a bias, of weight's shape.
        elementwise_affine: whether there is a weight; without it there is no bias either.
        device: of the parameters; None for torch's default.
        dtype: of the parameters; None for torch's default.
        weight_offset: added to the weight in float32 (Gemma: 1.0); the weight is then initialised to 1 - weight_offset.
        round_before_weight: round the normalised value to x's dtype before the weight multiplies it (Qwen).

    Raises:
        ValueError: kind is neither "rms" nor "layer".

    Where it rounds, and which x it takes: `normkit.head_norm`.

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
    ) -> None:
        super().__init__()
        if kind not in ("rms", "layer"):
            raise ValueError(f'kind: expected "rms" or "layer", got {kind!r}')
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.eps = eps
        self.kind = kind
        self.elementwise_affine = elementwise_affine
        self.weight_offset = weight_offset
        self.round_before_weight = round_before_weight
        shape = (head_dim,) if num_heads is None else (num_heads, head_dim)
        for name, wanted in (("weight", True), ("bias", bias)):
            stored = None
            if wanted and elementwise_affine:
                stored = Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, stored)
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Show the options, those of all norms where they are not the defaults."""
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
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise each head of x, or of x + residual.

        Args:
            x: (..., heads, head_dim) in float32, float16, bfloat16 or float64.  Outer strides are free, so q and k may
                be slices of a packed qkv.
            residual: of x's shape; added to x before the norm.  None: no addition.
            out_dtype: dtype of y; None for x's.

        Returns:
            y of x's shape; with a residual (y, residual_out), residual_out = x + residual in residual's dtype.

        Raises:
            TypeError: an argument is no tensor, or of the wrong dtype.
            ValueError: a shape or a device is wrong.
        """
        try:  # as in the other norms
            parameters = self._parameters
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:
            weight, bias = self.weight, self.bias  # type: ignore[assignment]
        if weight is None:  # which would have told the shape
            heads = () if self.num_heads is None else (self.num_heads,)
            _check_ending("x", x, (*heads, self.head_dim))
        if residual is None:
            return head_norm(
                x,
                weight,
                bias,
                self.eps,
                kind=self.kind,
                weight_offset=self.weight_offset,
                round_before_weight=self.round_before_weight,
                out_dtype=out_dtype,
            )
        call = Call(  # there is no function for it, but the backends have it
            "add_head_norm",
            self.kind == "layer",
            True,
            x,
            weight,
            bias,
            self.eps,
            self.weight_offset,
            self.round_before_weight,
            clamp_inf=False,
            out_dtype=out_dtype,
            residual=residual,
        )
        return _dispatch.serve(call)  # type: ignore[no-any-return]

    @classmethod
    def from_checkpoint(
        cls,
        source: Source,
        key: str,
        *,
        eps: float | None = None,
        kind: Kind | None = None,
        weight_offset: float | None = None,
        round_before_weight: bool | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Make the module of a head norm that is stored in a checkpoint.

        Args:
            source: as in `RMSNorm.from_checkpoint`.
            key: as in `RMSNorm.from_checkpoint`.
            eps: as in `RMSNorm.from_checkpoint`.
            kind: "rms" or "layer"; None for what `load_norm` would find.
            weight_offset: as in `RMSNorm.from_checkpoint`.
            round_before_weight: as in `RMSNorm.from_checkpoint`.
            device: as in `RMSNorm.from_checkpoint`.

        Returns:
            A module whose weight is stored as the checkpoint has it: (num_heads, head_dim), or (head_dim,) for any
            number of heads, num_heads None.

        Raises:
            KeyError: source has no such norm; the message names the nearest.
            TypeError: source is none of these.
            ValueError: a file is malformed, or the weight has neither one nor two dimensions.
            OSError: a file is missing or cannot be read.

        Example:
            >>> import normkit, torch
            >>> tensors = {"q_norm.weight": torch.ones(3, 4)}
            >>> normkit.HeadNorm.from_checkpoint(tensors, "q_norm", eps=1e-5)
            HeadNorm(3, 4, eps=1e-05, kind='rms')
        """
        options: Mapping[str, Any] = {"weight_offset": weight_offset, "device": device}
        return cls._from_stored(
            read_norm(
                source, key, kind=kind, eps=eps, round_before_weight=round_before_weight, **options
            )
        )

    @classmethod
    def _from_stored(cls, stored: StoredNorm) -> Self:
        shape = tuple(stored.weight.shape)
        if len(shape) not in (1, 2):
            raise ValueError(
                f"weight: expected shape (num_heads, head_dim) or (head_dim,), got {shape}"
            )
        module = cls(
            shape[0] if len(shape) == 2 else None,
            shape[-1],
            stored.eps,
            stored.kind,
            bias=stored.bias is not None,
            device="meta",
            weight_offset=stored.weight_offset,
            round_before_weight=stored.round_before_weight,
        )
        return module._adopt(stored)


def _check_ending(name: str, t: Any, ending: tuple[int, ...]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if tuple(t.shape[-len(ending) :]) != tuple(ending):
        raise ValueError(
            f"{name}: expected a shape that ends in {tuple(ending)}, got {tuple(t.shape)}"
        )
