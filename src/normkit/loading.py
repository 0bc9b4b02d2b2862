"""A module for a norm that is stored in a checkpoint."""

from __future__ import annotations

import torch

from normkit._spec import Kind
from normkit.checkpoint import Source, StoredNorm, read_norm
from normkit.checkpoint._names import is_head_norm
from normkit.modules import HeadNorm, LayerNorm, RMSNorm


def load_norm(
    source: Source,
    key: str,
    *,
    kind: Kind | None = None,
    eps: float | None = None,
    weight_offset: float | None = None,
    round_before_weight: bool | None = None,
    device: torch.device | str | None = None,
) -> RMSNorm | LayerNorm | HeadNorm:
    """Make the module of a norm in a checkpoint, of the class that fits what is stored.

    What it computes is what the family's own code computes, as `make families` measured it, with
    the numbers of config.json; docs/models.md has the rules.  What nobody says is assumed: the
    kind "layer" where there is a bias, else what most families with such a config have.  The weight
    (heads, head_dim) of a q_norm, k_norm or v_norm makes a `HeadNorm`, any other an `RMSNorm` or
    `LayerNorm`; a row that is stored as (1, n), (n, 1) or (n, 1, 1) has the weight (n,).  Of a
    module with a gate, it is the norm alone.

    Args:
        source: a .safetensors file, with its other shards if an index beside it lists it; a folder
            of such files, with their index or without; an index; a dict of tensors; or an object
            with get_tensor(name), which has keys() or raises KeyError for what it lacks.  Only the
            tensors of this norm are read, from a file those of up to 128 MiB; docs/checkpoints.md
            has which file of a folder is meant, and what else is refused.  A config.json beside the
            file is used, with its sections.
        key: name of the norm ("model.norm") or of its weight ("model.norm.weight").  A norm that
            is wrapped by PEFT, torch.compile, DDP or FSDP has its name in the plain model as well,
            which of several copies means the one that PEFT trains.
        kind: "rms" or "layer"; None for the family's.
        eps: None for that of the family, which may be an entry of config.json or its default.
        weight_offset: what is added to the weight; None for what the family adds (Gemma: 1.0).
        round_before_weight: None for True where the family does so (Llama and most that descend
            from it).
        device: None for where the source gives its tensors.

    Returns:
        An RMSNorm, LayerNorm or HeadNorm with copies of the stored tensors, bit for bit and in the
        dtype stored.

    Raises:
        KeyError: source has no such norm, or several; the message names the nearest.
        TypeError: source is none of these, an argument is of the wrong type, or a tensor is stored
            in a dtype that no call takes, as float8 and integers are.
        ValueError: a value is none of these, eps is not a finite number from 0 on, a file is
            malformed, or the stored shapes do not fit.
        NoRowError: a ValueError: the family's module is no norm of rows, and no kind is given.
        OSError: a file is missing or cannot be read.

    Warns:
        AssumedWarning: an option is assumed, and none was given.

    Nothing is rounded in loading.

    Example:
        >>> import normkit, torch
        >>> normkit.load_norm({"ln.weight": torch.ones(4), "ln.bias": torch.zeros(4)}, "ln")
        LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=True)
    """
    stored = read_norm(
        source,
        key,
        kind=kind,
        eps=eps,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        device=device,
    )
    stored.warn_of_assumed(stacklevel=2)
    return module_of(stored)


def module_of(stored: StoredNorm) -> RMSNorm | LayerNorm | HeadNorm:
    """The module for a norm that was read, of the class that fits it."""
    if is_head_norm(stored.key, tuple(stored.weight.shape)):
        return HeadNorm.from_stored(stored)
    if stored.spec.kind == "layer":
        return LayerNorm.from_stored(stored)
    return RMSNorm.from_stored(stored)
