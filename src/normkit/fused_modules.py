"""Modules of norms that are fused with more than a sum: those of `normkit.fusions`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, init

from normkit._serving.checks import check_ending, check_eps, check_size, in_groups
from normkit._spec import Activation, Kind, gated, is_layer
from normkit.functional import head_norm, rms_norm
from normkit.fusions import add_modulated_norm, gated_norm, modulated_norm


class GatedRMSNorm(torch.nn.Module):
    """`gated_norm` with a weight of its own: RMSNorm of Mamba-2, Qwen3-Next and their relatives.

    Its parameter is `weight` of shape (hidden_size,), as in the modules of those models, ones at
    first.  Where the columns of a model are split over ranks by whole groups, each rank's module is
    one of its own columns, with the same group_size.

    Args:
        hidden_size: the last dimension of x.
        eps: added to the mean of squares; None: the computing dtype's epsilon.
        activation: "silu" or "sigmoid", of z.
        norm_before_gate: as in `gated_norm`: False for Mamba-2, Bamba and Zamba-2.
        group_size: columns that are normalised together; it divides hidden_size.  None: all.
        round_before_weight: as in `rms_norm`; True in most models of transformers.
        round_each: as in `gated_norm`; True for Qwen3-Next and OLMo-Hybrid.
        device: of the weight.
        dtype: of the weight.

    Raises:
        TypeError: a size is no int, eps no number, norm_before_gate no bool.
        ValueError: group_size does not divide hidden_size, or a value is out of range.

    Example:
        >>> import normkit, torch
        >>> norm = normkit.GatedRMSNorm(64, norm_before_gate=False, round_before_weight=True)
        >>> norm(torch.randn(2, 5, 64), torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float | None = 1e-6,
        *,
        activation: Activation = "silu",
        norm_before_gate: bool = True,
        group_size: int | None = None,
        round_before_weight: bool = False,
        round_each: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("hidden_size", hidden_size)
        gated("rms", activation, norm_before_gate)  # raises what is wrong with these
        if group_size is not None:
            check_size("group_size", group_size)
            if hidden_size % group_size != 0:
                raise ValueError(
                    f"group_size: expected a divisor of hidden_size {hidden_size}, got {group_size}"
                )
        self.hidden_size, self.group_size = hidden_size, group_size
        self.eps = check_eps(eps)
        self.activation, self.norm_before_gate = activation, norm_before_gate
        self.round_before_weight, self.round_each = round_before_weight, round_each
        self.weight = Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the weight ones."""
        init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise x and multiply it by act(z), in the order of norm_before_gate.

        Args:
            x: (..., hidden_size).
            z: of x's shape; None: x is normalised and not gated.

        Returns:
            y, of x's shape and dtype.
        """
        check_ending("x", x, (self.hidden_size,))
        if z is not None:
            return gated_norm(
                x, z, self.weight, eps=self.eps, activation=self.activation,
                norm_before_gate=self.norm_before_gate, group_size=self.group_size,
                round_each=self.round_each, round_before_weight=self.round_before_weight,
            )  # fmt: skip
        if self.group_size is None:
            return rms_norm(
                x, self.weight, eps=self.eps, round_before_weight=self.round_before_weight
            )
        split = in_groups(self.group_size, x=x, weight=self.weight)
        y = head_norm(**split, eps=self.eps, round_before_weight=self.round_before_weight)
        return y.flatten(-2)

    def extra_repr(self) -> str:
        """Show the options, those that are not the defaults."""
        shown = [f"{self.hidden_size}", f"eps={self.eps}"]
        defaults = {
            "activation": "silu", "norm_before_gate": True, "group_size": None,
            "round_before_weight": False, "round_each": False,
        }  # fmt: skip
        given = ((name, getattr(self, name)) for name in defaults)
        shown += [f"{name}={value!r}" for name, value in given if value != defaults[name]]
        return ", ".join(shown)


class ModulatedNorm(torch.nn.Module):
    """`modulated_norm`, and behind a sum `add_modulated_norm`: the norm of AdaLN layers.

    Its parameters are `weight` and `bias` of shape (hidden_size,), ones and zeros at first, and
    None unless they are asked for, as in most models of diffusers.

    Args:
        hidden_size: the last dimension of x.
        eps: added to the statistic; None: the computing dtype's epsilon.
        kind: "layer" or "rms".
        elementwise_affine: whether there is a weight.
        bias: whether there is a bias.
        round_each: as in `modulated_norm`; True for Flux, SD3 and Qwen-Image.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: hidden_size is no int, or eps no number.
        ValueError: a value is out of range.

    Example:
        >>> import normkit, torch
        >>> norm = normkit.ModulatedNorm(64)
        >>> x, residual = torch.randn(2, 2, 5, 64)
        >>> scale, shift, gate = torch.randn(2, 3 * 64).chunk(3, -1)
        >>> y, residual = norm(x, scale, shift, residual=residual, gate=gate)
        >>> y.shape
        torch.Size([2, 5, 64])
    """

    weight: Parameter | None
    bias: Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float | None = 1e-6,
        *,
        kind: Kind = "layer",
        elementwise_affine: bool = False,
        bias: bool = False,
        round_each: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("hidden_size", hidden_size)
        is_layer(kind)  # raises what is wrong with it
        self.hidden_size, self.kind, self.round_each = hidden_size, kind, round_each
        self.eps = check_eps(eps)
        for name, wanted in (("weight", elementwise_affine), ("bias", bias)):
            parameter = torch.empty(hidden_size, device=device, dtype=dtype) if wanted else None
            self.register_parameter(name, None if parameter is None else Parameter(parameter))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the weight ones and the bias zeros."""
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x, or residual + gate * x, and scale and shift it.

        Args:
            x: (..., hidden_size).
            scale: as in `modulated_norm`.
            shift: likewise.
            residual: of x's shape; None: x is normalised.
            gate: as in `add_modulated_norm`, with a residual.

        Returns:
            y, of x's shape and dtype; with a residual (y, the sum).

        Raises:
            ValueError: a gate is given without a residual, or a shape does not fit.
        """
        check_ending("x", x, (self.hidden_size,))
        modulation = scale, shift, self.weight, self.bias, self.eps
        options: Any = {"kind": self.kind, "round_each": self.round_each}
        if residual is not None:
            return add_modulated_norm(x, residual, gate, *modulation, **options)
        if gate is not None:
            raise ValueError("gate: expected None without a residual, got a tensor")
        return modulated_norm(x, *modulation, **options)

    def extra_repr(self) -> str:
        """Show the options, those that are not the defaults."""
        shown = [f"{self.hidden_size}", f"eps={self.eps}"]
        shown += [f"kind={self.kind!r}"] * (self.kind != "layer")
        shown += ["elementwise_affine=True"] * (self.weight is not None)
        shown += ["bias=True"] * (self.bias is not None)
        return ", ".join(shown + ["round_each=True"] * self.round_each)
