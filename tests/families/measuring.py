"""The norms of a built model: under which names they are saved, and what the recogniser says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from families.building import Built
from normkit.checkpoint import _names
from normkit.checkpoint._families import Rounding, Rule, pattern_of
from normkit.recognition import Recognition, recognise

# By whether xhat is rounded before the weight, and whether the weight with its offset is.
_ROUNDINGS: dict[tuple[bool, bool], Rounding] = {
    (False, False): "once",
    (True, False): "first",
    (False, True): "weight",
}


@dataclass
class Measured:
    """What is known of the names of one or several models of a family."""

    rules: dict[str, set[Rule]] = field(default_factory=dict)  # by pattern of a norm's name
    others: set[str] = field(default_factory=set)  # patterns of what is no norm, nor named as one

    def add(self, other: Measured) -> None:
        """Take what another model of the family shows."""
        for pattern, rules in other.rules.items():
            self.rules.setdefault(pattern, set()).update(rules)
        self.others |= other.others


def measure(built: Built) -> Measured:
    """Ask the recogniser of every module of a model that may be a norm."""
    found = Measured()
    model = built.model.to(torch.bfloat16).eval()
    saved = saved_names(model)
    for path, module in model.named_modules():
        given = [name for name, p in module._parameters.items() if p is not None]
        names = [_names.split(saved(f"{path}.{name}")) for name in given]
        patterns = {pattern_of(name) for name, ending in names if ending} | {pattern_of(path)}
        if not given or module._modules:
            continue
        is_named = any(ending and _names.is_norm(name) for name, ending in names)
        rule = _rule(module, built, is_named=is_named)
        if rule is None:
            found.others |= patterns
        for pattern in patterns if rule else ():
            found.rules.setdefault(pattern, set()).add(rule)
    return found


def _rule(module: nn.Module, built: Built, *, is_named: bool) -> Rule | None:
    """What the family file says of a module; None where it is no norm and not called one."""
    result = recognise(module)
    if result.function is None:
        small = all(p is None or p.squeeze().ndim <= 2 for p in module._parameters.values())
        return Rule(none=result.reason.partition(": ")[0]) if is_named and small else None
    return rule_of(result, built.keys, built.groups)


def rule_of(result: Recognition, keys: dict[float, str], groups: dict[int, str]) -> Rule:
    """What a recognised norm computes, with the config keys that its eps and groups follow."""
    form, function = result.form, result.function
    assert function is not None
    if function.weight is None:
        return Rule(none="it has no weight")
    spec, eps = function.spec, function.spec.eps or 0.0
    own = result.specs.get(torch.bfloat16)
    rounding: Rounding = "elsewhere"
    if own is not None:
        rounding = _ROUNDINGS.get((own.round_before_weight, own.round_weight), "elsewhere")
    return Rule(
        kind=spec.kind,
        eps=keys.get(eps, eps),
        weight_offset=spec.weight_offset,
        rounding=rounding,
        has_bias=spec.has_bias,
        groups=groups.get(form.groups, form.groups) if form.groups > 1 else 1,
        gate=form.gate,
        channels_first=form.channels_first,
    )


def saved_names(model: nn.Module):
    """The name under which transformers saves a tensor, by its name in the model."""
    try:
        from transformers import conversion_mapping as mapping
        from transformers import core_model_loading as loading

        transforms = mapping.get_model_conversion_mapping(model, add_legacy=False)
    except Exception:  # a model of diffusers, which saves what it has
        return lambda name: name
    # a prefix is only added where the file that was loaded had it
    kept = [t for t in transforms if not isinstance(t, loading.PrefixChange)][::-1]
    back = []
    for transform in kept:
        with contextlib.suppress(Exception):  # one that cannot be reverted
            back.append(transform.reverse_transform())
    renamings = [t for t in back if isinstance(t, loading.WeightRenaming)]
    converters = [t for t in back if isinstance(t, loading.WeightConverter)]

    def saved(name: str) -> str:
        renamed, converted = loading.apply_converters(name, converters)
        return renamed if converted else loading.apply_renamings(renamed, renamings)

    return saved


def sections_of(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Give path, section and model_type of each part of a model with a section of the config."""
    config = getattr(model, "config", None)
    if config is None:
        return
    for path, module in model.named_modules():
        own = getattr(module, "config", None)
        if not path or own is None or own is config:
            continue
        for name, section in vars(config).items():
            if section is own and hasattr(section, "model_type"):
                yield path, name, section.model_type
