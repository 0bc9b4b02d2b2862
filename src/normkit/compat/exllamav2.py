"""ExLlamaV2's norm modules, on normkit's.

They take the place of `exllamav2.rmsnorm.ExLlamaV2RMSNorm` and its siblings: put them in the
modules that import those (`exllamav2.model`, `attn`, `mlp`, `moe_mlp`, `parallel_decoder`,
`vlm.vision_tower`) before a model is made, and before its conversion scripts are imported.  A model
is any object with what these read:

- ``config.norm_eps``, ``config.hidden_size``, and ``config.tensor_file_map``: the safetensors file
  of each tensor by name;
- ``config.arch.lm`` where no archparams are given: its norm_constant_bias (0 where it is missing)
  and headnorm ("layernorm"); ``config.arch.keymap`` (None): the renamings (from, to) that made the
  names of the map out of those in the files, with "$" for the beginning of a name;
- ``tp_context``: its get_split(broadcast_type), a list of (device index, begin, end), for
  `ExLlamaV2RMSNorm.tp_split`, and num_devices.

A norm keeps what is stored, bit for bit and in its dtype: that is what get_weight() returns.  The
constant of Gemma is added to it in float32 inside the op.  ``weight`` and ``bias`` are what
ExLlamaV2's own kernels read: float16, constant included, rounded once, one of each head for head
norms.  They are made when they are first read; where nothing differs from what is stored, they are
that.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import Parameter

from normkit import functional, modules, parallel
from normkit._spec import Kind
from normkit.checkpoint import StoredNorm
from normkit.compat._errors import raise_renamed
from normkit.compat.exllamav2_module import (
    Exposed,
    Hidden,
    Model,
    NormModule,
    Returned,
    torch_device,
)
from normkit.compat.exllamav2_tp import exllamav2_streams

__all__ = ["ExLlamaV2HeadNorm", "ExLlamaV2LayerNorm", "ExLlamaV2RMSNorm"]


class ExLlamaV2LayerNorm(NormModule[modules.LayerNorm]):
    """ExLlamaV2's LayerNorm over hidden_size.

        y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

    ``layernorm`` is a `torch.nn.LayerNorm` with the stored weight and bias.

    Args:
        model: as this module's documentation says.
        key: name of the norm in tensor_file_map, without ".weight".
        archparams: None for model.config.arch.lm.

    Example:
        >>> from types import SimpleNamespace
        >>> from normkit.compat.exllamav2 import ExLlamaV2LayerNorm
        >>> arch = SimpleNamespace(lm=SimpleNamespace())
        >>> model = SimpleNamespace(config=SimpleNamespace(arch=arch, hidden_size=64))
        >>> ExLlamaV2LayerNorm(model, "model.norm").weight_footprint()
        128
    """

    _function = staticmethod(functional.layer_norm)
    _module = modules.LayerNorm
    _adds_constant = False  # as in ExLlamaV2


class ExLlamaV2HeadNorm(NormModule[modules.HeadNorm]):
    """ExLlamaV2's norm of each attention head.

        y = xhat * (weight + norm_constant_bias) + bias,  xhat by archparams.headnorm: "rmsnorm", or
        else LayerNorm

    The output is a new tensor: ExLlamaV2 overwrites its input, but only reads what it gets back.
    ``layernorm`` is a `normkit.HeadNorm` with the stored weight, where ExLlamaV2 has a
    `torch.nn.LayerNorm` with one that is repeated for every head.

    Args:
        model: as this module's documentation says.
        key: name of the norm in tensor_file_map, without ".weight".
        num_heads: heads of the input.
        head_dim: size of each.  The stored weight is (num_heads, head_dim), or (head_dim,) for all
            heads; the bias is of the same shape.
        archparams: None for model.config.arch.lm.

    Example:
        >>> from types import SimpleNamespace
        >>> from normkit.compat.exllamav2 import ExLlamaV2HeadNorm
        >>> arch = SimpleNamespace(lm=SimpleNamespace())
        >>> config = SimpleNamespace(arch=arch, norm_eps=1e-5, tensor_file_map={})
        >>> ExLlamaV2HeadNorm(SimpleNamespace(config=config), "q_norm", 3, 8).variance_epsilon
        1e-05
    """

    _function = staticmethod(functional.head_norm)
    _module = modules.HeadNorm

    def __init__(
        self, model: Model, key: str, num_heads: int, head_dim: int, archparams: object = None
    ) -> None:
        super().__init__(model, key, archparams)
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.variance_epsilon = model.config.norm_eps

    def weight_footprint(self) -> int:
        """Return the bytes of weight, and of bias where tensor_file_map has one, in float16."""
        stored = self.model.config.tensor_file_map
        has_bias = any(f"{key}.bias" in stored for key in (self.key, self.alt_key))
        return self.num_heads * self.head_dim * 2 * (1 + has_bias)

    def _kind(self) -> Kind:
        return "rms" if getattr(self.archparams, "headnorm", None) == "rmsnorm" else "layer"

    def _check_shape(self, stored: StoredNorm) -> None:
        shape, heads = tuple(stored.weight.shape), (self.num_heads, self.head_dim)
        if shape not in (heads, heads[1:]):
            raise ValueError(
                f"{stored.key}.weight: expected shape {heads} or {heads[1:]}, got {shape}"
            )

    def _in_float16(self, module: modules.HeadNorm, name: str) -> Parameter | None:
        made = super()._in_float16(module, name)
        if made is None or made.ndim == 2:
            return made
        return Parameter(made.data.repeat(self.num_heads, 1), requires_grad=False)

    def _normalised(self, x: Hidden, output_fp32: bool, **options: Kind) -> Hidden:
        options["kind"] = self._loaded().kind
        heads = (self.num_heads, self.head_dim)
        if not isinstance(x, Tensor) or tuple(x.shape[-2:]) == heads:
            return super()._normalised(x, output_fp32, **options)
        if x.ndim == 0 or x.shape[-1] != self.num_heads * self.head_dim:
            raise ValueError(
                f"hidden_states: expected shape (..., {heads[0]}, {heads[1]}) or"
                f" (..., {heads[0] * heads[1]}), got {tuple(x.shape)}"
            )
        y = super()._normalised(x.view(*x.shape[:-1], *heads), output_fp32, **options)
        return y.flatten(-2) if isinstance(y, Tensor) else y


class ExLlamaV2RMSNorm(NormModule[modules.RMSNorm]):
    """ExLlamaV2's RMSNorm over hidden_size, on one device or, after `tp_split`, on several.

        y = x / sqrt(mean(x^2) + eps) * (weight + norm_constant_bias)

    A stored bias is added; ExLlamaV2 refuses one.

    Args:
        model: as this module's documentation says.
        key: name of the norm in tensor_file_map, without ".weight".
        archparams: None for model.config.arch.lm.

    Example:
        >>> from types import SimpleNamespace
        >>> from normkit.compat.exllamav2 import ExLlamaV2RMSNorm
        >>> arch = SimpleNamespace(lm=SimpleNamespace())
        >>> model = SimpleNamespace(config=SimpleNamespace(arch=arch, hidden_size=64))
        >>> ExLlamaV2RMSNorm(model, "model.norm").is_tp
        False
    """

    name = "RMSNorm"
    _function = staticmethod(functional.rms_norm)
    _module = modules.RMSNorm

    def __init__(self, model: Model, key: str, archparams: object = None) -> None:
        super().__init__(model, key, archparams)
        self.broadcast_type: int | None = None

    def unload(self) -> None:
        """Let go of the tensors, on all devices."""
        super().unload()
        self.is_tp = False
        self._replicas: list[modules.RMSNorm] = []
        self._context: parallel.TPContext | None = None

    def _made_for_kernels(self, name: str) -> Exposed:
        if not self.is_tp:
            return super()._made_for_kernels(name)
        return [self._in_float16(replica, name) for replica in self._replicas]

    def _out_dtype(self, output_fp32: bool) -> torch.dtype | None:
        return torch.float32 if output_fp32 else torch.float16

    def scratch_space_tp(self) -> list[int]:
        """Return a 0 per device of the model's tp_context: no scratch memory is needed."""
        return [0] * self.model.tp_context.num_devices

    def tp_split(self, broadcast_type: int) -> None:
        """Put the whole weight, and bias, on every device that has a part of a split.

        Args:
            broadcast_type: which split of model.tp_context; hidden_states go to its devices.

        Raises:
            RuntimeError: nothing is loaded.
            ValueError: no device has a part.

        From then on is_tp is True, weight and bias are lists, and forward is `forward_tp`.
        """
        module = self._loaded()
        split = self.model.tp_context.get_split(broadcast_type)
        devices = [torch_device(idx) for idx, begin, end in split if end > begin]
        if not devices:
            raise ValueError(f"broadcast_type: expected a split with parts, got {split}")
        self.unload()
        self._replicas = [
            module if module.weight.device == device else copy.deepcopy(module).to(device)
            for device in devices
        ]
        self.layernorm = self._replicas[0]
        self.is_tp = True
        self.broadcast_type = broadcast_type

    def forward_tp(
        self,
        hidden_states: Hidden,
        cache: object = None,
        attn_params: object = None,
        past_len: object = None,
        intermediates: bool = False,
        loras: object = None,
        output_fp32: bool = False,
        **kwargs: object,
    ) -> Returned:
        """Normalise hidden_states on every device of the split.

        Args:
            hidden_states: one tensor, which is sent to every device, or a list of one on each.
            cache: not used, like attn_params, past_len, loras and kwargs.
            attn_params: not used.
            past_len: not used.
            intermediates: return {"hidden_states": list} instead of the list.
            loras: not used.
            output_fp32: return float32; ExLlamaV2 ignores this here.
            kwargs: not used.

        Returns:
            A list of one tensor per device, with the shapes and dtypes of forward.

        Raises:
            RuntimeError: the norm has not been split.
            TypeError: hidden_states are no tensors, or of another dtype.
            ValueError: their number, a shape or a device does not fit.

        Each device works in ExLlamaV2's stream for it, where that is loaded.
        """
        if not self.is_tp:
            raise RuntimeError(f"{self.key}: expected tp_split() before this")
        return self.forward(hidden_states, intermediates=intermediates, output_fp32=output_fp32)

    def _normalised(self, x: Hidden, output_fp32: bool, **options: Kind) -> Hidden:
        if not self.is_tp:
            return super()._normalised(x, output_fp32, **options)
        context = self._split_context()
        if isinstance(x, Tensor):
            xs = parallel.broadcast(x, context)
        else:
            xs = _checked_list(x, len(self._replicas))
        biases = [replica.bias for replica in self._replicas]
        try:
            return parallel.rms_norm_tp(
                xs,
                [replica.weight for replica in self._replicas],
                None if biases[0] is None else biases,
                self.variance_epsilon,
                context=context,
                weight_offset=self._replicas[0].weight_offset,
                clamp_inf=True,
                out_dtype=self._out_dtype(output_fp32),
            )
        except (TypeError, ValueError) as error:
            names = {"xs": "hidden_states", "x": "hidden_states", "eps": "variance_epsilon"}
            raise_renamed(error, names)

    def _split_context(self) -> parallel.TPContext:
        if self._context is None:
            devices = [replica.weight.device for replica in self._replicas]
            self._context = parallel.TPContext(devices, streams=exllamav2_streams(devices))
        return self._context


def _checked_list(hidden_states: object, count: int) -> list[Tensor]:
    if not isinstance(hidden_states, (list, tuple)):
        kind = type(hidden_states).__name__
        raise TypeError(f"hidden_states: expected a tensor or a list of tensors, got {kind}")
    if len(hidden_states) != count:
        got = len(hidden_states)
        raise ValueError(f"hidden_states: expected {count} tensors, one per device, got {got}")
    return list(hidden_states)
