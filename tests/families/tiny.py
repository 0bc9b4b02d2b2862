"""Models of every library, tiny and with random weights, that run in a second."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from families.building import ARGUMENTS

# A model, and what it is called with.
Made = tuple[nn.Module, dict[str, Any]]

MOST_PARAMETERS = 60_000_000
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_ffn_dim"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "head_dim", "v_head_dim", "d_kv"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "bos_token_id"), 1),
    **dict.fromkeys(("n_positions", "max_position_embeddings"), 64),
    "vocab_size": 128,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "decoder_attention_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "sliding_window": 16,
    "image_size": 32,
    "patch_size": 8,
}

# Two layers by default are of one kind, and these models need both.
_BOTH = {"layer_types": ["linear_attention", "full_attention"]}
_GATED_DELTA: dict[str, Any] = {
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
}
OF_LAYERS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _BOTH,
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "granitemoehybrid": _BOTH | {"mamba_n_heads": 8, "mamba_d_head": 16},
    "kimi_linear": _BOTH,
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "qwen3_5_moe_text": _BOTH | _GATED_DELTA,
    "qwen3_5_text": _BOTH | _GATED_DELTA,
    "qwen3_next": _BOTH | _GATED_DELTA,
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 8},
}


@dataclass(frozen=True)
class Tiny:
    """A model that can be built, and what it is called with."""

    library: str
    name: str
    kind: str
    make: Callable[[], Made]

    def build(self) -> Made:
        """The model in evaluation, with weights of norms that are not all ones; its arguments."""
        torch.manual_seed(0)
        model, arguments = self.make()
        _check_size(model)
        for p in model.parameters():
            if p.dim() == 1 and p.is_floating_point():
                nn.init.normal_(p, 0.3, 0.5)
        return model.eval(), arguments


def _check_size(model: nn.Module) -> None:
    if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
        raise ValueError("not tiny")


def named(names: list[str]) -> list[Tiny]:
    """The models of these names; all for none."""
    known = [*_of_transformers(), *_of_timm(), *_of_diffusers()]
    return [tiny for tiny in known if not names or tiny.name in names]


# ------------------------------------------------------------------------------------ transformers


def _of_transformers() -> Iterator[Tiny]:
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for name, given in causal.items():
        class_name = given if isinstance(given, str) else given[0]
        yield Tiny("transformers", name, "causal", partial(_made_by_transformers, name, class_name))
    for name, given in modeling_auto.MODEL_MAPPING_NAMES.items():
        class_name = given if isinstance(given, str) else given[0]
        if name not in causal:
            yield Tiny(
                "transformers", name, "other", partial(_made_by_transformers, name, class_name)
            )


def _made_by_transformers(name: str, class_name: str) -> Made:
    import transformers

    model_class = getattr(transformers, class_name)
    with torch.device("meta"):
        _check_size(model_class(_tiny_config(name)))
    model = model_class(_tiny_config(name))
    return model, _inputs(model)


def _tiny_config(name: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[name]
    standard = ARGUMENTS.get(name, {})
    given: dict[str, Any] = _sizes_of(config_class(**standard)) | OF_LAYERS.get(name, {})
    error: Exception | None = None
    for left_out in ((), ("head_dim",), ("num_hidden_layers",)):
        kept = {name: size for name, size in given.items() if name not in left_out}
        for more in ({}, {"layer_types": None}):
            try:
                return config_class(**kept, **more)
            except Exception as why:  # a size that does not fit the others
                error = error or why
    assert error is not None
    raise error


def _sizes_of(config: Any) -> dict[str, Any]:
    """Those of SIZES that a config has, and of its sections."""
    found = {name: size for name, size in SIZES.items() if _has_number(config, name)}
    found["pad_token_id"] = SIZES["pad_token_id"]
    for name in ("text_config", "vision_config", "audio_config"):
        section = getattr(config, name, None)
        if hasattr(section, "to_dict"):
            found[name] = section.to_dict() | _sizes_of(section)
    return found


def _has_number(config: Any, name: str) -> bool:
    try:
        return isinstance(getattr(config, name, None), (int, float))
    except Exception:  # one that differs from layer to layer
        return False


def _inputs(model: Any) -> dict[str, Any]:
    config, name = model.config, model.main_input_name
    parameters = inspect.signature(model.forward).parameters
    text = torch.randint(3, 100, (2, 12))
    if name in ("pixel_values", "input_values", "input_features"):
        given = {name: _signal(config, name)}
        if "input_ids" in parameters:
            given["input_ids"] = text
    else:
        given = {"input_ids": text}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        given["decoder_input_ids"] = text[:, :6]
    return given


def _signal(config: Any, name: str) -> Tensor:
    if name == "input_values":
        return torch.randn(1, 4000)
    if name == "input_features":
        return torch.randn(1, getattr(config, "num_mel_bins", 80), 3000)
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 32)
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    return torch.randn(1, getattr(vision, "num_channels", 3), height, width)


# ------------------------------------------------------------------------------- timm and diffusers

TIMM = (
    "vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224",
    "convnext_atto", "mixer_s32_224", "xcit_nano_12_p16_224", "cait_xxs24_224",
    "poolformer_s12", "pvt_v2_b0", "pit_ti_224", "crossvit_tiny_240", "coat_tiny",
    "mobilevit_xxs", "gmlp_ti16_224", "resmlp_12_224", "eva02_tiny_patch14_224",
    "vit_relpos_small_patch16_224", "maxvit_rmlp_pico_rw_256", "hiera_tiny_224",
    "levit_128s", "volo_d1_224", "beit_base_patch16_224", "davit_tiny", "edgenext_xx_small",
    "efficientformerv2_s0", "fastvit_t8", "focalnet_tiny_srf", "twins_svt_small",
    "vit_tiny_r_s16_p8_224", "sequencer2d_s",
)  # fmt: skip


def _of_timm() -> Iterator[Tiny]:
    for name in TIMM:
        yield Tiny("timm", name, "vision", partial(_made_by_timm, name))


def _made_by_timm(name: str) -> Made:
    import timm

    model = timm.create_model(name)
    return model, {"x": torch.randn(1, *model.default_cfg["input_size"])}


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
_LATENT, _TIME = torch.randn(1, 4, 8, 8), torch.tensor([1])
DIFFUSERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DiTTransformer2DModel": (
        {**_HEADS, "sample_size": 8, "num_embeds_ada_norm": 10},
        {"hidden_states": _LATENT, "timestep": _TIME, "class_labels": _TIME},
    ),
    "PixArtTransformer2DModel": (
        {**_HEADS, "sample_size": 8, "caption_channels": 32, "cross_attention_dim": 32},
        {
            "hidden_states": _LATENT,
            "timestep": _TIME,
            "encoder_hidden_states": torch.randn(1, 5, 32),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "SD3Transformer2DModel": (
        {
            **_HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 24,
            "qk_norm": "rms_norm",
        },
        {
            "hidden_states": _LATENT,
            "timestep": _TIME,
            "encoder_hidden_states": torch.randn(1, 5, 32),
            "pooled_projections": torch.randn(1, 24),
        },
    ),
    "FluxTransformer2DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "in_channels": 4,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 24,
            "axes_dims_rope": (4, 4, 8),
        },
        {
            "hidden_states": torch.randn(1, 16, 4),
            "encoder_hidden_states": torch.randn(1, 5, 32),
            "pooled_projections": torch.randn(1, 24),
            "timestep": _TIME,
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(5, 3),
        },
    ),
    "WanTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 32,
            "ffn_dim": 48,
        },
        {
            "hidden_states": torch.randn(1, 4, 2, 8, 8),
            "timestep": _TIME,
            "encoder_hidden_states": torch.randn(1, 5, 32),
        },
    ),
    "AuraFlowTransformer2DModel": (
        {
            "sample_size": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
        },
        {
            "hidden_states": _LATENT,
            "timestep": _TIME,
            "encoder_hidden_states": torch.randn(1, 5, 32),
        },
    ),
    "UNet2DConditionModel": (
        {"block_out_channels": (32, 64), "cross_attention_dim": 32, "sample_size": 8,
         "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 8},
        {"sample": _LATENT, "timestep": 1, "encoder_hidden_states": torch.randn(1, 5, 32)},
    ),
    "AutoencoderKL": ({"block_out_channels": (32,)}, {"sample": torch.randn(1, 3, 16, 16)}),
}  # fmt: skip


def _of_diffusers() -> Iterator[Tiny]:
    for name in DIFFUSERS:
        yield Tiny("diffusers", name, "diffusion", partial(_made_by_diffusers, name))


def _made_by_diffusers(name: str) -> Made:
    import diffusers

    options, arguments = DIFFUSERS[name]
    return getattr(diffusers, name)(**options), arguments
