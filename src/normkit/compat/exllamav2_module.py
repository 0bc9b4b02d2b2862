"""What ExLlamaV2's norm modules have in common: how they are loaded, and what they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Generic, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import Parameter

from normkit import modules
from normkit._serving.backends import use_backend
from normkit._spec import FLOATS, FLOATS_TEXT, Kind
from normkit.checkpoint import StoredNorm, read_norm
from normkit.compat._errors import raise_renamed

Exposed = Parameter | None | list[Parameter | None]
# A tensor, or one for each device after tp_split; and what forward returns.
Hidden = Tensor | Sequence[Tensor]
Returned = Hidden | dict[str, Hidden]

Norm = TypeVar("Norm", modules.RMSNorm, modules.LayerNorm, modules.HeadNorm)


class Arch(Protocol):
    """Of `config.arch`; it may have a keymap, too."""

    lm: object


class Config(Protocol):
    """What is read of `model.config`."""

    norm_eps: float
    hidden_size: int
    tensor_file_map: Mapping[str, str]
    arch: Arch


class Splits(Protocol):
    """What is read of `model.tp_context`."""

    num_devices: int

    def get_split(self, broadcast_type: int, /) -> Sequence[tuple[int, int, int]]:
        """(device index, begin, end) of each part."""


class Model(Protocol):
    """What is read of a model."""

    config: Config
    tp_context: Splits


class TensorFiles:
    """The tensors of `config.tensor_file_map`, by the names that they have there."""

    def __init__(self, config: Config) -> None:
        self._files = config.tensor_file_map
        self._keymap = getattr(getattr(config, "arch", None), "keymap", None) or ()

    def get_tensor(self, name: str) -> Tensor:
        """Read one tensor; KeyError where the map does not have it."""
        path = self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                stored = [k for k in file.keys() if self._renamed(k) == name]  # noqa: SIM118
                if stored:
                    tensor: Tensor = file.get_tensor(stored[0])
                    return tensor
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot read {name}: {error}") from error
        raise ValueError(f"{path}: expected a tensor {name}, as in tensor_file_map")

    def _renamed(self, name: str) -> str:
        for before, after in self._keymap:
            anchored = before.startswith("$") and name.startswith(before[1:])
            name = ("$" + name if anchored else name).replace(before, after)
        return name


class NormModule(Generic[Norm]):
    """A norm of ExLlamaV2; `normkit.compat.exllamav2` says what it is and has them all."""

    name: str = "LayerNorm"

    layernorm: Norm | None
    """The module of normkit that holds what is stored; None before load()."""
    variance_epsilon: float
    """Added to the statistic, on every path: 1e-6, and from load() on `model.config.norm_eps`."""

    _function: ClassVar[Callable[..., Tensor]]
    _module: type[Norm]
    _adds_constant = True

    def __init__(self, model: Model, key: str, archparams: object = None) -> None:
        self.archparams = model.config.arch.lm if archparams is None else archparams
        self.model = model
        self.key = key
        self.alt_key: str | None = None
        self.device_idx: int | None = None
        self.footprint = -1
        self.submodules: list[object] = []
        self.variance_epsilon = 1e-6
        self.unload()

    # ------------------------------------------------------------------------------------ loading

    def load(self, device_context: bool = True) -> None:
        """Read the weight, and the bias if there is one, from the files of the model.

        Args:
            device_context: not used; ExLlamaV2's loader passes it.

        Raises:
            KeyError: tensor_file_map has no such weight.
            TypeError: norm_eps is no number, or what is stored is of another dtype than float32,
                float16 and bfloat16.
            ValueError: a file lacks what the map says, or a shape is not that of such a norm.
            OSError: a file is missing or cannot be read.
        """
        config = self.model.config
        eps = config.norm_eps
        if isinstance(eps, bool) or not isinstance(eps, (int, float)):
            raise TypeError(f"model.config.norm_eps: expected a number, got {eps!r}")
        constant = getattr(self.archparams, "norm_constant_bias", 0) if self._adds_constant else 0
        stored = read_norm(
            TensorFiles(config),
            self._stored_key(),
            kind=self._kind(),
            eps=float(eps),
            weight_offset=float(constant),
            round_before_weight=False,
            device=torch_device(self.device_idx),
        )
        self._check_shape(stored)
        for name, t in (("weight", stored.weight), ("bias", stored.bias)):
            if t is not None and t.dtype not in FLOATS:
                raise TypeError(f"{stored.key}.{name}: expected {FLOATS_TEXT}, got {t.dtype}")
        self.unload()
        self.layernorm = self._module.from_stored(stored).requires_grad_(False)
        self.variance_epsilon = float(eps)

    def unload(self) -> None:
        """Let go of the tensors."""
        self.layernorm = None
        self._exposed: dict[str, Exposed] = {}

    def reload(self) -> None:
        """Read the tensors again, to the device that is set now."""
        self.unload()
        self.load()

    def _stored_key(self) -> str:
        keys = [key for key in (self.key, self.alt_key) if key is not None]
        for key in keys:
            if f"{key}.weight" in self.model.config.tensor_file_map:
                return key
        wanted = " or ".join(f"{key}.weight" for key in keys)
        raise KeyError(f"model.config.tensor_file_map: expected {wanted}, which is not there")

    def _kind(self) -> Kind:
        return "layer"

    def _check_shape(self, stored: StoredNorm) -> None:
        expected, shape = (self.model.config.hidden_size,), tuple(stored.weight.shape)
        if shape != expected:
            raise ValueError(
                f"{stored.key}.weight: expected shape {expected}, by hidden_size, got {shape}"
            )

    # ------------------------------------------------------------------------------------ weights

    @property
    def weight(self) -> Exposed:
        """The weight as ExLlamaV2's kernels read it; a list of one per device after tp_split.

        Read only: unless float16 is stored and no constant is added, this is a copy.  What forward
        uses is `layernorm.weight`.
        """
        return self._expose("weight")

    @property
    def bias(self) -> Exposed:
        """The bias in float16, or None; a list of one per device after tp_split."""
        return self._expose("bias")

    def _expose(self, name: str) -> Exposed:
        if name not in self._exposed:
            self._exposed[name] = self._made_for_kernels(name)
        return self._exposed[name]

    def _made_for_kernels(self, name: str) -> Exposed:
        return None if self.layernorm is None else self._in_float16(self.layernorm, name)

    def _in_float16(self, module: Norm, name: str) -> Parameter | None:
        stored: Parameter | None = getattr(module, name)
        constant = module.weight_offset if name == "weight" else 0.0
        if stored is None or (stored.dtype == torch.float16 and not constant):
            return stored
        return Parameter((stored.float() + constant).half(), requires_grad=False)

    def get_weight(self) -> Tensor | tuple[Tensor, Tensor]:
        """Return what was stored, bit for bit: the weight, or (weight, bias).

        Raises:
            RuntimeError: nothing is loaded.
        """
        module = self._loaded()
        if module.bias is None:
            return module.weight.data
        return module.weight.data, module.bias.data

    def _loaded(self) -> Norm:
        if self.layernorm is None:
            raise RuntimeError(f"{self.key}: expected load() before this, nothing is loaded")
        return self.layernorm

    # -------------------------------------------------------------------------------------- sizes

    def weight_footprint(self) -> int:
        """Return the bytes of a float16 weight, which is what ExLlamaV2 counts with."""
        return self.model.config.hidden_size * 2

    def numel(self) -> int:
        """Return 0: norms are not counted among the weights that are quantised."""
        return 0

    def scratch_space_fixed(self) -> int:
        """Return 0: no scratch memory is needed."""
        return 0

    def scratch_space(self) -> int:
        """Return 0: no scratch memory is needed."""
        return 0

    def is_quant(self) -> bool:
        """Return False: norms are never quantised."""
        return False

    # ------------------------------------------------------------------------------------- device

    def set_device_idx(self, idx: int | None) -> None:
        """Say where load() puts the tensors: a CUDA device, -1 for the CPU, None: torch's default.

        Example:
            >>> from types import SimpleNamespace
            >>> from normkit.compat.exllamav2 import ExLlamaV2RMSNorm
            >>> arch = SimpleNamespace(lm=SimpleNamespace())
            >>> norm = ExLlamaV2RMSNorm(SimpleNamespace(config=SimpleNamespace(arch=arch)), "norm")
            >>> norm.set_device_idx(-1)
            >>> norm.device()
            'cpu'
        """
        self.device_idx = idx

    def device(self) -> str:
        """Return the name of the device of set_device_idx."""
        return str(torch_device(self.device_idx))

    # ------------------------------------------------------------------------------------ forward

    def forward(
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
        """Normalise hidden_states, which are left as they are.

        Args:
            hidden_states: (batch, seq_len, hidden_size) or any other (..., hidden_size); for head
                norms (..., num_heads, head_dim) or (..., num_heads * head_dim).  float32, float16
                or bfloat16, any outer strides.
            cache: not used, like attn_params, past_len, loras and kwargs.
            attn_params: not used.
            past_len: not used.
            intermediates: return {"hidden_states": y} instead of y.
            loras: not used.
            output_fp32: return float32.
            kwargs: not used.

        Returns:
            y, of hidden_states' shape: in float32 with output_fp32; else in hidden_states' dtype,
            but for `ExLlamaV2RMSNorm`, which then returns float16 whatever it is given, and after
            tp_split a list, as forward_tp does.

        Raises:
            RuntimeError: nothing is loaded.
            TypeError: hidden_states is no tensor, or of a dtype that no norm takes.
            ValueError: a shape or a device does not fit.

        y is rounded once, when it is stored; infinities in float16 count as +-65504.
        """
        return self._result(self._normalised(hidden_states, output_fp32), intermediates)

    def forward_torch(
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
        """Do what forward does in plain torch: the same eps, roundings, dtypes and errors."""
        with use_backend("reference"):
            return self.forward(hidden_states, intermediates=intermediates, output_fp32=output_fp32)

    def _normalised(self, x: Hidden, output_fp32: bool, **options: Kind) -> Hidden:
        module = self._loaded()
        stored = module._parameters  # module.weight takes ten times as long
        try:
            return self._function(
                x,
                stored["weight"],
                stored["bias"],
                self.variance_epsilon,
                weight_offset=module.weight_offset,
                clamp_inf=True,
                out_dtype=self._out_dtype(output_fp32),
                **options,
            )
        except (TypeError, ValueError) as error:
            raise_renamed(error, {"x": "hidden_states", "eps": "variance_epsilon"})

    def _out_dtype(self, output_fp32: bool) -> torch.dtype | None:
        return torch.float32 if output_fp32 else None

    def _result(self, y: Hidden, intermediates: bool) -> Returned:
        return {"hidden_states": y} if intermediates else y


def torch_device(idx: int | None) -> torch.device:
    """Return the device that an index of ExLlamaV2 means: -1 is the CPU, None torch's default."""
    if idx is None:
        return torch.get_default_device()
    return torch.device("cpu" if idx == -1 else f"cuda:{idx}")
