"""What a config.json says of the norms of its model.

The families are named by model_type and listed as Hugging Face transformers 5.23 computes them.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from normkit._serving.checks import check_number
from normkit._spec import DEFAULT_EPS, Kind


def _set(names: str) -> frozenset[str]:
    return frozenset(names.split())


_RMS_EPS = ("rms_norm_eps", "rms_norm_epsilon")
_ANY_EPS = ("norm_eps", "norm_epsilon")
_LAYER_EPS = ("layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "layernorm_eps")
_EPS: dict[Kind, tuple[str, ...]] = {
    "rms": _RMS_EPS + _ANY_EPS + _LAYER_EPS,
    "layer": _LAYER_EPS + _ANY_EPS,
}

_LAYER_WITHOUT_BIAS = _set("dbrx modernbert modernbert-decoder moonshine")
_RMS_WITH_LAYER_EPS = _set(
    """chatglm falcon_mamba longt5 mamba mamba2 mt5 nemotron_h pix2struct pop2piano qwen
    switch_transformers t5 udop umt5"""
)
_ADDS_ONE: dict[Kind, frozenset[str]] = {
    "rms": _set(
        """gemma gemma2 gemma3 gemma3_text qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text
        qwen3_next recurrent_gemma t5gemma t5gemma2 vaultgemma"""
    ),
    "layer": _set("nemotron"),
}
# The gated norm of Qwen3-Next is unlike the others of its model: a plain weight, rounded before.
_PLAIN_AMONG_OFFSET = "linear_attn.norm"
_ROUNDS_FIRST = _set(
    """apertus arcee aria_text bamba deepseek_v2 deepseek_v3 ernie4_5 ernie4_5_moe exaone4
    falcon_h1 falcon_mamba glm glm4 glm4_moe granite granitemoe granitemoehybrid hunyuan_v1_dense
    hunyuan_v1_moe jamba lfm2 lfm2_moe llama mamba mamba2 minimax minimax_m2 ministral ministral3
    mistral mistral3 mixtral mllama_text_model olmoe phi3 pixtral qwen2 qwen2_5_vl qwen2_5_vl_text
    qwen2_5_vl_vision qwen2_moe qwen2_vl qwen2_vl_text qwen3 qwen3_moe qwen3_vl qwen3_vl_text
    qwen3_vl_moe qwen3_vl_moe_text seed_oss smollm3 zamba zamba2"""
)

_TOWER = re.compile(r"vision|visual|audio")
_TEXT = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True)
class Config:
    """The part of a config.json that speaks of one norm."""

    origin: str
    prefix: str
    values: Mapping[str, Any]

    @property
    def family(self) -> str:
        """The model_type; "None" where there is none."""
        return str(self.values.get("model_type"))

    def kind(self, has_bias: bool) -> Kind:
        """The kind of the norm, by the rule in the documentation of `load_norm`."""
        if has_bias:
            return "layer"
        if "rms" in self.prefix.rpartition(".")[2].lower():
            return "rms"
        if self.family in _LAYER_WITHOUT_BIAS:
            return "layer"
        if self.family in _RMS_WITH_LAYER_EPS or self._first(_RMS_EPS):
            return "rms"
        return "layer" if self._first(_LAYER_EPS) else "rms"

    def eps(self, kind: Kind) -> float:
        """The eps of that kind of norm, or the default of its class."""
        name = self._first(_EPS[kind])
        if name is None:
            return DEFAULT_EPS[kind]
        try:
            return check_number(name, self.values[name], least=0)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.origin}: {error}") from error

    def weight_offset(self, kind: Kind) -> float:
        """What the family adds to the stored weight."""
        return 1.0 if self.family in _ADDS_ONE[kind] and not self._is_plain() else 0.0

    def round_before_weight(self, kind: Kind) -> bool:
        """Whether the family rounds the normalised value before the weight multiplies it."""
        if self.family in _ADDS_ONE["rms"]:
            return self._is_plain()
        return kind == "rms" and self.family in _ROUNDS_FIRST

    def _is_plain(self) -> bool:
        return self.prefix.endswith(_PLAIN_AMONG_OFFSET)

    def _first(self, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if self.values.get(name) is not None), None)


def config_of(prefix: str, config: dict[str, Any], origin: str) -> Config:
    """The part of a config.json for the norm of that name.

    Models with several towers have a config for each.  In a tower's, nothing of the language
    model holds; in that of the language model, what it leaves out is said outside it.
    """
    tower = _TOWER.search(prefix.lower())
    if tower:
        name = "audio_config" if tower[0] == "audio" else "vision_config"
        if isinstance(config.get(name), dict):
            return Config(origin, prefix, config[name])
    sections = (config.get(name) for name in _TEXT)
    text = next((part for part in sections if isinstance(part, dict)), {})
    return Config(origin, prefix, ChainMap(text, config))
