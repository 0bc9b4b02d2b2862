"""What load_norm makes of a model's saved names and config, against the model's own modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from families.building import Built, Family, build, sections
from families.measuring import saved_names
from normkit.checkpoint import _names
from normkit.checkpoint._families import pattern_of
from normkit.checkpoint._meaning import is_known, meaning
from normkit.recognition import Recognition, recognise

OPTIONS = ("kind", "eps", "weight_offset", "round_before_weight")


@dataclass
class Comparison:
    """How many norms there are, and of how many load_norm says something else."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def count(self, what: str, example: str) -> None:
        """Count one, and keep the first few."""
        self.counts[what] += 1
        kept = self.examples.setdefault(what, [])
        if len(kept) < 40:
            kept.append(example)


def full_config(family: Family, built: Built) -> Mapping[str, Any]:
    """The config.json of a model as it is saved."""
    if family.config_class is None:
        return {"_class_name": family.name} | {path: value for value, path in built.keys.items()}
    saved: Mapping[str, Any] = built.model.config.to_dict()
    return saved


def sparse_config(family: Family) -> dict[str, Any]:
    """A config.json that names the families and nothing else."""
    if family.config_class is None:
        return {"_class_name": family.name}
    return _sparse(family.config())


def _sparse(config: Any) -> dict[str, Any]:
    inner = {name: _sparse(section) for name, section in sections(config)}
    return {"model_type": config.model_type, **inner}


def compare(family: Family, result: Comparison) -> None:
    """Compare every model of a family, with values of its own for each eps and with defaults."""
    for model_class in family.model_classes():
        for mode in ("own eps", "sparse"):
            try:
                built = build(family, model_class, own_eps=mode == "own eps")
            except Exception:  # counted by `make families`
                continue
            config = sparse_config(family) if mode == "sparse" else full_config(family, built)
            _compare(f"{family.name}, {mode}", built.model, config, result)


def _compare(where: str, model: nn.Module, config: Mapping[str, Any], result: Comparison) -> None:
    model = model.to(torch.bfloat16).eval()
    saved = saved_names(model)
    modules = {path: m for path, m in model.named_modules() if not m._modules and m._parameters}
    names = {
        saved(f"{path}.{name}"): (path, name)
        for path, module in modules.items()
        for name, p in module._parameters.items()
        if p is not None
    }
    for name, (path, parameter) in names.items():
        module = modules[path]
        own = recognise(module)
        prefix, ending = _names.split(name)
        listed = bool(ending) and _names.is_norm_weight(
            name, names, lambda m: is_known(pattern_of(m), config)
        )
        listed = listed and _has_shape(prefix, module._parameters[parameter])
        is_row = own.function is not None and own.form.groups == 1
        if is_row and own.function.weight == parameter:
            result.counts["norms"] += 1
            if listed:
                _compare_options(where, name, own, names, config, result)
            else:
                result.count("missed", f"{where}: {name}")
        elif listed:
            result.count("false", f"{where}: {name}: {own.reason or own.form}")


def _has_shape(prefix: str, parameter: torch.Tensor) -> bool:
    return _names.norm_shape(prefix, tuple(parameter.shape)) is not None


def _compare_options(
    where: str,
    name: str,
    own: Recognition,
    names: Mapping[str, object],
    config: Mapping[str, Any],
    result: Comparison,
) -> None:
    has_bias = any(bias in names for bias in _names.biases_of(name))
    meant = meaning(_names.split(name)[0], config, where, has_bias=has_bias)
    measured = own.specs.get(torch.bfloat16)
    if measured is not None and measured.round_rstd:
        result.count("rstd is rounded, which load_norm does not know", f"{where}: {name}")
    for option in OPTIONS:
        if option == "round_before_weight" and measured is None:
            continue
        truth = getattr(measured or own.function.spec, option)
        if getattr(meant.spec, option) != truth:
            assumed = meant.origins[option].source == "assumed"
            said = f"{where}: {name}: {getattr(meant.spec, option)} for {truth}"
            result.count(f"{option} {'assumed otherwise' if assumed else 'wrong'}", said)
