"""The norm layers of LoRAX and Text Generation Inference, alike at every size and on every device.

    from normkit.compat.lorax import FastLayerNorm, FastRMSNorm

Both add an optional residual, and return (normed, residual) for the next layer.  Nothing that was
given is written; the sum is made in float32, and rounded only to be stored: this is what LoRAX has
on CUDA up to a hidden size of 8192, and it is so here above that and elsewhere too.

LoRAX gives `torch.nn.LayerNorm` two methods when it is imported.  Here that takes a call of
`install`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from normkit.checkpoint import HasGetTensor
from normkit.compat import dropout_layer_norm
from normkit.functional import add_layer_norm, add_rms_norm, rms_norm
from normkit.modules import LayerNorm

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FastLayerNorm", "FastRMSNorm", "install", "uninstall"]

Layer = TypeVar("Layer", bound=torch.nn.LayerNorm)


def _stored(weights: HasGetTensor, name: str, hint: str = "") -> Tensor:
    if not callable(getattr(weights, "get_tensor", None)):
        kind = type(weights).__name__
        raise TypeError(f"weights: expected an object with get_tensor(name), got {kind}")
    try:
        tensor = weights.get_tensor(name)
    except KeyError as error:
        raise KeyError(f"weights: expected a tensor {name!r}, got none{hint}") from error
    if not isinstance(tensor, Tensor):
        raise TypeError(f"weights: expected a torch.Tensor {name!r}, got {type(tensor).__name__}")
    return tensor


def _load(cls: type[Layer], prefix: str, weights: HasGetTensor, eps: float) -> Layer:
    """Make a LayerNorm of the tensors `prefix`.weight and `prefix`.bias."""
    weight = _stored(weights, f"{prefix}.weight")
    bias = _stored(weights, f"{prefix}.bias", "; load_no_bias is for norms without one")
    if bias.shape != weight.shape:
        expected = f"the weight's shape {tuple(weight.shape)}"
        raise ValueError(f"{prefix}.bias: expected {expected}, got {tuple(bias.shape)}")
    norm = cls(list(weight.shape), eps=eps)
    norm.weight, norm.bias = Parameter(weight), Parameter(bias)
    return norm


def _load_no_bias(cls: type[Layer], prefix: str, weights: HasGetTensor, eps: float) -> Layer:
    """Make a LayerNorm without a bias of the tensor `prefix`.weight."""
    weight = _stored(weights, f"{prefix}.weight")
    norm = cls(list(weight.shape), eps=eps)
    norm.weight = Parameter(weight)
    norm.register_parameter("bias", None)
    return norm


class FastLayerNorm(LayerNorm):
    """LayerNorm of x or of x + residual; a `torch.nn.LayerNorm` with the same state dict.

        normed = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias,  s = x + residual

    The arguments are those of `normkit.LayerNorm`; normalized_shape is one dimension.

    Example:
        >>> import torch
        >>> from normkit.compat.lorax import FastLayerNorm
        >>> normed, residual = FastLayerNorm(4)(torch.ones(2, 4), torch.ones(2, 4))
        >>> residual[0]
        tensor([2., 2., 2., 2.])
    """

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalise hidden_states, or hidden_states + residual.

        Args:
            hidden_states: x, as errors and the formula call it: (..., n) in float32, float16 or
                bfloat16.
            residual: of x's shape in any of them; None: nothing is added.

        Returns:
            normed, of x's shape and dtype; and the sum, a new tensor of residual's dtype, or x
            itself without a residual.

        Raises:
            TypeError: an argument is no tensor, or of the wrong dtype.
            ValueError: a shape or a device is wrong.

        The sum is rounded to be stored only; normed is made of the float32 sum and rounded once.
        Semantics: LoRAX on CUDA, for n up to 8192.
        """
        if residual is None:
            return super().forward(hidden_states), hidden_states
        return add_layer_norm(
            hidden_states,
            residual,
            self.weight,
            self.bias,
            self.eps,
            round_sum=False,
            weight_offset=self.weight_offset,
            round_before_weight=self.round_before_weight,
            memory_efficient=self.memory_efficient,
        )

    @classmethod
    def load(cls, prefix: str, weights: HasGetTensor, eps: float) -> Self:
        """Make the layer of the tensors `prefix`.weight and `prefix`.bias.

        Args:
            prefix: name of the layer.
            weights: what has get_tensor(name); its tensors become the parameters, uncopied.
            eps: added to the variance.

        Returns:
            An instance of the class on which this is called.

        Raises:
            KeyError: weights has no such tensor.  What else get_tensor raises is passed on.
            TypeError: weights has no get_tensor, or it gives no tensor.
            ValueError: weight and bias differ in shape.

        Example:
            >>> import torch
            >>> from normkit.compat.lorax import FastLayerNorm
            >>> class Weights(dict):
            ...     get_tensor = dict.__getitem__
            >>> stored = Weights({"ln.weight": torch.ones(4), "ln.bias": torch.zeros(4)})
            >>> FastLayerNorm.load("ln", stored, 1e-5)
            FastLayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=True)
        """
        return _load(cls, prefix, weights, eps)

    @classmethod
    def load_no_bias(cls, prefix: str, weights: HasGetTensor, eps: float) -> Self:
        """Make the layer of the tensor `prefix`.weight, without a bias; else as `load`."""
        return _load_no_bias(cls, prefix, weights, eps)


class FastRMSNorm(torch.nn.Module):
    """RMSNorm of x or of x + residual.

        normed = s / sqrt(mean(s^2) + eps) * weight,  s = x + residual

    Args:
        weight: (n,) in float32, float16 or bfloat16, whatever x is; it becomes the parameter.
        eps: added to the mean of squares; the attribute `variance_epsilon`.

    Example:
        >>> import torch
        >>> from normkit.compat.lorax import FastRMSNorm
        >>> normed, residual = FastRMSNorm(torch.ones(4), 1e-6)(torch.ones(2, 4))
        >>> residual[0]
        tensor([1., 1., 1., 1.])
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = Parameter(weight)
        self.variance_epsilon = eps

    def extra_repr(self) -> str:
        """Show the size and eps."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalise hidden_states, or hidden_states + residual; as `FastLayerNorm.forward`."""
        eps = self.variance_epsilon
        if residual is None:
            return rms_norm(hidden_states, self.weight, eps=eps), hidden_states
        return add_rms_norm(hidden_states, residual, self.weight, eps=eps, round_sum=False)

    @classmethod
    def load(cls, prefix: str, weights: HasGetTensor, eps: float = 1e-6) -> Self:
        """Make the layer of the tensor `prefix`.weight; as `FastLayerNorm.load`."""
        return cls(_stored(weights, f"{prefix}.weight"), eps)


# ---------------------------------------------------------------- LoRAX's own files

_ABSENT = object()
_METHODS: dict[str, object] = {
    "load": classmethod(_load),
    "load_no_bias": classmethod(_load_no_bias),
}
_OURS: dict[str, object] = {**_METHODS, "dropout_layer_norm": dropout_layer_norm}
_replaced: dict[str, object] = {}


def _found(name: str) -> object:
    if name in _METHODS:
        return vars(torch.nn.LayerNorm).get(name, _ABSENT)
    return sys.modules.get(name, _ABSENT)


def _put(name: str, value: object) -> None:
    if name not in _METHODS and value is _ABSENT:
        del sys.modules[name]
    elif name not in _METHODS:
        sys.modules[name] = cast(ModuleType, value)
    elif value is _ABSENT:
        delattr(torch.nn.LayerNorm, name)
    else:
        setattr(torch.nn.LayerNorm, name, value)


def install() -> None:
    """Serve LoRAX's own files, unchanged: its extension, and what it adds to torch.

    `import dropout_layer_norm` then gives `normkit.compat.dropout_layer_norm`, and
    `torch.nn.LayerNorm` and its subclasses have the classmethods `load(prefix, weights, eps)` and
    `load_no_bias(prefix, weights, eps)`.  What was there under these names is replaced, and kept
    for `uninstall`.  Once it is installed, another call changes nothing.

    Example:
        >>> from normkit.compat import lorax
        >>> lorax.install()
        >>> import dropout_layer_norm
        >>> dropout_layer_norm.__name__
        'normkit.compat.dropout_layer_norm'
        >>> lorax.uninstall()
    """
    for name, ours in _OURS.items():
        found = _found(name)
        if found is not ours:
            _put(name, ours)
            _replaced[name] = found


def uninstall() -> None:
    """Put back what `install` replaced; what has been replaced again since then stays.

    Example:
        >>> from normkit.compat import lorax
        >>> lorax.uninstall()
    """
    for name, before in _replaced.items():
        if _found(name) is _OURS[name]:
            _put(name, before)
    _replaced.clear()
