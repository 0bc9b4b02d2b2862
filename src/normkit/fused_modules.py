"""Modules of norms that are fused with more than a sum: those of `normkit.fusions`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter, init

from normkit._serving.checks import check_ending, check_eps, check_size, in_groups
from normkit._spec import Activation, gated
from normkit.functional import head_norm, rms_norm
from normkit.fusions import gated_norm


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
