"""The architectures, their configs with a value of its own for every eps, and their models."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")


# What the default config lacks for a model to be built; nothing here is about norms.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 24},
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model"}},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": {"head_dim": 128},
    "informer": {"prediction_length": 24},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"] * 16},
    "ministral": {"head_dim": 128},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "nemotron": {"num_key_value_heads": 48},
}


@dataclass(frozen=True)
class Family:
    """A model_type of transformers, or a class of diffusers, and the classes of its models."""

    library: str
    name: str
    class_names: tuple[str, ...]

    @property
    def config_class(self) -> type | None:
        """The class of its configs; None where the arguments of the model are its config."""
        if self.library == "diffusers":
            return None
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        return CONFIG_MAPPING[self.name]

    def config(self, **arguments: Any) -> Any:
        """A config of the family with these arguments, and else its defaults."""
        assert self.config_class is not None
        return self.config_class(**ARGUMENTS.get(self.name, {}) | arguments)

    def model_classes(self) -> Iterator[type]:
        """Import them, one by one; a class that needs a missing library is left out."""
        library = importlib.import_module(self.library)
        for name in self.class_names:
            with contextlib.suppress(Exception):
                yield getattr(library, name)


@dataclass
class Built:
    """A model on the meta device, and the config keys that its eps and groups follow, by value."""

    model: nn.Module
    keys: dict[float, str]
    groups: dict[int, str] = field(default_factory=dict)


def quiet() -> None:
    """Keep the libraries from talking of configs that nobody meant to use."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


# ------------------------------------------------------------------------------------ transformers


def transformers_families() -> list[Family]:
    """Every model_type that an auto class builds, with all classes that auto classes name."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    names: dict[str, dict[str, None]] = {}
    for mapping, classes in vars(modeling_auto).items():
        if mapping.startswith("MODEL") and mapping.endswith("NAMES"):
            for model_type, given in classes.items():
                listed = [given] if isinstance(given, str) else given
                names.setdefault(model_type, {}).update(dict.fromkeys(listed))
    return [
        Family("transformers", model_type, tuple(names[model_type]))
        for model_type in sorted(CONFIG_MAPPING_NAMES)
        if model_type in names
    ]


def diffusers_families() -> list[Family]:
    """The transformers, UNets and autoencoders of diffusers."""
    import diffusers
    from diffusers.models import autoencoders, controlnets, transformers, unets

    found = {
        name
        for package in (autoencoders, transformers, unets, controlnets)
        for name, value in vars(package).items()
        if isinstance(value, type) and issubclass(value, diffusers.ModelMixin)
    }
    return [Family("diffusers", name, (name,)) for name in sorted(found & set(dir(diffusers)))]


# ----------------------------------------------------------------------------------------- configs


def is_eps(name: str, value: object) -> bool:
    """Whether a config's entry is the eps of a norm."""
    number = isinstance(value, float) and 0 < value < 1e-2
    return number and ("eps" in name.lower() or "variance" in name.lower())


def sections(config: Any) -> Iterator[tuple[str, Any]]:
    """The configs within a config, by name."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield name, value


def eps_of(config: Any, path: str = "") -> dict[str, float]:
    """Every eps of a config and of its sections, by path."""
    found = {path + k: v for k, v in vars(config).items() if is_eps(k, v)}
    for name, section in sections(config):
        found |= eps_of(section, f"{path}{name}.")
    return found


def set_at(config: Any, path: str, value: object) -> None:
    """Set an entry of a config, or of a section of it."""
    *outer, name = path.split(".")
    for section in outer:
        config = getattr(config, section)
    setattr(config, name, value)


def at(config: Any, path: str) -> object:
    """An entry of a config, or of a section of it; None where there is none."""
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


def unlike_any_default(index: int) -> float:
    """A value for an eps that no code writes, and that is another for every index."""
    return float(f"{3.37e-6 * 1.11**index:.4g}")


def with_own_eps(config: Any) -> dict[float, str]:
    """Give each eps of a config a value of its own; which key it is, by value."""
    keys = {}
    for index, path in enumerate(sorted(eps_of(config))):
        value = unlike_any_default(index)
        set_at(config, path, value)
        if at(config, path) == value:
            keys[value] = path
    return keys


def aliases(family: Family, path: str) -> list[str]:
    """The other entries of config.json that set the same eps: older names, and a flat config."""
    config_class = family.config_class
    assert config_class is not None
    key = path.rpartition(".")[2]
    names = {key} if "." in path else set()
    mapped = getattr(config_class, "attribute_map", {})
    names |= {old for old, new in mapped.items() if new == path}
    value: float = 16 if "groups" in key else unlike_any_default(99)
    found = []
    for name in sorted(names - {path}):
        with contextlib.suppress(Exception):  # a config that refuses the key
            if at(family.config(**{name: value}), path) == value:
                found.append(name)
    return found


def switches(config: Any) -> Iterator[tuple[str, object]]:
    """Entries that may change which norms there are, with the other value to try."""
    for name, value in list(vars(config).items()):
        if "norm" not in name.lower() or name.startswith("_"):
            continue
        if isinstance(value, bool):
            yield name, not value
        elif isinstance(value, str):
            words = ("layer_norm", "layernorm", "rms_norm", "rmsnorm", "no_norm", "rms", "layer")
            yield from ((name, word) for word in words if word != value)


# ------------------------------------------------------------------------------------------ models


def build(
    family: Family,
    model_class: type,
    switch: tuple[str, object] | None = None,
    *,
    own_eps: bool = True,
) -> Built:
    """Build a model on the meta device from its default config.

    Args:
        family: that of the model.
        model_class: one of the family's.
        switch: an entry of the config to set, and its value.
        own_eps: give each eps a value of its own, and each number of groups another than 1.
    """
    if family.config_class is None:
        return _build_from_arguments(model_class, own_eps=own_eps)
    if own_eps:
        with contextlib.suppress(Exception):  # other groups than one may not fit the other sizes
            return _build(family, model_class, switch, own_eps=True, in_groups=True)
    return _build(family, model_class, switch, own_eps=own_eps, in_groups=False)


def _build(
    family: Family,
    model_class: type,
    switch: tuple[str, object] | None,
    *,
    own_eps: bool,
    in_groups: bool,
) -> Built:
    config = family.config()
    if switch is not None:
        setattr(config, *switch)
    keys = with_own_eps(config) if own_eps else {}
    groups = groups_of(config)
    for path, count in groups.items():
        if in_groups and count == 1:
            set_at(config, path, 2)
            groups[path] = 2
    with torch.device("meta"):
        model = model_class(config)
    return Built(model, keys, {count: path for path, count in groups.items()})


def groups_of(config: Any, path: str = "") -> dict[str, int]:
    """Every number of groups of a config and of its sections, by path."""
    found = {
        path + name: value
        for name, value in vars(config).items()
        if type(value) is int and value > 0 and "groups" in name.lower()
    }
    for name, section in sections(config):
        found |= groups_of(section, f"{path}{name}.")
    return found


def defaults(family: Family) -> Mapping[str, float]:
    """What each eps and each number of groups is where config.json is silent."""
    if family.config_class is not None:
        config = family.config()
        return eps_of(config) | groups_of(config)
    parameters = inspect.signature(next(family.model_classes()).__init__).parameters
    return {k: p.default for k, p in parameters.items() if is_eps(k, p.default)}


def _build_from_arguments(model_class: type, *, own_eps: bool) -> Built:
    parameters = inspect.signature(model_class.__init__).parameters
    names = sorted(k for k, p in parameters.items() if is_eps(k, p.default))
    keys = {unlike_any_default(index): name for index, name in enumerate(names) if own_eps}
    with torch.device("meta"):
        model = model_class(**{name: value for value, name in keys.items()})
    return Built(model, keys)
